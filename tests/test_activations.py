"""The kernels' activations and derivatives in units in the last place, from underflow to overflow, on every ISA."""

from __future__ import annotations

import functools

import mpmath
import numpy as np
import pytest
import torch
from backends import supported_isas, use_isa
from torch import Tensor

from pyconv.functional import bias_act_dropout

SMOOTH = ("sigmoid", "tanh", "gelu", "silu")
ULPS = 4

pytestmark = pytest.mark.cpu_only

CPU_ISAS = pytest.mark.parametrize("isa", supported_isas())
VECTOR_ISAS = pytest.mark.parametrize("isa", [isa for isa in supported_isas() if isa != "scalar"])
ACTIVATION = pytest.mark.parametrize("activation", SMOOTH)


def evaluate(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation, and the gradient that reaches its input."""
    leaf = x.clone().requires_grad_()
    y = bias_act_dropout(leaf, activation=activation)
    return y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]


# ------------------------------------------------------------------------------------------------------------
# Expectations: value, derivative, and the larger of the derivative and its first term, which may cancel with the second
# ------------------------------------------------------------------------------------------------------------


def expected_in_float64(activation: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For float32 arguments: float64 has digits to spare."""
    t = torch.from_numpy(x.astype(np.float64))
    sigmoid, other_side = torch.sigmoid(t), torch.sigmoid(-t)
    cdf = torch.erfc(t * -(0.5**0.5)) / 2
    density = torch.exp(-t * t / 2) / (2 * torch.pi) ** 0.5
    value, derivative, term = {
        "sigmoid": (sigmoid, sigmoid * other_side, sigmoid * other_side),
        "tanh": (torch.tanh(t), 1 / torch.cosh(t) ** 2, 1 / torch.cosh(t) ** 2),
        "gelu": (t * cdf, cdf + t * density, cdf),
        "silu": (t * sigmoid, sigmoid * (1 + t * other_side), sigmoid),
    }[activation]
    return value.numpy(), derivative.numpy(), np.maximum(np.abs(derivative.numpy()), np.abs(term.numpy()))


@functools.cache
def expected_by_mpmath(activation: str) -> tuple[np.ndarray, ...]:
    """Arguments, and for each as above, as numpy.longdouble."""
    arguments = float64_arguments()
    with mpmath.workdps(40):
        rows = [_with_forty_digits(activation, mpmath.mpf(float(x))) for x in arguments]
        columns = [np.array([np.longdouble(mpmath.nstr(v, 25)) for v in column]) for column in zip(*rows)]
    return arguments, *columns


def _with_forty_digits(activation: str, x: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    if activation == "gelu":
        t = max(min(x, 100), -100)  # beyond, the tail is 0 in any case
        cdf, density = mpmath.erfc(-t / mpmath.sqrt(2)) / 2, mpmath.exp(-t * t / 2) / mpmath.sqrt(2 * mpmath.pi)
        derivative = cdf + t * density
        return x * cdf, derivative, max(abs(derivative), cdf)
    t = max(min(x, 2000), -2000)
    sigmoid, other_side = 1 / (1 + mpmath.exp(-t)), 1 / (1 + mpmath.exp(t))
    if activation == "sigmoid":
        return sigmoid, sigmoid * other_side, sigmoid * other_side
    if activation == "tanh":
        return mpmath.tanh(t), mpmath.sech(t) ** 2, mpmath.sech(t) ** 2
    derivative = sigmoid * (1 + t * other_side)
    return x * sigmoid, derivative, max(abs(derivative), sigmoid)


def float32_arguments() -> np.ndarray:
    """Of every exponent and sign many mantissas, and densely where the activations are neither 0 nor linear."""
    everywhere = np.arange(0, 2**32, 20011, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = [np.linspace(low, high, 60_001, dtype=np.float32) for low, high in ((-2, 2), (-20, 10), (-120, 100))]
    return np.concatenate([everywhere[np.isfinite(everywhere)], *dense])


def float64_arguments() -> np.ndarray:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**64, 1000, dtype=np.uint64).view(np.float64)
    dense = [generator.uniform(low, high, 700) for low, high in ((-2, 2), (-40, 10), (-760, 710))]
    return np.concatenate([bits[np.isfinite(bits)], *dense])


def worst_ulps(actual: Tensor, expected: np.ndarray, magnitude: np.ndarray) -> float:
    """The largest error in units in the last place of a number of this magnitude."""
    ulp = np.spacing(np.abs(magnitude).astype(actual.numpy().dtype)).astype(expected.dtype)
    ulps = np.abs(actual.numpy().astype(expected.dtype) - expected) / ulp
    return float(ulps.max())


# ------------------------------------------------------------------------------------------------------------


@CPU_ISAS
@ACTIVATION
def test_float32(activation: str, isa: str) -> None:
    use_isa(isa)
    x = float32_arguments()
    actual, derivative = evaluate(activation, torch.from_numpy(x))
    value, expected_derivative, largest_term = expected_in_float64(activation, x)
    assert worst_ulps(actual, value, value) <= ULPS
    if activation in ("gelu", "silu"):  # that of the others is a polynomial of the output, with its cancellation
        assert worst_ulps(derivative, expected_derivative, largest_term) <= ULPS


@VECTOR_ISAS
@ACTIVATION
def test_float64(activation: str, isa: str) -> None:
    """The scalar ISA has libm's precision."""
    use_isa(isa)
    x, value, expected_derivative, largest_term = expected_by_mpmath(activation)
    actual, derivative = evaluate(activation, torch.from_numpy(x))
    assert worst_ulps(actual, value, value) <= ULPS
    if activation in ("gelu", "silu"):
        assert worst_ulps(derivative, expected_derivative, largest_term) <= ULPS


@CPU_ISAS
def test_tanh_near_one_is_rounded_once(isa: str) -> None:
    """Its derivative is taken from the output's distance to 1."""
    use_isa(isa)
    x = np.linspace(4, 12, 100_001, dtype=np.float32)
    value = expected_in_float64("tanh", x)[0]
    assert worst_ulps(evaluate("tanh", torch.from_numpy(x))[0], value, value) < 0.51


@CPU_ISAS
@ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype, activation: str, isa: str) -> None:
    """As torch in float64: infinities, NaN, and the sign of zero."""
    use_isa(isa)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0], dtype=dtype).repeat(5)
    actual, _ = evaluate(activation, x)
    expected = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
    }[activation](x.double()).to(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~expected.isnan()], expected[~expected.isnan()])
    assert torch.equal(actual.signbit()[~expected.isnan()], expected.signbit()[~expected.isnan()])


@CPU_ISAS
@ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_does_not_depend_on_its_place(dtype: torch.dtype, activation: str, isa: str) -> None:
    """In a vector, in a partial vector, alone."""
    use_isa(isa)
    x = 4 * torch.randn(67, dtype=dtype)
    together = evaluate(activation, x)

    def check(where: slice) -> None:
        for part, whole in zip(evaluate(activation, x[where]), together, strict=True):
            assert torch.equal(part, whole[where])

    for i in range(len(x)):
        check(slice(i, None))
        check(slice(0, i + 1))
        check(slice(i, i + 1))
