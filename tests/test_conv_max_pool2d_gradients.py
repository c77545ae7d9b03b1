"""conv_max_pool2d: derivatives of every order, what is saved for them and what may be done to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import also_emulated, every_isa, use_isa
from cases import BY_NAME, Case, Pair
from numerics import (
    ACTIVATIONS,
    DATA,
    DTYPES,
    GRADIENT_NAMES,
    assert_equal,
    dtype_name,
    integers,
    leaf,
    operands,
    run,
)

from pyconv import reference
from pyconv.functional import conv_max_pool2d

SMALL: dict[str, Case] = {
    case.name: case
    for case in (
        Case("plain", 2, 2, 6, 6, 3, (3, 3)),
        Case("strided", 1, 2, 9, 8, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
        Case("dilated-groups", 1, 4, 7, 7, 4, (2, 2), dilation=(2, 3), groups=2),
        Case("overlap", 1, 2, 7, 7, 2, (2, 2), pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1)),
        Case("pool-dilation-ceil", 1, 1, 8, 8, 2, (2, 2), pool_dilation=(2, 1), ceil_mode=True),
        Case("same", 1, 2, 5, 6, 2, (2, 4), padding="same"),
        Case("int32-argmax", 1, 1, 18, 17, 2, (2, 2), pool_size=(16, 16), pool_stride=(1, 1)),
    )
}


def well_separated(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random float64 leaves: no two values of a window are so close that a finite difference swaps them."""
    input, weight, bias, _ = operands(case, torch.float64, DATA["signed"], seed)
    input, weight, bias = leaf(input), leaf(weight), leaf(bias)
    return input, weight, bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name: str, activation: str) -> None:
    case = SMALL[name]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(*tensors, activation=activation, **case.kwargs())

    assert torch.autograd.gradcheck(function, well_separated(case))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["plain", "overlap"])
def test_gradgradcheck(name: str, activation: str) -> None:
    case = SMALL[name]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(*tensors, activation=activation, **case.kwargs())

    assert torch.autograd.gradgradcheck(function, well_separated(case), check_fwd_over_rev=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_gradient_penalty_added_to_another_loss(name: str, activation: str) -> None:
    """The second-order terms must not be dropped: beside a first-order loss nobody would notice."""
    case = SMALL[name]

    def gradients(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        input, weight, bias = well_separated(case)
        output = function(input, weight, bias, activation=activation, **case.kwargs())
        first_order = torch.autograd.grad(output.square().sum(), (input, weight, bias), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first_order)
        return torch.autograd.grad(output.sum() + penalty, (input, weight, bias))

    for actual, expected, name in zip(
        gradients(conv_max_pool2d), gradients(reference.conv_max_pool2d), GRADIENT_NAMES, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
def test_gradient_penalty_without_bias(unbatched: bool, activation: str) -> None:
    case = SMALL["plain"]

    def gradients(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        input, weight, _ = well_separated(case)
        image = input[0] if unbatched else input
        output = function(image, weight, activation=activation, **case.kwargs())
        (first_order,) = torch.autograd.grad(output.sum(), image, create_graph=True)
        return torch.autograd.grad(output.square().sum() + first_order.square().sum(), (input, weight))

    for actual, expected in zip(
        gradients(conv_max_pool2d), gradients(reference.conv_max_pool2d), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["empty-windows", "empty-windows-rows"])
def test_gradient_penalty_of_windows_without_a_valid_position(name: str) -> None:
    case = BY_NAME[name]
    input, weight, bias = well_separated(case)
    output = conv_max_pool2d(input, weight, bias, activation="tanh", **case.kwargs())
    first_order = torch.autograd.grad(output.sum(), (input, weight, bias), create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first_order)
    for gradient in torch.autograd.grad(output.sum() + penalty, (input, weight, bias)):
        assert_equal(gradient, torch.zeros_like(gradient), "gradient")


def test_gradient_penalty_through_backward_accumulation() -> None:
    """As above, through .backward() and .grad rather than autograd.grad."""
    case = SMALL["plain"]

    def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = well_separated(case)
        output = function(*leaves, activation="tanh", **case.kwargs())
        (first_order,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
        (output.mean() + first_order.norm()).backward()
        return [t.grad for t in leaves]

    for actual, expected in zip(
        gradients(conv_max_pool2d), gradients(reference.conv_max_pool2d), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_third_derivative() -> None:
    case = SMALL["plain"]

    def third(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        input, weight, bias = well_separated(case)
        value = function(input, weight, bias, activation="sigmoid", **case.kwargs()).sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
            value = gradient.square().sum()
        return torch.autograd.grad(value, weight)[0]

    torch.testing.assert_close(third(conv_max_pool2d), third(reference.conv_max_pool2d), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "gelu"])
def test_hessian(activation: str) -> None:
    case = SMALL["plain"]
    input, weight, bias = well_separated(case)

    def loss_of(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def loss(weight: torch.Tensor) -> torch.Tensor:
            return function(input, weight, bias, activation=activation, **case.kwargs()).square().sum()

        return loss

    actual = torch.autograd.functional.hessian(loss_of(conv_max_pool2d), weight)
    expected = torch.autograd.functional.hessian(loss_of(reference.conv_max_pool2d), weight)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# Which gradients are computed


@also_emulated
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool]) -> None:
    case = BY_NAME["K-13"]
    *tensors, grad_output = operands(case, torch.float32, integers)
    _, expected = run(reference.conv_max_pool2d, *tensors, grad_output, **case.kwargs())
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    output = conv_max_pool2d(*leaves, **case.kwargs())
    assert output.requires_grad == any(needs)
    if not any(needs):
        return
    output.backward(grad_output)
    for tensor, need, gradient, name in zip(leaves, needs, expected, GRADIENT_NAMES, strict=True):
        if need:
            assert_equal(tensor.grad, gradient, f"gradient of {name}")
        else:
            assert tensor.grad is None


@also_emulated
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_backward_operator_computes_only_what_its_mask_says(needs: tuple[bool, bool, bool]) -> None:
    case = BY_NAME["K-13"]
    input, weight, _, grad_output = operands(case, torch.float32, integers)
    argmax = torch.zeros(case.output_shape, dtype=torch.uint8)
    sides = [side for side in case.padding for _ in range(2)]
    gradients = torch.ops.pyconv._conv_max_pool2d_backward(
        grad_output, input, weight, argmax, input.new_empty(0), case.stride, sides, case.dilation,
        case.groups, case.pool_size, case.pool_size, case.pool_padding, case.pool_dilation, case.ceil_mode,
        "none", needs,
    )  # fmt: skip
    shapes = (case.input_shape, case.weight_shape, case.bias_shape)
    for gradient, need, shape in zip(gradients, needs, shapes, strict=True):
        if need:
            assert gradient.shape == shape
        else:
            assert gradient is None or gradient.numel() == 0


def test_no_graph_without_grad_mode() -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, _ = operands(case, torch.float32, integers)
    with torch.no_grad():
        assert not conv_max_pool2d(leaf(input), leaf(weight), leaf(bias), **case.kwargs()).requires_grad


def test_gradients_have_the_shape_type_and_layout_of_their_tensors() -> None:
    case = BY_NAME["L2"].reduced()
    *tensors, grad_output = operands(case, torch.float32, integers)
    _, gradients = run(conv_max_pool2d, *tensors, grad_output, **case.kwargs())
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.dtype == tensor.dtype
        assert gradient.is_contiguous()


def test_gradients_accumulate() -> None:
    case = BY_NAME["K-13"]
    *tensors, grad_output = operands(case, torch.float32, integers)
    leaves = [leaf(t) for t in tensors]
    for _ in range(2):
        conv_max_pool2d(*leaves, **case.kwargs()).backward(grad_output)
    _, once = run(reference.conv_max_pool2d, *tensors, grad_output, **case.kwargs())
    for tensor, gradient, name in zip(leaves, once, GRADIENT_NAMES, strict=True):
        assert_equal(tensor.grad, 2 * gradient, f"gradient of {name}")


def test_graph_is_freed_after_backward_as_torch_does() -> None:
    case = BY_NAME["K-13"]
    leaves = [leaf(t) for t in operands(case, torch.float32, integers)[:3]]
    output = conv_max_pool2d(*leaves, **case.kwargs()).sum()
    output.backward(retain_graph=True)
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


# What is saved


def saved_tensors(activation: str, case: Case) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, input and every tensor that autograd saves, in the order it does."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    input, weight, bias = (leaf(t) for t in operands(case, torch.float32, DATA["signed"])[:3])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = conv_max_pool2d(input, weight, bias, activation=activation, **case.kwargs())
    known = {t.data_ptr() for t in (input, weight, bias)}
    return output, input, [t for t in saved if t.data_ptr() not in known and t.numel() > 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["L2", "KSH5"])
def test_bytes_saved_for_backward(name: str, activation: str) -> None:
    """Beyond input and weight: one byte an output element, and for a smooth activation the output's size."""
    case = BY_NAME[name].reduced()
    output, _, saved = saved_tensors(activation, case)
    smooth = 0 if activation in ("none", "relu") else output.numel() * output.element_size()
    assert sum(t.numel() * t.element_size() for t in saved) == output.numel() + smooth
    if activation in ("sigmoid", "tanh"):
        assert any(t.data_ptr() == output.data_ptr() for t in saved), "the output is saved as a copy"


def test_bytes_saved_for_a_window_over_255_positions() -> None:
    output, _, saved = saved_tensors("relu", BY_NAME["window-300"])
    assert sum(t.numel() * t.element_size() for t in saved) == 4 * output.numel()


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_output_may_be_changed_in_place(activation: str) -> None:
    case = BY_NAME["K-13"]
    *tensors, grad_output = operands(case, torch.float32, integers)
    arguments = {"activation": activation, **case.kwargs()}
    _, expected = run(reference.conv_max_pool2d, *tensors, 3 * grad_output, **arguments)
    leaves = [leaf(t) for t in tensors]
    output = conv_max_pool2d(*leaves, activation=activation, **case.kwargs())
    output.mul_(3)
    output.backward(grad_output)
    for tensor, gradient, name in zip(leaves, expected, GRADIENT_NAMES, strict=True):
        assert_equal(tensor.grad, gradient, f"gradient of {name}")


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_changing_a_saved_output_in_place_is_an_error(activation: str) -> None:
    """torch.sigmoid and torch.tanh forbid it too."""
    case = BY_NAME["K-13"]
    leaves = [leaf(t) for t in operands(case, torch.float32, DATA["signed"])[:3]]
    output = conv_max_pool2d(*leaves, activation=activation, **case.kwargs())
    output.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_output_with_a_saved_pre_activation_may_be_changed_in_place(activation: str) -> None:
    case = BY_NAME["K-13"]
    *tensors, grad_output = operands(case, torch.float64, DATA["signed"])
    arguments = {"activation": activation, **case.kwargs()}
    _, expected = run(reference.conv_max_pool2d, *tensors, 3 * grad_output, **arguments)
    leaves = [leaf(t) for t in tensors]
    output = conv_max_pool2d(*leaves, activation=activation, **case.kwargs())
    output.mul_(3)
    output.backward(grad_output)
    for tensor, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
def test_changing_an_operand_in_place_before_backward_is_an_error(which: int) -> None:
    case = BY_NAME["K-13"]
    leaves = [leaf(t) for t in operands(case, torch.float32, DATA["signed"])[:3]]
    output = conv_max_pool2d(*leaves, **case.kwargs())
    with torch.no_grad():
        leaves[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operands_are_not_changed_and_not_aliased(activation: str) -> None:
    # Pointwise and unpooled: the one shape where a lazy operator could return its input.
    case = Case("identity", 1, 1, 4, 4, 1, (1, 1), pool_size=(1, 1))
    input, weight, bias = torch.ones(case.input_shape), torch.ones(case.weight_shape), torch.zeros(1)
    before = [t.clone() for t in (input, weight, bias)]
    output, gradients = run(conv_max_pool2d, input, weight, bias, activation=activation, **case.kwargs())
    pointers = {t.untyped_storage().data_ptr() for t in (input, weight, bias)}
    for tensor in (output, *gradients):
        assert tensor.untyped_storage().data_ptr() not in pointers
    for tensor, original in zip((input, weight, bias), before, strict=True):
        assert_equal(tensor, original, "operand")


# Gradients that are not finite


@also_emulated
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_non_finite_grad_output_stops_at_dead_windows(dtype: torch.dtype, value: float) -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, grad_output = operands(case, dtype, integers)
    output = reference.conv_max_pool2d(input, weight, bias, activation="relu", **case.kwargs())
    dead = output == 0
    assert dead.any() and not dead.all()
    poisoned = grad_output.masked_fill(dead, value)
    clean = grad_output.masked_fill(dead, 0)
    _, actual = run(conv_max_pool2d, input, weight, bias, poisoned, activation="relu", **case.kwargs())
    _, expected = run(conv_max_pool2d, input, weight, bias, clean, activation="relu", **case.kwargs())
    for gradient, other, name in zip(actual, expected, GRADIENT_NAMES, strict=True):
        assert_equal(gradient, other, f"gradient of {name}")


@also_emulated
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_non_finite_grad_output_passes_live_windows(activation: str, value: float) -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    output = reference.conv_max_pool2d(input, weight, bias, activation=activation, **case.kwargs())
    where = tuple((output > 0).nonzero()[0])
    grad_output[where] = value
    _, (grad_input, grad_weight, grad_bias) = run(
        conv_max_pool2d, input, weight, bias, grad_output, activation=activation, **case.kwargs()
    )
    k = where[1]
    assert_equal(grad_bias[k], torch.tensor(value), "gradient of the bias of its channel")
    assert not grad_weight[k].isfinite().all()
    assert not grad_input[where[0]].isfinite().all()
    others = torch.arange(case.K) != k
    assert grad_bias[others].isfinite().all() and grad_weight[others].isfinite().all()
    assert grad_input[torch.arange(case.N) != where[0]].isfinite().all()


@also_emulated
@pytest.mark.parametrize("last", [-3.0, float("nan")])
@pytest.mark.parametrize("channels", [3, 33])  # the few are scattered window by window, the many merged
def test_windows_that_share_a_winner(channels: int, last: float) -> None:
    x = torch.zeros(1, channels, 7, 7)
    x[:, :, 3, 3] = 1
    x.requires_grad_()
    w = torch.ones(2, channels, 2, 2, requires_grad=True)
    b = torch.zeros(2, requires_grad=True)
    # Four equal maxima of the convolution, of which all four windows choose the first, (2, 2).
    y = conv_max_pool2d(x, w, b, pool_size=3, pool_stride=2)
    assert torch.equal(y, torch.full_like(y, channels))
    grad_output = torch.zeros_like(y)
    grad_output[0, 0, 0, 0], grad_output[0, 0, 1, 1], grad_output[0, 1, 0, 1] = 3, last, 5
    dx, dw, db = torch.autograd.grad(y, (x, w, b), grad_output)

    sums = torch.tensor([3 + last, 5])
    torch.testing.assert_close(db, sums, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dw[:, :, 1, 1], sums[:, None].expand(2, channels), rtol=0, atol=0, equal_nan=True)
    expected = torch.zeros_like(x)
    expected[..., 2:4, 2:4] = sums.sum()
    torch.testing.assert_close(dx, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pool", [{}, {"pool_size": (3, 3), "pool_stride": (2, 2)}], ids=["apart", "overlapping"])
@pytest.mark.parametrize(
    "channels, kernel, stride, groups",
    [(3, (5, 5), (2, 2), 1), (4, (3, 7), (4, 4), 2), (12, (11, 3), (2, 4), 3)],
    ids=str,
)
@pytest.mark.parametrize("isa", every_isa())
def test_non_finite_grad_output_stays_in_its_patch(
    isa: str, channels: int, kernel: Pair, stride: Pair, groups: int, pool: dict[str, Pair], value: float
) -> None:
    """Where the stride does not divide the filter, kernels that work by blocks of the stride have room for more."""
    use_isa(isa)
    case = Case("strided", 3, channels, 31, 37, 36, kernel, stride=stride, padding=(2, 1), groups=groups, **pool)
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    grad_output[1, 3, 1, 1] = value
    results = run(conv_max_pool2d, input, weight, bias, grad_output, **case.kwargs())[1]
    expected = run(reference.conv_max_pool2d, input, weight, bias, grad_output, **case.kwargs())[1]
    assert not expected[0][1].isfinite().all()
    for gradient, other, name in zip(results, expected, GRADIENT_NAMES, strict=True):
        assert_equal(gradient, other, f"gradient of {name}")


def test_nan_in_one_image_stays_in_its_gradient() -> None:
    case = BY_NAME["L2"].reduced()
    input, weight, bias, grad_output = operands(case, torch.float32, integers)
    clean: Any = run(conv_max_pool2d, input, weight, bias, grad_output, activation="relu", **case.kwargs())[1]
    input[0] = float("nan")
    _, (grad_input, grad_weight, _) = run(
        conv_max_pool2d, input, weight, bias, grad_output, activation="relu", **case.kwargs()
    )
    assert_equal(grad_input[1], clean[0][1], "gradient of the other image")
    assert grad_weight.isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dependence", ["weight of input", "bias of input", "input of weight", "tied weights"])
def test_double_backward_where_operands_depend_on_each_other(dependence: str, activation: str) -> None:
    """The differentiable backward must not follow the path between two operands a second time."""
    data = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    filters = torch.randn(3, 3, 3, 3, dtype=torch.float64) / 3
    shift = torch.randn(3, dtype=torch.float64)

    def loss(operator: Callable[..., torch.Tensor], x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if dependence == "weight of input":
            w = w + x[0, :, :3, :3].unsqueeze(1)
        elif dependence == "bias of input":
            b = b + x.mean((0, 2, 3))
        elif dependence == "input of weight":
            x = x + w.mean()
        else:
            x = operator(x, w, b, padding=1, pool_size=1, activation=activation)
        return operator(x, w, b, padding=1, activation=activation).square().sum()

    found = []
    for operator in (conv_max_pool2d, reference.conv_max_pool2d):
        leaves = [leaf(t) for t in (data, filters, shift)]
        first = torch.autograd.grad(loss(operator, *leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append((*first, *second))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_of_operands_run_once(create_graph: bool) -> None:
    input, weight, bias = well_separated(SMALL["plain"])
    operands = [t * 1 for t in (input, weight, bias)]
    plain = torch.autograd.grad(conv_max_pool2d(*operands).sum(), (input, weight, bias))
    operands = [t * 1 for t in (input, weight, bias)]
    for operand in operands:
        operand.register_hook(lambda gradient: gradient * 2)
    hooked = torch.autograd.grad(conv_max_pool2d(*operands).sum(), (input, weight, bias), create_graph=create_graph)
    for ours, expected in zip(hooked, plain, strict=True):
        torch.testing.assert_close(ours, 2 * expected)
