"""conv_max_pool2d: every instruction set agrees with the scalar one, every thread count with one thread.

The tests that ask `EVERY_ISA` run on the CUDA kernels too, emulated or on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from backends import device, every_isa, supported_isas, use_isa
from cases import BY_NAME, CASES, Case, Pair, random_case
from numerics import (
    ACTIVATIONS,
    DATA,
    DTYPES,
    GRADIENT_NAMES,
    assert_equal,
    assert_exact,
    check_bounds,
    dtype_name,
    integers,
    kernel_argmax,
    operands,
    run,
)

import pyconv
from pyconv.functional import conv_max_pool2d

ISAS = supported_isas()
EVERY_ISA = pytest.mark.parametrize("isa", every_isa())
VECTOR_ISAS = [name for name in ISAS if name != "scalar"]
MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
AFFORDABLE_FOR_SCALAR = 20_000_000


def affordable(case: Case) -> Case:
    case = case.reduced()
    return case if case.flops <= AFFORDABLE_FOR_SCALAR else case.with_batch(1)


SHAPES = [
    case for case in map(affordable, CASES) if case.flops <= AFFORDABLE_FOR_SCALAR and "odd" in case.tags
] + [affordable(BY_NAME[name]) for name in ("L1", "L2", "CIFAR", "DQN", "IMPALA", "LeNet5-C3", "Simard-2")]


# Instruction sets


@pytest.mark.cpu_only
def test_scalar_is_always_compiled_and_supported() -> None:
    assert "scalar" in ISAS
    assert pyconv.isa() in ISAS


@pytest.mark.cpu_only
@EVERY_ISA
def test_set_isa(isa: str) -> None:
    pyconv.set_isa(isa)
    assert pyconv.isa() == isa


@pytest.mark.cpu_only
def test_unknown_isa_is_an_error_that_lists_the_choices() -> None:
    before = pyconv.isa()
    with pytest.raises(ValueError, match="sse9") as error:
        pyconv.set_isa("sse9")
    for name in pyconv.compiled_isas():
        assert name in str(error.value)
    assert pyconv.isa() == before


def import_with_isa(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import pyconv; print(pyconv.isa())"],
        env={**os.environ, "PYCONV_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.cpu_only
def test_isa_from_the_environment() -> None:
    process = import_with_isa("scalar")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "scalar"


@pytest.mark.cpu_only
def test_unknown_isa_in_the_environment_is_an_error_that_lists_the_choices() -> None:
    process = import_with_isa("sse9")
    assert process.returncode != 0
    message = process.stderr.strip().splitlines()[-1]
    assert "sse9" in message and "PYCONV_CPU_ISA" in message
    for name in pyconv.compiled_isas():
        assert name in message


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@EVERY_ISA
def test_every_isa_is_exact_on_random_integers(isa: str, dtype: torch.dtype) -> None:
    use_isa(isa)
    for seed in range(1000, 1040):
        case = random_case(seed)
        *tensors, grad_output = operands(case, dtype, integers, seed)
        tensors[0] = tensors[0].contiguous(memory_format=list(MEMORY_FORMATS.values())[seed % 2])
        assert_exact(*tensors, grad_output, activation="relu", **case.kwargs())


@pytest.mark.cpu_only
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("case", SHAPES, ids=[case.name for case in SHAPES])
def test_integers_give_the_bits_of_scalar(case: Case, isa: str, dtype: torch.dtype, memory_format: str) -> None:
    *tensors, grad_output = operands(case, dtype, integers)
    tensors[0] = tensors[0].contiguous(memory_format=MEMORY_FORMATS[memory_format])
    arguments = {"activation": "relu", **case.kwargs()}
    results = []
    for name in ("scalar", isa):
        pyconv.set_isa(name)
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, **arguments)
        results.append([output, kernel_argmax(*tensors, **arguments), *gradients])
    for scalar, vector, what in zip(*results, ("output", "argmax", *GRADIENT_NAMES), strict=True):
        assert_equal(vector, scalar, what)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "gelu", "silu"])
@EVERY_ISA
def test_every_isa_is_within_the_error_bound(isa: str, activation: str, data: str) -> None:
    use_isa(isa)
    for name in ("L1", "L2", "K-33", "pool-overlap", "groups-2"):
        for dtype in (torch.float32, torch.bfloat16):
            *tensors, grad_output = operands(affordable(BY_NAME[name]), dtype, DATA[data])
            check_bounds(*tensors, grad_output, activation=activation, **BY_NAME[name].kwargs())


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", ["pool-overlap", "L2"])
def test_every_isa_follows_the_rules_of_the_maximum(name: str, dtype: torch.dtype, isa: str) -> None:
    """NaN, infinities and ties: the scalar kernel's output and argmax."""
    case = affordable(BY_NAME[name])
    input, weight, bias, _ = operands(case, dtype, integers)
    mask = torch.rand(case.input_shape)
    for value in (float("nan"), float("inf"), float("-inf")):
        poisoned = input.masked_fill(mask < 0.002, value)
        results = []
        for isa_name, place in (("scalar", "cpu"), (isa, device())):
            use_isa(isa_name)
            tensors = [t.to(place) for t in (poisoned, weight, bias)]
            output = conv_max_pool2d(*tensors, **case.kwargs())
            results.append((output.cpu(), kernel_argmax(*tensors, **case.kwargs()).cpu()))
        for scalar, other in zip(*results, strict=True):
            assert_equal(other, scalar, f"output or argmax with {value}")


@EVERY_ISA
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_its_whole_range(activation: str, isa: str) -> None:
    """From underflow to overflow, with few enough elements to fall into a vector's tail as well."""
    use_isa(isa)
    magnitudes = torch.logspace(-30, 4, 149)
    values = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, -0.0, 88.7, -88.7, -103.9, 1e30, -1e30])])
    input = values.view(1, 1, 1, -1)
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    arguments = {
        "activation": activation, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1,
        "pool_size": (1, 1), "pool_stride": None, "pool_padding": (0, 0), "pool_dilation": (1, 1),
        "ceil_mode": False,
    }  # fmt: skip
    check_bounds(input, weight, bias, torch.ones_like(input), **arguments)


# Threads


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("name", ["L1", "L2", "CIFAR", "CIFAR64", "DQN", "KSH5", "IMPALA", "Simard-2"])
def test_thread_count_does_not_change_a_bit(name: str, memory_format: str, dtype: torch.dtype) -> None:
    """Output, argmax and gradients on 1, 2 and 3 threads; on real data another order of summation shows."""
    case = BY_NAME[name]
    case = case.with_batch(10) if case.flops / case.N < 10_000_000 else case.with_batch(2)
    *tensors, grad_output = operands(case, dtype, DATA["signed"])
    tensors[0] = tensors[0].contiguous(memory_format=MEMORY_FORMATS[memory_format])
    arguments = {"activation": "relu", **case.kwargs()}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, **arguments)
        results.append([output, kernel_argmax(*tensors, **arguments), *gradients])
    for several in results[1:]:
        for one, other, what in zip(results[0], several, ("output", "argmax", *GRADIENT_NAMES), strict=True):
            assert_equal(other, one, what)


@pytest.mark.cpu_only
@pytest.mark.parametrize("N", [1, 10])
@pytest.mark.parametrize("isa", ISAS)
def test_thread_count_does_not_change_a_bit_on_any_isa(isa: str, N: int) -> None:
    """One image too: there the work inside an image is what is shared."""
    pyconv.set_isa(isa)
    case = BY_NAME["CIFAR64"].with_batch(N) if isa != "scalar" else BY_NAME["L2"].with_batch(N)
    *tensors, grad_output = operands(case, torch.float32, DATA["signed"])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, activation="tanh", **case.kwargs())
        results.append([output, *gradients])
    for one, two in zip(*results, strict=True):
        assert_equal(two, one, "output or gradient")


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("N", [9, 131])
def test_many_threads_and_many_images(N: int, dtype: torch.dtype) -> None:
    """Images in several chunks and blocks of them, the last ones not full; more threads than a step has segments."""
    case = BY_NAME["L2"].with_batch(N)
    *tensors, grad_output = operands(case, dtype, DATA["signed"])
    exact = operands(case, torch.float32, integers)
    arguments = {"activation": "relu", **case.kwargs()}
    torch.set_num_threads(1)
    expected = run(conv_max_pool2d, *tensors, grad_output, **arguments)
    for threads in (2, 5, 11):
        torch.set_num_threads(threads)
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, **arguments)
        assert_equal(output, expected[0], "output")
        for gradient, one, what in zip(gradients, expected[1], GRADIENT_NAMES, strict=True):
            assert_equal(gradient, one, f"{what} on {threads} threads")
        assert_exact(*exact, **arguments)


@pytest.mark.cpu_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "pool_size, pool_padding", [((5, 2), (2, 0)), ((5, 2), (0, 0)), ((3, 3), (1, 1)), ((4, 1), (1, 0))], ids=str
)
def test_windows_taller_than_what_is_computed_at_a_time(pool_size: Pair, pool_padding: Pair, isa: str) -> None:
    """Wide maps of many channels, of which two rows of the convolution at a time fill the cache: a task of rows in the
    middle has several steps to go before its first window is complete, and nothing to say about the rows above."""
    pyconv.set_isa(isa)
    case = Case("tall", 1, 128, 12, 64, 16, (3, 3), padding=(1, 1), pool_size=pool_size, pool_padding=pool_padding,
                pool_stride=(1, 2))  # fmt: skip
    tensors = operands(case, torch.float32, integers)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_exact(*tensors, **{"activation": "none", **case.kwargs()})


@pytest.mark.cpu_only
@pytest.mark.parametrize("isa", ISAS)
def test_scratch_memory_does_not_follow_a_window_beyond_the_map(isa: str) -> None:
    """ceil_mode allows it where the stride is as large; of each window only the first position exists."""
    pyconv.set_isa(isa)
    input, weight = (integers(shape, torch.float32, torch.Generator()) for shape in ((2, 8, 20, 20), (32, 8, 3, 3)))
    far = {"pool_size": 3, "pool_stride": 2 * 10**8, "pool_dilation": 10**8, "ceil_mode": True}
    output, gradients = run(conv_max_pool2d, input, weight, None, **far)
    first = F.conv2d(input[..., :3, :3], weight)
    assert_equal(output, first, "output")
    expected, _ = run(F.conv2d, input[..., :3, :3], weight, None)[1]
    assert_equal(gradients[0][..., :3, :3], expected, "gradient of input")
    assert not gradients[0][..., 3:].any() and not gradients[0][..., 3:, :].any()


def test_repeated_runs_give_the_same_bits() -> None:
    case = BY_NAME["L2"]
    *tensors, grad_output = operands(case, torch.float32, DATA["signed"])
    first = run(conv_max_pool2d, *tensors, grad_output, activation="relu", **case.kwargs())
    for _ in range(5):
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, activation="relu", **case.kwargs())
        for again, before in zip([output, *gradients], [first[0], *first[1]], strict=True):
            assert_equal(again, before, "output or gradient")


def test_concurrent_calls_from_python_threads() -> None:
    """Calls release the GIL: they must not share scratch memory."""
    cases = [BY_NAME[name].reduced() for name in ("L1", "L2", "pool-overlap", "groups-2", "DQN", "K-33")]
    problems = [operands(case, torch.float32, DATA["signed"], seed) for seed, case in enumerate(cases)]

    def solve(i: int) -> list[torch.Tensor]:
        output, gradients = run(conv_max_pool2d, *problems[i], activation="relu", **cases[i].kwargs())
        return [output, *gradients]

    expected = [solve(i) for i in range(len(cases))]
    order = [i % len(cases) for i in range(20 * len(cases))]
    with ThreadPoolExecutor(4) as pool:
        for i, results in zip(order, pool.map(solve, order), strict=True):
            for actual, alone in zip(results, expected[i], strict=True):
                assert_equal(actual, alone, cases[i].name)
