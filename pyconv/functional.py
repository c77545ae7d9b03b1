"""The operators as functions. They check and normalise arguments; the arithmetic is in the extension."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from pyconv import _C

ACTIVATIONS = ("none", "relu", "sigmoid", "tanh", "gelu", "silu")


def _int64(value: int, name: str) -> int:
    # The schema would call it no integer.
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"conv_max_pool2d: expected {name} to fit 64 bits, but got {value}")
    return value


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    if isinstance(value, (int, torch.SymInt)):
        return (_int64(value, name),) * 2
    if isinstance(value, (tuple, list, torch.Size)) and all(isinstance(v, (int, torch.SymInt)) for v in value):
        if len(value) == 1:
            return (_int64(value[0], name),) * 2
        if len(value) == 2:
            return (_int64(value[0], name), _int64(value[1], name))
        raise RuntimeError(f"conv_max_pool2d: expected {name} to be an int or a pair of ints, but got {value!r}")
    raise TypeError(f"conv_max_pool2d: expected {name} to be an int or a pair of ints, but got {value!r}")


def _padding_sides(
    padding: int | Sequence[int] | str, kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Padding at top, bottom, left and right. 'same' puts an odd element at the far side, as conv2d does."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise RuntimeError(f"Invalid padding string: {padding!r}; expected 'same' or 'valid'")
        if stride != (1, 1):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        total_h, total_w = (
            _int64(d * (size - 1), "the 'same' padding of a dilated filter")
            for d, size in zip(dilation, kernel, strict=True)
        )
        return (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
    h, w = _pair(padding, "padding")
    return (h, h, w, w)


def _schema_arguments(
    kernel: Sequence[int],
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    pool_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None,
    pool_padding: int | Sequence[int],
    pool_dilation: int | Sequence[int],
    ceil_mode: bool,
    activation: str,
) -> tuple[Any, ...]:
    """The arguments behind the tensors, in the schema's order and form. `kernel`: height and width of the filters."""
    stride = _pair(stride, "stride")
    dilation = _pair(dilation, "dilation")
    pool_size = _pair(pool_size, "pool_size")
    return (
        stride,
        _padding_sides(padding, kernel, stride, dilation),
        dilation,
        _int64(groups, "groups"),
        pool_size,
        pool_size if pool_stride is None else _pair(pool_stride, "pool_stride"),
        _pair(pool_padding, "pool_padding"),
        _pair(pool_dilation, "pool_dilation"),
        ceil_mode,
        activation,
    )


def _check_tensor(value: object, name: str, operator: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _check_activation(activation: object, operator: str) -> None:
    if not isinstance(activation, str):
        raise TypeError(f"{operator}(): argument 'activation' must be str, not {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but got {activation!r}")


def conv_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    activation: str = "none",
) -> Tensor:
    """Convolution, max-pooling, bias and activation in one pass.

    Equivalent to ``activation(max_pool2d(conv2d(input, weight, None, stride, padding, dilation, groups), pool_size,
    pool_stride, pool_padding, pool_dilation, ceil_mode) + bias)``. For the monotone activations (none, relu, sigmoid,
    tanh) this is also ``max_pool2d(activation(conv2d(input, weight, bias)))``. Neither the convolution's output nor
    64-bit indices are ever written: training saves one byte per pooled element.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16. Sums are accumulated in float32
            (float64 for float64).
        weight: (K, C / groups, R, S), dtype and device of input.
        bias: (K,), or None.
        stride, padding, dilation: of the convolution; an int or a pair (height, width). padding may also be 'valid',
            or 'same' where stride is 1.
        groups: number of groups that C and K are split into.
        pool_size, pool_stride, pool_padding, pool_dilation: of the pooling window, in convolution outputs; pool_stride
            None means pool_size. Padding is never chosen as the maximum; a window without any position gives
            -inf before the activation and has no gradient.
        ceil_mode: whether a partial last window counts.
        activation: 'none', 'relu', 'sigmoid', 'tanh', 'gelu' (with erf) or 'silu'.

    Returns:
        (N, K, PH, PW), or (K, PH, PW) for an unbatched input; in channels_last memory format iff input or weight is.

    Raises:
        RuntimeError: for a shape, dtype or device that conv2d or max_pool2d refuses, in their words.
        ValueError: for an unknown activation.
        TypeError: for an argument of a wrong Python type.
    """
    if not torch.compiler.is_compiling():
        output = _C.conv_max_pool2d(
            input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_dilation,
            ceil_mode, activation,
        )  # fmt: skip
        if output is not NotImplemented:
            return output
    # Tracers and subclasses need the operator itself, and an argument that is none must be named.
    _check_tensor(input, "input", "conv_max_pool2d")
    _check_tensor(weight, "weight", "conv_max_pool2d")
    if bias is not None:
        _check_tensor(bias, "bias", "conv_max_pool2d")
    _check_activation(activation, "conv_max_pool2d")
    if not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"conv_max_pool2d(): argument 'groups' must be int, not {type(groups).__name__}")
    if not isinstance(ceil_mode, (bool, torch.SymBool)):
        raise TypeError(f"conv_max_pool2d(): argument 'ceil_mode' must be bool, not {type(ceil_mode).__name__}")
    if padding == "same" and weight.dim() != 4:
        raise RuntimeError(f"conv_max_pool2d: expected weight of 4 dimensions, but got size {list(weight.shape)}")
    return torch.ops.pyconv.conv_max_pool2d(
        input,
        weight,
        bias,
        *_schema_arguments(
            weight.shape[2:],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            pool_size=pool_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            pool_dilation=pool_dilation,
            ceil_mode=ceil_mode,
            activation=activation,
        ),
    )


# ---- dropout -----------------------------------------------------------------------------------------------


def _check_dropout_arguments(p: object, generator: object, operator: str) -> None:
    if not isinstance(p, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{operator}(): argument 'p' must be float, not {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability p has to be between 0 and 1, but got {p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{operator}(): argument 'generator' must be torch.Generator, not {type(generator).__name__}"
        )


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    inverted: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout with a counter-based mask, which the backward computes again: nothing but the seed is saved.

    Equivalent to ``torch.nn.functional.dropout(input, p, training)`` with another random number generator:
    Philox4x32-10 on (seed, offset, index of the element). A call on the CPU seeds it by one 64-bit draw from
    `generator`; on a GPU, seed and offset are those of the generator, whose offset advances by 4. So the mask
    does not depend on the number of threads or the memory format, and a captured CUDA graph draws a new one in
    each replay.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        p: probability of an element to be dropped, that is multiplied by 0.
        training: False applies no mask.
        inverted: True multiplies the kept elements by 1 / (1 - p) in training and changes nothing otherwise.
            False is the original form: kept elements are unchanged in training, and otherwise all are
            multiplied by 1 - p.
        generator: the default generator of the device if None. torch.compile accepts None only.

    Returns:
        A tensor like `input`, in its memory format; `input` itself, without a draw, where nothing changes
        (p == 0, or inverted and not training).

    Raises:
        ValueError: p outside [0, 1].
        RuntimeError: unsupported dtype, or a generator of another device.
        TypeError: an argument of a wrong Python type.
    """
    _check_tensor(input, "input", "dropout")
    _check_dropout_arguments(p, generator, "dropout")
    if p == 0 or (inverted and not training):
        return input
    arguments = (input, float(p), bool(training), bool(inverted), generator)
    if torch.compiler.is_compiling() or has_torch_function((input,)):
        return torch.ops.pyconv.dropout(*arguments)
    return _C.dropout(*arguments)


def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    p: float = 0.0,
    training: bool = True,
    inverted: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bias, activation and dropout in one pass, as they follow a matrix product in a fully connected layer.

    Equivalent to ``dropout(activation(input + bias), p, training)``. The backward needs, beside the seed:
    nothing for 'none', the output for 'relu', 'sigmoid' and 'tanh', the pre-activation for 'gelu' and 'silu'.

    Args:
        input: (*, columns); float32, float64, bfloat16 or float16.
        bias: (columns,), dtype and device of input, or None. Under autocast it is cast to the dtype of input.
        activation: 'none', 'relu', 'sigmoid', 'tanh', 'gelu' (with erf) or 'silu'.
        p, training, inverted, generator: as in :func:`dropout`.

    Returns:
        A tensor like `input`, in its memory format.

    Raises:
        ValueError: p outside [0, 1], or an unknown activation.
        RuntimeError: unsupported dtype, a bias that does not fit, or a generator of another device.
        TypeError: an argument of a wrong Python type.
    """
    _check_tensor(input, "input", "bias_act_dropout")
    if bias is not None:
        _check_tensor(bias, "bias", "bias_act_dropout")
    _check_activation(activation, "bias_act_dropout")
    _check_dropout_arguments(p, generator, "bias_act_dropout")
    arguments = (input, bias, activation, float(p), bool(training), bool(inverted), generator)
    if torch.compiler.is_compiling() or has_torch_function((input, bias)):
        return torch.ops.pyconv.bias_act_dropout(*arguments)
    return _C.bias_act_dropout(*arguments)
