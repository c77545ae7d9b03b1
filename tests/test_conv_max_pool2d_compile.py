"""conv_max_pool2d traced: opcheck, meta and fake tensors, torch.compile, torch.export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import device
from cases import BY_NAME, CASES, Case
from numerics import (
    ACTIVATIONS,
    DATA,
    DTYPES,
    LAYOUTS,
    arrange,
    assert_equal,
    dtype_name,
    integers,
    leaf,
    operands,
    operator_arguments,
    run,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import pyconv
from pyconv import reference
from pyconv.functional import conv_max_pool2d

ARGUMENT_CASES = [
    "L2", "same-even", "groups-2", "dilation", "pool-overlap", "pool-padding-ceil", "window-300",
    "empty-windows", "batch-0",
]  # fmt: skip
BACKENDS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# opcheck


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ARGUMENT_CASES)
def test_opcheck(name: str, requires_grad: bool) -> None:
    case = BY_NAME[name].reduced()
    tensors = [t.requires_grad_(requires_grad) for t in operands(case, torch.float32, DATA["signed"])[:3]]
    arguments = operator_arguments(*tensors, activation="relu", **case.kwargs())
    torch.library.opcheck(torch.ops.pyconv.conv_max_pool2d.default, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_of_every_activation(activation: str, layout: str) -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, _ = operands(case, torch.float64, DATA["signed"])
    tensors = [leaf(arrange(input, layout)), leaf(weight), leaf(bias)]
    arguments = operator_arguments(*tensors, activation=activation, **case.kwargs())
    torch.library.opcheck(torch.ops.pyconv.conv_max_pool2d.default, arguments)


def test_opcheck_without_bias_and_unbatched() -> None:
    case = BY_NAME["K-13"]
    input, weight, _, _ = operands(case, torch.float32, DATA["signed"])
    arguments = operator_arguments(leaf(input[0]), leaf(weight), None, activation="relu", **case.kwargs())
    torch.library.opcheck(torch.ops.pyconv.conv_max_pool2d.default, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_of_forward_and_backward(activation: str) -> None:
    case = BY_NAME["pool-overlap"]
    input, weight, bias, grad_output = operands(case, torch.float32, DATA["signed"])
    call = operator_arguments(input, weight, bias, activation=activation, **case.kwargs())
    torch.library.opcheck(torch.ops.pyconv._conv_max_pool2d_forward.default, call)
    output, argmax, saved = torch.ops.pyconv._conv_max_pool2d_forward(*call)
    saved = output if activation in ("sigmoid", "tanh") else saved
    for mask in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.pyconv._conv_max_pool2d_backward.default,
            (grad_output, input, weight, argmax, saved, *call[3:], mask),
        )


def test_differentiating_the_internal_backward_is_an_error() -> None:
    """It has no derivative of its own: dropping second-order terms in silence would be the worst defect."""
    case = BY_NAME["K-13"]
    input, weight, bias, grad_output = operands(case, torch.float32, DATA["signed"])
    call = operator_arguments(input, weight, bias, activation="none", **case.kwargs())
    _, argmax, saved = torch.ops.pyconv._conv_max_pool2d_forward(*call)
    weight = leaf(weight)
    backward = torch.ops.pyconv._conv_max_pool2d_backward
    grad_input, _, _ = backward(grad_output, input, weight, argmax, saved, *call[3:], (True, False, False))
    with pytest.raises(RuntimeError, match="not implemented"):
        grad_input.sum().backward()


# Meta and fake tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_meta_device(case: Case, dtype: torch.dtype) -> None:
    input, weight, bias = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in (case.input_shape, case.weight_shape, case.bias_shape)
    )
    output = conv_max_pool2d(input, weight, bias, **case.kwargs())
    assert output.device.type == "meta"
    assert output.dtype == dtype
    assert output.shape == case.output_shape


def test_meta_device_backward() -> None:
    case = BY_NAME["L2"]
    tensors = [t.to("meta") for t in operands(case, torch.float32, DATA["signed"])]
    _, gradients = run(conv_max_pool2d, *tensors, activation="gelu", **case.kwargs())
    for gradient, tensor in zip(gradients, tensors, strict=False):
        assert gradient.device.type == "meta"
        assert gradient.shape == tensor.shape


def test_meta_device_raises_what_conv2d_raises_there() -> None:
    input, weight = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 2, 3, 3, device="meta")
    with pytest.raises(RuntimeError) as expected:
        torch.nn.functional.conv2d(input, weight)
    with pytest.raises(RuntimeError) as actual:
        conv_max_pool2d(input, weight)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("name", ["K-13", "pointwise", "K-1", "window-300"])
def test_fake_tensors_have_the_real_metadata(name: str, input_layout: str, weight_layout: str) -> None:
    case = BY_NAME[name]
    input, weight, bias, _ = operands(case, torch.float32, DATA["signed"])
    input, weight = arrange(input, input_layout), arrange(weight, weight_layout)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (input, weight, bias)]
    for activation in ("relu", "silu"):
        call = operator_arguments(input, weight, bias, activation=activation, **case.kwargs())
        for operator in (torch.ops.pyconv.conv_max_pool2d, torch.ops.pyconv._conv_max_pool2d_forward):
            real = operator(*call)
            with mode:
                fake = operator(*fakes, *call[3:])
            for r, f in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True):
                assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


# Subclasses and modes


class Named(torch.Tensor):
    """A subclass that only inherits: torch hands it through __torch_function__."""


def test_tensor_subclass_is_kept() -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, _ = operands(case, torch.float32, integers)
    output = conv_max_pool2d(input.as_subclass(Named), weight, bias, **case.kwargs())
    assert type(output) is Named
    expected = reference.conv_max_pool2d(input, weight, bias, **case.kwargs())
    assert_equal(output.as_subclass(torch.Tensor), expected, "output")


def test_dispatch_mode_sees_the_operators() -> None:
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case = BY_NAME["K-13"]
    *tensors, grad_output = operands(case, torch.float32, integers)
    with Recorder():
        run(conv_max_pool2d, *tensors, grad_output, **case.kwargs())
    assert "pyconv._conv_max_pool2d_forward.default" in seen
    assert "pyconv._conv_max_pool2d_backward.default" in seen


# torch.compile


def compare_with_eager(
    function: Callable[..., torch.Tensor], compiled: Callable[..., torch.Tensor], case: Case, **arguments: Any
) -> None:
    *tensors, grad_output = operands(case, torch.float32, integers)
    output, gradients = run(compiled, *tensors, grad_output, **arguments)
    expected, expected_gradients = run(function, *tensors, grad_output, **arguments)
    assert_equal(output, expected, "output")
    assert output.stride() == expected.stride()
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert_equal(actual, gradient, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_a_dynamic_batch(backend: str) -> None:
    """One graph, no break, and no second compilation for another batch size."""
    case = BY_NAME["L1"].reduced()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(conv_max_pool2d, fullgraph=True, dynamic=True, backend=counter)
    for N in (2, 5, 7):
        compare_with_eager(conv_max_pool2d, compiled, case.with_batch(N), activation="relu", **case.kwargs())
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ARGUMENT_CASES)
def test_compile_every_argument(name: str) -> None:
    case = BY_NAME[name].reduced()
    compiled = torch.compile(conv_max_pool2d, fullgraph=True, backend="aot_eager")
    compare_with_eager(conv_max_pool2d, compiled, case, activation="relu", **case.kwargs())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compile_every_activation(activation: str) -> None:
    case = BY_NAME["K-13"]
    compiled = torch.compile(conv_max_pool2d, fullgraph=True, backend="aot_eager")
    compare_with_eager(conv_max_pool2d, compiled, case, activation=activation, **case.kwargs())


def test_compile_the_operator_itself() -> None:
    case = BY_NAME["K-13"]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.ops.pyconv.conv_max_pool2d(*tensors, activation="tanh")

    compare_with_eager(function, torch.compile(function, fullgraph=True, backend="aot_eager"), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_a_model(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        pyconv.ConvMaxPool2d(1, 6, 5, activation="relu"),
        pyconv.ConvMaxPool2d(6, 8, 5, activation="tanh", padding="same"),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 6 * 6, 10),
    )
    input = torch.randn(4, 1, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for function in (model, compiled):
        model.zero_grad()
        output = function(input)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-4, atol=1e-4)


def test_compile_in_channels_last() -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, _ = operands(case, torch.float32, integers)
    compiled = torch.compile(conv_max_pool2d, fullgraph=True, backend="aot_eager")
    output = compiled(input.contiguous(memory_format=torch.channels_last), weight, bias, **case.kwargs())
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_equal(output, reference.conv_max_pool2d(input, weight, bias, **case.kwargs()), "output")


def test_compile_of_func_transforms() -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, _ = operands(case, torch.float32, integers)

    def loss(weight: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(image, weight, bias, activation="relu", **case.kwargs()).sum()

    def per_sample(weight: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return vmap(grad(loss), in_dims=(None, 0))(weight, input)

    for function, args in ((grad(loss), (weight, input)), (per_sample, (weight, input))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_equal(compiled(*args), function(*args), "gradient")


def test_compile_under_autocast() -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, _ = operands(case, torch.float32, integers)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            return conv_max_pool2d(*tensors, activation="relu", **case.kwargs())

    output = torch.compile(function, fullgraph=True, backend="aot_eager")(input, weight, bias)
    assert output.dtype == torch.bfloat16
    assert_equal(output, function(input, weight, bias), "output")


def test_compile_refuses_double_backward_or_is_right() -> None:
    """torch.compile does not support double backward; it must say so, not drop the second-order terms."""
    case = Case("tiny", 1, 1, 5, 5, 2, (2, 2))
    input, weight, bias, _ = operands(case, torch.float64, DATA["signed"])
    compiled = torch.compile(conv_max_pool2d, fullgraph=True, backend="aot_eager")
    weight = leaf(weight)
    output = compiled(input, weight, bias, activation="tanh", **case.kwargs())
    (gradient,) = torch.autograd.grad(output.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(gradient.square().sum(), weight)


# torch.export


class Layer(torch.nn.Module):
    """The functional form, so that export sees the wrapper too."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 1, 5, 5))
        self.bias = torch.nn.Parameter(torch.randn(6))
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return conv_max_pool2d(input, self.weight, self.bias, activation=self.activation)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(
    "make", [lambda: Layer("relu"), lambda: pyconv.ConvMaxPool2d(1, 6, 5)], ids=["functional", "module"]
)
def test_export_with_a_dynamic_batch(make: Callable[[], torch.nn.Module], strict: bool) -> None:
    model = make()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(3, 1, 28, 28),), dynamic_shapes=({0: batch},), strict=strict
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pyconv.conv_max_pool2d.default" in targets, "the operator was decomposed"
    for N in (1, 7):
        input = torch.randn(N, 1, 28, 28)
        assert_equal(program.module()(input), model(input), "output")
