"""conv_max_pool2d in bfloat16 where the CPU multiplies it: pairs of channels, subnormals, the way back."""

from __future__ import annotations

import pytest
import torch
from backends import supported_isas
from cases import BY_NAME, Case
from numerics import (
    DATA,
    GRADIENT_NAMES,
    LAYOUTS,
    arrange,
    assert_equal,
    assert_exact,
    check_bounds,
    integers,
    operands,
    run,
)

import pyconv
from pyconv.functional import conv_max_pool2d

ISA, WIDENED = "avx512_bf16", "avx512"
ENTRIES: dict[str, dict[str, object]] = {"bfloat16_pool2x2": {}, "bfloat16": {"pool_size": (3, 2)}}
"""Arguments that lead to each entry of the forward list."""

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(ISA not in supported_isas(), reason="this CPU has no AVX512_BF16"),
]
SMALLEST = torch.finfo(torch.bfloat16).smallest_normal
SUBNORMAL = SMALLEST / 4


def kernels() -> list[str]:
    return [name for name, _, _ in pyconv._C.conv_max_pool2d_kernels() if name.startswith("cpu/")]


def shape(C: int, **arguments: object) -> Case:
    return Case(f"C-{C}", 2, C, 11, 12, 19, (3, 2), **arguments)  # type: ignore[arg-type]


def test_it_is_the_default_and_adds_to_the_lists_of_avx512() -> None:
    assert pyconv.compiled_isas().index(ISA) > pyconv.compiled_isas().index(WIDENED)
    pyconv.set_isa(WIDENED)
    of_avx512 = [name.removeprefix(f"cpu/{WIDENED}") for name in kernels()]
    pyconv.set_isa(ISA)
    names = [name.removeprefix(f"cpu/{ISA}") for name in kernels()]
    assert [name for name in names if name in of_avx512] == of_avx512
    for phase in ("/forward/", "/backward/"):
        added = [name.startswith(f"{phase}bfloat16") for name in names if name.startswith(phase)]
        assert added == sorted(added, reverse=True), "what is added comes first"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 31, 32, 33, 66])
def test_channels_that_leave_pairs_and_vectors_incomplete(C: int, entry: str, layout: str) -> None:
    pyconv.set_isa(ISA)
    case = shape(C, **ENTRIES[entry])
    input, weight, bias, grad_output = operands(case, torch.bfloat16, lambda *args: integers(*args, largest=1))
    input, weight = arrange(input, layout), arrange(weight, layout)
    assert_exact(input, weight, bias, grad_output, activation="relu", **case.kwargs())


@pytest.mark.parametrize("expanded", ["input", "weight"])
def test_one_channel_expanded_to_several(expanded: str) -> None:
    pyconv.set_isa(ISA)
    case = shape(5)
    names = ("input", "weight", "bias", "grad_output")
    tensors = dict(zip(names, operands(case, torch.bfloat16, integers), strict=True))
    tensors[expanded] = tensors[expanded][:, :1].expand(-1, 5, -1, -1)
    assert_exact(**tensors, activation="relu", **case.kwargs())


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "name", ["CIFAR64", "KSH2", "KSH5", "DQN", "groups-2", "dilation", "pool-overlap-1", "window-300"]
)
@pytest.mark.parametrize("isa", [WIDENED, ISA])
def test_error_bound(isa: str, name: str, data: str, activation: str) -> None:
    pyconv.set_isa(isa)
    case = BY_NAME[name].reduced()
    *tensors, grad_output = operands(case, torch.bfloat16, DATA[data])
    check_bounds(*tensors, grad_output, activation=activation, **case.kwargs())


@pytest.mark.parametrize("entry", ENTRIES)
def test_subnormal_operands_count_as_zero_in_the_forward(entry: str) -> None:
    """Which shows, too, that the entry runs; AVX-512's own kernels keep them."""
    case = shape(4, **ENTRIES[entry])
    input, weight, bias, _ = operands(case, torch.bfloat16, integers)
    bias.zero_()
    ones = torch.ones_like(weight)
    for x, w in ((torch.full_like(input, SUBNORMAL), ones), (torch.ones_like(input), SUBNORMAL * ones)):
        pyconv.set_isa(WIDENED)
        assert (conv_max_pool2d(x, w, bias, **case.kwargs()) == 4 * 6 * SUBNORMAL).all()
        pyconv.set_isa(ISA)
        assert (conv_max_pool2d(x, w, bias, **case.kwargs()) == 0).all()
    smallest = torch.full_like(input, SMALLEST)
    assert_equal(
        conv_max_pool2d(smallest, ones, bias, **case.kwargs()), torch.full(case.output_shape, 24 * SMALLEST), "y"
    )


# Backward

OVERLAPPING = {"pool_size": (3, 3), "pool_stride": (2, 2)}
POOLS: dict[str, dict[str, object]] = {"2x2": {}, "overlapping": OVERLAPPING}


def image(C: int, **arguments: object) -> Case:
    return Case(f"C-{C}", 2, C, 13, 12, 19, (3, 3), padding=(1, 0), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("C", [16, 17, 20, 31, 32, 33, 47, 48, 63, 64, 95])
def test_gradients_with_channels_that_leave_pairs_and_vectors_incomplete(C: int, pool: str, layout: str) -> None:
    case = image(C, **POOLS[pool])
    tensors = operands(case, torch.bfloat16, lambda *args: integers(*args, largest=1))
    input, weight, bias, grad_output = (arrange(t, layout) if t.dim() == 4 else t for t in tensors)
    results = []
    for isa in ("scalar", ISA):
        pyconv.set_isa(isa)
        output, gradients = run(conv_max_pool2d, input, weight, bias, grad_output, activation="relu", **case.kwargs())
        results.append([output, *gradients])
    for scalar, pairs, what in zip(*results, ("output", *GRADIENT_NAMES), strict=True):
        assert_equal(pairs, scalar, what)


def test_gradients_that_add_up_to_more_bits_than_bfloat16_has() -> None:
    """Windows share winners; sums of one, two and three pieces, and infinite ones.

    The second image is the first again, with large gradients of the other sign: what remains of the weight's gradient
    is what would be lost beside them.
    """
    case = image(64, **OVERLAPPING)
    input, weight, bias, _ = operands(case, torch.bfloat16, lambda *args: integers(*args, largest=1))
    input, weight = (input[:1].abs() + 1).expand_as(input), weight.abs() + 1
    choice = torch.randint(0, 3, case.output_shape, generator=torch.Generator().manual_seed(1))
    choice[1] = choice[0]
    for first, second in (((1, 2**9, 3 * 2**17), (1, -(2**9), -3 * 2**17)), ((1, float("inf"), 2), (1, 2, 3))):
        grads = [torch.tensor(v, dtype=torch.bfloat16)[of] for v, of in zip((first, second), choice, strict=True)]
        results = []
        for isa in ("scalar", ISA):
            pyconv.set_isa(isa)
            results.append(run(conv_max_pool2d, input, weight, bias, torch.stack(grads), **case.kwargs())[1])
        for scalar, pairs, what in zip(*results, GRADIENT_NAMES, strict=True):
            assert_equal(pairs, scalar, what)


@pytest.mark.parametrize("pool", POOLS)
def test_subnormal_operands_count_as_zero_in_the_backward(pool: str) -> None:
    """Which shows, too, that the entry runs."""
    case = image(64, **POOLS[pool])
    input, weight, bias, grad_output = (torch.ones_like(t) for t in operands(case, torch.bfloat16, integers))
    for isa in (WIDENED, ISA):
        pyconv.set_isa(isa)
        gradients = run(conv_max_pool2d, input, weight, bias, SUBNORMAL * grad_output, **case.kwargs())[1]
        for gradient in gradients[:2]:
            assert (gradient == 0).all() == (isa == ISA)
        assert (gradients[2] > 0).all(), "the bias gradient is a sum without products"


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("C", [48, 64, 65])
@pytest.mark.parametrize("pool", POOLS)
def test_error_bound_of_gradients(pool: str, C: int, data: str, activation: str) -> None:
    pyconv.set_isa(ISA)
    case = image(C, **POOLS[pool])
    *tensors, grad_output = operands(case, torch.bfloat16, DATA[data])
    check_bounds(*tensors, grad_output, activation=activation, **case.kwargs())
