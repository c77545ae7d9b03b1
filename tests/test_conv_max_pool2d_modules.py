"""ConvMaxPool2d: parameters, initialisation, saving, copying, moving and representation."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from backends import device
from cases import CASES, Case
from numerics import assert_equal, integers, leaf, operands
from torch import nn
from torch.nn.utils import parametrize, prune

import pyconv
from pyconv import ConvMaxPool2d, reference

FILLED = [case for case in CASES if not case.tags & {"empty-windows"}]


def layer_of(case: Case, **arguments: Any) -> ConvMaxPool2d:
    return ConvMaxPool2d(case.C, case.K, case.kernel, **{**case.kwargs(), **arguments})


@pytest.mark.parametrize("case", FILLED, ids=[case.name for case in FILLED])
def test_forward_is_the_reference(case: Case) -> None:
    case = case.reduced()
    input, weight, bias, _ = operands(case, torch.float32, integers)
    layer = layer_of(case, activation="relu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    expected = reference.conv_max_pool2d(input, weight, bias, activation="relu", **case.kwargs())
    assert_equal(layer(input), expected, "output")


def test_defaults_are_those_of_conv2d_and_max_pool2d() -> None:
    input = torch.randn(2, 3, 12, 13)
    layer = ConvMaxPool2d(3, 5, 3)
    expected = nn.functional.max_pool2d(nn.functional.conv2d(input, layer.weight, layer.bias), 2)
    torch.testing.assert_close(layer(input), expected)


def test_positional_arguments() -> None:
    layer = ConvMaxPool2d(3, 5, (3, 2), 3)
    assert layer(torch.randn(2, 3, 12, 13)).shape == (2, 5, 3, 4)
    with pytest.raises(TypeError, match="positional"):
        ConvMaxPool2d(3, 5, 3, 2, 1)


def test_without_bias() -> None:
    layer = ConvMaxPool2d(3, 5, 3, bias=False)
    assert layer.bias is None
    assert set(layer.state_dict()) == {"weight"}
    input = leaf(torch.randn(2, 3, 8, 8))
    expected = reference.conv_max_pool2d(input, layer.weight)
    torch.testing.assert_close(layer(input), expected)
    layer(input).sum().backward()
    assert layer.weight.grad is not None and input.grad is not None


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_and_initialisation_are_those_of_conv2d(groups: int) -> None:
    torch.manual_seed(1)
    theirs = nn.Conv2d(4, 6, (3, 5), groups=groups)
    torch.manual_seed(1)
    ours = ConvMaxPool2d(4, 6, (3, 5), groups=groups)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal(a, b, "parameter")
    torch.manual_seed(1)
    ours.reset_parameters()
    assert_equal(ours.weight, theirs.weight, "weight")


def test_state_dict_of_conv2d_loads_and_back() -> None:
    theirs, ours = nn.Conv2d(3, 5, 3), ConvMaxPool2d(3, 5, 3)
    ours.load_state_dict(theirs.state_dict())
    assert_equal(ours.weight, theirs.weight, "weight")
    assert_equal(ours.bias, theirs.bias, "bias")
    other = nn.Conv2d(3, 5, 3)
    other.load_state_dict(ours.state_dict())
    assert_equal(other.weight, theirs.weight, "weight")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        ours.load_state_dict(nn.Conv2d(3, 5, 5).state_dict())


def test_saved_file_holds_conv2ds_contiguous_weight() -> None:
    layer = ConvMaxPool2d(3, 5, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["weight"].shape == (5, 3, 3, 3)
    again = ConvMaxPool2d(3, 5, 3)
    again.load_state_dict(saved)
    input = torch.randn(2, 3, 8, 8)
    assert_equal(again(input), layer(input), "output")


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Any) -> None:
    layer = ConvMaxPool2d(
        3, 5, (3, 2), (2, 3), padding="same", pool_stride=2, ceil_mode=True, activation="tanh"
    )
    other = copied(layer)
    input = torch.randn(2, 3, 8, 9)
    assert_equal(other(input), layer(input), "output")
    assert repr(other) == repr(layer)


def test_deepcopy_is_independent() -> None:
    layer = ConvMaxPool2d(1, 2, 3)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype) -> None:
    for layer in (ConvMaxPool2d(1, 2, 3, dtype=dtype), ConvMaxPool2d(1, 2, 3).to(dtype)):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer(torch.zeros(1, 1, 6, 6, dtype=dtype)).dtype == dtype


def test_meta_device_and_to_empty() -> None:
    layer = ConvMaxPool2d(1, 20, 5, device="meta", activation="relu")
    output = layer(torch.empty(10, 1, 28, 28, device="meta"))
    assert output.is_meta and output.shape == (10, 20, 12, 12)
    layer = layer.to_empty(device=device())
    layer.reset_parameters()
    assert layer(torch.randn(1, 1, 28, 28)).isfinite().all()
    with torch.device("meta"):
        assert ConvMaxPool2d(1, 2, 3).weight.is_meta


def test_channels_last_module() -> None:
    layer = ConvMaxPool2d(3, 5, 3, activation="relu")
    input = torch.randn(2, 3, 9, 9)
    expected = layer(input)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert moved.weight.is_contiguous(memory_format=torch.channels_last)
    output = moved(input)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)


def test_unbatched_input() -> None:
    layer = ConvMaxPool2d(3, 5, 3)
    input = torch.randn(3, 9, 9)
    assert_equal(layer(input), layer(input[None])[0], "output")


class Negative(nn.Module):
    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return -parameter


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrized_parameter(name: str) -> None:
    layer = ConvMaxPool2d(3, 5, 3)
    input = torch.randn(2, 3, 9, 9)
    parameters = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    parameters[name] = -parameters[name]
    parametrize.register_parametrization(layer, name, Negative())
    assert_equal(layer(input), pyconv.functional.conv_max_pool2d(input, **parameters), "output")


def test_a_pruned_weight() -> None:
    layer = ConvMaxPool2d(3, 5, 3)
    input = torch.randn(2, 3, 9, 9)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert (layer.weight == 0).any() and (layer.weight_orig != 0).all()
    assert_equal(layer(input), pyconv.functional.conv_max_pool2d(input, layer.weight, layer.bias), "output")


def test_functional_call_replaces_parameters() -> None:
    layer = ConvMaxPool2d(3, 5, 3)
    input, weight = torch.randn(2, 3, 9, 9), torch.randn(5, 3, 3, 3)
    output = torch.func.functional_call(layer, {"weight": weight}, input)
    assert_equal(output, pyconv.functional.conv_max_pool2d(input, weight, layer.bias), "output")


def test_trains_in_an_optimizer() -> None:
    torch.manual_seed(0)
    layer = ConvMaxPool2d(1, 4, 3, activation="tanh")
    input, target = torch.randn(8, 1, 8, 8), torch.rand(8, 4, 3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(input) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_repr_gives_what_differs_from_the_defaults() -> None:
    plain = repr(ConvMaxPool2d(1, 20, 5))
    assert plain == "ConvMaxPool2d(1, 20, kernel_size=(5, 5), pool_size=(2, 2))"
    text = repr(
        ConvMaxPool2d(
            4, 6, 3, 3, stride=2, padding=1, dilation=2, groups=2, bias=False, pool_stride=2, pool_padding=1,
            pool_dilation=2, ceil_mode=True, activation="relu",
        )
    )  # fmt: skip
    for part in (
        "stride=(2, 2)", "padding=(1, 1)", "dilation=(2, 2)", "groups=2", "bias=False", "pool_stride=(2, 2)",
        "pool_padding=(1, 1)", "pool_dilation=(2, 2)", "ceil_mode=True", "activation='relu'",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"groups": 2}, "in_channels must be divisible by groups"),
        ({"in_channels": 4, "groups": 2}, "out_channels must be divisible by groups"),
        ({"groups": 0}, "groups must be a positive integer"),
        ({"padding": "full"}, "Invalid padding string 'full'"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided convolutions"),
        ({"activation": "softmax"}, "activation must be one of"),
    ],
    ids=str,
)
def test_wrong_arguments_fail_at_construction_as_in_conv2d(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvMaxPool2d(**{"in_channels": 3, "out_channels": 5, "kernel_size": 3, **arguments})


def test_wrong_input_fails_in_torchs_words() -> None:
    with pytest.raises(
        RuntimeError, match=r"expected input\[2, 1, 8, 8\] to have 3 channels, but got 1 channels"
    ):
        ConvMaxPool2d(3, 5, 3)(torch.randn(2, 1, 8, 8))


def test_public_names() -> None:
    assert pyconv.ConvMaxPool2d is ConvMaxPool2d
    assert isinstance(ConvMaxPool2d(1, 1, 1), nn.Module)
    assert pyconv.__version__ == "0.1.0"


POOLING_DEFAULTS = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "pool_size": 2, "pool_stride": None,
    "pool_padding": 0, "pool_dilation": 1, "ceil_mode": False, "activation": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [pyconv.functional.conv_max_pool2d, reference.conv_max_pool2d, reference.conv_max_pool2d_argmax],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_functional_signature(function: Any) -> None:
    """People's scripts call it: names, order, defaults and what is keyword-only are fixed."""
    parameters = inspect.signature(function).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert positional == ["input", "weight", "bias"]
    assert parameters["bias"].default is None
    assert keywords == POOLING_DEFAULTS


def test_module_signature() -> None:
    parameters = inspect.signature(ConvMaxPool2d).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert positional == ["in_channels", "out_channels", "kernel_size", "pool_size"]
    defaults = {**POOLING_DEFAULTS, "bias": True, "device": None, "dtype": None}
    assert {"pool_size": parameters["pool_size"].default, **keywords} == defaults


def test_operator_schema() -> None:
    schema = str(torch.ops.pyconv.conv_max_pool2d.default._schema)
    assert schema == (
        "pyconv::conv_max_pool2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
        "int[4] padding=0, int[2] dilation=1, int groups=1, int[2] pool_size=2, int[2] pool_stride=[], "
        "int[2] pool_padding=0, int[2] pool_dilation=1, bool ceil_mode=False, "
        'str activation="none") -> Tensor'
    )
