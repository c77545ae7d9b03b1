"""The layers of the program network3.py of the book "Neural Networks and Deep Learning" (chapter 6).

    ConvPoolLayer        x (N, C, H, W) -> convolution, max-pooling, + b, activation -> (N, K, PH, PW)
    FullyConnectedLayer  x (N, n_in)    -> dropout, x w + b, activation              -> (N, n_out)
    SoftmaxLayer         x (N, n_in)    -> dropout, x w + b, softmax                 -> (N, n_out)

Each layer is a `torch.nn.Module` whose parameters are called `w` and `b`, as in the book. In training mode
dropout multiplies by a mask and does not rescale; in inference mode the input is multiplied by 1 - p_dropout
instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

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


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, but got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but got {value}")
    return value


def _check_counts(name: str, values: Sequence[int], length: int) -> tuple[int, ...]:
    values = tuple(values)
    if len(values) != length:
        raise ValueError(f"{name} must have {length} entries, but got {values}")
    return tuple(_check_count(f"{name}[{i}]", value) for i, value in enumerate(values))


def _check_activation(activation_fn: Activation) -> Activation:
    if not callable(activation_fn):
        raise TypeError(f"activation_fn must be a function of a tensor, but got {activation_fn!r}")
    return activation_fn


def _check_probability(p_dropout: float) -> float:
    if not 0.0 <= p_dropout <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p_dropout}")
    return p_dropout


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
    with as many numbers, to (N, n_out). Networks with one are trained layer by layer.

    Attributes:
        w, b: weights and biases, `torch.nn.Parameter`.
        params: [w, b].
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


class ConvPoolLayer(Layer):
    """Convolution (valid, stride 1), max-pooling, bias and activation as one fused operator.

    Equivalent to ``activation_fn(max_pool2d(conv2d(x, w), poolsize) + b)``; rows and columns that do not fill
    a pooling window are left out. There is no dropout in a convolutional layer.

    Args:
        filter_shape: (filters, input maps, height, width), the shape of `w`.
        image_shape: (mini-batch, input maps, height, width) of the input.
        poolsize: (height, width) of the pooling window, which is also its stride.
        activation_fn: `sigmoid`, `tanh`, `ReLU`, `linear`, or any differentiable function of a tensor.
        init: "book", "lecun" or "he"; fan-in is input maps * height * width, fan-out is
            filters * height * width // (pooling window).
        dtype, device: of `w` and `b`; PyTorch's defaults if None.
        generator: source of the initial values; PyTorch's default if None.

    Raises:
        ValueError: the shapes disagree, or the output would be empty.
    """

    def __init__(
        self,
        filter_shape: Sequence[int],
        image_shape: Sequence[int],
        poolsize: Sequence[int] = (2, 2),
        activation_fn: Activation = sigmoid,
        *,
        init: str = "book",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.filter_shape = _check_counts("filter_shape", filter_shape, 4)
        self.image_shape = _check_counts("image_shape", image_shape, 4)
        self.poolsize = _check_counts("poolsize", poolsize, 2)
        self.activation_fn = _check_activation(activation_fn)
        filters, maps, *filter_size = self.filter_shape
        _, image_maps, *image_size = self.image_shape
        if maps != image_maps:
            raise ValueError(
                f"filter_shape {self.filter_shape} is for {maps} input maps, "
                f"but image_shape {self.image_shape} has {image_maps}"
            )
        pooled_size = [(i - f + 1) // p for i, f, p in zip(image_size, filter_size, self.poolsize)]
        if min(pooled_size) < 1:
            raise ValueError(
                f"filters of {filter_size[0]}x{filter_size[1]} and a pooling window of "
                f"{self.poolsize[0]}x{self.poolsize[1]} leave nothing of an image of "
                f"{image_size[0]}x{image_size[1]}"
            )
        self.output_shape = (filters, *pooled_size)
        self.n_in = math.prod(self.image_shape[1:])
        self.n_out = math.prod(self.output_shape)
        fan_in = maps * math.prod(filter_size)
        fan_out = max(1, filters * math.prod(filter_size) // math.prod(self.poolsize))
        self.w, self.b = _initial_parameters(
            self.filter_shape, filters, fan_in, fan_out, init, dtype, device, generator
        )

    def forward(self, inpt: Tensor) -> Tensor:
        """(N, maps, height, width), or any shape (N, ...) with as many numbers, -> (N, *output_shape)."""
        images = inpt.reshape(inpt.shape[0], *self.image_shape[1:])
        activation, remaining_fn = _split_activation(self.activation_fn)
        return remaining_fn(
            functional.conv_max_pool2d(images, self.w, self.b, pool_size=self.poolsize, activation=activation)
        )

    def _lowered(self) -> list[lowering.Operation]:
        activation = _fused_activation(self.activation_fn)
        return [
            lowering.ConvMaxPool2d(
                self.w, self.b, pool_size=self.poolsize, activation=activation, image_size=self.image_shape[1:]
            )
        ]

    def extra_repr(self) -> str:
        return (
            f"filter_shape={self.filter_shape}, image_shape={self.image_shape}, poolsize={self.poolsize}, "
            f"activation_fn={_name(self.activation_fn)}"
        )


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
