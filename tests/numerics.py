"""Data, layouts, exact expectations and error bounds for the tests of the operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import backends
import torch
from cases import Case
from torch import Tensor

import pyconv
from pyconv import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "offset")

EXACT_LIMIT = {torch.float32: 2**24, torch.float64: 2**53, torch.bfloat16: 2**8, torch.float16: 2**11}
"""Integers up to this magnitude are exact in the type."""

GRADIENT_NAMES = ("input", "weight", "bias")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------
# Data: drawn by a CPU generator, so that every backend sees the same, then moved to the backend's device
# ------------------------------------------------------------------------------------------------------------


def integers(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, largest: int = 2
) -> Tensor:
    """Random integers in [-largest, largest], so small that sums of their products are exact in `dtype`."""
    drawn = torch.randint(-largest, largest + 1, tuple(shape), generator=generator, device="cpu")
    return drawn.to(backends.device(), dtype)


def signed(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device="cpu").to(backends.device(), dtype)


def positive(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Without cancellation, which hides errors."""
    return torch.rand(tuple(shape), generator=generator, device="cpu").to(backends.device(), dtype)


DATA: dict[str, Callable[[Sequence[int], torch.dtype, torch.Generator], Tensor]] = {
    "signed": signed,
    "positive": positive,
}


def affordable(case: Case) -> Case:
    """The case at a size that a test can afford on the kernels in use: emulated ones are slow."""
    return case.reduced_to(20_000_000) if pyconv.isa() == backends.EMULATION else case.reduced()


def operands(
    case: Case,
    dtype: torch.dtype,
    make: Callable[[Sequence[int], torch.dtype, torch.Generator], Tensor],
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and grad_output for `case`, filled by `make`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = (case.input_shape, case.weight_shape, case.bias_shape, case.output_shape)
    input, weight, bias, grad_output = (make(shape, dtype, generator) for shape in shapes)
    return input, weight, bias, grad_output


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """A copy of `tensor` (3-D or 4-D) with the same values in the named memory layout."""
    if layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return tensor.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(-1, -3)
    if layout == "transposed":
        return tensor.mT.clone(memory_format=torch.contiguous_format).mT
    if layout == "strided":
        spread = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        return spread[..., 1::2].copy_(tensor)
    if layout == "offset":
        flat = tensor.new_full((tensor.numel() + 1,), math.nan)
        return flat[1:].view(tensor.shape).copy_(tensor)
    raise ValueError(f"layout must be one of {LAYOUTS}, but got {layout!r}")


# ------------------------------------------------------------------------------------------------------------
# Running an operator
# ------------------------------------------------------------------------------------------------------------


def leaf(tensor: Tensor | None) -> Tensor | None:
    """The same memory as a new leaf that requires a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_()


def run(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The output of `function`, and its gradients for input, weight and bias (if there is one)."""
    leaves = [leaf(input), leaf(weight), leaf(bias)]
    output = function(*leaves, **arguments)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    gradients = torch.autograd.grad(output, [t for t in leaves if t is not None], grad_output)
    return output.detach(), list(gradients)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().contiguous()


def operator_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str = "none", **arguments: Any
) -> tuple[object, ...]:
    """The positional arguments of torch.ops.pyconv.conv_max_pool2d for those of the functional form.

    The operator's padding is (top, bottom, left, right): 'same' puts the odd row and column at the end.
    """
    dilation: tuple[int, int] = arguments["dilation"]
    padding = arguments["padding"]
    if padding == "same":
        totals = [d * (extent - 1) for d, extent in zip(dilation, weight.shape[2:], strict=True)]
        sides = [side for total in totals for side in (total // 2, total - total // 2)]
    else:
        sides = [side for side in padding for _ in range(2)]
    return (
        input,
        weight,
        bias,
        arguments["stride"],
        sides,
        dilation,
        arguments["groups"],
        arguments["pool_size"],
        arguments["pool_stride"] or arguments["pool_size"],
        arguments["pool_padding"],
        arguments["pool_dilation"],
        arguments["ceil_mode"],
        activation,
    )


def kernel_argmax(input: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any) -> Tensor:
    """The argmax that the kernel stores for its backward: window-relative, 255 or -1 for "no gradient"."""
    with torch.no_grad():
        call = operator_arguments(input, weight, bias, **arguments)
        return torch.ops.pyconv._conv_max_pool2d_forward(*call)[1]


def live_windows(argmax: Tensor) -> Tensor:
    no_gradient = reference.NO_GRADIENT_UINT8 if argmax.dtype == torch.uint8 else reference.NO_GRADIENT
    return argmax != no_gradient


# ------------------------------------------------------------------------------------------------------------
# Comparisons
# ------------------------------------------------------------------------------------------------------------


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same shape and same values bit for bit (but 0 equals -0 and NaN equals NaN), whatever the layout."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not same.all():
        where = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} elements differ; "
            f"at {where} got {actual[where]}, expected {expected[where]}"
        )


def assert_exact(
    input: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor, **arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    """Integer data: output and all gradients of pyconv equal the float64 reference exactly. Returns them."""
    function = pyconv.functional.conv_max_pool2d
    dtype = input.dtype
    output, gradients = run(function, input, weight, bias, grad_output, **arguments)
    expected, expected_gradients = run(
        reference.conv_max_pool2d,
        double(input),
        double(weight),
        double(bias),
        double(grad_output),
        **arguments,
    )
    pairs = [(output, expected, "output")]
    pairs += [
        (gradient, expected_gradient, f"gradient of {name}")
        for gradient, expected_gradient, name in zip(
            gradients, expected_gradients, GRADIENT_NAMES, strict=False
        )
    ]
    for actual, exact, what in pairs:
        finite = exact[exact.isfinite()]
        assert finite.abs().max().item() <= EXACT_LIMIT[dtype] if finite.numel() else True, (
            f"the test's data are too large: {what} is not exact in {dtype}"
        )
        assert actual.dtype == dtype, f"{what}: {actual.dtype}, expected {dtype}"
        assert_equal(actual.double(), exact, what)
    return output, gradients


# ------------------------------------------------------------------------------------------------------------
# Error bound
#
# |err| <= (2 + sqrt(T)) * eps * S + eps_out * |y|: T terms in the sum, S the sum over absolute values, eps of
# the accumulator, eps_out of the output. Activations add 4 ulp.
#
# The tensor cores of CUDA multiply operands of a storage format. Two roundings come with them, each at most a
# relative error of every term, so a multiple of S:
#   TF32             keeps 11 significant bits: an operand changes by at most 2**-11 of itself, a product of two by
#                    2 * 2**-11 + 2**-22.
#   16-bit formats   input and weight are of the format already. The gradient at the pre-activation, grad_output times
#                    the activation's derivative, summed over overlapping windows that share a maximum, is computed in
#                    float32 and rounded to the format once before it is multiplied: by at most half its eps, and by
#                    half its smallest subnormal. (A sum over windows that share a maximum is at most the sum of the
#                    magnitudes, so S stays as it is.)
# ------------------------------------------------------------------------------------------------------------

LIPSCHITZ = {"none": 1.0, "relu": 1.0, "sigmoid": 0.25, "tanh": 1.0, "gelu": 1.13, "silu": 1.1}
"""Bound of each activation's derivative."""

_CURVATURE = 1.0
"""Bound of every activation's second derivative; the largest is gelu's, 0.8."""

_ACTIVATION_ULPS = 4


def accumulator_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


@dataclass
class Expectation:
    """float64 values and how far from them a result may lie, elementwise.

    `scale` is S; the bound of the operator is `bound`.
    """

    value: Tensor
    scale: Tensor
    bound: Tensor

    def worst_relative_error(self, actual: Tensor) -> float:
        """max |err| / S over the elements that have terms."""
        error = (actual.double() - self.value).abs() / self.scale
        return error[self.scale > 0].max().item() if (self.scale > 0).any() else 0.0

    def check(self, actual: Tensor, what: str) -> None:
        error = (actual.double() - self.value).abs()
        excess = error - self.bound
        # Not `excess > 0`, which a NaN would pass.
        bad = ~(excess <= 0)
        if bad.any():
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise AssertionError(
                f"{what}: {int(bad.sum())} of {bad.numel()} elements beyond the error bound; at {where} got "
                f"{actual[where].item()}, expected {self.value[where].item()} +- {self.bound[where].item()}"
            )


def _rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to `dtype` may add, subnormal results included."""
    info = torch.finfo(dtype)
    return info.eps * value.abs() + info.smallest_normal * info.eps


def _rounds_to_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and backends.on_cuda_kernels()


def _sum_factor(terms: int, dtype: torch.dtype) -> float:
    # In float64 the expectation carries the same error as the result.
    reference_too = 2 if dtype == torch.float64 else 1
    operands = 2 * 2**-11 + 2**-22 if _rounds_to_tf32(dtype) else 0
    return reference_too * (2 + math.sqrt(terms)) * accumulator_eps(dtype) + operands


def _rounding_before_product(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What a tensor core's operand format may change in the gradient at the pre-activation."""
    if dtype in (torch.bfloat16, torch.float16) and backends.on_cuda_kernels():
        return _rounding(gradient, dtype) / 2
    return torch.zeros_like(gradient)


def _terms(weight: Tensor, bias: Tensor | None) -> int:
    return weight[0].numel() + (bias is not None)


def expect_forward(input: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any) -> Expectation:
    """The output, whichever near-tie is chosen: the window's largest S bounds its maximum."""
    activation = arguments.pop("activation")
    dtype = input.dtype
    x, w, b = double(input), double(weight), double(bias)
    magnitudes = (x.abs(), w.abs(), None if b is None else b.abs())
    pre_activation = reference.conv_max_pool2d(x, w, b, **arguments)
    scale = reference.conv_max_pool2d(*magnitudes, **arguments)
    value = reference.ACTIVATIONS[activation](pre_activation)
    bound = LIPSCHITZ[activation] * _sum_factor(_terms(weight, bias), dtype) * scale + _rounding(value, dtype)
    if activation not in ("none", "relu"):
        # gelu and silu multiply by the pre-activation something that may have cancelled.
        largest = torch.maximum(value.abs(), pre_activation.abs())
        bound += _ACTIVATION_ULPS * accumulator_eps(dtype) * largest
    return Expectation(value, scale, bound)


def check_choice(
    argmax: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str, **arguments: Any
) -> None:
    """Every chosen value is its window's maximum within the bound; ReLU is dead only below the bound."""
    dtype = input.dtype
    x, w, b = double(input), double(weight), double(bias)
    factor = _sum_factor(_terms(weight, bias), dtype)
    largest = reference.conv_max_pool2d(x, w, b, **arguments)
    scale = reference.conv_max_pool2d(x.abs(), w.abs(), None if b is None else b.abs(), **arguments)
    # Two values of the window are compared, each with an error of its own, after rounding at the latest.
    tolerance = 2 * (factor * scale + _rounding(scale, dtype))
    live = live_windows(argmax)
    chosen = reference.conv_max_pool2d_given_argmax(x, w, b, argmax, **arguments)
    assert (largest - chosen <= tolerance)[live].all(), "a chosen value is below the maximum of its window"
    if activation == "relu":
        dead = ~live
        assert (largest <= tolerance)[dead].all(), "a window is marked dead, but its maximum is positive"
        assert (chosen >= -tolerance)[live].all(), "a window is marked live, but its value is negative"
    else:
        assert live.all(), "a window with a valid position is marked as without gradient"


def expect_gradients(
    argmax: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    **arguments: Any,
) -> list[Expectation]:
    """The gradients for input, weight and bias (if there is one), given the choice `argmax`."""
    dtype = input.dtype
    x, w, b, g = double(input), double(weight), double(bias), double(grad_output)
    live = live_windows(argmax)
    if activation == "relu":
        # The argmax says where relu is live; next to 0 the exact sum may lie on the other side.
        activation = "none"
    given = reference.conv_max_pool2d_given_argmax

    values = run(given, x, w, b, g, argmax=argmax, activation=activation, **arguments)[1]

    # The gradient at the pre-activation, and what the activation's derivative may add to it.
    pre_activation = given(x, w, b, argmax, **arguments).masked_fill(~live, 0).requires_grad_()
    activated = reference.ACTIVATIONS[activation](pre_activation)
    inner = torch.autograd.grad(activated, pre_activation, g)[0].masked_fill(~live, 0).abs()
    pre_activation, activated = pre_activation.detach(), activated.detach()
    added = _rounding_before_product(inner, dtype).masked_fill(~live, 0)
    if activation not in ("none", "relu"):
        magnitudes = (x.abs(), w.abs(), None if b is None else b.abs())
        scale = given(*magnitudes, argmax, **arguments).masked_fill(~live, 0)
        saved = torch.maximum(pre_activation.abs(), activated.abs())
        error = _sum_factor(_terms(weight, bias), dtype) * scale + _rounding(saved, dtype)
        added += g.abs() * (_ACTIVATION_ULPS * accumulator_eps(dtype) + 2 * _CURVATURE * error)

    def magnitudes_of_sums(upstream: Tensor) -> list[Tensor]:
        leaves = [leaf(x.abs()), leaf(w.abs()), leaf(b)]
        output = given(*leaves, argmax, **arguments)
        return list(torch.autograd.grad(output, [t for t in leaves if t is not None], upstream))

    terms = _gradient_terms(input, weight, argmax, **arguments)
    return [
        Expectation(
            value,
            scale,
            _sum_factor(count, dtype) * scale + extra + _rounding(value, dtype),
        )
        for value, scale, extra, count in zip(
            values, magnitudes_of_sums(inner), magnitudes_of_sums(added), terms, strict=False
        )
    ]


def _gradient_terms(input: Tensor, weight: Tensor, argmax: Tensor, **arguments: Any) -> tuple[int, int, int]:
    """The largest number of terms in one element of the gradient for input, weight and bias."""
    groups: int = arguments["groups"]
    size: tuple[int, int] = arguments["pool_size"]
    stride = arguments["pool_stride"] or size
    dilation: tuple[int, int] = arguments["pool_dilation"]
    # Overlapping windows may share their maximum.
    sharing = math.prod(min(size[d], -(-(dilation[d] * (size[d] - 1) + 1) // stride[d])) for d in (0, 1))
    windows = argmax.numel() // argmax.shape[-3]
    return weight.shape[0] // groups * weight[0, 0].numel() * sharing, windows, windows


def check_bounds(
    input: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor, **arguments: Any
) -> list[tuple[Tensor, Expectation]]:
    """pyconv's output, its choice of maxima and its gradients lie within their bounds.

    Returns output and gradients with the expectation of each.
    """
    output, gradients = run(pyconv.functional.conv_max_pool2d, input, weight, bias, grad_output, **arguments)
    argmax = kernel_argmax(input, weight, bias, **arguments)
    check_choice(argmax, input, weight, bias, **arguments)
    expectations = [
        expect_forward(input, weight, bias, **arguments),
        *expect_gradients(argmax, grad_output, input, weight, bias, **arguments),
    ]
    results = list(zip([output, *gradients], expectations, strict=True))
    for (result, expected), name in zip(results, ("output", *GRADIENT_NAMES), strict=False):
        expected.check(result, name if name == "output" else f"gradient of {name}")
    return results
