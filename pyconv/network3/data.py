"""The data of the experiments: MNIST from IDX files or the book's pickles, and the embedded digits.

Data are pairs (x, y): x (n, 784) float32, row-major images of 28x28 pixels with the values byte / 256; y (n,)
int64, the digits 0..9.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from pyconv.errors import DataError
from pyconv.network3 import _unpickle
from pyconv.network3.network import Data, size

_SIDE = 28
_PIXELS = _SIDE * _SIDE
_CLASSES = 10

_MAX_IDX_BYTES = 2**31  # five times the largest set in MNIST's format (EMNIST's 814,255 images)
_MAX_PICKLE_BYTES = 2**32  # mnist_expanded.pkl.gz, written as text, has about 3.3e9 bytes
_MAX_DEFLATE_RATIO = 1032  # no deflate stream decompresses to more per byte
_READ_CHUNK = 1 << 20

_IDX_MAGIC = b"\x00\x00\x08"  # of bytes; the number of dimensions follows
_GZIP_MAGIC = b"\x1f\x8b"
_DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)

_EMBEDDED_SIZES = (1197, 300, 300)


def load_data_shared(filename: str | os.PathLike[str] | None = None) -> list[Data]:
    """Load training, validation and test data, and say on stderr which and how many.

    Args:
        filename: a directory with MNIST's four IDX files, plain or .gz; or one of the book's files
            ``mnist.pkl.gz``, ``mnist_expanded.pkl.gz``. None: the directory that the environment variable
            PYCONV_DATA names, or else the embedded digits (`load_digits`).

    Returns:
        [training_data, validation_data, test_data]. Of the training images of IDX files the last sixth is the
        validation data: MNIST gives 50,000 / 10,000 / 10,000.

    Raises:
        DataError: a file is truncated, foreign or inconsistent.
        pickle.UnpicklingError: a pickle asks for anything but arrays.
        OSError: a file cannot be read.
    """
    if filename is None:
        filename = os.environ.get("PYCONV_DATA") or None
    if filename is None:
        return load_digits()
    path = Path(filename)
    parts = _read_idx_directory(path) if path.is_dir() else _read_pickle(path)
    _report(str(path), parts)
    return parts


def load_digits() -> list[Data]:
    """Load the digits that pyconv carries: 1,197 training, 300 validation and 300 test digits.

    They are scikit-learn's 1,797 handwritten digits, enlarged; `scripts/make_digits.py` says how.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        x, y = _to_tensors(file["images"], file["labels"])
    parts = list(zip(x.split(_EMBEDDED_SIZES), y.split(_EMBEDDED_SIZES)))
    _report("the digits embedded in pyconv", parts)
    return parts


def expand_mnist(training_data: Data, seed: int = 0) -> Data:
    """Each training image and its shifts by one pixel down, up, right and left, shuffled.

    The line that a shift vacates is zero. The book's program expand_mnist.py writes the same to a file.

    Args:
        training_data: (x, y), x (n, 784).
        seed: of the shuffling.
    """
    x, y = training_data
    if x.dim() != 2 or x.shape[1] != _PIXELS:
        raise RuntimeError(f"expected x of shape (n, {_PIXELS}), but got {tuple(x.shape)}")
    n = len(x)
    images = x.reshape(n, _SIDE, _SIDE)
    order = torch.randperm(5 * n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    expanded_x, expanded_y = x.new_empty(5 * n, _PIXELS), y.new_empty(5 * n)
    for i, (rows, columns) in enumerate([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]):
        shifted = images.roll((rows, columns), dims=(1, 2))
        if rows:
            shifted[:, 0 if rows > 0 else -1, :] = 0.0
        if columns:
            shifted[:, :, 0 if columns > 0 else -1] = 0.0
        positions = order[i * n : (i + 1) * n]
        expanded_x[positions] = shifted.reshape(n, _PIXELS)
        expanded_y[positions] = y
    return expanded_x, expanded_y


def _report(source: str, parts: Sequence[Data]) -> None:
    training, validation, test = map(size, parts)
    sizes = f"{training} training, {validation} validation, {test} test images"
    print(f"pyconv.network3: data from {source}: {sizes}", file=sys.stderr)


def _to_tensors(images: np.ndarray, labels: np.ndarray) -> Data:
    """Bytes (n, 784) and digits (n,) -> x, y."""
    x = torch.from_numpy(images).to(torch.float32).div_(256.0)
    return x, torch.from_numpy(labels.astype(np.int64))


# ----------------------------------------------------------------------------------------------------------
# IDX files
# ----------------------------------------------------------------------------------------------------------


def read_idx(path: str | os.PathLike[str], dims: int) -> np.ndarray:
    """Read an IDX file of bytes with `dims` dimensions, plain or gzip-compressed, into a uint8 array.

    The format (http://yann.lecun.com/exdb/mnist): a big-endian header of 32-bit words, first the magic number
    0x00000800 + dims, then each extent; then the bytes, row-major. What the header claims is compared with
    what the file can hold before anything is allocated.

    Raises:
        DataError: the file is truncated, too long, or of another kind.
    """
    path = Path(path)
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        compressed = file.peek(2)[:2] == _GZIP_MAGIC
        stream: BinaryIO = gzip.GzipFile(fileobj=file) if compressed else file
        try:
            return _read_idx_stream(path, stream, dims, file_size * (_MAX_DEFLATE_RATIO if compressed else 1))
        except _DAMAGED_GZIP as error:
            raise DataError(f"{path}: expected a whole gzip file, found a damaged one ({error})") from None


def _read_idx_stream(path: Path, stream: BinaryIO, dims: int, available: int) -> np.ndarray:
    header_size = 4 * (1 + dims)
    header = stream.read(header_size)
    magic = 0x0800 + dims
    if header[:4] != struct.pack(">I", magic):
        raise DataError(
            f"{path}: expected an IDX file of bytes with {dims} dimensions (magic number {magic:#010x}), "
            f"found one that begins with 0x{header[:4].hex()}"
        )
    if len(header) < header_size:
        raise DataError(f"{path}: expected a header of {header_size} bytes, found {len(header)}")
    shape = struct.unpack(f">{dims}I", header[4:])
    expected = math.prod(shape)
    claimed = "x".join(map(str, shape))
    claim = f"{path}: expected {expected} bytes after the header, which claims {claimed}, found "
    if expected > min(available, _MAX_IDX_BYTES):
        raise DataError(f"{claim}a file that holds at most {min(available, _MAX_IDX_BYTES)}")
    data = bytearray()
    while len(data) <= expected:
        part = stream.read(min(_READ_CHUNK, expected + 1 - len(data)))
        if not part:
            break
        data += part
    if len(data) != expected:
        raise DataError(claim + (str(len(data)) if len(data) < expected else "more"))
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find_idx(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{directory}: expected a file {name} or {name}.gz, found neither")


def _read_idx_pair(directory: Path, prefix: str) -> Data:
    image_path = _find_idx(directory, f"{prefix}-images-idx3-ubyte")
    label_path = _find_idx(directory, f"{prefix}-labels-idx1-ubyte")
    labels = read_idx(label_path, dims=1)
    images = read_idx(image_path, dims=3)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise DataError(f"{image_path}: expected images of 28x28, found {images.shape[1]}x{images.shape[2]}")
    if len(images) != len(labels):
        raise DataError(
            f"{label_path}: expected {len(images)} labels, one for each image, found {len(labels)}"
        )
    if len(labels) > 0 and labels.max() >= _CLASSES:
        raise DataError(f"{label_path}: expected labels from 0 to 9, found {labels.max()}")
    return _to_tensors(images.reshape(len(images), _PIXELS), labels)


def _read_idx_directory(directory: Path) -> list[Data]:
    x, y = _read_idx_pair(directory, "train")
    validation = len(x) // 6
    training = len(x) - validation
    return [(x[:training], y[:training]), (x[training:], y[training:]), _read_idx_pair(directory, "t10k")]


# ----------------------------------------------------------------------------------------------------------
# The book's pickles
# ----------------------------------------------------------------------------------------------------------


def _read_pickle(path: Path) -> list[Data]:
    with open(path, "rb") as file:
        start = file.peek(4)[:4]
        if start[:2] != _GZIP_MAGIC:
            found = f"a file that begins with 0x{start.hex()}"
            if start[:3] == _IDX_MAGIC:
                found = "one IDX file; give its directory"
            raise DataError(
                f"{path}: expected a directory of IDX files or a gzip-compressed pickle, found {found}"
            )
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file), _READ_CHUNK)
        reader = _unpickle.BoundedReader(stream, _MAX_PICKLE_BYTES)
        try:
            if stream.peek(3)[:3] == _IDX_MAGIC:
                raise DataError(
                    "expected a directory of IDX files or a gzip-compressed pickle, "
                    "found one IDX file, compressed; give its directory"
                )
            value = _unpickle.load_arrays(reader)
        except _DAMAGED_GZIP as error:
            raise DataError(
                f"{path}: expected a whole gzip-compressed pickle, found a damaged one ({error})"
            ) from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except _unpickle.Refused as error:
            raise pickle.UnpicklingError(f"{path}: {error}") from None
    if not (_is_sequence(value, 3) and all(_is_sequence(part, 2) for part in value)):
        raise DataError(f"{path}: expected three pairs (images, labels), found another structure")
    names = ("training", "validation", "test")
    return [_from_pickle(f"{path}: {name} data", part, reader.count) for name, part in zip(names, value)]


def _is_sequence(value: object, length: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == length


def _from_pickle(where: str, part: Sequence[object], file_bytes: int) -> Data:
    """A pair (images, labels), each an array or a list of its rows, -> x, y."""
    images, labels = map(_to_array, part)
    if isinstance(images, list):
        rows = [_to_array(row) for row in images]
        if not all(isinstance(row, np.ndarray) and row.shape == (_PIXELS,) for row in rows):
            raise DataError(f"{where}: expected a list of arrays of {_PIXELS} pixels, found other entries")
        # A list may name one array many times; in the book's files none does, so the rows fit into the file.
        if sum(row.nbytes for row in rows) > file_bytes:
            raise DataError(
                f"{where}: expected a file as large as its {len(rows)} images, found {file_bytes} bytes"
            )
        images = np.stack(rows) if rows else np.empty((0, _PIXELS), np.float32)
    if isinstance(labels, list):
        if not all(type(label) is int and 0 <= label < _CLASSES for label in labels):
            raise DataError(f"{where}: expected whole labels from 0 to 9, found others")
        labels = np.array(labels, np.int64)
    if not (isinstance(images, np.ndarray) and images.ndim == 2 and images.shape[1] == _PIXELS):
        raise DataError(f"{where}: expected images of shape (n, {_PIXELS}), found {_shape(images)}")
    if not (isinstance(labels, np.ndarray) and labels.shape == (len(images),)):
        raise DataError(f"{where}: expected {len(images)} labels, one for each image, found {_shape(labels)}")
    if images.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: expected images of floating-point and labels of an integer dtype, "
            f"found {images.dtype} and {labels.dtype}"
        )
    if len(images) > 0:
        low, high = images.min(), images.max()
        if not (low >= 0.0 and high <= 1.0):
            raise DataError(f"{where}: expected pixels from 0 to 1, found {low} to {high}")
        if labels.min() < 0 or labels.max() >= _CLASSES:
            raise DataError(f"{where}: expected labels from 0 to 9, found {labels.min()} to {labels.max()}")
    x: Tensor = torch.from_numpy(images.astype(np.float32))
    return x, torch.from_numpy(labels.astype(np.int64))


def _to_array(value: object) -> object:
    return value.value if isinstance(value, _unpickle.Array) else value


def _shape(value: object) -> str:
    return str(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
