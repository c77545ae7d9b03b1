"""conv_max_pool2d: the memory format of its results, and operands in any memory layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import also_emulated, device
from cases import BY_NAME, Case
from numerics import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    arrange,
    assert_equal,
    assert_exact,
    dtype_name,
    integers,
    kernel_argmax,
    leaf,
    operands,
    run,
)

from pyconv import reference
from pyconv.functional import conv_max_pool2d

CASE = BY_NAME["K-13"]

# Memory format


def strided_like(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """A dense tensor whose dimensions lie in memory in the given order, outermost first."""
    inverse = [order.index(d) for d in range(len(order))]
    return torch.zeros([shape[d] for d in order]).permute(inverse)


ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    "input_shape, weight_shape",
    [
        ((2, 3, 8, 9), (4, 3, 3, 3)),
        ((1, 3, 8, 9), (4, 3, 3, 3)),
        ((2, 1, 8, 9), (4, 1, 3, 3)),
        ((1, 1, 8, 9), (1, 1, 3, 3)),
        ((2, 3, 8, 8), (4, 3, 1, 1)),
        ((2, 1, 8, 8), (4, 1, 1, 1)),
        ((2, 3, 8, 9), (1, 3, 3, 3)),
        ((2, 3, 1, 9), (4, 3, 1, 3)),
    ],
    ids=str,
)
def test_memory_format_is_that_of_conv2d(input_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> None:
    """channels_last if and only if input or weight is, also where sizes of one make the strides ambiguous."""
    for input_order, weight_order in itertools.product(ORDERS, ORDERS):
        input, weight = strided_like(input_shape, input_order), strided_like(weight_shape, weight_order)
        expected = F.conv2d(input, weight)
        actual = conv_max_pool2d(input, weight, pool_size=1)
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride(), (
            f"input strides {input.stride()}, weight strides {weight.stride()}"
        )


@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_results_are_dense_in_the_memory_format(input_layout: str, weight_layout: str) -> None:
    input, weight, bias, grad_output = operands(CASE, torch.float32, integers)
    output, (grad_input, grad_weight, grad_bias) = run(
        conv_max_pool2d, arrange(input, input_layout), arrange(weight, weight_layout), bias, grad_output
    )
    channels_last = "channels_last" in (input_layout, weight_layout)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)
    assert grad_input.is_contiguous(memory_format=memory_format)
    assert grad_weight.shape == weight.shape and grad_bias.is_contiguous()


@also_emulated
def test_argmax_has_the_layout_of_the_output() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input, weight, bias, _ = operands(CASE, torch.float32, integers)
        input = input.contiguous(memory_format=memory_format)
        argmax = kernel_argmax(input, weight, bias, **CASE.kwargs())
        assert argmax.stride() == conv_max_pool2d(input, weight, bias, **CASE.kwargs()).stride()


def test_unbatched_output_is_contiguous_as_conv2d_makes_it() -> None:
    input, weight, *_ = operands(CASE, torch.float32, integers)
    image = input[0]
    expected = F.conv2d(image, weight).stride()
    assert conv_max_pool2d(image, weight, pool_size=1).stride() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["L2", "pool-overlap", "groups-2", "K-33"])
def test_result_does_not_depend_on_the_layout(name: str, dtype: torch.dtype) -> None:
    """On integers, where every order of summation gives the same: all combinations of layouts."""
    case = BY_NAME[name].reduced()
    tensors = operands(case, dtype, integers)
    expected, expected_gradients = assert_exact(*tensors, activation="relu", **case.kwargs())
    for layouts in itertools.product(LAYOUTS, repeat=3):
        input, weight, grad_output = (
            arrange(t, layout) for t, layout in zip((*tensors[:2], tensors[3]), layouts, strict=True)
        )
        output, gradients = run(
            conv_max_pool2d, input, weight, tensors[2], grad_output, activation="relu", **case.kwargs()
        )
        assert_equal(output, expected, f"output for {layouts}")
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            assert_equal(gradient, other, f"gradient for {layouts}")


# Unusual strides


@also_emulated
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_expanded_operands(dims: tuple[int, ...], activation: str) -> None:
    """Strides of zero, in input, weight, bias and grad_output."""
    tensors = []
    for t in operands(CASE, torch.float32, integers):
        index = [slice(0, 1) if d in dims and t.dim() == 4 else slice(None) for d in range(t.dim())]
        tensors.append(t[tuple(index)].expand(t.shape) if t.dim() == 4 else t[:1].expand(t.shape))
    assert_exact(*tensors, activation=activation, **CASE.kwargs())


@also_emulated
def test_gradient_of_a_sum_is_expanded() -> None:
    """sum() sends a scalar expanded to the output's shape."""
    input, weight, bias, _ = operands(CASE, torch.float32, integers)
    leaves = [leaf(t) for t in (input, weight, bias)]
    conv_max_pool2d(*leaves, activation="relu", **CASE.kwargs()).sum().backward()
    _, expected = run(reference.conv_max_pool2d, input, weight, bias, activation="relu", **CASE.kwargs())
    for tensor, gradient in zip(leaves, expected, strict=True):
        assert_equal(tensor.grad, gradient, "gradient")


@also_emulated
@pytest.mark.parametrize("name", ["L1", "L2", "K-33", "pool-overlap"])
def test_sliced_views_of_larger_tensors(name: str) -> None:
    """Every dimension stepped or offset, and what lies around the view is poison."""
    case = BY_NAME[name].reduced()
    views = []
    for t in operands(case, torch.float32, integers):
        around = torch.full([2 * size + 3 for size in t.shape], float("nan"))
        view = around[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
        views.append(view.copy_(t))
    assert_exact(*views, activation="relu", **case.kwargs())


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["L1", "L2", "K-33"])
def test_misaligned_operands(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Elements on odd addresses, as a view of a packed byte buffer has them."""
    case = BY_NAME[name].with_batch(1)
    misaligned = []
    for t in operands(case, dtype, lambda *args: integers(*args, largest=1)):
        dense = t.contiguous(memory_format=memory_format) if t.dim() == 4 else t
        size = t.numel() * t.element_size()
        buffer = torch.from_numpy(np.zeros(size + 16, dtype=np.uint8))
        offset = 1 + (-buffer.data_ptr()) % 8
        # torch views bytes as elements only on aligned offsets; NumPy does on any.
        raw = np.ndarray((t.numel(),), _NUMPY_TYPES[dtype], buffer.numpy().data, offset)
        view = torch.from_numpy(raw.view(_NUMPY_TYPES[dtype])).view(dtype)
        assert view.data_ptr() % 2 == 1
        view = view.as_strided(dense.shape, dense.stride())
        misaligned.append(view.copy_(t))
    assert_exact(*misaligned, activation="relu", **case.kwargs())


_NUMPY_TYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,
}


@also_emulated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grad_output_in_any_layout(activation: str, layout: str) -> None:
    """Saved tensors have the output's layout, grad_output any other."""
    case = BY_NAME["pool-overlap"]
    input, weight, bias, grad_output = operands(case, torch.float64, integers)
    arguments = {"activation": activation, **case.kwargs()}
    for input_layout in ("contiguous", "channels_last"):
        tensors = (arrange(input, input_layout), weight, bias)
        _, expected = run(reference.conv_max_pool2d, *tensors, grad_output, **arguments)
        _, actual = run(conv_max_pool2d, *tensors, arrange(grad_output, layout), **arguments)
        for gradient, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


# Sizes of zero and one


@also_emulated
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_empty_batch(dtype: torch.dtype, layout: str) -> None:
    case = BY_NAME["batch-0"]
    input, weight, bias, grad_output = operands(case, dtype, integers)
    output, gradients = run(
        conv_max_pool2d, arrange(input, layout), arrange(weight, layout), bias, grad_output, **case.kwargs()
    )
    assert output.shape == case.output_shape and output.dtype == dtype
    for gradient, like in zip(gradients, (input, weight, bias), strict=True):
        assert_equal(gradient, torch.zeros_like(like), "gradient")


@also_emulated
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        Case("all-ones", 1, 1, 1, 1, 1, (1, 1), pool_size=(1, 1)),
        Case("one-position", 2, 3, 3, 3, 4, (3, 3), pool_size=(1, 1)),
        Case("one-row", 2, 3, 1, 9, 4, (1, 3), pool_size=(1, 2)),
        Case("one-column", 2, 3, 9, 1, 4, (3, 1), pool_size=(2, 1)),
        Case("one-window", 2, 3, 4, 4, 4, (3, 3)),
        Case("one-filter-one-channel", 3, 1, 6, 6, 1, (3, 3)),
    ],
    ids=lambda case: case.name,
)
def test_sizes_of_one(case: Case, layout: str) -> None:
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    assert_exact(
        arrange(input, layout), arrange(weight, layout), bias, grad_output, activation="none", **case.kwargs()
    )


@also_emulated
def test_views_of_a_huge_tensor() -> None:
    """Strides beyond 2**31 elements: on the CPU 8 GiB of address space, of which a few pages are touched."""
    far = 2**31
    if device().type == "cuda" and torch.cuda.mem_get_info()[0] < 3 * 4 * far:
        pytest.skip("two storages of 8 GiB each do not fit on this GPU")
    values = {name: torch.randint(-2, 3, (2, 2, 6, 6)).float() for name in ("x", "w")}
    x = torch.empty(far + 72).as_strided((2, 2, 6, 6), (far, 36, 6, 1)).copy_(values["x"])
    w = torch.empty(far + 72).as_strided((2, 2, 3, 3), (9, far, 3, 1)).copy_(values["w"][..., :3, :3])
    gradients = []
    for pair in ((x, w), (x.contiguous(), w.contiguous())):
        leaves = [t.detach().requires_grad_() for t in pair]
        output = conv_max_pool2d(*leaves)
        gradients.append((output, *torch.autograd.grad(output, leaves, torch.ones_like(output))))
    for strided, dense in zip(*gradients, strict=True):
        assert torch.equal(strided, dense)
