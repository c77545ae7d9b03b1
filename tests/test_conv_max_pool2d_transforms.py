"""conv_max_pool2d under torch.func, forward-mode AD, checkpointing, autocast and inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from backends import device
from cases import BY_NAME, Case
from numerics import ACTIVATIONS, DATA, assert_equal, integers, leaf, operands, run
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import pyconv
from pyconv import reference
from pyconv.functional import conv_max_pool2d

CASE = Case("transformed", 3, 2, 7, 8, 4, (3, 3), padding=(1, 0), pool_size=(2, 2))
EMPTY = BY_NAME["empty-windows"]

Operator = Callable[..., torch.Tensor]


def tensors(case: Case = CASE, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    input, weight, bias, _ = operands(case, torch.float64, DATA["signed"], seed)
    return input, weight, bias


def assert_same(function: Callable[[Operator], object]) -> None:
    """`function` gives the same for the operator and for its reference."""
    torch.testing.assert_close(
        function(conv_max_pool2d), function(reference.conv_max_pool2d), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_func_grad(activation: str) -> None:
    def gradients(operator: Operator) -> object:
        def loss(*args: torch.Tensor) -> torch.Tensor:
            return operator(*args, activation=activation, **CASE.kwargs()).square().sum()

        return grad(loss, argnums=(0, 1, 2))(*tensors())

    assert_same(gradients)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_func_grad_of_grad(bias: bool) -> None:
    def second(operator: Operator) -> object:
        input, weight, b = tensors()

        def loss(weight: torch.Tensor) -> torch.Tensor:
            return (
                operator(input, weight, b if bias else None, activation="tanh", **CASE.kwargs())
                .square()
                .sum()
            )

        return grad(lambda w: grad(loss)(w).square().sum())(weight)

    assert_same(second)


def test_func_vjp() -> None:
    def product(operator: Operator) -> object:
        output, pullback = vjp(lambda *args: operator(*args, activation="relu", **CASE.kwargs()), *tensors())
        return output, pullback(torch.ones_like(output))

    assert_same(product)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_func_jvp(activation: str) -> None:
    def product(operator: Operator) -> object:
        return jvp(
            lambda *args: operator(*args, activation=activation, **CASE.kwargs()), tensors(), tensors(seed=1)
        )

    assert_same(product)


def test_func_jvp_of_windows_without_a_valid_position() -> None:
    def product(operator: Operator) -> object:
        return jvp(
            lambda *args: operator(*args, activation="sigmoid", **EMPTY.kwargs()),
            tensors(EMPTY),
            tensors(EMPTY, seed=1),
        )

    assert_same(product)


def test_func_grad_of_windows_without_a_valid_position() -> None:
    def gradients(operator: Operator) -> object:
        def loss(*args: torch.Tensor) -> torch.Tensor:
            return operator(*args, activation="tanh", **EMPTY.kwargs()).sum()

        return grad(loss, argnums=(0, 1, 2))(*tensors(EMPTY))

    assert_same(gradients)


@pytest.mark.parametrize("differentiate", [jacrev, jacfwd, hessian], ids=["jacrev", "jacfwd", "hessian"])
def test_func_jacobians(differentiate: Callable[..., Callable[..., object]]) -> None:
    case = Case("tiny", 1, 1, 5, 5, 2, (2, 2))
    input, weight, bias = tensors(case)

    def jacobian(operator: Operator) -> object:
        def loss(weight: torch.Tensor) -> torch.Tensor:
            return operator(input, weight, bias, activation="silu", **case.kwargs()).square().sum((-2, -1))

        return differentiate(loss)(weight)

    assert_same(jacobian)


# vmap


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, None, 0)], ids=str
)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    def mapped(operator: Operator) -> object:
        stacked = [
            torch.stack([tensors(seed=seed)[i] for seed in range(3)], dim=dim)
            if dim is not None
            else tensors()[i]
            for i, dim in enumerate(in_dims)
        ]
        return vmap(lambda *args: operator(*args, activation="relu", **CASE.kwargs()), in_dims=in_dims)(
            *stacked
        )

    def one_by_one(operator: Operator) -> torch.Tensor:
        results = []
        for seed in range(3):
            args = [tensors(seed=seed if dim is not None else 0)[i] for i, dim in enumerate(in_dims)]
            results.append(operator(*args, activation="relu", **CASE.kwargs()))
        return torch.stack(results)

    torch.testing.assert_close(
        mapped(conv_max_pool2d), one_by_one(reference.conv_max_pool2d), rtol=1e-9, atol=1e-9
    )


def test_vmap_over_unbatched_images() -> None:
    input, weight, bias = tensors()
    mapped = vmap(lambda image: conv_max_pool2d(image, weight, bias, **CASE.kwargs()))(input)
    expected = reference.conv_max_pool2d(input, weight, bias, **CASE.kwargs())
    torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-9)


def test_vmap_of_vmap() -> None:
    input, weight, bias = tensors()
    weights = torch.stack([weight, -weight])

    def one(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(image, weight, bias, activation="tanh", **CASE.kwargs())

    mapped = vmap(lambda w: vmap(lambda image: one(image, w))(input))(weights)
    expected = [
        reference.conv_max_pool2d(input, w, bias, activation="tanh", **CASE.kwargs()) for w in weights
    ]
    torch.testing.assert_close(mapped, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_per_sample_gradients(activation: str) -> None:
    input, weight, bias = tensors()

    def loss(weight: torch.Tensor, bias: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(image, weight, bias, activation=activation, **CASE.kwargs()).square().sum()

    actual = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, input)
    for n, image in enumerate(input):
        upstream = 2 * reference.conv_max_pool2d(image, weight, bias, activation=activation, **CASE.kwargs())
        _, expected = run(
            reference.conv_max_pool2d, image, weight, bias, upstream, activation=activation, **CASE.kwargs()
        )
        for per_sample, gradient in zip(actual, expected[1:], strict=True):
            torch.testing.assert_close(per_sample[n], gradient, rtol=1e-9, atol=1e-9)


def test_per_sample_gradients_of_a_module() -> None:
    layer = pyconv.ConvMaxPool2d(2, 4, 3, activation="tanh", dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    input = tensors()[0]

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (image,)).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, input)
    layer(input).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-9)


def test_vmap_of_batched_gradients() -> None:
    """is_grads_batched maps the backward alone."""

    def rows(operator: Operator) -> object:
        input, weight, bias = (leaf(t) for t in tensors())
        output = operator(input, weight, bias, activation="tanh", **CASE.kwargs())
        basis = torch.stack([torch.ones_like(output), output.detach()])
        return torch.autograd.grad(output, (input, weight, bias), basis, is_grads_batched=True)

    assert_same(rows)


# Forward-mode differentiation


@pytest.mark.parametrize("with_grad", [False, True], ids=["constant", "requires-grad"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
def test_forward_mode_tangent(which: int, with_grad: bool) -> None:
    def tangent(operator: Operator) -> object:
        args = [t.clone().requires_grad_(with_grad) for t in tensors()]
        with fwAD.dual_level():
            args[which] = fwAD.make_dual(args[which], tensors(seed=1)[which])
            dual = operator(*args, activation="sigmoid", **CASE.kwargs())
            primal, tangent = fwAD.unpack_dual(dual)
            assert tangent is not None, "the tangent is lost"
            return primal.detach().clone(), tangent.detach().clone()

    assert_same(tangent)


def test_forward_mode_without_grad_mode() -> None:
    def tangent(operator: Operator) -> object:
        input, weight, bias = tensors()
        with torch.no_grad(), fwAD.dual_level():
            dual = operator(fwAD.make_dual(input, torch.ones_like(input)), weight, bias, **CASE.kwargs())
            return fwAD.unpack_dual(dual).tangent.clone()

    assert_same(tangent)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_forward_mode(activation: str) -> None:
    case = Case("tiny", 1, 2, 5, 5, 2, (2, 2))
    args = tuple(t.requires_grad_() for t in tensors(case))

    def function(*args: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(*args, activation=activation, **case.kwargs())

    assert torch.autograd.gradcheck(function, args, check_forward_ad=True, check_backward_ad=False)


def test_gradgradcheck_forward_over_reverse() -> None:
    case = Case("tiny", 1, 1, 4, 4, 2, (2, 2))
    args = tuple(t.requires_grad_() for t in tensors(case))

    def function(*args: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(*args, activation="tanh", **case.kwargs())

    assert torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True)


# Checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_checkpointing(activation: str, use_reentrant: bool) -> None:
    *args, grad_output = operands(CASE, torch.float32, DATA["signed"])

    def plain(*args: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(*args, activation=activation, **CASE.kwargs())

    def checkpointed(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(plain, *args, use_reentrant=use_reentrant)

    def results(function: Operator) -> list[torch.Tensor]:
        leaves = [leaf(t) for t in args]
        output = function(*leaves)
        output.backward(grad_output)
        return [output, *(t.grad for t in leaves)]

    for actual, expected in zip(results(checkpointed), results(plain), strict=True):
        assert_equal(actual, expected, "output or gradient")


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_casts_as_conv2d(dtype: torch.dtype) -> None:
    input, weight, bias, grad_output = operands(CASE, torch.float32, integers)
    leaves = [leaf(t) for t in (input, weight, bias)]
    with torch.autocast(device().type, dtype=dtype):
        output = conv_max_pool2d(*leaves, activation="relu", **CASE.kwargs())
        assert output.dtype == torch.nn.functional.conv2d(input, weight, bias).dtype == dtype
    gradients = torch.autograd.grad(output, leaves, grad_output.to(dtype))
    expected, expected_gradients = run(
        reference.conv_max_pool2d, input, weight, bias, grad_output, activation="relu", **CASE.kwargs()
    )
    assert_equal(output.float(), expected, "output")
    for gradient, other, tensor in zip(gradients, expected_gradients, leaves, strict=True):
        assert gradient.dtype == tensor.dtype, "the gradient of a float32 parameter is float32"
        assert_equal(gradient, other, "gradient")


def test_autocast_of_operands_of_different_types() -> None:
    """conv2d casts each operand, so that a bfloat16 activation meets a float32 weight."""
    input, weight, bias, _ = operands(CASE, torch.float32, integers)
    with torch.autocast(device().type, dtype=torch.bfloat16):
        output = conv_max_pool2d(input.bfloat16(), weight, bias, **CASE.kwargs())
    assert output.dtype == torch.bfloat16
    assert_equal(output.float(), reference.conv_max_pool2d(input, weight, bias, **CASE.kwargs()), "output")


def test_autocast_leaves_float64_alone_as_conv2d() -> None:
    input, weight, bias = tensors()
    with torch.autocast(device().type, dtype=torch.bfloat16):
        output = conv_max_pool2d(input, weight, bias, **CASE.kwargs())
        assert output.dtype == torch.nn.functional.conv2d(input, weight, bias).dtype


def test_autocast_disabled_inside() -> None:
    input, weight, bias, _ = operands(CASE, torch.float32, integers)
    with torch.autocast(device().type, dtype=torch.bfloat16), torch.autocast(device().type, enabled=False):
        assert conv_max_pool2d(input, weight, bias, **CASE.kwargs()).dtype == torch.float32


# Inference


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_mode(activation: str) -> None:
    args = tensors()
    trained = conv_max_pool2d(*(leaf(t) for t in args), activation=activation, **CASE.kwargs())
    with torch.inference_mode():
        output = conv_max_pool2d(*args, activation=activation, **CASE.kwargs())
        parameters = [leaf(t) for t in args]
    assert output.is_inference()
    assert_equal(output, trained, "output")
    with torch.inference_mode():
        assert_equal(conv_max_pool2d(*parameters, activation=activation, **CASE.kwargs()), trained, "output")


def test_inference_tensor_cannot_be_saved_for_backward() -> None:
    input, weight, bias = tensors()
    with torch.inference_mode():
        inference_input = input.clone()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved for backward"):
        conv_max_pool2d(inference_input, leaf(weight), bias, **CASE.kwargs())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_and_inference_compute_the_same(activation: str) -> None:
    """The kernels without argmax are others than those with it; their output must not differ in a bit."""
    for name in ("L1", "L2", "K-33", "pool-overlap"):
        case = BY_NAME[name].reduced()
        input, weight, bias, _ = operands(case, torch.float32, DATA["signed"])
        trained = conv_max_pool2d(leaf(input), weight, bias, activation=activation, **case.kwargs())
        inferred = conv_max_pool2d(input, weight, bias, activation=activation, **case.kwargs())
        assert_equal(inferred, trained, name)
