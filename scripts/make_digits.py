"""Make pyconv/network3/digits.npz, the handwritten digits that pyconv carries with it.

Source: ``sklearn.datasets.load_digits()``, 1,797 real digits of 8x8 pixels with values 0..16 (the test part
of the UCI data set "Optical Recognition of Handwritten Digits"). Each digit is

1. enlarged three times, to 24x24, by bilinear interpolation between pixel centres (the border repeats outside
   the outermost centres, as ``torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False)``
   does);
2. centred in 28x28 zeros;
3. stored as the byte ``floor(v * 255 / 16)`` of its interpolated value v.

With a factor of three every interpolation weight is a whole number of thirds, so all of it is done in
integers, and the bytes do not depend on the machine.

The source is grouped by writer, so a fixed permutation splits it: 1,197 training, 300 validation and 300 test
digits, each with every class in proportion.

Arrays of the file, in the order training, validation, test:
    images        uint8  (1797, 784)  row-major 28x28; the value of a pixel is byte / 256
    labels        uint8  (1797,)      0..9
    source_index  uint16 (1797,)      position in scikit-learn's order

Run ``python scripts/make_digits.py`` (needs scikit-learn) to write the file, ``--check`` to compare it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).resolve().parent.parent / "pyconv" / "network3" / "digits.npz"
SOURCE_SIZE, FACTOR, IMAGE_SIZE = 8, 3, 28
NUM_VALIDATION, NUM_TEST = 300, 300
SPLIT_SEED = 1797


def interpolation_matrix() -> np.ndarray:
    """The bilinear weights (24, 8) of one axis, in thirds; each row sums to 3."""
    weights = np.zeros((FACTOR * SOURCE_SIZE, SOURCE_SIZE), dtype=np.int64)
    for row in range(FACTOR * SOURCE_SIZE):
        # The centre of the enlarged pixel, (row + 0.5) / 3 - 0.5 source pixels, is (row - 1) thirds.
        thirds = min(max(row - 1, 0), (SOURCE_SIZE - 1) * FACTOR)
        left, fraction = divmod(thirds, FACTOR)
        weights[row, left] += FACTOR - fraction
        if fraction:
            weights[row, left + 1] += fraction
    return weights


def enlarge(images: np.ndarray) -> np.ndarray:
    """Integer images (n, 8, 8) with values 0..16 -> bytes (n, 784)."""
    weights = interpolation_matrix()
    scaled = weights @ images.astype(np.int64) @ weights.T  # v * FACTOR**2, exact
    enlarged = scaled * 255 // (16 * FACTOR**2)
    margin = (IMAGE_SIZE - FACTOR * SOURCE_SIZE) // 2
    centred = np.pad(enlarged, ((0, 0), (margin, margin), (margin, margin)))
    return centred.reshape(len(images), IMAGE_SIZE**2).astype(np.uint8)


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """A fixed permutation: training, validation, test digits, each with all classes in proportion."""
    random = np.random.RandomState(SPLIT_SEED)  # its stream is frozen, unlike default_rng's
    shuffled = random.permutation(len(labels))
    # Where a digit stands in its class, as a fraction: any stretch of the digits sorted by it is stratified.
    fraction = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        fraction[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(fraction[shuffled], kind="stable")]
    test, validation, training = np.split(order, [NUM_TEST, NUM_TEST + NUM_VALIDATION])
    return np.concatenate([random.permutation(part) for part in (training, validation, test)])


def make() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = source.images.astype(np.int64)
    if not (images == source.images).all() or images.min() < 0 or images.max() > 16:
        raise ValueError("expected scikit-learn's digits to be whole numbers from 0 to 16")
    order = stratified_order(source.target)
    return {
        "images": enlarge(images)[order],
        "labels": source.target[order].astype(np.uint8),
        "source_index": order.astype(np.uint16),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the digits embedded in pyconv.network3.")
    parser.add_argument(
        "--check", action="store_true", help=f"compare with {OUTPUT.name} instead of writing it"
    )
    arguments = parser.parse_args()
    arrays = make()
    if not arguments.check:
        np.savez_compressed(OUTPUT, **arrays)
        print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")
        return 0
    with np.load(OUTPUT, allow_pickle=False) as stored:
        different = [name for name, array in arrays.items() if not np.array_equal(stored[name], array)]
    if different:
        print(f"{OUTPUT} differs in {', '.join(different)}", file=sys.stderr)
        return 1
    print(f"{OUTPUT} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
