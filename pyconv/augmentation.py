"""Random distortions of training images, made anew in every epoch; no distorted image is kept."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from pyconv import _C, reference

_MOST_PIXELS = 2**31
"""Of a padded image: kernels count its pixels in 32 bits."""

_MOST_ROWS = 2**24
"""Of a padded image, and columns: float32 tells whole numbers apart up to there."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RandomDistortion:
    """Random shift, rotation, scale, shear, elastic distortion, crop and mirror image of training images.

    An image is scaled, sheared, turned about its middle and shifted; then displaced elastically, cropped and mirrored.
    All of this is one map from the pixels of the output to places in the image, where the image is interpolated
    bilinearly, once; outside the image is 0. All channels share the map. Without shift, rotation, scale, shear and
    elastic the pixels are copied.

    The distortion of an image is a pure function of the seed, the epoch, the image's position in the training data and
    the arguments: the same for any number of threads and any order or division into mini-batches. Bits may differ
    between instruction sets and devices, by rounding.

    An object can be the `augment` of `pyconv.network3.Network.SGD`, which tells it the epoch.

    Args:
        image_shape: (channels, height, width).
        shift: the most pixels either way, a number or a pair (vertical, horizontal); uniform, not in whole pixels.
        rotation: the most degrees either way, up to 180.
        scale: the most relative change, below 1; height and width are multiplied by numbers of their own, uniform
            from 1 - scale to 1 + scale.
        shear: the most either way, in pixels sideways for each pixel downwards.
        elastic: alpha of Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to
            visual document analysis" (2003). Two fields of numbers, uniform from -1 to 1, one for each pixel of the
            output, are smoothed by a Gaussian whose weights sum to 1 (up to 3 sigma; zeros around the field) and
            multiplied by alpha: the displacements down and to the right, in pixels. With a sigma of 4, about
            alpha / 25 pixels, root mean square.
        elastic_sigma: of the Gaussian, in pixels.
        crop: (height, width) of the output, at a random place, in whole pixels, of the image padded by
            `crop_padding` zeros on each side; None for the whole image.
        crop_padding: needs a crop.
        flip: the probability of an image mirrored left to right.
        seed: 64 bits, signed or unsigned.

    Attributes:
        output_shape: (channels, height, width) of a distorted image.
        epoch: as set by `set_epoch`, at first 0.
        Others: the arguments, `shift` as a pair.

    Raises:
        ValueError: a number out of range, or a crop larger than the padded image.
        TypeError: an argument of a wrong Python type.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        *,
        shift: float | Sequence[float] = 0.0,
        rotation: float = 0.0,
        scale: float = 0.0,
        shear: float = 0.0,
        elastic: float = 0.0,
        elastic_sigma: float = 4.0,
        crop: Sequence[int] | None = None,
        crop_padding: int = 0,
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.image_shape = _sizes(image_shape, "image_shape", ("channels", "height", "width"))
        if isinstance(shift, (tuple, list)):
            if len(shift) != 2:
                raise ValueError(f"expected shift to be a number or a pair (vertical, horizontal), but got {shift!r}")
            self.shift = _number(shift[0], "shift"), _number(shift[1], "shift")
        else:
            self.shift = (_number(shift, "shift"),) * 2
        self.rotation = _number(rotation, "rotation", most=180.0)
        self.scale = _number(scale, "scale", below=1.0)
        self.shear = _number(shear, "shear")
        self.elastic = _number(elastic, "elastic")
        self.elastic_sigma = _number(elastic_sigma, "elastic_sigma")
        if self.elastic_sigma == 0.0:
            raise ValueError("expected elastic_sigma to be positive, but got 0.0")
        self.crop = None if crop is None else _sizes(crop, "crop", ("height", "width"))
        self.crop_padding = _integer(crop_padding, "crop_padding", 0, _MOST_PIXELS)
        self.flip = _number(flip, "flip", most=1.0)
        self.seed = _integer(seed, "seed", -(2**63), 2**64 - 1)
        self.epoch = 0

        channels, height, width = self.image_shape
        padded = height + 2 * self.crop_padding, width + 2 * self.crop_padding
        if (padded[0] + 3) * (padded[1] + 3) >= _MOST_PIXELS:
            raise ValueError(f"expected a padded image of less than 2**31 pixels, but got {padded[0]} x {padded[1]}")
        if max(padded) >= _MOST_ROWS:
            raise ValueError(
                f"expected a padded image of less than 2**24 rows and columns, but got {padded[0]} x {padded[1]}"
            )
        if self.crop is None and self.crop_padding > 0:
            raise ValueError(f"crop_padding is for a crop: expected 0 without one, but got {self.crop_padding}")
        output = (height, width) if self.crop is None else self.crop
        if output[0] > padded[0] or output[1] > padded[1]:
            raise ValueError(f"expected a crop of at most {padded[0]} x {padded[1]}, but got {output[0]} x {output[1]}")
        self.output_shape = (channels, *output)
        self._smoothing = reference.gaussian_half(self.elastic_sigma, max(output))

    def set_epoch(self, epoch: int) -> None:
        """Make the distortions those of `epoch`, from 0 to 2**32 - 1.

        Raises:
            ValueError: another number.
            TypeError: not an int.
        """
        self.epoch = _integer(epoch, "epoch", 0, 2**32 - 1)

    def __call__(self, positions: Tensor, x: Tensor) -> None:
        """Distort examples x in place, as `Network.SGD` asks of its `augment`.

        Args:
            positions: (n,) int64, of the examples in the training data.
            x: (n, features) or (n, channels, height, width).

        Raises:
            ValueError: a crop, after which images have another shape; a negative position.
            RuntimeError, TypeError: as `apply` does.
        """
        if self.output_shape != self.image_shape:
            raise ValueError(
                f"expected distorted images of the shape {self.image_shape}, to take the place of the images, but they "
                f"are of the shape {self.output_shape}; `apply` makes a new tensor"
            )
        images = self._checked(x, positions)
        if x.device.type == "cpu" and x.is_contiguous():
            self._run(images, positions, images)
        else:
            x.copy_(self._distorted(images, positions).view(x.shape))

    def apply(self, images: Tensor, positions: Tensor) -> Tensor:
        """Distorted copies (n, *output_shape) of images.

        Args:
            images: (n, channels, height, width) or (n, features); float32, float64, bfloat16 or float16. Coordinates
                and weights are computed in float32, in float64 for float64.
            positions: (n,) int64, of the images in the training data.

        Raises:
            RuntimeError: a wrong shape or dtype, or images that require a gradient, of which there is none.
            ValueError: a negative position.
            TypeError: something other than tensors.
        """
        return self._distorted(self._checked(images, positions), positions)

    def _checked(self, x: Tensor, positions: Tensor) -> Tensor:
        """x as images (n, channels, height, width)."""
        for name, value in (("examples", x), ("positions", positions)):
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {name} to be a tensor, but got {type(value).__name__}")
        features = math.prod(self.image_shape)
        if x.shape[1:] not in ((features,), self.image_shape):
            raise RuntimeError(
                f"expected examples of shape (n, {features}) or (n, {', '.join(map(str, self.image_shape))}), but got "
                f"{tuple(x.shape)}"
            )
        if x.dtype not in _DTYPES:
            raise RuntimeError(
                f"expected examples of dtype float32, float64, bfloat16 or float16, but got {_name(x.dtype)}"
            )
        if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
            raise RuntimeError(
                f"expected positions of shape ({len(x)},) and dtype int64, but got {tuple(positions.shape)} and "
                f"{_name(positions.dtype)}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("expected examples that require no gradient: a random distortion has no derivative")
        return x.reshape(len(x), *self.image_shape)

    def _distorted(self, images: Tensor, positions: Tensor) -> Tensor:
        if images.device.type == "cpu":
            output = images.new_empty(len(images), *self.output_shape)
            self._run(images.contiguous(), positions, output)
            return output
        negative = (positions < 0).nonzero()
        if len(negative) > 0:
            index = int(negative[0])
            raise ValueError(
                f"expected positions that are not negative, but got {int(positions[index])} at index {index}"
            )
        return reference.random_distortion(
            images, positions, shift=self.shift, rotation=self.rotation, scale=self.scale, shear=self.shear,
            elastic=self.elastic, elastic_sigma=self.elastic_sigma, crop=self.crop, crop_padding=self.crop_padding,
            flip=self.flip, seed=self.seed, epoch=self.epoch,
        )  # fmt: skip

    def _run(self, images: Tensor, positions: Tensor, output: Tensor) -> None:
        most = (*self.shift, math.radians(self.rotation), self.scale, self.shear, self.elastic)
        _C.random_distortion(
            images, positions.cpu().contiguous(), output, self.seed % 2**64, self.epoch, most, self._smoothing,
            self.crop_padding, self.flip,
        )  # fmt: skip

    def __repr__(self) -> str:
        settings = [
            f"{name}={getattr(self, name)!r}"
            for name, parameter in inspect.signature(RandomDistortion).parameters.items()
            if name not in ("image_shape", "seed") and getattr(self, name) not in (parameter.default, (0.0, 0.0))
        ]
        return f"{type(self).__name__}({', '.join([repr(self.image_shape), *settings, f'seed={self.seed}'])})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: float, name: str, most: float = math.inf, below: float = math.inf) -> float:
    """`value` as a float from 0 to `most`, below `below`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, but got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # of an int
        number = math.inf
    if not (0.0 <= number <= most and number < below):
        expected = f"from 0 to {most:g}" if most < math.inf else f"from 0 to below {below:g}"
        if most == below == math.inf:
            expected = "finite and not negative"
        raise ValueError(f"expected {name} to be {expected}, but got {value}")
    return number


def _integer(value: int, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be an int, but got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"expected {name} to be from {least} to {most}, but got {value}")
    return int(value)


def _sizes(value: Sequence[int], name: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"expected {name} to be ({', '.join(axes)}), but got {value!r}")
    if len(value) != len(axes):
        raise ValueError(f"expected {name} to be ({', '.join(axes)}), but got {value!r}")
    return tuple(_integer(size, f"{axis} of {name}", 1, _MOST_PIXELS) for size, axis in zip(value, axes, strict=True))
