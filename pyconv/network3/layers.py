"""The layers of the program network3.py of the book "Neural Networks and Deep Learning" (chapter 6), and two more.

    ConvPoolLayer        x (N, C, H, W) -> convolution, pooling, + b, activation -> (N, K, PH, PW)
    FullyConnectedLayer  x (N, n_in)    -> dropout, x w + b, activation          -> (N, n_out)
    SoftmaxLayer         x (N, n_in)    -> dropout, x w + b, softmax             -> (N, n_out)

    ConvLayer            x (N, C, H, W) -> convolution, + b, activation          -> (N, K, OH, OW)
    PoolLayer            x (N, C, H, W) -> pooling                               -> (N, C, PH, PW)

Each layer is a `torch.nn.Module` whose parameters are called `w` and `b`, as in the book; a PoolLayer has none. In
training mode dropout multiplies by a mask and does not rescale; in inference mode the input is multiplied by
1 - p_dropout instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyconv import functional, lowering

Activation = Callable[[Tensor], Tensor]

# ----------------------------------------------------------------------------------------------------------
# Activation functions
# ----------------------------------------------------------------------------------------------------------


def linear(z: Tensor) -> Tensor:
    """z itself."""
    return z


def ReLU(z: Tensor) -> Tensor:
    """max(0, z)."""
    return torch.relu(z)


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + exp(-z))."""
    return torch.sigmoid(z)


def tanh(z: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(z)


_FUSED_NAMES: dict[Activation, str] = {
    linear: "none",
    ReLU: "relu",
    sigmoid: "sigmoid",
    tanh: "tanh",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}
"""The activation functions that the fused operators apply themselves, and what they call them."""


def _split_activation(activation_fn: Activation) -> tuple[str, Activation]:
    """The activation to ask of the fused operator, and the function to apply to its output."""
    for fused_fn, name in _FUSED_NAMES.items():
        if activation_fn is fused_fn:  # compared by identity: a callable of the user's need not be hashable
            return name, linear
    return "none", activation_fn


def _fused_activation(activation_fn: Activation) -> str:
    activation, remaining_fn = _split_activation(activation_fn)
    if remaining_fn is not linear:
        raise lowering.UnsupportedError(f"the activation function {_name(activation_fn)} is not among the fused ones")
    return activation


# ----------------------------------------------------------------------------------------------------------
# Shared by the layers
# ----------------------------------------------------------------------------------------------------------


def dropout_layer(layer: Tensor, p_dropout: float) -> Tensor:
    """Drop each element of `layer` with probability `p_dropout`; the others keep their value."""
    return functional.dropout(layer, p_dropout, True, inverted=False)


def _check_count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, but got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but got {value}")
    return value


def _check_counts(name: str, values: Sequence[int], length: int, least: int = 1) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of {length} ints, but got {values!r}")
    values = tuple(values)
    if len(values) != length:
        raise ValueError(f"{name} must have {length} entries, but got {values}")
    return tuple(_check_count(f"{name}[{i}]", value, least) for i, value in enumerate(values))


def _check_pair(name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, ...]:
    """(height, width); an int stands for both."""
    if isinstance(value, int):
        return (_check_count(name, value, least),) * 2
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be an int or a pair of ints, but got {value!r}")
    return _check_counts(name, value, 2, least)


def _check_activation(activation_fn: Activation) -> Activation:
    if not callable(activation_fn):
        raise TypeError(f"activation_fn must be a function of a tensor, but got {activation_fn!r}")
    return activation_fn


def _check_probability(p_dropout: float) -> float:
    if not 0.0 <= p_dropout <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p_dropout}")
    return p_dropout


def _output_size(
    size: Sequence[int], window: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0)
) -> tuple[int, ...]:
    """How many whole windows fit in either direction."""
    return tuple((n + 2 * p - w) // s + 1 for n, w, s, p in zip(size, window, stride, padding, strict=True))


def _check_lowerable(pooling: str) -> None:
    if pooling != "max":
        raise lowering.UnsupportedError("L2 pooling is not among the operations of a plan")


def _check_pooling(pooling: str) -> str:
    if pooling not in ("max", "l2"):
        raise ValueError(f"pooling must be 'max' or 'l2', but got {pooling!r}")
    return pooling


def _l2_pool2d(images: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The square roots of the sums of the squares of the windows of images (N, C, H, W): (N, C, PH, PW).

    Where all of a window is zero, so are all derivatives; those of the square root by itself are infinite there, and
    times zero NaN. (`torch.nn.functional.lp_pool2d` lets them arise, and has a NaN as its forward-mode derivative.)
    """
    half = images.dtype in (torch.float16, torch.bfloat16)  # whose squares overflow or lose half the digits
    squares = (images.float() if half else images).square()
    sums = F.avg_pool2d(squares, size, stride, divisor_override=1)
    zero = sums == 0
    return sums.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0).to(images.dtype)


def _initial_parameters(
    shape: tuple[int, ...],
    biases: int,
    fan_in: int,
    fan_out: int,
    init: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights and biases of a layer before training.

    ========  ==========================  ==================
    init      weights ~ N(0, variance)    biases
    ========  ==========================  ==================
    "book"    1 / fan_out                 N(0, 1)
    "lecun"   1 / fan_in                  N(0, 1)
    "he"      2 / fan_in (for ReLU)       0
    ========  ==========================  ==================

    "book" is what network3.py does; its author notes that 1 / fan_in (LeCun et al., "Efficient BackProp",
    1998) is what he had meant. "he" is He et al., "Delving Deep into Rectifiers", 2015.
    """
    variances = {"book": 1.0 / fan_out, "lecun": 1.0 / fan_in, "he": 2.0 / fan_in}
    if init not in variances:
        raise ValueError(f"init must be one of {', '.join(map(repr, variances))}, but got {init!r}")
    w = torch.empty(shape, dtype=dtype, device=device).normal_(
        0.0, math.sqrt(variances[init]), generator=generator
    )
    b = torch.empty(biases, dtype=dtype, device=device)
    b = b.zero_() if init == "he" else b.normal_(0.0, 1.0, generator=generator)
    return nn.Parameter(w), nn.Parameter(b)


class Layer(nn.Module):
    """What the layers of a `Network` have in common.

    A layer of your own sets `n_in`, `n_out`, `w` and `b`, and has a `forward` from (N, n_in), or any shape (N, ...)
    with as many numbers, to (N, n_out). One without parameters has the class attribute ``params = []`` instead of `w`
    and `b`. Networks with a layer of your own are trained layer by layer.

    Attributes:
        w, b: weights and biases, `torch.nn.Parameter`.
        params: [w, b], or [].
        n_in, n_out: how many numbers the layer takes and gives for one example.
        p_dropout: probability with which an input is dropped in training.
    """

    w: nn.Parameter
    b: nn.Parameter
    n_in: int
    n_out: int
    p_dropout: float = 0.0
    _mini_batch: tuple[int, int] | None = None
    """See `rows_of_mini_batch`."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator
        self._evaluated: Tensor | None = None

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.w, self.b]

    def _lowered(self) -> list[lowering.Operation]:
        """What the layer computes in training, for a compiled plan.

        Raises:
            UnsupportedError: a plan cannot express it.
        """
        raise lowering.UnsupportedError(f"{type(self).__name__} says nothing of what it computes")

    def _dropped_and_multiplied(self) -> list[lowering.Operation]:
        return [
            lowering.Flatten(),
            lowering.BiasActDropout(p=self.p_dropout, inverted=False, generator=self.generator),
            lowering.Dense(self.w, inputs_are_rows=True),
        ]

    def _drop(self, inpt: Tensor) -> Tensor:
        """The rows (N, n_in) of the input after the book's dropout."""
        inpt = inpt.flatten(1)
        if self.p_dropout == 0.0:
            return inpt
        if self.training and self._mini_batch is not None:
            # A mask depends on an element's position in the whole mini-batch, whose other rows may be anything.
            begin, count = self._mini_batch
            rows = slice(begin, begin + len(inpt))
            whole = F.pad(inpt, (0, 0, begin, count - rows.stop))
            return functional.dropout(whole, self.p_dropout, inverted=False, generator=self.generator)[rows]
        return functional.dropout(
            inpt, self.p_dropout, self.training, inverted=False, generator=self.generator
        )

    def _remember(self, output: Tensor) -> Tensor:
        """Keep an inference's output (N, n_out) for `y_out`."""
        if not self.training:
            self._evaluated = output.detach()
        return output

    @property
    def y_out(self) -> Tensor:
        """The predicted classes (N,) int64 of the mini-batch that was evaluated last, in inference mode."""
        if self._evaluated is None:
            raise RuntimeError(f"{type(self).__name__} has no y_out: it has not evaluated a mini-batch yet")
        return self._evaluated.argmax(dim=1)

    def accuracy(self, y: Tensor) -> float:
        """The fraction of the mini-batch that was evaluated last whose label `y` (N,) is predicted."""
        y_out = self.y_out
        if y.shape != y_out.shape:
            raise RuntimeError(f"expected y of shape {tuple(y_out.shape)}, but got {tuple(y.shape)}")
        return (y_out == y).double().mean().item()


@contextlib.contextmanager
def rows_of_mini_batch(layers: Iterable[nn.Module], begin: int, count: int) -> Iterator[None]:
    """Within it the inputs of `layers` are the rows from `begin` on of a mini-batch of `count` examples, and get the
    dropout masks that these rows get among all."""
    layers = [layer for layer in layers if isinstance(layer, Layer)]
    try:
        for layer in layers:
            layer._mini_batch = begin, count
        yield
    finally:
        for layer in layers:
            layer._mini_batch = None


# ----------------------------------------------------------------------------------------------------------
# The layers
# ----------------------------------------------------------------------------------------------------------


class ImageLayer(Layer):
    """What the layers of images have in common.

    Attributes:
        image_shape: (mini-batch, maps, height, width) of the input.
        output_shape: (maps, height, width) of the output for one image.
    """

    image_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def _set_output_shape(self, maps: int, size: tuple[int, ...], windows: str) -> None:
        if min(size) < 1:
            height, width = self.image_shape[2:]
            raise ValueError(f"{windows} leave nothing of an image of {height}x{width}")
        self.output_shape = (maps, *size)
        self.n_in = math.prod(self.image_shape[1:])
        self.n_out = math.prod(self.output_shape)

    def _images(self, inpt: Tensor) -> Tensor:
        return inpt.reshape(inpt.shape[0], *self.image_shape[1:])

    def _options(self) -> dict[str, Any]:
        """The arguments that go beyond the book's and differ from their defaults, by name."""
        defaults = {
            "stride": (1, 1), "padding": (0, 0), "pool_stride": getattr(self, "poolsize", None), "groups": 1,
            "pooling": "max",
        }  # fmt: skip
        values = {name: getattr(self, name, default) for name, default in defaults.items()}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def _options_repr(self) -> str:
        return "".join(f", {name}={value!r}" for name, value in self._options().items())


class _ConvolutionalLayer(ImageLayer):
    """Convolution, pooling, bias and activation; without pooling, the window is one position."""

    def __init__(
        self,
        filter_shape: Sequence[int],
        image_shape: Sequence[int],
        poolsize: int | Sequence[int],
        activation_fn: Activation,
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        pool_stride: int | Sequence[int] | None,
        groups: int,
        pooling: str,
        init: str,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(generator)
        self.filter_shape = _check_counts("filter_shape", filter_shape, 4)
        self.image_shape = _check_counts("image_shape", image_shape, 4)
        self.poolsize = _check_pair("poolsize", poolsize)
        self.activation_fn = _check_activation(activation_fn)
        self.stride = _check_pair("stride", stride)
        self.padding = _check_pair("padding", padding, least=0)
        self.pool_stride = self.poolsize if pool_stride is None else _check_pair("pool_stride", pool_stride)
        self.groups = _check_count("groups", groups)
        self.pooling = _check_pooling(pooling)
        filters, maps, *filter_size = self.filter_shape
        if maps * groups != self.image_shape[1]:
            in_groups = f" in {groups} groups" if groups > 1 else ""
            raise ValueError(
                f"filter_shape {self.filter_shape} is for {maps * groups} input maps{in_groups}, "
                f"but image_shape {self.image_shape} has {self.image_shape[1]}"
            )
        if filters % groups != 0:
            raise ValueError(f"expected the filters to be a multiple of groups, but got {filters} and {groups}")
        convolved_size = _output_size(self.image_shape[2:], filter_size, self.stride, self.padding)
        windows = f"filters of {filter_size[0]}x{filter_size[1]}"
        if self.padding != (0, 0):
            windows += f" with padding {self.padding}"
        if self.poolsize != (1, 1):
            windows += f" and a pooling window of {self.poolsize[0]}x{self.poolsize[1]}"
        self._set_output_shape(filters, _output_size(convolved_size, self.poolsize, self.pool_stride), windows)
        fan_in = maps * math.prod(filter_size)
        # How many outputs an input reaches. Of a window only the maximum counts, and there is one window for so many
        # positions as pool_stride says; the book divides by the window, which is the same where windows do not overlap.
        fan_out = filters // groups * math.prod(filter_size) // math.prod(self.stride + self.pool_stride)
        self.w, self.b = _initial_parameters(
            self.filter_shape, filters, fan_in, max(1, fan_out), init, dtype, device, generator
        )

    def forward(self, inpt: Tensor) -> Tensor:
        """(N, maps, height, width), or any shape (N, ...) with as many numbers, -> (N, *output_shape)."""
        convolve = functools.partial(
            functional.conv_max_pool2d, self._images(inpt), self.w, stride=self.stride, padding=self.padding,
            groups=self.groups,
        )  # fmt: skip
        if self.pooling == "l2":
            pooled = _l2_pool2d(convolve(pool_size=1), self.poolsize, self.pool_stride)
            return self.activation_fn(pooled + self.b[:, None, None])
        activation, remaining_fn = _split_activation(self.activation_fn)
        return remaining_fn(
            convolve(bias=self.b, pool_size=self.poolsize, pool_stride=self.pool_stride, activation=activation)
        )

    def _lowered(self) -> list[lowering.Operation]:
        _check_lowerable(self.pooling)
        return [
            lowering.ConvMaxPool2d(
                self.w, self.b, self.stride, self.padding, groups=self.groups, pool_size=self.poolsize,
                pool_stride=self.pool_stride, activation=_fused_activation(self.activation_fn),
                image_size=self.image_shape[1:],
            )
        ]  # fmt: skip


class ConvPoolLayer(_ConvolutionalLayer):
    """Convolution, pooling, bias and activation, with max-pooling as one fused operator.

    Equivalent to ``activation_fn(max_pool2d(conv2d(x, w, None, stride, padding, groups=groups), poolsize, pool_stride)
    + b)``; rows and columns that do not fill a pooling window are left out. There is no dropout in a convolutional
    layer. What comes after `activation_fn` goes beyond the book's program, and its defaults are what that does.

    Args:
        filter_shape: (filters, input maps / groups, height, width), the shape of `w`.
        image_shape: (mini-batch, input maps, height, width) of the input.
        poolsize: of the pooling window, an int or (height, width).
        activation_fn: `sigmoid`, `tanh`, `ReLU`, `linear`, or any differentiable function of a tensor.
        stride: of the convolution, an int or (height, width).
        padding: rows and columns of zeros on each side of an image, an int or (height, width).
        pool_stride: of the pooling windows, an int or (height, width); `poolsize` if None. Less makes them overlap.
        groups: number of groups that the input maps and the filters are split into.
        pooling: "max", or "l2" for the square root of the sum of the squares of a window, whose gradient is 0 where the
            whole window is; networks with "l2" are trained layer by layer.
        init: "book", "lecun" or "he"; fan-in is filter_shape[1] * height * width, fan-out is
            filters / groups * height * width // (the product of stride and pool_stride over both directions).
        dtype, device: of `w` and `b`; PyTorch's defaults if None.
        generator: source of the initial values; PyTorch's default if None.

    Raises:
        ValueError: the shapes disagree, a number is out of range, or the output would be empty.
        TypeError: something other than an int as a size.
    """

    def __init__(
        self,
        filter_shape: Sequence[int],
        image_shape: Sequence[int],
        poolsize: int | Sequence[int] = (2, 2),
        activation_fn: Activation = sigmoid,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        pool_stride: int | Sequence[int] | None = None,
        groups: int = 1,
        pooling: str = "max",
        init: str = "book",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            filter_shape, image_shape, poolsize, activation_fn, stride, padding, pool_stride, groups, pooling, init,
            dtype, device, generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"filter_shape={self.filter_shape}, image_shape={self.image_shape}, poolsize={self.poolsize}, "
            f"activation_fn={_name(self.activation_fn)}{self._options_repr()}"
        )


class ConvLayer(_ConvolutionalLayer):
    """Convolution, bias and activation as one fused operator: ``activation_fn(conv2d(x, w, b, stride, padding))``.

    A plan that training is compiled to makes one operation of it and a :class:`PoolLayer` with max-pooling behind it.

    Args:
        filter_shape: (filters, input maps / groups, height, width), the shape of `w`.
        image_shape: (mini-batch, input maps, height, width) of the input.
        activation_fn, stride, padding, groups, init, dtype, device, generator: as in :class:`ConvPoolLayer`, with a
            pool_stride of 1 in the fan-out.

    Raises:
        ValueError: the shapes disagree, a number is out of range, or the output would be empty.
        TypeError: something other than an int as a size.
    """

    def __init__(
        self,
        filter_shape: Sequence[int],
        image_shape: Sequence[int],
        activation_fn: Activation = sigmoid,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        groups: int = 1,
        init: str = "book",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            filter_shape, image_shape, 1, activation_fn, stride, padding, None, groups, "max", init, dtype, device,
            generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"filter_shape={self.filter_shape}, image_shape={self.image_shape}, "
            f"activation_fn={_name(self.activation_fn)}{self._options_repr()}"
        )


class PoolLayer(ImageLayer):
    """Pooling alone; it has no parameters. Rows and columns that do not fill a window are left out.

    Training is compiled where it has max-pooling and stands behind a :class:`ConvLayer`.

    Args:
        image_shape: (mini-batch, maps, height, width) of the input.
        poolsize, pool_stride, pooling: as in :class:`ConvPoolLayer`.

    Raises:
        ValueError: a number is out of range, or the output would be empty.
        TypeError: something other than an int as a size.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        poolsize: int | Sequence[int] = (2, 2),
        *,
        pool_stride: int | Sequence[int] | None = None,
        pooling: str = "max",
    ) -> None:
        super().__init__()
        self.image_shape = _check_counts("image_shape", image_shape, 4)
        self.poolsize = _check_pair("poolsize", poolsize)
        self.pool_stride = self.poolsize if pool_stride is None else _check_pair("pool_stride", pool_stride)
        self.pooling = _check_pooling(pooling)
        _, maps, *image_size = self.image_shape
        windows = f"pooling windows of {self.poolsize[0]}x{self.poolsize[1]}"
        self._set_output_shape(maps, _output_size(image_size, self.poolsize, self.pool_stride), windows)

    @property
    def params(self) -> list[nn.Parameter]:
        return []

    def forward(self, inpt: Tensor) -> Tensor:
        """(N, maps, height, width), or any shape (N, ...) with as many numbers, -> (N, *output_shape)."""
        pool = _l2_pool2d if self.pooling == "l2" else F.max_pool2d
        return pool(self._images(inpt), self.poolsize, self.pool_stride)

    def _lowered_with(self, before: Layer | None) -> list[lowering.Operation]:
        """What the layer `before` and this one behind it compute together.

        Raises:
            UnsupportedError: a plan cannot express it.
        """
        _check_lowerable(self.pooling)
        if type(before) is not ConvLayer:
            place = "is the first layer" if before is None else f"stands behind {type(before).__name__}"
            raise lowering.UnsupportedError(f"{place}; expected it behind a ConvLayer")
        if before.output_shape != self.image_shape[1:]:
            raise lowering.UnsupportedError(
                f"image_shape {self.image_shape} is for maps {self.image_shape[1:]}, but the ConvLayer in front of it "
                f"gives {before.output_shape}"
            )
        # The plan's operation pools before bias and activation, which is the same: the fused activations are monotone.
        (convolution,) = before._lowered()
        return [dataclasses.replace(convolution, pool_size=self.poolsize, pool_stride=self.pool_stride)]

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, poolsize={self.poolsize}{self._options_repr()}"


class FullyConnectedLayer(Layer):
    """``activation_fn(dropout(x) w + b)``, in inference ``activation_fn((1 - p_dropout) x w + b)``.

    Args:
        n_in, n_out: `w` has the shape (n_in, n_out).
        activation_fn: `sigmoid`, `tanh`, `ReLU`, `linear`, or any differentiable function of a tensor.
        p_dropout: probability with which an input is dropped in training.
        init: "book", "lecun" or "he"; fan-in is n_in, fan-out is n_out.
        dtype, device: of `w` and `b`; PyTorch's defaults if None.
        generator: source of the initial values and of the dropout masks; PyTorch's default if None.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        activation_fn: Activation = sigmoid,
        p_dropout: float = 0.0,
        *,
        init: str = "book",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.n_in = _check_count("n_in", n_in)
        self.n_out = _check_count("n_out", n_out)
        self.activation_fn = _check_activation(activation_fn)
        self.p_dropout = _check_probability(p_dropout)
        self.w, self.b = _initial_parameters(
            (n_in, n_out), n_out, n_in, n_out, init, dtype, device, generator
        )

    def forward(self, inpt: Tensor) -> Tensor:
        """(N, n_in), or any shape (N, ...) with as many numbers, -> (N, n_out)."""
        activation, remaining_fn = _split_activation(self.activation_fn)
        z = self._drop(inpt) @ self.w
        return self._remember(remaining_fn(functional.bias_act_dropout(z, self.b, activation=activation)))

    def _lowered(self) -> list[lowering.Operation]:
        activation = _fused_activation(self.activation_fn)
        return [*self._dropped_and_multiplied(), lowering.BiasActDropout(self.b, activation)]

    def extra_repr(self) -> str:
        return (
            f"n_in={self.n_in}, n_out={self.n_out}, activation_fn={_name(self.activation_fn)}, "
            f"p_dropout={self.p_dropout}"
        )


class SoftmaxLayer(Layer):
    """``softmax(dropout(x) w + b)``, in inference ``softmax((1 - p_dropout) x w + b)``.

    `w` (n_in, n_out) and `b` (n_out,) start at zero.

    Args:
        n_in, n_out: n_out is the number of classes.
        p_dropout: probability with which an input is dropped in training.
        dtype, device: of `w` and `b`; PyTorch's defaults if None.
        generator: source of the dropout masks; PyTorch's default if None.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        p_dropout: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.n_in = _check_count("n_in", n_in)
        self.n_out = _check_count("n_out", n_out)
        self.p_dropout = _check_probability(p_dropout)
        self.w = nn.Parameter(torch.zeros(n_in, n_out, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(n_out, dtype=dtype, device=device))

    def logits(self, inpt: Tensor) -> Tensor:
        """(N, n_in), or any shape (N, ...) with as many numbers, -> (N, n_out), before the softmax."""
        return torch.addmm(self.b, self._drop(inpt), self.w)

    def forward(self, inpt: Tensor) -> Tensor:
        """(N, n_in), or any shape (N, ...) with as many numbers, -> probabilities (N, n_out)."""
        return self._remember(torch.softmax(self.logits(inpt), dim=1))

    def cost(self, inpt: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood cost -mean log p[y] of `inpt` (N, n_in) with the labels `y` (N,)."""
        # From the logits, since the logarithm of a probability that underflowed would be -inf.
        return F.cross_entropy(self.logits(inpt), y)

    def _lowered(self) -> list[lowering.Operation]:
        return [*self._dropped_and_multiplied(), lowering.BiasActDropout(self.b)]

    def extra_repr(self) -> str:
        return f"n_in={self.n_in}, n_out={self.n_out}, p_dropout={self.p_dropout}"


def _name(activation_fn: Activation) -> str:
    return getattr(activation_fn, "__name__", repr(activation_fn))
