"""The CUDA kernels of the operators, emulated on the CPU or on a GPU: every kernel, tile and precision.

The tests of the operators themselves run on these kernels too: those that ask `EVERY_ISA` or are `also_emulated`, and
all of them with `pytest --backend`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator

import backends
import emulated_kernels
import pytest
import torch
from cases import BY_NAME, CASES, TILE_CASES, Case, random_case
from numerics import (
    ACTIVATIONS,
    DATA,
    LAYOUTS,
    affordable,
    arrange,
    assert_equal,
    assert_exact,
    check_bounds,
    integers,
    kernel_argmax,
    operands,
    positive,
    run,
)
from test_conv_max_pool2d_value import check_accuracy

from pyconv.functional import bias_act_dropout, conv_max_pool2d

pytestmark = [] if backends.backend() == "cuda" else backends.NEEDS_EMULATION

EMULATED_ONLY = pytest.mark.skipif(backends.backend() == "cuda", reason="about the emulation of the CUDA kernels")

PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
"""dtype and allow_tf32: each has kernels of its own."""

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _on_cuda_kernels(_unchanged_process_state: None) -> None:
    if backends.backend() == "cpu":
        backends.use_isa(backends.EMULATION)


def use_precision(name: str) -> torch.dtype:
    dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[name]
    return dtype


def preferring_matrix_products(precision: str) -> contextlib.AbstractContextManager[None]:
    """Small shapes would take the direct kernel; a GPU has no choice but its own."""
    if backends.backend() == "cuda":
        return contextlib.nullcontext()
    return emulated_kernels.preferred("float32" if precision == "float32" else "tensor_core")


def preferring_generic_kernels() -> contextlib.AbstractContextManager[None]:
    if backends.backend() == "cuda":
        return contextlib.nullcontext()
    return emulated_kernels.preferred("generic")


def sparse_integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1, mostly 0: sums over thousands of windows stay below what bfloat16 holds exactly."""
    values = integers(shape, dtype, generator, largest=1)
    return values * (positive(shape, torch.float32, generator) < 0.3)


# ------------------------------------------------------------------------------------------------------------
# Every kernel
# ------------------------------------------------------------------------------------------------------------


def tile_runs() -> list[object]:
    """Case, precision and memory format. A large tile takes seconds to emulate: most of its runs are long."""
    runs = []
    for case in TILE_CASES:
        for precision in PRECISIONS:
            for memory_format in FORMATS:
                affordable_flops = {("float32", "NCHW"): 100_000_000, ("bfloat16", "channels_last"): 160_000_000}
                short = case.flops < affordable_flops.get((precision, memory_format), 5_000_000)
                marks = () if short else pytest.mark.long
                name = f"{case.name}-{precision}-{memory_format}"
                runs.append(pytest.param(case, precision, memory_format, marks=marks, id=name))
    return runs


@pytest.mark.parametrize("case, precision, memory_format", tile_runs())
def test_tile_is_exact_on_integers(case: Case, precision: str, memory_format: str) -> None:
    dtype = use_precision(precision)
    input, weight, bias, grad_output = operands(case, dtype, sparse_integers)
    input = input.contiguous(memory_format=FORMATS[memory_format])
    assert_exact(input, weight, bias, grad_output, activation="relu", **case.kwargs())


BIAS_ACT_DROPOUT_SHAPES = ((3, 7), (4, 64), (3000, 256))
PROBABILITIES = (0.0, 0.3, 0.5)


@EMULATED_ONLY
def test_every_kernel_is_reached() -> None:
    """By the shapes and precisions that this file and test_bias_act_dropout.py run."""
    with emulated_kernels.launches_without_running():
        for precision in PRECISIONS:
            dtype = use_precision(precision)
            for case, memory_format in itertools.product(TILE_CASES, FORMATS.values()):
                *tensors, grad_output = (
                    torch.empty(shape, dtype=dtype)
                    for shape in (case.input_shape, case.weight_shape, case.bias_shape, case.output_shape)
                )
                tensors[0] = tensors[0].contiguous(memory_format=memory_format)
                run(conv_max_pool2d, *tensors, grad_output, activation="relu", **case.kwargs())
                with preferring_matrix_products(precision):
                    run(conv_max_pool2d, *tensors, grad_output, activation="sigmoid", **case.kwargs())
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for name in ("K-1", "window-300"):
                *tensors, grad_output = operands(BY_NAME[name], dtype, integers)
                run(conv_max_pool2d, *tensors, grad_output, **BY_NAME[name].kwargs())
            for shape in BIAS_ACT_DROPOUT_SHAPES:
                for p in PROBABILITIES:
                    input = torch.empty(shape, dtype=dtype, requires_grad=True)
                    bias = torch.empty(shape[-1:], dtype=dtype, requires_grad=True)
                    for activation in ("none", "relu", "sigmoid", "gelu"):
                        output = bias_act_dropout(input, bias, activation=activation, p=p)
                        torch.autograd.grad(output, (input, bias), torch.empty_like(output))
        # The CUDA door alone launches it; the CPU's draws its state by itself.
        missing = {
            kernel
            for kernel in emulated_kernels.compiled() - emulated_kernels.launched()
            if "dropout_state_kernel" not in kernel
        }
    assert not missing, "no test reaches\n" + "\n".join(sorted(missing))


@EMULATED_ONLY
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("entry", ["direct", "tensor_core", "float32", "generic"])
def test_every_entry_of_the_dispatch_lists_is_exact(entry: str, precision: str) -> None:
    """Shapes for which the lists would choose a better kernel."""
    dtype = use_precision(precision)
    with emulated_kernels.preferred(entry):
        for seed, name in enumerate(("L1", "L2", "K-33", "pool-overlap", "groups-2", "stride-pair", "same-dilated")):
            case = BY_NAME[name].with_batch(2)
            *tensors, grad_output = operands(case, dtype, sparse_integers, seed)
            for memory_format in FORMATS.values():
                tensors[0] = tensors[0].contiguous(memory_format=memory_format)
                assert_exact(*tensors, grad_output, activation="relu", **case.kwargs())


# ------------------------------------------------------------------------------------------------------------
# Shapes
# ------------------------------------------------------------------------------------------------------------


def named_runs() -> list[object]:
    """Each case in one precision; the others take longer than a normal run may."""
    return [
        pytest.param(case, precision, marks=() if i % 4 == j else pytest.mark.long, id=f"{case.name}-{precision}")
        for i, case in enumerate(CASES)
        for j, precision in enumerate(PRECISIONS)
    ]


@pytest.mark.parametrize("case, precision", named_runs())
def test_named_shape_is_exact_on_integers(case: Case, precision: str) -> None:
    """By matrix products where they accept the shape; test_conv_max_pool2d_value.py leaves the choice to the lists."""
    dtype = use_precision(precision)
    case = affordable(case)
    input, weight, bias, grad_output = operands(case, dtype, sparse_integers)
    channels_last = len(case.name) % 2 == 0
    input = input.contiguous(memory_format=FORMATS["channels_last" if channels_last else "NCHW"])
    with preferring_matrix_products(precision):
        assert_exact(input, weight, bias, grad_output, activation="relu", **case.kwargs())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_shapes_are_exact_on_integers(precision: str) -> None:
    dtype = use_precision(precision)
    for seed in range(2000, 2030):
        case = random_case(seed)
        draw = random.Random(seed)
        input, weight, bias, grad_output = operands(case, dtype, sparse_integers, seed)
        input, weight, grad_output = (arrange(t, draw.choice(LAYOUTS)) for t in (input, weight, grad_output))
        bias = bias if draw.random() < 0.8 else None
        activation = draw.choice(("none", "relu"))
        with preferring_matrix_products(precision):
            assert_exact(input, weight, bias, grad_output, activation=activation, **case.kwargs())


# ------------------------------------------------------------------------------------------------------------
# Operands that are copied to channels_last, gradients that are not finite
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_many_multiply_adds_are_exact_in_nchw(precision: str, activation: str) -> None:
    """From 2**28 on the door lays out the operands of the tensor cores anew; the gradients stay in NCHW."""
    dtype = use_precision(precision)
    case = Case("laid-out", 12, 64, 38, 38, 64, (3, 3))
    backward = case.flops // case.pool_size[0] ** 2  # two products of one multiply-add for each window
    assert backward >= 2**28
    input, weight, bias, grad_output = operands(case, dtype, sparse_integers)
    if activation == "relu":
        assert_exact(input, weight, bias, grad_output, activation=activation, **case.kwargs())
        return
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    output = conv_max_pool2d(*leaves, activation=activation, **case.kwargs())
    gradients = torch.autograd.grad(output, leaves, grad_output)
    assert output.is_contiguous() and gradients[0].is_contiguous()
    # The same operands in channels_last, which are not laid out anew.
    others = [t.contiguous(memory_format=torch.channels_last) for t in leaves[:2]] + leaves[2:]
    expected = conv_max_pool2d(*others, activation=activation, **case.kwargs())
    assert_equal(output.detach(), expected.detach(), "output")
    for name, gradient, other in zip(
        ("input", "weight", "bias"), gradients, torch.autograd.grad(expected, others, grad_output), strict=True
    ):
        assert_equal(gradient, other, f"gradient of {name}")


@EMULATED_ONLY
@pytest.mark.parametrize("precision", PRECISIONS)
def test_who_takes_operands_laid_out_anew(precision: str) -> None:
    """With tensor cores, NCHW takes the kernels of channels_last from 2**28 multiply-adds on; in float32 its own."""
    dtype = use_precision(precision)
    same = {}
    for images in (4, 48):
        case = Case("laid-out", images, 64, 38, 38, 64, (3, 3))
        launched = []
        for memory_format in FORMATS.values():
            tensors = [torch.empty(shape, dtype=dtype) for shape in (case.input_shape, case.weight_shape)]
            tensors[0] = tensors[0].contiguous(memory_format=memory_format)
            with emulated_kernels.launches_without_running():
                conv_max_pool2d(*tensors, **case.kwargs())
                launched.append(emulated_kernels.launched())
        same[images] = launched[0] == launched[1]
    assert same == {4: False, 48: precision != "float32"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_that_is_not_finite_stays_in_its_patch(
    precision: str, activation: str, memory_format: str, value: float
) -> None:
    """As the generic kernel, which visits the taps that exist and no others; strides that leave some inputs without."""
    dtype = use_precision(precision)
    for kernel, stride, dilation in (((5, 4), (2, 3), (1, 1)), ((3, 2), (5, 2), (2, 3)), ((2, 2), (3, 3), (1, 1))):
        case = Case("strided", 2, 8, 21, 23, 16, kernel, stride=stride, dilation=dilation, padding=(1, 2), groups=2)
        input, weight, bias, grad_output = operands(case, dtype, sparse_integers)
        grad_output[1, 3, 1, 1] = value
        input = input.contiguous(memory_format=FORMATS[memory_format])
        results = []
        for kernels in (preferring_matrix_products(precision), preferring_generic_kernels()):
            with kernels:
                _, gradients = run(
                    conv_max_pool2d, input, weight, bias, grad_output, activation=activation, **case.kwargs()
                )
                results.append(gradients[0])
        assert not results[1][1].isfinite().all() and results[1].isfinite().any()
        assert torch.equal(results[0].isfinite(), results[1].isfinite())


# ------------------------------------------------------------------------------------------------------------
# Accuracy of the matrix products; TF32
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("activation", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["L2", "K-33", "pool-overlap", "groups-2"])
def test_accuracy_of_matrix_products(name: str, precision: str, activation: str, data: str) -> None:
    """Within the error bound, and emulated not much worse than torch."""
    dtype = use_precision(precision)
    with preferring_matrix_products(precision):
        for memory_format in FORMATS.values():
            check_accuracy(BY_NAME[name].with_batch(2), dtype, data, activation, memory_format)


TF32_NAMES = ("L2", "CIFAR64", "K-33", "K-13", "pool-overlap", "groups-2")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", TF32_NAMES)
def test_error_bound_of_tf32(name: str, data: str) -> None:
    use_precision("tf32")
    case = BY_NAME[name].reduced()
    *tensors, grad_output = operands(case, torch.float32, DATA[data])
    with preferring_matrix_products("tf32"):
        for memory_format in FORMATS.values():
            tensors[0] = tensors[0].contiguous(memory_format=memory_format)
            check_bounds(*tensors, grad_output, activation="relu", **case.kwargs())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_bound_of_tf32_for_every_activation(activation: str) -> None:
    use_precision("tf32")
    case = BY_NAME["K-33"]
    *tensors, grad_output = operands(case, torch.float32, DATA["signed"])
    with preferring_matrix_products("tf32"):
        check_bounds(*tensors, grad_output, activation=activation, **case.kwargs())


def test_tf32_is_taken_only_where_it_is_allowed() -> None:
    """1 + 2**-12 is 1 in TF32; in float32 it is itself. The window is one that the direct kernel refuses."""
    case = Case("tf32", 2, 64, 12, 12, 64, (3, 3), pool_size=(2, 4))
    input = torch.full(case.input_shape, 1 + 2**-12)
    weight = torch.ones(case.weight_shape)
    terms = case.C * 9
    for allowed, expected in ((True, float(terms)), (False, terms * (1 + 2**-12))):
        torch.backends.cudnn.allow_tf32 = allowed
        output = conv_max_pool2d(input, weight, **case.kwargs())
        assert_equal(output, torch.full(case.output_shape, expected), f"output with allow_tf32 = {allowed}")


def test_tf32_leaves_float64_alone() -> None:
    case = BY_NAME["K-33"]
    *tensors, grad_output = operands(case, torch.float64, DATA["signed"])
    results = []
    for allowed in (True, False):
        torch.backends.cudnn.allow_tf32 = allowed
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, activation="tanh", **case.kwargs())
        results.append([output, *gradients])
    for with_tf32, without in zip(*results, strict=True):
        assert torch.equal(with_tf32, without)


# ------------------------------------------------------------------------------------------------------------
# Determinism and the order of threads
# ------------------------------------------------------------------------------------------------------------

ORDER_NAMES = ("L1", "L2", "K-33", "pool-overlap", "pool-dilation", "groups-2", "window-300")


@pytest.fixture
def no_seed() -> Iterator[None]:
    before = os.environ.pop("PYCONV_EMULATION_SEED", None)
    yield
    os.environ.pop("PYCONV_EMULATION_SEED", None)
    if before is not None:
        os.environ["PYCONV_EMULATION_SEED"] = before


@EMULATED_ONLY
@pytest.mark.usefixtures("no_seed")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ORDER_NAMES)
def test_order_of_threads_does_not_change_a_bit(name: str, precision: str) -> None:
    """Each seed is another order of a block's threads between two barriers: a missing barrier shows."""
    dtype = use_precision(precision)
    case = BY_NAME[name].with_batch(2)
    *tensors, grad_output = operands(case, dtype, DATA["signed"])
    arguments = {"activation": "tanh", **case.kwargs()}
    results = []
    for seed in ("0", "1", "77"):
        os.environ["PYCONV_EMULATION_SEED"] = seed
        with preferring_matrix_products(precision):
            output, gradients = run(conv_max_pool2d, *tensors, grad_output, **arguments)
            results.append([output, kernel_argmax(*tensors, **arguments), *gradients])
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


@EMULATED_ONLY
@pytest.mark.usefixtures("no_seed")
def test_order_of_threads_does_not_change_a_bit_of_dropout() -> None:
    input, bias, grad_output = torch.randn(70, 130), torch.randn(130), torch.randn(70, 130)
    results = []
    for seed in ("0", "1", "77"):
        os.environ["PYCONV_EMULATION_SEED"] = seed
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in (input, bias)]
        output = bias_act_dropout(*leaves, activation="gelu", p=0.3)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, grad_output)))
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)
