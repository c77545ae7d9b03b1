"""Each operator of pyconv in plain PyTorch: the specification, the oracle of the tests and the baseline.

Nothing here is fast and nothing here touches the extension; every function is differentiable to any order by
PyTorch's own autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_Size = int | tuple[int, int]

# ------------------------------------------------------------------------------------------------------------
# Activations
# ------------------------------------------------------------------------------------------------------------


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}
"""The activations every operator takes; "gelu" is the exact form, with erf."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function called `name` in `ACTIVATIONS`; ValueError for any other name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but got {name!r}")
    return ACTIVATIONS[name]


# ------------------------------------------------------------------------------------------------------------
# conv_max_pool2d
#
#   input (N, C, H, W) -> conv2d (N, K, OH, OW) -> max_pool2d (N, K, PH, PW) -> + bias -> activation
#
# An argmax is the row-major position i * pool_width + j inside the pooling window: int64 here, uint8 or int32
# in the extension.
# ------------------------------------------------------------------------------------------------------------

NO_GRADIENT = -1
"""The argmax of a window that passes no gradient on: it has no valid position, or ReLU is dead there."""

NO_GRADIENT_UINT8 = 255
"""`NO_GRADIENT` where the argmax is stored in one byte."""


def _pair(size: _Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


class _Pool:
    """The pooling windows over a map of a given size, resolved as torch.nn.functional.max_pool2d does."""

    def __init__(
        self,
        map_size: tuple[int, int],
        pool_size: _Size,
        pool_stride: _Size | None,
        pool_padding: _Size,
        pool_dilation: _Size,
        ceil_mode: bool,
        device: torch.device,
    ) -> None:
        self.size = _pair(pool_size)
        stride = self.size if pool_stride is None else _pair(pool_stride)
        padding = _pair(pool_padding)
        dilation = _pair(pool_dilation)
        # max_pool2d on the meta device checks the arguments and rounds the output size, and costs nothing.
        probe = torch.empty((1, 1, *map_size), device="meta")
        self.out_size = F.max_pool2d(probe, self.size, stride, padding, dilation, ceil_mode).shape[-2:]
        # rows[p, i]: the row of the map under window row p, position row i; it may lie outside the map.
        self.rows, self.columns = (
            torch.arange(self.out_size[d], device=device)[:, None] * stride[d]
            - padding[d]
            + torch.arange(self.size[d], device=device) * dilation[d]
            for d in (0, 1)
        )
        self.row_valid = (self.rows >= 0) & (self.rows < map_size[0])
        self.column_valid = (self.columns >= 0) & (self.columns < map_size[1])

    def window_valid(self) -> Tensor:
        """(PH, PW) bool: does the window hold at least one position of the map?"""
        return self.row_valid.any(1)[:, None] & self.column_valid.any(1)

    def gather(self, conv: Tensor, argmax: Tensor) -> Tensor:
        """The elements of `conv` (..., OH, OW) at `argmax` (..., PH, PW), arbitrary where it is negative."""
        height, width = conv.shape[-2:]
        position = argmax.clamp(min=0)
        window_row = torch.arange(self.out_size[0], device=conv.device)[:, None]
        window_column = torch.arange(self.out_size[1], device=conv.device)
        row = self.rows[window_row, position // self.size[1]].clamp(0, height - 1)
        column = self.columns[window_column, position % self.size[1]].clamp(0, width - 1)
        return conv.flatten(-2).gather(-1, (row * width + column).flatten(-2)).view(argmax.shape)

    def argmax(self, conv: Tensor) -> Tensor:
        """The argmax of every window by PyTorch's rules, `NO_GRADIENT` where a window has no valid position.

        The window is scanned row-major and padding skipped; the first valid position starts as the maximum
        and a later one replaces it if it is greater or NaN: the first of equal maxima, but the last NaN.
        """
        height, width = conv.shape[-2:]
        shape = (*conv.shape[:-2], *self.out_size)
        best = torch.full(shape, NO_GRADIENT, dtype=torch.int64, device=conv.device)
        best_value = torch.zeros(shape, dtype=conv.dtype, device=conv.device)
        for i in range(self.size[0]):
            rows = self.rows[:, i].clamp(0, height - 1)[:, None]
            for j in range(self.size[1]):
                value = conv[..., rows, self.columns[:, j].clamp(0, width - 1)]
                valid = self.row_valid[:, i, None] & self.column_valid[:, j]
                replace = valid & ((best == NO_GRADIENT) | (value > best_value) | value.isnan())
                best = best.masked_fill(replace, i * self.size[1] + j)
                best_value = torch.where(replace, value, best_value)
        return best


def _add_bias(pooled: Tensor, bias: Tensor | None) -> Tensor:
    return pooled if bias is None else pooled + bias[:, None, None]


def _activate_gathered(gathered: Tensor, live: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(gathered + bias) where `live`, elsewhere the constant activation(-inf) without gradient."""
    activate = activation_function(activation)
    # The values that are thrown away must stay finite: 0 * inf would put NaN into the gradient of the others.
    output = activate(_add_bias(gathered.masked_fill(~live, 0), bias))
    return torch.where(live, output, activate(torch.full_like(output, float("-inf")).detach()))


def conv_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
    pool_size: _Size = 2,
    pool_stride: _Size | None = None,
    pool_padding: _Size = 0,
    pool_dilation: _Size = 1,
    ceil_mode: bool = False,
    activation: str = "none",
) -> Tensor:
    """activation(max_pool2d(conv2d(input, weight), ...) + bias); see `pyconv.functional.conv_max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (K, C / groups, R, S).
        bias: (K,) or None.

    Returns:
        (N, K, PH, PW), or (K, PH, PW) for an unbatched input. A window without a valid position, which only
        `pool_dilation` > 1 can produce, gives activation(-inf) and no gradient, not even to the bias.

    Raises:
        ValueError: unknown activation.
        RuntimeError: whatever conv2d and max_pool2d raise.
    """
    activate = activation_function(activation)
    conv = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    pool = _Pool(conv.shape[-2:], pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode, conv.device)
    valid = pool.window_valid()
    if valid.all():
        pooled = F.max_pool2d(conv, pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode)
        return activate(_add_bias(pooled, bias))
    # The backward of max_pool2d writes out of bounds for a window without a valid position.
    pooled = pool.gather(conv, pool.argmax(conv.detach()))
    return _activate_gathered(pooled, valid, bias, activation)


def conv_max_pool2d_argmax(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
    pool_size: _Size = 2,
    pool_stride: _Size | None = None,
    pool_padding: _Size = 0,
    pool_dilation: _Size = 1,
    ceil_mode: bool = False,
    activation: str = "none",
) -> Tensor:
    """The window-relative argmax of `conv_max_pool2d` by PyTorch's max rules: int64, shaped as its output.

    The arguments are those of `conv_max_pool2d`. An entry is the row-major position in the window of the
    first maximum or the last NaN; it is `NO_GRADIENT` where no position is valid or ReLU is dead.
    """
    activation_function(activation)
    with torch.no_grad():
        conv = F.conv2d(input, weight, None, stride, padding, dilation, groups)
        pool = _Pool(
            conv.shape[-2:], pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode, conv.device
        )
        argmax = pool.argmax(conv)
        if activation == "relu":
            dead = _add_bias(pool.gather(conv, argmax), bias) <= 0
            argmax = argmax.masked_fill(dead, NO_GRADIENT)
    return argmax


def conv_max_pool2d_given_argmax(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    argmax: Tensor,
    *,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
    pool_size: _Size = 2,
    pool_stride: _Size | None = None,
    pool_padding: _Size = 0,
    pool_dilation: _Size = 1,
    ceil_mode: bool = False,
    activation: str = "none",
) -> Tensor:
    """`conv_max_pool2d` with the choice of the maximum taken from `argmax` instead of made.

    Near-ties are decided differently by every precision and summation order; gradients can be compared only
    for a common choice. The other arguments are those of `conv_max_pool2d`.

    Args:
        argmax: (N, K, PH, PW) or (K, PH, PW), window-relative, row-major: uint8 with 255 for "no gradient",
            or a signed integer type with -1. Such an entry gives the constant activation(-inf): 0 for relu.
    """
    no_gradient = NO_GRADIENT_UINT8 if argmax.dtype == torch.uint8 else NO_GRADIENT
    conv = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    pool = _Pool(conv.shape[-2:], pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode, conv.device)
    live = argmax != no_gradient
    gathered = pool.gather(conv, argmax.long().masked_fill(~live, NO_GRADIENT))
    return _activate_gathered(gathered, live, bias, activation)


# ------------------------------------------------------------------------------------------------------------
# dropout
#
#   (seed, offset, index) -> Philox4x32-10 -> draws in row-major order -> kept or dropped
# ------------------------------------------------------------------------------------------------------------


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """The Philox4x32 random numbers of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).

    Args:
        counter: (n, 4) uint32.
        key: two 32-bit numbers.

    Returns:
        (n, 4) uint32.
    """
    words = [counter[:, i].astype(np.uint64) for i in range(4)]
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for i in range(rounds):
        keys = [
            np.uint64((key[j] + i * weyl) & 0xFFFFFFFF) for j, weyl in enumerate((0x9E3779B9, 0xBB67AE85))
        ]
        product0, product1 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (product1 >> half) ^ words[1] ^ keys[0],
            product1 & low,
            (product0 >> half) ^ words[3] ^ keys[1],
            product0 & low,
        ]
    return np.stack(words, axis=1).astype(np.uint32)


def dropout_mask(shape: Sequence[int], p: float, seed: int, offset: int = 0) -> Tensor:
    """Which elements a dropout with probability `p` keeps, by the arguments alone: bool, True where kept.

    Args:
        shape: of the result; element i is the i-th in row-major order.
        p: drop probability. Where 256 p is an integer an element takes 8 random bits, otherwise 32.
        seed, offset: 64 bits each, signed or unsigned.
    """
    numel = math.prod(shape)
    bits = 8 if (p * 256).is_integer() else 32
    threshold = int(p * 256) if bits == 8 else math.floor(p * 2**32 + 0.5)
    blocks = np.arange(-(-numel * bits // 128), dtype=np.uint64)
    counter = np.empty((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = blocks & np.uint64(0xFFFFFFFF)
    counter[:, 1] = blocks >> np.uint64(32)
    counter[:, 2:] = offset & 0xFFFFFFFF, offset >> 32 & 0xFFFFFFFF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).reshape(-1)
    if bits == 8:
        draws = (words[:, None] >> np.array([0, 8, 16, 24], dtype=np.uint32) & np.uint32(255)).reshape(-1)
    else:
        draws = words
    kept = draws[:numel].astype(np.uint64) >= np.uint64(threshold)
    return torch.from_numpy(kept).view(tuple(shape))


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    inverted: bool = True,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """`pyconv.functional.dropout` with the state given instead of drawn from a generator.

    Args:
        input: any shape.
        seed, offset: 64 bits each. A call that draws takes ``torch.empty((), dtype=torch.int64)
            .random_(-2**63, None, generator=generator)`` as its seed and 0 as its offset.
    """
    if not training:
        return input if inverted else input * (1 - p)
    if p in (0, 1):
        return input * (1 - p)
    mask = dropout_mask(input.shape, p, seed, offset).to(input.device, input.dtype)
    return input * mask / (1 - p) if inverted else input * mask


def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    p: float = 0.0,
    training: bool = True,
    inverted: bool = True,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """dropout(activation(input + bias)); see `dropout` for the state.

    Args:
        input: (*, columns).
        bias: (columns,) or None.
    """
    activated = activation_function(activation)(input if bias is None else input + bias)
    return dropout(activated, p, training, inverted=inverted, seed=seed, offset=offset)


# ------------------------------------------------------------------------------------------------------------
# random_distortion
#
#   (seed, epoch, position) -> Philox4x32-10 -> amounts of the image's distortion
#   -> places (h, w) in the image, between its pixels -> the four neighbours of each, weighted
# ------------------------------------------------------------------------------------------------------------


class DistortionDraws(NamedTuple):
    """How each of n images is distorted, the numbers in float64 on the CPU.

    Attributes:
        shift: (n, 2), down and to the right, between -1 and 1, which are the most either way, as in all that follows.
        rotation, shear: (n,).
        scale: (n, 2), of height and width.
        mirrored: (n,) bool.
        place: (n, 2) int64, row and column of the crop's first pixel in the padded image.
        fields: (n, 2, h, w), displacements down and to the right before they are smoothed.
    """

    shift: Tensor
    rotation: Tensor
    shear: Tensor
    scale: Tensor
    mirrored: Tensor
    place: Tensor
    fields: Tensor


def distortion_draws(
    positions: Tensor, output_size: tuple[int, int], places: tuple[int, int], flip: float, seed: int, epoch: int
) -> DistortionDraws:
    """What `random_distortion` draws for images at `positions` (n,) int64.

    The key of Philox4x32-10 is the seed, its counter (block, epoch, position low, position high). Words of block 0:
    shift down, shift to the right, rotation, shear; of block 1: scale of height, scale of width, mirror image (where it
    is below floor(flip * 2^32 + 0.5)); of block 2: row and column of the crop (word * places >> 32). From block 3 on
    each pixel of the output has a word, in row-major order, whose low half is the displacement down and whose high half
    is that to the right. Word and half are signed: of b bits, they stand for (number + 0.5) / 2^(b - 1).

    Args:
        output_size: (h, w).
        places: in how many rows and columns a crop may begin.
        flip: probability of a mirror image.
    """
    n, pixels = len(positions), math.prod(output_size)
    blocks = 3 + -(-pixels // 4)
    where = positions.cpu().numpy().astype(np.uint64)[:, None]
    counter = np.empty((n, blocks, 4), dtype=np.uint32)
    counter[:, :, 0] = np.arange(blocks, dtype=np.uint32)
    counter[:, :, 1] = epoch
    counter[:, :, 2] = where & np.uint64(0xFFFFFFFF)
    counter[:, :, 3] = where >> np.uint64(32)
    words = philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).reshape(n, blocks * 4)

    def symmetric(numbers: np.ndarray, bits: int) -> Tensor:
        return torch.from_numpy((numbers.astype(np.float64) + 0.5) / 2.0 ** (bits - 1))

    signed = symmetric(words[:, :12].view(np.int32), 32)
    mirrored = words[:, 6].astype(np.uint64) < np.uint64(math.floor(flip * 2**32 + 0.5))
    place = words[:, 8:10].astype(np.uint64) * np.array(places, dtype=np.uint64) >> np.uint64(32)
    of_pixels = words[:, 12 : 12 + pixels]
    halves = np.stack([of_pixels & np.uint32(0xFFFF), of_pixels >> np.uint32(16)], axis=1).astype(np.uint16)
    return DistortionDraws(
        shift=signed[:, :2], rotation=signed[:, 2], shear=signed[:, 3], scale=signed[:, 4:6],
        mirrored=torch.from_numpy(mirrored), place=torch.from_numpy(place.astype(np.int64)),
        fields=symmetric(halves.view(np.int16), 16).view(n, 2, *output_size),
    )  # fmt: skip


def gaussian_half(sigma: float, longest: int) -> Tensor:
    """A Gaussian from its middle on, at whole numbers up to 3 sigma and less than `longest`: float64, (radius + 1,).

    With its other half it sums to 1.
    """
    radius = math.ceil(min(3.0 * sigma, longest - 1))  # the product may be infinite
    half = torch.exp(-0.5 * (torch.arange(radius + 1, dtype=torch.float64) / sigma).square())
    return half / (2.0 * half.sum() - 1.0)


def _band(half: Tensor, extent: int) -> Tensor:
    """(extent, extent): the product with it smooths, as if there were zeros around."""
    distance = (torch.arange(extent)[:, None] - torch.arange(extent)).abs()
    return torch.where(distance < len(half), half[distance.clamp(max=len(half) - 1)], 0.0)


def random_distortion(
    images: Tensor,
    positions: Tensor,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    rotation: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    elastic: float = 0.0,
    elastic_sigma: float = 4.0,
    crop: tuple[int, int] | None = None,
    crop_padding: int = 0,
    flip: float = 0.0,
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:
    """`pyconv.RandomDistortion`, on any device.

    Args:
        images: (n, C, H, W) of a floating-point dtype.
        positions: (n,) int64, of the images in the training data.
        shift, rotation, scale, shear, elastic, elastic_sigma, crop, crop_padding, flip, seed: those of the class.
        epoch: from 0 to 2^32 - 1.

    Returns:
        (n, C, h, w). Coordinates and weights are computed in float32, in float64 for float64.
    """
    height, width = images.shape[2:]
    h, w = output_size = (height, width) if crop is None else crop
    places = height + 2 * crop_padding - h + 1, width + 2 * crop_padding - w + 1
    draws = distortion_draws(positions, output_size, places, flip, seed, epoch)
    first = draws.place - crop_padding
    # Rows (n, h, 1) and columns (n, 1, w) of the image that the output would show undistorted.
    rows = first[:, :1, None] + torch.arange(h)[:, None]
    columns = torch.arange(w).expand(len(images), 1, w)
    columns = first[:, 1:, None] + torch.where(draws.mirrored[:, None, None], columns.flip(2), columns)
    if not any((*shift, rotation, scale, shear, elastic)):
        rows, columns = (index.to(images.device) for index in torch.broadcast_tensors(rows, columns))
        return _pixels(images, rows, columns)

    angle, sideways = draws.rotation * math.radians(rotation), draws.shear * shear
    scale_h, scale_w = (1.0 + draws.scale * scale).unbind(1)
    sine, cosine = angle.sin(), angle.cos()
    # The image is scaled, then sheared, then turned counterclockwise about its middle, then shifted.
    to_h = torch.stack([cosine / scale_h, sine / scale_h], 1)
    to_w = torch.stack([-(sine + sideways * cosine) / scale_w, (cosine - sideways * sine) / scale_w], 1)
    middle = torch.tensor([0.5 * (height - 1), 0.5 * (width - 1)], dtype=torch.float64)
    from_h = rows - middle[0] - (draws.shift[:, 0] * shift[0])[:, None, None]
    from_w = columns - middle[1] - (draws.shift[:, 1] * shift[1])[:, None, None]

    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    half = gaussian_half(elastic_sigma, max(output_size))
    displacements = elastic * (_band(half, h) @ draws.fields @ _band(half, w))
    places_of = []
    for axis, to in enumerate((to_h, to_w)):
        place = middle[axis] + to[:, :1, None] * from_h + to[:, 1:, None] * from_w
        places_of.append((place + displacements[:, axis]).to(images.device, dtype))
    # Clamping to the border of zeros changes no value, and keeps what follows in range.
    y, x = (place.nan_to_num(-1.0).clamp(-1, extent) for place, extent in zip(places_of, (height, width), strict=True))
    above, left = y.floor(), x.floor()
    down, right = (y - above).unsqueeze(1), (x - left).unsqueeze(1)
    above, left, wide = above.long(), left.long(), images.to(dtype)
    neighbours = [[_pixels(wide, above + i, left + j) for j in (0, 1)] for i in (0, 1)]
    upper, lower = (a + (b - a) * right for a, b in neighbours)
    return (upper + (lower - upper) * down).to(images.dtype)


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(n, C, h, w): the pixels of `images` (n, C, H, W) at rows, columns (n, h, w); 0 outside."""
    n, channels, height, width = images.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1)
    gathered = images.flatten(2).gather(2, index[:, None].expand(-1, channels, -1)).view(n, channels, *rows.shape[1:])
    return gathered.masked_fill(~inside.unsqueeze(1), 0.0)
