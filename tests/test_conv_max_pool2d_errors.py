"""conv_max_pool2d refuses what conv2d and max_pool2d refuse, in their words, and names no C++ file."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import device
from cases import BY_NAME
from numerics import DATA, leaf, operands, operator_arguments

import pyconv
from pyconv import reference
from pyconv.functional import conv_max_pool2d

pytestmark = pytest.mark.usefixtures("cudnn")

CPP_FILE = re.compile(r"\.(cpp|cc|h|hpp|cu|cuh)\b")


def composite(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    pool_size: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: Any = False,
) -> torch.Tensor:
    """The two torch operators with the same mistake."""
    conv = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.max_pool2d(conv, pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


IMAGE, FILTERS = (2, 3, 8, 8), (4, 3, 3, 3)

# name: (input shape, weight shape, bias shape, arguments)
MISTAKES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = {
    "input of 2 dimensions": ((8, 8), FILTERS, None, {}),
    "input of 5 dimensions": ((1, *IMAGE), FILTERS, None, {}),
    "weight of 3 dimensions": (IMAGE, FILTERS[1:], None, {}),
    "weight of 5 dimensions": (IMAGE, (*FILTERS, 3), None, {}),
    "channels": (IMAGE, (4, 2, 3, 3), None, {}),
    "channels, unbatched": (IMAGE[1:], (4, 2, 3, 3), None, {}),
    "channels in groups": (IMAGE, FILTERS, None, {"groups": 2}),
    "filters not divisible by groups": ((2, 6, 8, 8), (5, 3, 3, 3), None, {"groups": 2}),
    "no filters": (IMAGE, (0, 3, 3, 3), None, {}),
    "bias too long": (IMAGE, FILTERS, (5,), {}),
    "bias of 2 dimensions": (IMAGE, FILTERS, (4, 1), {}),
    "bias of 0 dimensions": (IMAGE, FILTERS, (), {}),
    "kernel beyond the input": ((2, 3, 2, 8), FILTERS, None, {}),
    "kernel beyond the padded input": ((2, 3, 2, 2), FILTERS, None, {"padding": 1, "dilation": 4}),
    "empty map": ((2, 3, 0, 8), FILTERS, None, {}),
    "zero stride": (IMAGE, FILTERS, None, {"stride": 0}),
    "negative stride": (IMAGE, FILTERS, None, {"stride": (1, -1)}),
    "negative padding": (IMAGE, FILTERS, None, {"padding": -1}),
    "zero dilation": (IMAGE, FILTERS, None, {"dilation": 0}),
    "zero groups": (IMAGE, FILTERS, None, {"groups": 0}),
    "negative groups": (IMAGE, FILTERS, None, {"groups": -1}),
    "same padding with a stride": (IMAGE, FILTERS, None, {"padding": "same", "stride": 2}),
    "pool beyond the map": (IMAGE, FILTERS, None, {"pool_size": 7}),
    "dilated pool beyond the map": (IMAGE, FILTERS, None, {"pool_dilation": 6}),
    "negative pool size": (IMAGE, FILTERS, None, {"pool_size": -1, "pool_stride": 1}),
    "zero pool size": (IMAGE, FILTERS, None, {"pool_size": 0, "pool_stride": 1}),
    "zero pool stride": (IMAGE, FILTERS, None, {"pool_stride": 0}),
    "negative pool stride": (IMAGE, FILTERS, None, {"pool_stride": (2, -1)}),
    "pool padding over half": (IMAGE, FILTERS, None, {"pool_padding": 2}),
    "pool padding over half of an odd size": (IMAGE, FILTERS, None, {"pool_size": 3, "pool_padding": 2}),
    "pool padding over half, dilated": (
        IMAGE,
        FILTERS,
        None,
        {"pool_padding": 2, "pool_dilation": 3},
    ),
    "negative pool padding": (IMAGE, FILTERS, None, {"pool_padding": -1}),
    "zero pool dilation": (IMAGE, FILTERS, None, {"pool_dilation": 0}),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MISTAKES)
def test_message_is_torchs(name: str, requires_grad: bool) -> None:
    input_shape, weight_shape, bias_shape, arguments = MISTAKES[name]
    input, weight = zeros(*input_shape).requires_grad_(requires_grad), zeros(*weight_shape)
    bias = None if bias_shape is None else zeros(*bias_shape)
    with pytest.raises(RuntimeError) as expected:
        composite(input, weight, bias, **arguments)
    with pytest.raises(RuntimeError) as actual:
        conv_max_pool2d(input, weight, bias, **arguments)
    assert str(actual.value) == str(expected.value)
    assert not CPP_FILE.search(str(actual.value))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_under_transforms_too(name: str) -> None:
    input_shape, weight_shape, bias_shape, arguments = MISTAKES[name]
    weight, bias = zeros(*weight_shape), None if bias_shape is None else zeros(*bias_shape)
    with pytest.raises(RuntimeError) as error:
        torch.func.grad(lambda x: conv_max_pool2d(x, weight, bias, **arguments).sum())(zeros(*input_shape))
    assert not CPP_FILE.search(str(error.value))


def on_meta(name: str) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    *shapes, arguments = MISTAKES[name]
    return [None if shape is None else torch.empty(shape, device="meta") for shape in shapes], arguments


def refused_on_meta(name: str) -> bool:
    """torch's shape functions check less than its kernels."""
    tensors, arguments = on_meta(name)
    try:
        composite(*tensors, **arguments)
    except RuntimeError:
        return True
    except (ZeroDivisionError, IndexError):
        pass
    return False


@pytest.mark.parametrize("name", list(filter(refused_on_meta, MISTAKES)))
def test_mistakes_are_refused_on_the_meta_device_too(name: str) -> None:
    tensors, arguments = on_meta(name)
    with pytest.raises(RuntimeError) as error:
        conv_max_pool2d(*tensors, **arguments)
    assert not CPP_FILE.search(str(error.value))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float32, torch.float64),
        (torch.float16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_types_must_agree(dtypes: tuple[torch.dtype | None, ...]) -> None:
    input, weight = zeros(*IMAGE, dtype=dtypes[0]), zeros(*FILTERS, dtype=dtypes[1])
    bias = None if dtypes[2] is None else zeros(4, dtype=dtypes[2])
    with pytest.raises(RuntimeError) as expected:
        composite(input, weight, bias)
    with pytest.raises(RuntimeError) as actual:
        conv_max_pool2d(input, weight, bias)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_unsupported_types_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError) as error:
        conv_max_pool2d(torch.zeros(IMAGE).to(dtype), torch.zeros(FILTERS).to(dtype))
    message = str(error.value)
    assert not CPP_FILE.search(message)
    name = {torch.int64: "Long", torch.uint8: "Byte", torch.bool: "Bool", torch.complex64: "ComplexFloat"}
    assert name.get(dtype, "Float8_e4m3fn") in message or str(dtype) in message


@pytest.mark.parametrize("which", ["input", "weight", "bias"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_devices_must_agree(which: str, requires_grad: bool) -> None:
    """conv2d accepts one operand on the meta device and gives a result without data; here it is refused."""
    tensors = {"input": zeros(*IMAGE), "weight": zeros(*FILTERS), "bias": zeros(4)}
    tensors[which] = tensors[which].to("meta")
    tensors["weight"].requires_grad_(requires_grad)
    with pytest.raises(RuntimeError, match="device") as error:
        conv_max_pool2d(**tensors)
    assert "meta" in str(error.value) and device().type in str(error.value)
    assert not CPP_FILE.search(str(error.value))


def test_sparse_operands_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="Sparse"):
        conv_max_pool2d(zeros(*IMAGE).to_sparse(), zeros(*FILTERS))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 2**61, "stride": 2**61},
        {"padding": 2**62},
        {"padding": 2**63 - 1},
        {"padding": (2**40, 2**40), "stride": 2**39},
        {"dilation": 2**62},
        {"dilation": (1, 2**62)},
        {"dilation": 2**63 - 1},
        {"dilation": 2**62, "padding": 2**62},
    ],
    ids=str,
)
def test_extents_that_overflow_are_refused(arguments: dict[str, Any], requires_grad: bool) -> None:
    """Multiplied in 64 bits, these would describe small results, of memory that is not there."""
    input, weight = zeros(2, 8, 20, 20).requires_grad_(requires_grad), zeros(32, 8, 5, 5)
    with pytest.raises(RuntimeError, match=r"conv_max_pool2d: expected a padded input and .* 2\*\*44") as error:
        conv_max_pool2d(input, weight, **arguments)
    for name, value in arguments.items():
        if name != "stride":
            assert name in str(error.value) and str(value if isinstance(value, int) else value[1]) in str(error.value)
    assert not CPP_FILE.search(str(error.value))


def test_a_stride_or_dilation_that_is_never_taken_may_be_any() -> None:
    far = {"stride": 2**62, "dilation": (2**62, 1)}
    output = conv_max_pool2d(zeros(1, 3, 4, 4), zeros(4, 3, 1, 4), pool_size=1, **far)
    assert output.shape == (1, 4, 1, 1)


# ValueError and TypeError


@pytest.mark.parametrize(
    "name", ["stride", "padding", "dilation", "pool_size", "pool_stride", "pool_padding", "pool_dilation", "groups"]
)
def test_integers_beyond_64_bits(name: str) -> None:
    """ValueError as in torch, naming the argument and what was given."""
    for value in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=name) as error:
            conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), **{name: value})
        assert str(value) in str(error.value)


def test_same_padding_beyond_64_bits() -> None:
    with pytest.raises(ValueError, match="padding"):
        conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), padding="same", dilation=2**62)


@pytest.mark.parametrize("shape", [FILTERS[1:], (*FILTERS, 3)], ids=str)
def test_same_padding_of_a_weight_without_four_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="weight") as error:
        conv_max_pool2d(zeros(*IMAGE), zeros(*shape), padding="same")
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("activation", ["ReLU", "softmax", "", "leaky_relu"])
def test_unknown_activation_lists_the_choices(activation: str) -> None:
    for function in (conv_max_pool2d, reference.conv_max_pool2d):
        with pytest.raises(ValueError, match="activation must be one of") as error:
            function(zeros(*IMAGE), zeros(*FILTERS), activation=activation)
        assert repr(activation) in str(error.value)
        for name in reference.ACTIVATIONS:
            assert repr(name) in str(error.value)


def test_unknown_activation_of_the_operator_and_the_module() -> None:
    with pytest.raises((ValueError, RuntimeError), match="softmax") as error:
        torch.ops.pyconv.conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), activation="softmax")
    assert not CPP_FILE.search(str(error.value))
    with pytest.raises(ValueError, match="softmax"):
        pyconv.ConvMaxPool2d(3, 4, 3, activation="softmax")


@pytest.mark.parametrize(
    "name, value",
    [
        ("input", [[1.0]]),
        ("input", None),
        ("weight", None),
        ("weight", 1.0),
        ("bias", 1.0),
        ("bias", [0.0] * 4),
        ("stride", 1.5),
        ("stride", "1"),
        ("stride", None),
        ("padding", 1.5),
        ("padding", (1, 0.5)),
        ("padding", None),
        ("dilation", 2.0),
        ("groups", 1.0),
        ("groups", "1"),
        ("groups", (1,)),
        ("pool_size", 2.0),
        ("pool_size", None),
        ("pool_stride", 2.0),
        ("pool_padding", 0.0),
        ("pool_dilation", 1.0),
        ("ceil_mode", "yes"),
        ("ceil_mode", 1),
        ("activation", None),
        pytest.param("activation", torch.relu, id="activation-torch.relu"),  # its str() has an address
    ],
    ids=str,
)
def test_wrong_python_type(name: str, value: object) -> None:
    arguments: dict[str, Any] = {
        "input": zeros(*IMAGE),
        "weight": zeros(*FILTERS),
        "bias": zeros(4),
        name: value,
    }
    with pytest.raises(TypeError, match=name):
        conv_max_pool2d(**arguments)


@pytest.mark.parametrize(
    "name", ["stride", "padding", "dilation", "pool_size", "pool_stride", "pool_padding", "pool_dilation"]
)
def test_a_size_has_one_or_two_elements(name: str) -> None:
    """RuntimeError as in torch, naming the argument and what was given."""
    for value in ((1, 1, 1), (1, 1, 1, 1)):
        with pytest.raises(RuntimeError, match=name) as error:
            conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), **{name: value})
        assert "1, 1, 1" in str(error.value)


def test_unknown_padding_string() -> None:
    with pytest.raises(RuntimeError, match="Invalid padding string: 'full'"):
        conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), padding="full")


def test_arguments_after_the_bias_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), None, 1)


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="poolsize"):
        conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS), poolsize=2)


# The operators under the functional form


@pytest.mark.parametrize("operator", ["conv_max_pool2d", "_conv_max_pool2d_forward"])
@pytest.mark.parametrize(
    "position, name, value",
    [(3, "stride", [1]), (4, "padding", [0, 0]), (5, "dilation", [1, 1, 1]), (7, "pool_size", [2]),
     (8, "pool_stride", [2]), (9, "pool_padding", []), (10, "pool_dilation", [1, 1, 1])],
    ids=str,
)  # fmt: skip
def test_operator_checks_the_length_of_lists(
    operator: str, position: int, name: str, value: list[int]
) -> None:
    call = list(operator_arguments(zeros(*IMAGE), zeros(*FILTERS), None, **BY_NAME["K-13"].kwargs()))
    call[position] = value
    with pytest.raises(RuntimeError, match=name):
        getattr(torch.ops.pyconv, operator)(*call)


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
@pytest.mark.parametrize("which", ["grad_output", "argmax", "saved"])
def test_backward_operator_checks_its_tensors(which: str, wrong: str) -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, grad_output = operands(case, torch.float32, DATA["signed"])
    call = operator_arguments(input, weight, bias, activation="silu", **case.kwargs())
    _, argmax, saved = torch.ops.pyconv._conv_max_pool2d_forward(*call)
    tensors = {"grad_output": grad_output, "argmax": argmax, "saved": saved}
    tensors[which] = tensors[which][..., :-1] if wrong == "shape" else tensors[which].double()
    with pytest.raises(RuntimeError, match=which) as error:
        torch.ops.pyconv._conv_max_pool2d_backward(
            tensors["grad_output"], input, weight, tensors["argmax"], tensors["saved"], *call[3:], (True,) * 3
        )
    assert not CPP_FILE.search(str(error.value))


def test_backward_of_a_wrong_grad_output() -> None:
    case = BY_NAME["K-13"]
    input, weight, bias, grad_output = operands(case, torch.float32, DATA["signed"])
    output = conv_max_pool2d(leaf(input), weight, bias, **case.kwargs())
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
        output.backward(grad_output[..., :-1])


def test_an_error_leaves_no_trace() -> None:
    """The next call works."""
    with pytest.raises(RuntimeError):
        conv_max_pool2d(zeros(*IMAGE), zeros(4, 2, 3, 3))
    assert conv_max_pool2d(zeros(*IMAGE), zeros(*FILTERS)).shape == (2, 4, 3, 3)
