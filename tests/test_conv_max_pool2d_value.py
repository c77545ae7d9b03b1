"""conv_max_pool2d against the float64 reference: exact on integers, within the error bound elsewhere."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from backends import also_emulated, backend
from cases import BY_NAME, CASES, Case, random_case
from numerics import (
    ACTIVATIONS,
    DATA,
    DTYPES,
    GRADIENT_NAMES,
    LAYOUTS,
    affordable,
    arrange,
    assert_equal,
    assert_exact,
    check_bounds,
    dtype_name,
    expect_gradients,
    integers,
    kernel_argmax,
    live_windows,
    operands,
    positive,
    run,
)

from pyconv import reference
from pyconv.functional import conv_max_pool2d

RANDOM_SHAPES = 240
FILLED = [case for case in CASES if not case.tags & {"empty-windows", "empty-batch"}]
SMALL = [case for case in FILLED if "odd" in case.tags or case.name in ("L1", "L2")]
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


# Integer data: exact


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("seed", range(RANDOM_SHAPES))
def test_random_shape_is_exact_on_integers(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed)
    draw = random.Random(seed)
    input, weight, bias, grad_output = operands(case, dtype, integers, seed)
    activation = draw.choice(("none", "relu"))
    if draw.random() < 0.15:
        input, grad_output = input[0], grad_output[0]
    input, weight, grad_output = (arrange(t, draw.choice(LAYOUTS)) for t in (input, weight, grad_output))
    bias = bias if draw.random() < 0.8 else None
    assert_exact(input, weight, bias, grad_output, activation=activation, **case.kwargs())


@also_emulated
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=("NCHW", "channels_last"))
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_named_shape_is_exact_on_integers(case: Case, memory_format: torch.memory_format) -> None:
    case = affordable(case)
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    input = input.contiguous(memory_format=memory_format)
    output, _ = assert_exact(input, weight, bias, grad_output, activation="relu", **case.kwargs())
    assert output.shape == case.output_shape


@pytest.mark.parametrize("name", ["L1", "L2", "CIFAR64", "KSH5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=dtype_name)
def test_network_shape_is_exact_on_integers_in_other_types(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name].with_batch(1)

    def sparse_integers(
        shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> torch.Tensor:
        """Mostly zero: sums over hundreds of channels stay below what bfloat16 holds exactly."""
        values = integers(shape, dtype, generator, largest=1)
        return values * (positive(shape, torch.float32, generator) < 0.3)

    input, weight, bias, grad_output = operands(case, dtype, sparse_integers)
    assert_exact(input, weight, bias, grad_output, activation="relu", **case.kwargs())


@pytest.mark.parametrize("N", [1, 3, 10, 33])
@pytest.mark.parametrize("name", ["L1", "L2"])
def test_book_layers_are_exact_on_integers_at_any_batch(name: str, N: int) -> None:
    case = BY_NAME[name].with_batch(N)
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    assert_exact(input, weight, bias, grad_output, activation="relu", **case.kwargs())


def test_reference_is_the_composition_of_torch_operators() -> None:
    for case in FILLED:
        case = case.reduced()
        input, weight, bias, grad_output = operands(case, torch.float64, integers)

        def composite(
            input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, c: Case = case
        ) -> torch.Tensor:
            conv = F.conv2d(input, weight, None, c.stride, c.padding, c.dilation, c.groups)
            pool = F.max_pool2d(
                conv, c.pool_size, c.pool_stride, c.pool_padding, c.pool_dilation, c.ceil_mode
            )
            return torch.relu(pool + bias[:, None, None])

        actual, actual_gradients = run(
            reference.conv_max_pool2d, input, weight, bias, grad_output, activation="relu", **case.kwargs()
        )
        expected, expected_gradients = run(composite, input, weight, bias, grad_output)
        assert_equal(actual, expected, case.name)
        for a, b in zip(actual_gradients, expected_gradients, strict=True):
            assert_equal(a, b, case.name)


# Real data: the error bound


def torch_runs(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grad_output: torch.Tensor,
    **arguments: object,
) -> list[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
    """torch's output, gradients and argmax in NCHW and in channels_last."""
    runs = []
    for memory_format in MEMORY_FORMATS:
        tensors = (
            input.contiguous(memory_format=memory_format),
            weight.contiguous(memory_format=memory_format),
        )
        output, gradients = run(reference.conv_max_pool2d, *tensors, bias, grad_output, **arguments)
        runs.append((output, gradients, reference.conv_max_pool2d_argmax(*tensors, bias, **arguments)))
    return runs


def check_accuracy(
    case: Case, dtype: torch.dtype, data: str, activation: str, memory_format: torch.memory_format
) -> None:
    """Output and gradients within the bound, and on the CPU not much worse than the worse of torch's memory formats."""
    input, weight, bias, grad_output = operands(case, dtype, DATA[data])
    arguments = {"activation": activation, **case.kwargs()}
    formatted = input.contiguous(memory_format=memory_format)
    checked = check_bounds(formatted, weight, bias, grad_output, **arguments)
    if dtype == torch.float64:
        # torch's float64 result is what the error is measured against.
        return
    if backend() == "cuda":
        # Without cuDNN torch adds in blocks there, the kernels term by term. The bound allows for that.
        return
    torchs = torch_runs(input, weight, bias, grad_output, **arguments)
    eps = torch.finfo(dtype).eps
    output, expected = checked[0]
    worst = max(expected.worst_relative_error(run[0]) for run in torchs)
    assert expected.worst_relative_error(output) <= 2 * worst + eps, "output: far less accurate than torch"

    torch_expected = [
        expect_gradients(run[2], grad_output, input, weight, bias, **arguments) for run in torchs
    ]
    for i, (gradient, expected) in enumerate(checked[1:]):
        worst = max(
            per_run[i].worst_relative_error(run[1][i])
            for per_run, run in zip(torch_expected, torchs, strict=True)
        )
        assert expected.worst_relative_error(gradient) <= 3 * worst + eps, (
            f"gradient of {GRADIENT_NAMES[i]}: far less accurate than torch"
        )


WINOGRAD = [case for case in FILLED if case.name.startswith("winograd")]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", WINOGRAD, ids=names(WINOGRAD))
def test_error_bound_of_winograd(case: Case, dtype: torch.dtype, data: str) -> None:
    check_accuracy(case, dtype, data, "relu", torch.channels_last)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("case", FILLED, ids=names(FILLED))
def test_error_bound_of_named_shape(case: Case, data: str) -> None:
    check_accuracy(case.reduced(), torch.float32, data, "relu", torch.contiguous_format)


@also_emulated
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ["L1", "L2", "CIFAR64", "KSH5", "K-33", "pool-overlap", "depthwise"])
def test_error_bound_in_channels_last(name: str, data: str) -> None:
    check_accuracy(affordable(BY_NAME[name]), torch.float32, data, "none", torch.channels_last)


@also_emulated
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["L2", "K-13", "pool-overlap"])
def test_error_bound_of_every_type_and_activation(
    name: str, dtype: torch.dtype, activation: str, data: str
) -> None:
    check_accuracy(BY_NAME[name].reduced(), dtype, data, activation, torch.contiguous_format)


# The rules of the maximum


def argmax_as_int64(argmax: torch.Tensor) -> torch.Tensor:
    return argmax.long().masked_fill(~live_windows(argmax), reference.NO_GRADIENT)


def torch_argmax(conv: torch.Tensor, case: Case) -> torch.Tensor:
    """The window-relative argmax from the flat indices of torch's own max_pool2d."""
    pool_stride = case.pool_stride or case.pool_size
    _, flat = F.max_pool2d(
        conv,
        case.pool_size,
        pool_stride,
        case.pool_padding,
        case.pool_dilation,
        case.ceil_mode,
        return_indices=True,
    )
    window_row = torch.arange(flat.shape[-2])[:, None]
    window_column = torch.arange(flat.shape[-1])
    row = flat // conv.shape[-1] - (window_row * pool_stride[0] - case.pool_padding[0])
    column = flat % conv.shape[-1] - (window_column * pool_stride[1] - case.pool_padding[1])
    return row // case.pool_dilation[0] * case.pool_size[1] + column // case.pool_dilation[1]


POOLING = [
    "K-13",
    "pool-2x3",
    "pool-overlap",
    "pool-padding",
    "pool-padding-ceil",
    "pool-dilation",
    "window-300",
]


def pooling_only(name: str, C: int = 8) -> Case:
    """The pooling of a named case behind a depthwise 1x1 convolution, so that any map can be pooled."""
    case = BY_NAME[name]
    _, _, height, width = case.conv_shape
    return Case(
        f"{name}-only", 2, C, height, width, C, (1, 1), groups=C, pool_size=case.pool_size,
        pool_stride=case.pool_stride, pool_padding=case.pool_padding, pool_dilation=case.pool_dilation,
        ceil_mode=case.ceil_mode,
    )  # fmt: skip


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", POOLING)
def test_ties_take_the_first_position(name: str, dtype: torch.dtype) -> None:
    case = pooling_only(name)
    input = torch.randint(0, 2, case.input_shape).to(dtype)
    weight = torch.ones(case.weight_shape, dtype=dtype)
    argmax = argmax_as_int64(kernel_argmax(input, weight, None, **case.kwargs()))
    assert_equal(argmax, torch_argmax(input, case), "argmax")
    assert_equal(argmax, reference.conv_max_pool2d_argmax(input, weight, **case.kwargs()), "argmax")


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", POOLING)
def test_non_finite_values_follow_torch(name: str, value: float, dtype: torch.dtype) -> None:
    # One channel in, so that no 0 * inf of another channel gets into a sum.
    case = pooling_only(name)
    input = torch.randint(-3, 4, case.input_shape).to(dtype)
    input[torch.rand(case.input_shape) < 0.3] = value
    input[0, 0] = value
    weight = torch.ones(case.weight_shape, dtype=dtype)
    output = conv_max_pool2d(input, weight, **case.kwargs())
    assert_equal(output, reference.conv_max_pool2d(input, weight, **case.kwargs()), "output")
    argmax = argmax_as_int64(kernel_argmax(input, weight, None, **case.kwargs()))
    assert_equal(argmax, torch_argmax(input, case), "argmax")


@also_emulated
def test_non_finite_convolution_inputs_follow_torch() -> None:
    """Through a dense convolution: what becomes NaN, inf or stays finite is what torch makes of it."""
    case = BY_NAME["L2"].reduced()
    input, weight, bias, _ = operands(case, torch.float32, integers)
    input[0, 3, 4, 5], input[1, 7, 2, 2], input[1, 0, 11, 11] = float("nan"), float("inf"), float("-inf")
    weight[5, 2, 1, 1] = float("inf")
    output = conv_max_pool2d(input, weight, bias, activation="relu", **case.kwargs())
    assert_equal(
        output, reference.conv_max_pool2d(input, weight, bias, activation="relu", **case.kwargs()), "output"
    )


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=("NCHW", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["winograd-5x5", "winograd-overlap-padding", "winograd-groups"])
def test_non_finite_values_do_not_spread_in_a_winograd_tile(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Values, winners and gradients are those of a direct sum, and the other images keep their bits."""
    case = BY_NAME[name].with_batch(3)
    input, weight, bias, grad_output = operands(case, dtype, integers)
    input = input.contiguous(memory_format=memory_format)
    arguments = {"activation": "none", **case.kwargs()}
    untouched = conv_max_pool2d(input, weight, bias, **arguments)
    largest = torch.finfo(dtype).max
    for value in (float("inf"), float("-inf"), float("nan"), largest):
        spoilt = input.clone(memory_format=torch.preserve_format)
        spoilt[1, 3, 4, 5] = value
        spoilt[1, 7, 4, 6] = -value
        output = conv_max_pool2d(spoilt, weight, bias, **arguments)
        assert_equal(output[::2], untouched[::2], "the other images")
        expected = reference.conv_max_pool2d(spoilt[1:2].double(), weight.double(), bias.double(), **arguments)
        if value != largest:
            assert_equal(output[1:2], expected.to(dtype), "output")
            argmax = kernel_argmax(spoilt, weight, bias, **case.kwargs())
            double = (spoilt.double(), weight.double(), bias.double())
            assert_equal(
                argmax_as_int64(argmax), reference.conv_max_pool2d_argmax(*double, **case.kwargs()), "argmax"
            )
        else:
            # The transform's sums overflow where the direct ones cannot: windows that multiply the value by zero only.
            magnitudes = (spoilt[1:2].double().abs(), weight.double().abs(), bias.double().abs())
            finite = reference.conv_max_pool2d(*magnitudes, **arguments) < largest / 16
            assert_equal(output[1:2].isfinite() & finite, finite, "where the output is finite")


@also_emulated
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activation_of_non_finite_values(value: float, activation: str) -> None:
    case = pooling_only("no-pool")
    input = torch.full(case.input_shape, value)
    weight = torch.ones(case.weight_shape)
    output = conv_max_pool2d(input, weight, activation=activation, **case.kwargs())
    assert_equal(output, reference.ACTIVATIONS[activation](input), "output")


@also_emulated
def test_relu_of_nan_is_live_and_relu_of_zero_is_dead() -> None:
    case = pooling_only("no-pool")
    input = torch.zeros(case.input_shape)
    input[:, :, 1] = float("nan")
    input[:, :, 2] = 1.0
    weight, bias = torch.ones(case.weight_shape), torch.zeros(case.bias_shape)
    _, (_, _, grad_bias) = run(conv_max_pool2d, input, weight, bias, activation="relu", **case.kwargs())
    live_rows = 2
    assert_equal(
        grad_bias, torch.full(case.bias_shape, float(case.N * live_rows * case.W)), "gradient of bias"
    )


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("name", ["empty-windows", "empty-windows-rows"])
def test_windows_without_a_valid_position(name: str, activation: str, dtype: torch.dtype) -> None:
    """They give activation(-inf) and no gradient, whatever arrives from above."""
    case = BY_NAME[name]
    input, weight, bias, _ = operands(case, dtype, integers)
    for upstream in (1.0, float("inf"), float("nan")):
        grad_output = torch.full(case.output_shape, upstream, dtype=dtype)
        output, gradients = run(
            conv_max_pool2d, input, weight, bias, grad_output, activation=activation, **case.kwargs()
        )
        empty = torch.full(case.output_shape, float("-inf"), dtype=dtype)
        assert_equal(output, reference.ACTIVATIONS[activation](empty), "output")
        for gradient, name in zip(gradients, GRADIENT_NAMES, strict=True):
            assert_equal(gradient, torch.zeros_like(gradient), f"gradient of {name}")


@also_emulated
@pytest.mark.parametrize(
    "name, dtype", [("window-255", torch.uint8), ("window-256", torch.int32), ("window-300", torch.int32)]
)
def test_argmax_is_one_byte_up_to_255_positions(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    # The maximum of the last window at its last position: the largest index there is.
    input[..., -1, -1] = 100
    weight[:, :, -1, -1] = 2
    assert kernel_argmax(input, weight, bias, **case.kwargs()).dtype == dtype
    expected = reference.conv_max_pool2d_argmax(input, weight, bias, **case.kwargs())
    assert expected.max() == case.window_positions - 1
    assert_equal(argmax_as_int64(kernel_argmax(input, weight, bias, **case.kwargs())), expected, "argmax")
    assert_exact(input, weight, bias, grad_output, activation="none", **case.kwargs())


# Arguments in every form


@pytest.mark.parametrize(
    "given, pair",
    [
        ({"stride": 2}, {"stride": (2, 2)}),
        ({"padding": 1}, {"padding": (1, 1)}),
        ({"padding": "valid"}, {"padding": (0, 0)}),
        ({"padding": "same"}, {"padding": (1, 1)}),
        ({"dilation": 2}, {"dilation": (2, 2)}),
        ({"pool_size": 3}, {"pool_size": (3, 3)}),
        ({"pool_size": 3, "pool_stride": 1}, {"pool_size": (3, 3), "pool_stride": (1, 1)}),
        ({"pool_size": 3}, {"pool_size": (3, 3), "pool_stride": (3, 3)}),
        ({"pool_padding": 1}, {"pool_padding": (1, 1)}),
        ({"pool_dilation": 2}, {"pool_dilation": (2, 2)}),
        ({"stride": [2, 1], "pool_size": [2, 3]}, {"stride": (2, 1), "pool_size": (2, 3)}),
        ({}, {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "pool_size": (2, 2),
              "pool_stride": (2, 2), "pool_padding": (0, 0), "pool_dilation": (1, 1), "ceil_mode": False}),
    ],
    ids=str,
)  # fmt: skip
def test_an_int_means_a_pair(given: dict[str, object], pair: dict[str, object]) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    input, weight = (integers(shape, torch.float32, generator) for shape in ((2, 3, 11, 12), (4, 3, 3, 3)))
    assert_equal(conv_max_pool2d(input, weight, **given), conv_max_pool2d(input, weight, **pair), "output")
    assert_equal(
        conv_max_pool2d(input, weight, **given), reference.conv_max_pool2d(input, weight, **given), "output"
    )


def test_pooling_order_does_not_matter_for_monotone_activations() -> None:
    """conv -> bias -> activation -> pool, the order of most networks, gives the same values."""
    case = BY_NAME["L2"].reduced()
    input, weight, bias, _ = operands(case, torch.float64, DATA["signed"])
    for activation in ("none", "relu", "sigmoid", "tanh"):
        other = F.max_pool2d(reference.ACTIVATIONS[activation](F.conv2d(input, weight, bias)), 2)
        ours = conv_max_pool2d(input, weight, bias, activation=activation)
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_unbatched_input(dtype: torch.dtype) -> None:
    case = BY_NAME["K-13"].with_batch(1)
    input, weight, bias, grad_output = operands(case, dtype, integers)
    output, gradients = run(
        conv_max_pool2d, input[0], weight, bias, grad_output[0], activation="relu", **case.kwargs()
    )
    batched, batched_gradients = run(
        conv_max_pool2d, input, weight, bias, grad_output, activation="relu", **case.kwargs()
    )
    assert_equal(output, batched[0], "output")
    assert_equal(gradients[0], batched_gradients[0][0], "gradient of input")
    for gradient, expected in zip(gradients[1:], batched_gradients[1:], strict=True):
        assert_equal(gradient, expected, "gradient of a parameter")


@also_emulated
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batch_of_none(activation: str) -> None:
    case = BY_NAME["batch-0"]
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    output, gradients = run(
        conv_max_pool2d, input, weight, bias, grad_output, activation=activation, **case.kwargs()
    )
    assert output.shape == case.output_shape
    for gradient, like in zip(gradients, (input, weight, bias), strict=True):
        assert_equal(gradient, torch.zeros_like(like), "gradient")


@also_emulated
@pytest.mark.parametrize("stride", [7, 10**8, 2**40, 2**63 - 1])
def test_stride_that_is_never_taken(stride: int) -> None:
    """With one output along an axis the stride is irrelevant, and no scratch memory may follow it."""
    x = torch.arange(64.0).reshape(1, 1, 8, 8).requires_grad_()
    w = torch.ones(1, 1, 3, 3)
    output = conv_max_pool2d(x, w, stride=stride, pool_size=1)
    assert torch.equal(output, F.conv2d(x, w, stride=7))
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert gradient.sum() == 9 and gradient[..., :3, :3].sum() == 9


@pytest.mark.long
def test_argmax_beyond_the_integers_of_float32() -> None:
    """A window of more than 2**24 positions: the argmax may not travel as a float32 number."""
    size, row, column = 4200, 4120, 1235
    x = torch.zeros(1, 1, size, size)
    x[0, 0, row, column] = 1
    output, argmax, _ = torch.ops.pyconv._conv_max_pool2d_forward(
        x, torch.ones(1, 1, 1, 1), pool_size=[size, size], pool_stride=[size, size]
    )
    assert output.item() == 1
    assert argmax.item() == row * size + column
