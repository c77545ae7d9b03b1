"""RandomDistortion: the kernels of every instruction set against the reference, its draws, exact copies, errors."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from backends import supported_isas
from numerics import dtype_name
from torch import Tensor
from training_support import MB, assert_same_parameters, difference, make_data, make_network, train

import pyconv
from pyconv import RandomDistortion, reference
from pyconv.network3 import descent

pytestmark = pytest.mark.cpu_only

EVERY_ISA = pytest.mark.parametrize("isa", supported_isas())

SETTINGS: dict[str, dict[str, Any]] = {
    "shift": {"shift": 2.0},
    "shift of one axis": {"shift": (0.0, 3.5)},
    "rotation": {"rotation": 15.0},
    "half turns": {"rotation": 180.0},
    "scale": {"scale": 0.3},
    "shear": {"shear": 0.4},
    "affine": {"shift": (1.5, 2.5), "rotation": 12.0, "scale": 0.15, "shear": 0.2},
    "elastic": {"elastic": 34.0},
    "narrow elastic": {"elastic": 3.0, "elastic_sigma": 0.6},
    "wide elastic": {"elastic": 200.0, "elastic_sigma": 40.0},
    "affine and elastic": {"shift": 1.0, "rotation": 10.0, "scale": 0.1, "shear": 0.1, "elastic": 20.0},
    "flip": {"flip": 0.5},
    "turned and mirrored": {"rotation": 30.0, "flip": 0.5},
}
"""For any shape of images."""

CROPPED: dict[str, dict[str, Any]] = {
    "crop": {"crop": (7, 9)},
    "padded crop": {"crop": (11, 13), "crop_padding": 3},
    "padded mirrored crop": {"crop": (12, 16), "crop_padding": 2, "flip": 0.5},
    "crop of padding": {"crop": (1, 2), "crop_padding": 5},
    "all": {
        "shift": 1.0, "rotation": 20.0, "scale": 0.2, "shear": 0.3, "elastic": 10.0, "elastic_sigma": 2.0,
        "crop": (9, 10), "crop_padding": 1, "flip": 0.5,
    },
}  # fmt: skip
"""For images of 11 x 13."""

IN_PLACE_CROP = {"crop": (28, 28), "crop_padding": 4, "flip": 0.5}

SHAPES = [(1, 28, 28), (1, 18, 18), (3, 11, 13), (2, 5, 37), (1, 1, 1), (1, 33, 2), (4, 16, 16), (1, 64, 65)]


def make_images(n: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=g, dtype=torch.float64).to(dtype)


def make_positions(n: int) -> Tensor:
    return torch.arange(n) * 7919 + 3


def by_reference(distortion: RandomDistortion, images: Tensor, positions: Tensor) -> Tensor:
    names = ("shift", "rotation", "scale", "shear", "elastic", "elastic_sigma", "crop", "crop_padding", "flip", "seed")
    settings = {name: getattr(distortion, name) for name in (*names, "epoch")}
    return reference.random_distortion(images, positions, **settings)


def bound(distortion: RandomDistortion, dtype: torch.dtype) -> float:
    """Of the difference of two computations, on images from 0 to 1.

    A coordinate is a sum of three terms, in kernel and reference; none of them is larger than the extents times the
    map's coefficients, below (1 + shear) / (1 - scale). Before that, displacements are two sums of so many terms as the
    Gaussian has weights, which sum to 1. A pixel changes by at most 1 for a whole pixel in each direction.
    """
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    _, height, width = distortion.image_shape
    h, w = distortion.output_shape[1:]
    coefficient = (1.0 + distortion.shear) / (1.0 - distortion.scale)
    reach = coefficient * (height + width + h + w + sum(distortion.shift))
    taps = 2 * min(math.ceil(3.0 * distortion.elastic_sigma), max(h, w)) + 2
    coordinate = (3.0 * reach + 2.0 * taps * distortion.elastic) * eps
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    return 2.0 * coordinate + 12.0 * eps + rounding


def assert_as_reference(distortion: RandomDistortion, images: Tensor, positions: Tensor) -> None:
    output, expected = distortion.apply(images, positions), by_reference(distortion, images, positions)
    assert output.shape == expected.shape == (len(images), *distortion.output_shape)
    assert output.dtype == images.dtype
    worst = float((output.double() - expected.double()).abs().max()) if output.numel() else 0.0
    assert worst <= bound(distortion, images.dtype)


# ------------------------------------------------------------------------------------------------------------
# Against the reference
# ------------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(isa: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    pyconv.set_isa(isa)
    for shape in SHAPES:
        images, distortion = make_images(7, shape, dtype), RandomDistortion(shape, seed=11, **settings)
        assert_as_reference(distortion, images, make_positions(7))


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("settings", CROPPED.values(), ids=CROPPED)
def test_crops(isa: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    pyconv.set_isa(isa)
    for channels in (1, 3):
        distortion = RandomDistortion((channels, 11, 13), seed=-5, **settings)
        assert_as_reference(distortion, make_images(9, (channels, 11, 13), dtype), make_positions(9))


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_16_bit_types(isa: str, dtype: torch.dtype) -> None:
    pyconv.set_isa(isa)
    images = make_images(6, (2, 19, 21), dtype)
    assert_as_reference(RandomDistortion((2, 19, 21), **SETTINGS["affine and elastic"]), images, make_positions(6))
    mirrored = RandomDistortion((2, 19, 21), flip=0.5, crop=(19, 21), crop_padding=2)
    assert torch.equal(mirrored.apply(images, make_positions(6)), by_reference(mirrored, images, make_positions(6)))


def test_extreme_settings_stay_within_the_image() -> None:
    """Coordinates that overflow, or are no numbers, lie outside."""
    images = make_images(20, (1, 9, 9), torch.float32) + 1.0
    for settings in (
        {"shift": 1e300}, {"shear": 1e300}, {"elastic": 1e300}, {"shear": 1e30, "shift": 1e38, "elastic": 3e38},
        {"scale": math.nextafter(1.0, 0.0), "shear": 1e30}, {"elastic": 1.0, "elastic_sigma": 1e308},
    ):  # fmt: skip
        output = RandomDistortion((1, 9, 9), **settings).apply(images, make_positions(20))
        assert ((output >= 0.0) & (output <= 2.0)).all()


def test_no_images() -> None:
    for settings in SETTINGS.values():
        distortion = RandomDistortion((1, 4, 4), **settings)
        assert distortion.apply(torch.rand(0, 16), make_positions(0)).shape == (0, 1, 4, 4)
        assert by_reference(distortion, torch.rand(0, 1, 4, 4), make_positions(0)).shape == (0, 1, 4, 4)


def test_a_known_turn() -> None:
    """A quarter of a turn, from draws that are asked for as they are: counterclockwise, about the middle."""
    positions = torch.arange(200)
    draws = reference.distortion_draws(positions, (5, 5), (1, 1), 0.0, 0, 0)
    nearest = int((draws.rotation - 0.5).abs().argmin())
    most = 90.0 / float(draws.rotation[nearest])
    image = make_images(1, (1, 5, 5))
    output = RandomDistortion((1, 5, 5), rotation=most).apply(image, positions[nearest : nearest + 1])
    torch.testing.assert_close(output, image.rot90(1, (2, 3)), rtol=0.0, atol=1e-12)


def test_a_known_shift() -> None:
    """The image moves down and to the right by what was drawn."""
    positions = torch.arange(1)
    draws = reference.distortion_draws(positions, (9, 9), (1, 1), 0.0, 0, 0)
    down, right = draws.shift[0].tolist()
    settings = abs(2.0 / down), abs(1.0 / right)
    image = make_images(1, (1, 9, 9))
    moved = torch.zeros_like(image)
    rows, columns = int(math.copysign(2, down)), int(math.copysign(1, right))
    inner = image[:, :, max(-rows, 0) : 9 - max(rows, 0), max(-columns, 0) : 9 - max(columns, 0)]
    moved[:, :, max(rows, 0) : 9 - max(-rows, 0), max(columns, 0) : 9 - max(-columns, 0)] = inner
    torch.testing.assert_close(RandomDistortion((1, 9, 9), shift=settings).apply(image, positions), moved, rtol=0.0,
                               atol=1e-12)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# The draws
# ------------------------------------------------------------------------------------------------------------


def test_draws_are_the_words_of_philox() -> None:
    """Block by block, with a seed, an epoch and positions of more than 32 bits' worth."""
    seed, epoch, position = 0x123456789ABCDEF0, 0xFFFFFFFE, 2**40 + 5

    def words(block: int) -> list[int]:
        counter = [[block, epoch, position & 0xFFFFFFFF, position >> 32]]
        return reference.philox4x32(np.array(counter, dtype=np.uint32), (seed & 0xFFFFFFFF, seed >> 32))[0].tolist()

    def signed(word: int, bits: int = 32) -> float:
        return ((word - 2**bits if word >= 2 ** (bits - 1) else word) + 0.5) / 2.0 ** (bits - 1)

    draws = reference.distortion_draws(torch.tensor([position]), (3, 5), (6, 7), 0.5, seed, epoch)
    down, right, rotation, shear = words(0)
    assert draws.shift[0].tolist() == [signed(down), signed(right)]
    assert [float(draws.rotation), float(draws.shear)] == [signed(rotation), signed(shear)]
    of_height, of_width, mirror, _ = words(1)
    assert draws.scale[0].tolist() == [signed(of_height), signed(of_width)]
    assert bool(draws.mirrored) == (mirror < 2**31)
    assert draws.place[0].tolist() == [words(2)[0] * 6 >> 32, words(2)[1] * 7 >> 32]
    of_pixels = [word for block in range(3, 7) for word in words(block)][:15]
    halves = [[signed(word & 0xFFFF, 16) for word in of_pixels], [signed(word >> 16, 16) for word in of_pixels]]
    assert draws.fields.flatten(2)[0].tolist() == halves


@EVERY_ISA
def test_all_bits_of_seed_epoch_and_position_count(isa: str) -> None:
    pyconv.set_isa(isa)
    image = make_images(1, (1, 8, 8))
    distortion = RandomDistortion((1, 8, 8), shift=2.0, elastic=10.0, seed=2**63 + 1)
    seen = []
    for seed, epoch, position in (
        (2**63 + 1, 0, 0), (1, 0, 0), (2**63, 0, 0), (2**63 + 1, 1, 0), (2**63 + 1, 2**31, 0), (2**63 + 1, 0, 1),
        (2**63 + 1, 0, 2**32), (2**63 + 1, 0, 2**62),
    ):  # fmt: skip
        distortion = RandomDistortion((1, 8, 8), shift=2.0, elastic=10.0, seed=seed)
        distortion.set_epoch(epoch)
        assert_as_reference(distortion, image, torch.tensor([position]))
        seen.append(distortion.apply(image, torch.tensor([position])))
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i])


def test_a_seed_is_64_bits_signed_or_not() -> None:
    images = make_images(2, (1, 8, 8))
    one, other = (RandomDistortion((1, 8, 8), shift=2.0, seed=seed) for seed in (-3, 2**64 - 3))
    assert torch.equal(one.apply(images, make_positions(2)), other.apply(images, make_positions(2)))


def test_distribution_of_the_draws() -> None:
    """Means, variances and correlations, each within 5 standard deviations, and the range."""
    n, flip, places = 40_000, 0.3, (5, 9)
    draws = reference.distortion_draws(torch.arange(n), (1, 2), places, flip, 1, 0)
    columns = [*draws.shift.T, draws.rotation, draws.shear, *draws.scale.T, *draws.fields.flatten(1).T]
    uniform = torch.stack(columns)
    assert uniform.abs().max() < 1.0 and (uniform.abs().amax(1) > 0.999).all()
    assert (uniform.mean(1).abs() < 5 * math.sqrt(1 / 3 / n)).all()
    assert ((uniform.square().mean(1) - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / n)).all()
    products = uniform @ uniform.T / n
    assert (products.fill_diagonal_(0.0).abs() < 5 / 3 / math.sqrt(n)).all()
    neighbours = uniform[:, 1:] * uniform[:, :-1]
    assert (neighbours.mean(1).abs() < 5 / 3 / math.sqrt(n)).all(), "neighbouring positions"
    assert abs(int(draws.mirrored.sum()) - n * flip) < 5 * math.sqrt(n * flip * (1 - flip))
    for axis, count in enumerate(places):
        found = draws.place[:, axis].bincount(minlength=count)
        assert len(found) == count
        assert ((found - n / count).abs() < 5 * math.sqrt(n / count)).all()


def test_displacements_are_of_the_size_that_the_docstring_says() -> None:
    """In the middle, where the field's edges do not count."""
    fields = reference.distortion_draws(torch.arange(2000), (33, 33), (1, 1), 0.0, 0, 0).fields
    half = reference.gaussian_half(4.0, 33)
    band = reference._band(half, 33)
    smoothed = (band @ fields @ band)[:, :, 16, 16]
    assert float(half.sum() * 2 - half[0]) == pytest.approx(1.0, abs=1e-15)
    assert float(smoothed.square().mean().sqrt()) == pytest.approx(1 / 25, rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# What the result does not depend on
# ------------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("settings", [SETTINGS["affine and elastic"], IN_PLACE_CROP], ids=["sampled", "copied"])
def test_threads_division_and_order_change_no_bit(isa: str, settings: dict[str, Any]) -> None:
    pyconv.set_isa(isa)
    n = 301
    distortion = RandomDistortion(seed=3, **settings)
    images, positions = make_images(n, (1, 28, 28), torch.float32), make_positions(n)
    torch.set_num_threads(1)
    expected = distortion.apply(images, positions)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(distortion.apply(images, positions), expected)
        for size in (1, 7, 128):
            parts = [distortion.apply(*part) for part in zip(images.split(size), positions.split(size), strict=True)]
            assert torch.equal(torch.cat(parts), expected)
        order = torch.randperm(n)
        assert torch.equal(distortion.apply(images[order], positions[order]), expected[order])


def test_epochs_and_positions_differ_and_equal_positions_agree() -> None:
    distortion = RandomDistortion(**SETTINGS["affine"])
    image = make_images(1, (1, 28, 28)).expand(3, -1, -1, -1)
    first = distortion.apply(image, torch.tensor([4, 5, 4]))
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    distortion.set_epoch(1)
    second = distortion.apply(image, torch.tensor([4, 5, 4]))
    assert not torch.equal(first, second)
    distortion.set_epoch(0)
    assert torch.equal(distortion.apply(image, torch.tensor([4, 5, 4])), first)


def test_all_channels_share_a_map() -> None:
    distortion = RandomDistortion((3, 12, 12), **SETTINGS["affine and elastic"])
    images = make_images(4, (1, 12, 12)).expand(-1, 3, -1, -1)
    output = distortion.apply(images, make_positions(4))
    assert torch.equal(output[:, :1].expand(-1, 3, -1, -1), output)


# ------------------------------------------------------------------------------------------------------------
# Copies
# ------------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=dtype_name)
def test_whole_pixels_are_copied_bit_by_bit(isa: str, dtype: torch.dtype) -> None:
    pyconv.set_isa(isa)
    images = make_images(50, (2, 8, 8), torch.float64) - 0.5
    images[:, :, ::3, 1] = -0.0
    images[:, :, 1::3, 2] = math.nan
    images[:, :, 2::3, 3] = -math.inf
    images = images.to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()]
    distortion = RandomDistortion((2, 8, 8), crop=(6, 7), crop_padding=1, flip=0.5)
    positions = make_positions(50)
    output, expected = distortion.apply(images, positions), by_reference(distortion, images, positions)
    assert torch.equal(output.view(integers), expected.view(integers))
    draws = reference.distortion_draws(positions, (6, 7), (5, 4), 0.5, 0, 0)
    assert draws.mirrored.any() and not draws.mirrored.all()
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for i, (row, column) in enumerate(draws.place.tolist()):
        crop = padded[i, :, row : row + 6, column : column + 7]
        crop = crop.flip(2) if draws.mirrored[i] else crop
        assert torch.equal(output[i].view(integers), crop.contiguous().view(integers))


def test_nothing_set_copies() -> None:
    images = make_images(3, (1, 28, 28))
    output = RandomDistortion().apply(images, make_positions(3))
    assert torch.equal(output, images) and output.data_ptr() != images.data_ptr()


# ------------------------------------------------------------------------------------------------------------
# In place
# ------------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("settings", [*SETTINGS.values(), IN_PLACE_CROP], ids=str)
def test_in_place(isa: str, settings: dict[str, Any]) -> None:
    pyconv.set_isa(isa)
    distortion = RandomDistortion((2, 28, 28), **settings)
    images, positions = make_images(40, (2, 28, 28), torch.float32), make_positions(40)
    before = images.clone()
    expected = distortion.apply(images, positions)
    assert torch.equal(images, before)
    for x in (images.clone(), images.flatten(1).clone(), images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        assert distortion(positions, x) is None
        assert torch.equal(x.reshape(expected.shape), expected)
    strided = torch.full((80, 2 * 784), 7.0)
    strided[::2] = images.flatten(1)
    distortion(positions, strided[::2])
    assert torch.equal(strided[::2].view(expected.shape), expected) and (strided[1::2] == 7.0).all()


def test_autograd_hears_of_a_change_in_place() -> None:
    x, w = torch.rand(2, 784), torch.ones((), requires_grad=True)
    y = (x * w).sum()
    RandomDistortion(shift=1.0)(torch.arange(2), x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_other_devices_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors on a GPU do, here by a device that only says that it is none of the CPU."""

    class Elsewhere(Tensor):
        device = property(lambda self: torch.device("meta"))  # type: ignore[assignment]

    distortion = RandomDistortion((1, 8, 8), shift=1.0, crop=(8, 8), crop_padding=1)
    images, positions = make_images(3, (1, 8, 8)), make_positions(3)
    calls = []
    monkeypatch.setattr(reference, "random_distortion", lambda *a, **k: (calls.append(k), torch.ones(3, 1, 8, 8))[1])
    x = images.flatten(1).clone().as_subclass(Elsewhere)
    distortion(positions, x)
    assert calls == [
        {
            "shift": (1.0, 1.0), "rotation": 0.0, "scale": 0.0, "shear": 0.0, "elastic": 0.0, "elastic_sigma": 4.0,
            "crop": (8, 8), "crop_padding": 1, "flip": 0.0, "seed": 0, "epoch": 0,
        }
    ]  # fmt: skip
    assert (x.as_subclass(Tensor) == 1.0).all()
    with pytest.raises(ValueError, match=r"expected positions that are not negative, but got -4 at index 1"):
        distortion(torch.tensor([1, -4, 2]), x)


# ------------------------------------------------------------------------------------------------------------
# The object
# ------------------------------------------------------------------------------------------------------------


def test_repr_names_what_is_set() -> None:
    assert repr(RandomDistortion()) == "RandomDistortion((1, 28, 28), seed=0)"
    distortion = RandomDistortion((3, 8, 8), shift=(1, 2), scale=0.1, crop=[4, 5], seed=7)
    assert repr(distortion) == "RandomDistortion((3, 8, 8), shift=(1.0, 2.0), scale=0.1, crop=(4, 5), seed=7)"
    again = eval(repr(distortion))
    images = make_images(2, (3, 8, 8))
    assert torch.equal(again.apply(images, make_positions(2)), distortion.apply(images, make_positions(2)))
    assert distortion.output_shape == (3, 4, 5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_and_pickles(duplicate) -> None:
    distortion = RandomDistortion(seed=9, **SETTINGS["affine and elastic"])
    distortion.set_epoch(4)
    twin = duplicate(distortion)
    images = make_images(2, (1, 28, 28))
    assert torch.equal(twin.apply(images, make_positions(2)), distortion.apply(images, make_positions(2)))
    twin.set_epoch(5)
    assert distortion.epoch == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_shape": 28}, TypeError, r"expected image_shape to be \(channels, height, width\), but got 28"),
        ({"image_shape": (28, 28)}, ValueError, r"image_shape to be \(channels, height, width\), but got \(28, 28\)"),
        ({"image_shape": (1, 0, 28)}, ValueError, r"height of image_shape to be from 1 to \d+, but got 0"),
        ({"image_shape": (1, 28.0, 28)}, TypeError, r"height of image_shape to be an int, but got 28.0"),
        ({"image_shape": (1, 50_000, 50_000)}, ValueError, r"less than 2\*\*31 pixels, but got 50000 x 50000"),
        ({"image_shape": (1, 1, 2**24)}, ValueError, r"less than 2\*\*24 rows and columns, but got 1 x 16777216"),
        ({"shift": 10**400}, ValueError, r"expected shift to be finite and not negative, but got 1000"),
        ({"shift": -1}, ValueError, r"expected shift to be finite and not negative, but got -1"),
        ({"shift": math.nan}, ValueError, r"shift .* but got nan"),
        ({"shift": math.inf}, ValueError, r"shift .* but got inf"),
        ({"shift": (1, 2, 3)}, ValueError, r"to be a number or a pair \(vertical, horizontal\), but got \(1, 2, 3\)"),
        ({"shift": (1, "2")}, TypeError, r"expected shift to be a number, but got '2'"),
        ({"rotation": 180.1}, ValueError, r"expected rotation to be from 0 to 180, but got 180.1"),
        ({"rotation": True}, TypeError, r"expected rotation to be a number, but got True"),
        ({"scale": 1.0}, ValueError, r"expected scale to be from 0 to below 1, but got 1.0"),
        ({"shear": -0.1}, ValueError, r"expected shear to be finite and not negative, but got -0.1"),
        ({"elastic": math.nan}, ValueError, r"expected elastic to be .* but got nan"),
        ({"elastic_sigma": 0}, ValueError, r"expected elastic_sigma to be positive, but got 0.0"),
        ({"crop": 24}, TypeError, r"expected crop to be \(height, width\), but got 24"),
        ({"crop": (29, 28)}, ValueError, r"expected a crop of at most 28 x 28, but got 29 x 28"),
        ({"crop": (28, 31), "crop_padding": 1}, ValueError, r"expected a crop of at most 30 x 30, but got 28 x 31"),
        ({"crop_padding": 1}, ValueError, r"crop_padding is for a crop: expected 0 without one, but got 1"),
        ({"crop_padding": -1, "crop": (3, 3)}, ValueError, r"crop_padding to be from 0 to \d+, but got -1"),
        ({"flip": 1.5}, ValueError, r"expected flip to be from 0 to 1, but got 1.5"),
        ({"seed": 0.5}, TypeError, r"expected seed to be an int, but got 0.5"),
        ({"seed": 2**64}, ValueError, r"expected seed to be from -9223372036854775808 to 18446744073709551615"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RandomDistortion(**arguments)


@pytest.mark.parametrize(
    ("x", "positions", "error", "message"),
    [
        (torch.rand(3, 783), torch.arange(3), RuntimeError,
         r"expected examples of shape \(n, 784\) or \(n, 1, 28, 28\), but got \(3, 783\)"),
        (torch.rand(3, 28, 28), torch.arange(3), RuntimeError, r"but got \(3, 28, 28\)"),
        (torch.rand(()), torch.arange(3), RuntimeError, r"but got \(\)"),
        (torch.zeros(3, 784, dtype=torch.uint8), torch.arange(3), RuntimeError, r"dtype float32.*, but got uint8"),
        (torch.rand(3, 784), torch.arange(4), RuntimeError,
         r"expected positions of shape \(3,\) and dtype int64, but got \(4,\) and int64"),
        (torch.rand(3, 784), torch.arange(3.0), RuntimeError, r"but got \(3,\) and float32"),
        (torch.rand(3, 784), torch.arange(3)[:, None], RuntimeError, r"but got \(3, 1\) and int64"),
        (torch.rand(3, 784), torch.tensor([0, 1, -1]), ValueError,
         r"expected positions that are not negative, but got -1 at index 2"),
        (np.zeros((3, 784)), torch.arange(3), TypeError, r"expected examples to be a tensor, but got ndarray"),
        (torch.rand(3, 784), [0, 1, 2], TypeError, r"expected positions to be a tensor, but got list"),
        (torch.rand(3, 784, requires_grad=True), torch.arange(3), RuntimeError, r"has no derivative"),
    ],
)  # fmt: skip
def test_wrong_examples(x: Any, positions: Any, error: type[Exception], message: str) -> None:
    distortion = RandomDistortion(shift=1.0)
    for call in (lambda: distortion(positions, x), lambda: distortion.apply(x, positions)):
        with pytest.raises(error, match=message):
            call()


def test_a_crop_does_not_fit_in_place() -> None:
    with pytest.raises(ValueError, match=r"of the shape \(1, 28, 28\), .* but they are of the shape \(1, 20, 20\)"):
        RandomDistortion(crop=(20, 20))(torch.arange(2), torch.rand(2, 784))


@pytest.mark.parametrize("epoch, error", [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), (True, TypeError)])
def test_wrong_epochs(epoch: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"expected epoch to be .* but got {epoch}"):
        RandomDistortion().set_epoch(epoch)


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def make_distortion(**settings: Any) -> RandomDistortion:
    return RandomDistortion((1, 18, 18), seed=2, **(settings or SETTINGS["affine and elastic"]))


@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 2**20], ids=["single", "several chunks", "one chunk"])
@pytest.mark.parametrize("options", [{}, {"shuffle": True, "drop_last": False, "lmbda": 1.0, "momentum": 0.5}], ids=str)
def test_compiled_training_is_that_layer_by_layer(
    options: dict[str, Any], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_CHUNK_BYTES", chunk_bytes)
    eager, compiled, by_one, plain = (make_network(p_dropout=0.25) for _ in range(4))
    data = make_data(7 * MB + 8)
    expected, rng = train(eager, data, False, epochs=3, augment=make_distortion(), **options)
    history, compiled_rng = train(compiled, data, True, epochs=3, augment=make_distortion(), **options)
    assert_same_parameters(compiled, eager)
    assert history["train_cost"] == pytest.approx(expected["train_cost"], rel=1e-10)
    assert torch.equal(rng, compiled_rng)
    # A function of the program calls it for each mini-batch.
    distortion = make_distortion()

    class OneByOne:
        set_epoch = distortion.set_epoch

        def __call__(self, positions: Tensor, x: Tensor) -> None:
            assert len(x) <= MB
            distortion(positions, x)

    train(by_one, data, True, epochs=3, augment=OneByOne(), **options)
    for one, other in zip(by_one.params, compiled.params, strict=True):
        assert torch.equal(one, other)
    train(plain, data, True, epochs=3, **options)
    assert difference(plain.params[0], compiled.params[0]) > 1e-4, "the distortions have no effect"


@pytest.mark.parametrize("compiled", [False, True])
def test_each_epoch_has_distortions_of_its_own(compiled: bool) -> None:
    seen = []

    class Recorded(RandomDistortion):
        def __call__(self, positions: Tensor, x: Tensor) -> None:
            super().__call__(positions, x)
            seen.append((self.epoch, positions.clone(), x.clone()))

    data = make_data(3 * MB)
    train(make_network(), data, compiled, epochs=2, augment=Recorded((1, 18, 18), shift=2.0))
    assert {epoch for epoch, *_ in seen} == {0, 1}
    first, second = (torch.cat([x for epoch, _, x in seen if epoch == wanted]) for wanted in (0, 1))
    assert first.shape == data[0].shape and not torch.equal(first, second)
    assert torch.cat([positions for epoch, positions, _ in seen if epoch == 0]).tolist() == list(range(3 * MB))


def test_training_does_not_change_the_data() -> None:
    data = make_data(3 * MB)
    before = data[0].clone()
    train(make_network(), data, True, augment=make_distortion())
    assert torch.equal(data[0], before)


def test_training_with_progress_trains_no_further_than_that() -> None:
    """Whoever looks on sees the parameters of the mini-batch he is at, and may stop there."""
    watched, expected = make_network(), make_network()
    data = make_data(5 * MB)

    class Stop(Exception):
        pass

    def two(indices):
        for index in indices:
            if index == 2:
                raise Stop
            yield index

    with pytest.raises(Stop):
        train(watched, data, True, augment=make_distortion(), progress=two)
    train(expected, tuple(part[: 2 * MB] for part in data), True, augment=make_distortion())
    assert_same_parameters(watched, expected, 0.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_divergence_names_the_mini_batch_of_distorted_examples(compiled: bool) -> None:
    network, expected = make_network(), make_network()
    data = make_data(6 * MB)
    data[0][4 * MB + 3] = math.nan
    validation = make_data(MB)
    with pytest.raises(pyconv.network3.network.DivergenceError, match="mini-batch 4 of epoch 0.*hold NaN"):
        network.SGD(data, 1, MB, 0.05, validation, None, verbose=False, compiled=compiled, augment=make_distortion())
    train(expected, tuple(part[: 4 * MB] for part in data), compiled, augment=make_distortion())
    assert_same_parameters(network, expected, 0.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_distortion_for_other_images_is_an_error(compiled: bool) -> None:
    with pytest.raises(RuntimeError, match=r"expected examples of shape \(n, 784\)"):
        train(make_network(), make_data(MB), compiled, augment=RandomDistortion(shift=1.0))
