"""What the operators give on a GPU as far as no GPU is needed: shapes, types, layouts and devices of fake tensors.

No tensor here requires a gradient: where torch is built without CUDA, autograd cannot make a node for a CUDA tensor.
"""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, CASES, Case
from numerics import ACTIVATIONS, DATA, DTYPES, LAYOUTS, arrange, dtype_name, operands, operator_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyconv.functional import bias_act_dropout, conv_max_pool2d, dropout

GPU = torch.device("cuda", 0)


def fake(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same metadata on a GPU, without data; to be called in a FakeTensorMode."""
    return [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU) for t in tensors
    ]


def assert_like(fake_tensor: Tensor, real: Tensor) -> None:
    assert fake_tensor.device == GPU
    assert (fake_tensor.shape, fake_tensor.dtype) == (real.shape, real.dtype)
    assert fake_tensor.stride() == real.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_shape_and_type_of_every_case(case: Case, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        tensors = [
            torch.empty(shape, dtype=dtype, device=GPU)
            for shape in (case.input_shape, case.weight_shape, case.bias_shape)
        ]
        output = conv_max_pool2d(*tensors, activation="relu", **case.kwargs())
        assert (output.device, output.dtype, output.shape) == (GPU, dtype, case.output_shape)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("name", ["K-13", "K-1", "window-300"])
def test_forward_and_backward_have_the_cpus_metadata(
    name: str, input_layout: str, weight_layout: str, activation: str
) -> None:
    case = BY_NAME[name]
    input, weight, bias, grad_output = operands(case, torch.float32, DATA["signed"])
    input, weight = arrange(input, input_layout), arrange(weight, weight_layout)
    call = operator_arguments(input, weight, bias, activation=activation, **case.kwargs())
    forward, backward = torch.ops.pyconv._conv_max_pool2d_forward, torch.ops.pyconv._conv_max_pool2d_backward
    real = forward(*call)
    saved = real[0] if activation == "tanh" else real[2]
    real_gradients = backward(grad_output, input, weight, real[1], saved, *call[3:], (True, True, True))
    with FakeTensorMode():
        for fake_tensor, like in zip(forward(*fake(input, weight, bias), *call[3:]), real, strict=True):
            assert_like(fake_tensor, like)
        operand_fakes = fake(grad_output, input, weight, real[1], saved)
        gradients = backward(*operand_fakes, *call[3:], (True, True, True))
        for fake_tensor, like in zip(gradients, real_gradients, strict=True):
            assert_like(fake_tensor, like)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_dropout(layout: str) -> None:
    real = arrange(torch.randn(2, 3, 4, 5), layout)
    with FakeTensorMode():
        (input,) = fake(real)
        for output in (
            dropout(input),
            dropout(input, 0.3, training=False, inverted=False),
            torch.ops.pyconv.dropout_with_state(input, 0.5, True, 3, 0),
        ):
            assert_like(output, real)
        state = torch.ops.pyconv._dropout_state(torch.empty(0, dtype=torch.int64, device=GPU), None)
        assert (state.device, state.dtype, state.shape) == (GPU, torch.int64, (2,))
        mask = torch.ops.pyconv._dropout_mask(state, (4, 5), 0.5)
        assert (mask.device, mask.dtype, mask.shape) == (GPU, torch.bool, (4, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act_dropout(activation: str, bias: bool) -> None:
    real, real_bias = torch.randn(7, 5), torch.randn(5) if bias else None
    with FakeTensorMode():
        input, fake_bias = fake(real, real_bias)
        assert_like(bias_act_dropout(input, fake_bias, activation=activation, p=0.3), real)
        state = torch.empty(2, dtype=torch.int64, device=GPU)
        output, saved = torch.ops.pyconv._bias_act_dropout_forward(input, fake_bias, state, activation, 0.3, 2.0)
        assert_like(output, real)
        assert saved.numel() == (real.numel() if bias and activation in ("gelu", "silu") else 0)
        grad_input, grad_bias = torch.ops.pyconv._bias_act_dropout_backward(
            output, output, state, activation, 0.3, 2.0, [True, bias]
        )
        assert_like(grad_input, real)
        assert grad_bias.device == GPU and grad_bias.shape == ((5,) if bias else (0,))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
def test_operands_on_cpu_and_gpu_are_refused(which: int) -> None:
    with FakeTensorMode():
        devices = [torch.device("cpu") if i == which else GPU for i in range(3)]
        tensors = [
            torch.empty(shape, device=device)
            for shape, device in zip(((2, 3, 8, 8), (4, 3, 3, 3), (4,)), devices, strict=True)
        ]
        with pytest.raises(RuntimeError, match="same device.*(cuda:0 and cpu|cpu and cuda:0)"):
            conv_max_pool2d(*tensors)
