"""The Python half of the operators: fake (meta) kernels, which give shapes, dtypes and layouts without data."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _is_channels_last(t: Tensor) -> bool:
    """Whether the strides order the dimensions as N, H, W, C; ties count as contiguous, as in ATen."""
    if t.dim() != 4:
        return False
    smallest = 0
    for d in (1, 3, 2, 0):
        if t.stride(d) == 0 and d == 1:
            return False
        if t.size(d) == 0 or t.stride(d) < smallest:
            return False
        # N111 tensors, and tensors whose batch has the stride of the channels, fit both orders.
        if d == 0 and smallest == t.stride(1):
            return False
        smallest = t.stride(d)
        if t.size(d) > 1:
            smallest *= t.size(d)
    return True


def _output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    channels_last = _is_channels_last(input) or _is_channels_last(weight)
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty(shape: tuple[int, ...], like: Tensor, fmt: torch.memory_format, dtype: torch.dtype) -> Tensor:
    if len(shape) == 3:
        return torch.empty((1, *shape), dtype=dtype, device=like.device, memory_format=fmt).squeeze(0)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=fmt)


def _output_shape(
    input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_dilation,
    ceil_mode,
) -> torch.Size:  # fmt: skip
    """Asks conv2d and max_pool2d, so that shapes, symbolic ones too, and errors are torch's."""
    for other in (weight, bias):
        # conv2d would let a meta tensor among real ones through and give a result without data.
        if other is not None and other.device != input.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{input.device} and {other.device}!"
            )
    top, bottom, left, right = padding
    if top != bottom or left != right:
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    conv = F.conv2d(input, weight, bias, stride, (top, left), dilation, groups)
    return F.max_pool2d(conv, pool_size, pool_stride or None, pool_padding, pool_dilation, ceil_mode).shape


@torch.library.register_fake("pyconv::conv_max_pool2d")
def _(
    input, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, pool_size=(2, 2),
    pool_stride=(), pool_padding=(0, 0), pool_dilation=(1, 1), ceil_mode=False, activation="none",
):  # fmt: skip
    shape = _output_shape(
        input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_dilation,
        ceil_mode,
    )  # fmt: skip
    return _empty(shape, input, _output_format(_batched(input), weight), input.dtype)


@torch.library.register_fake("pyconv::_conv_max_pool2d_forward")
def _(
    input, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, pool_size=(2, 2),
    pool_stride=(), pool_padding=(0, 0), pool_dilation=(1, 1), ceil_mode=False, activation="none",
):  # fmt: skip
    shape = _output_shape(
        input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_dilation,
        ceil_mode,
    )  # fmt: skip
    fmt = _output_format(_batched(input), weight)
    argmax_dtype = torch.uint8 if pool_size[0] * pool_size[1] <= 255 else torch.int32
    saved = _empty(shape, input, fmt, input.dtype) if activation in ("gelu", "silu") else input.new_empty(0)
    return _empty(shape, input, fmt, input.dtype), _empty(shape, input, fmt, argmax_dtype), saved


@torch.library.register_fake("pyconv::_conv_max_pool2d_backward")
def _(
    grad_output, input, weight, argmax, saved, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding,
    pool_dilation, ceil_mode, activation, output_mask,
):  # fmt: skip
    fmt = _output_format(_batched(input), weight)
    grad_input = _empty(input.shape, input, fmt, input.dtype) if output_mask[0] else None
    grad_weight = torch.empty_like(weight) if output_mask[1] else None
    grad_bias = weight.new_empty(weight.shape[0]) if output_mask[2] else None
    return grad_input, grad_weight, grad_bias


def _batched(t: Tensor) -> Tensor:
    return t.unsqueeze(0) if t.dim() == 3 else t


# ---- dropout -----------------------------------------------------------------------------------------------
#
# dropout, bias_act_dropout and dropout_with_state are composites of the operators below: no fake kernels.


@torch.library.register_fake("pyconv::_bias_act_dropout")
def _(input, bias, state, activation, p, scale):
    return torch.empty_like(input)


@torch.library.register_fake("pyconv::_bias_act_dropout_forward")
def _(input, bias, state, activation, p, scale):
    writes_pre_activation = bias is not None and activation in ("gelu", "silu")
    return torch.empty_like(input), input.new_empty(input.shape if writes_pre_activation else 0)


@torch.library.register_fake("pyconv::_bias_act_dropout_backward")
def _(grad_output, saved, state, activation, p, scale, output_mask):
    grad_input = torch.empty_like(grad_output) if output_mask[0] else grad_output.new_empty(0)
    return grad_input, grad_output.new_empty(grad_output.shape[-1] if output_mask[1] else 0)


@torch.library.register_fake("pyconv::_dropout_mask")
def _(state, size, p):
    return state.new_empty((*state.shape[:-1], *size), dtype=torch.bool)


@torch.library.register_vmap("pyconv::_dropout_mask")
def _(info, in_dims, state, size, p):
    if in_dims[0] is None:
        return torch.ops.pyconv._dropout_mask(state, size, p), None
    return torch.ops.pyconv._dropout_mask(state.movedim(in_dims[0], 0), size, p), 0


@torch.library.register_fake("pyconv::_dropout_state")
def _(distinct, generator):
    return distinct.new_empty(2)
