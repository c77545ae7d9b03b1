"""The short way of an eager call: which arguments take it, and that they mean what the long way takes them for."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from numerics import assert_equal
from numerics import integers as drawn_integers
from torch.overrides import TorchFunctionMode

from pyconv import _C
from pyconv.functional import _schema_arguments, conv_max_pool2d

DEFAULTS = conv_max_pool2d.__kwdefaults__
IMAGE, FILTERS = (2, 4, 13, 12), (6, 4, 3, 2)


class Inheriting(torch.Tensor):
    pass


class Whole(int):
    pass


class Text(str):
    pass


def integers(*shape: int) -> torch.Tensor:
    return drawn_integers(shape, torch.float32, torch.Generator().manual_seed(0))


def tensors() -> dict[str, torch.Tensor]:
    return {"input": integers(*IMAGE), "weight": integers(*FILTERS), "bias": integers(FILTERS[0])}


def made(arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments, those not given at their defaults; tensors are given as functions that make them."""
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    return {**tensors(), **DEFAULTS, **arguments}


@pytest.fixture(autouse=True)
def _no_default_device(_unchanged_process_state: None) -> None:
    """A default device is a mode, with which every call takes the long way."""
    torch.set_default_device(None)


def name_of(arguments: dict[str, Any]) -> str:
    shown = (name if callable(value) else f"{name}={value!r}" for name, value in arguments.items())
    return " ".join(shown) or "defaults"


def short_way(**arguments: Any) -> torch.Tensor:
    return _C.conv_max_pool2d(*made(arguments).values())


def long_way(**arguments: Any) -> torch.Tensor:
    given = made(arguments)
    input, weight, bias = (given.pop(name) for name in tensors())
    return torch.ops.pyconv.conv_max_pool2d(input, weight, bias, *_schema_arguments(weight.shape[2:], **given))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": None},
        {"stride": 2},
        {"stride": (2, 1)},
        {"stride": [1, 2]},
        {"padding": 1},
        {"padding": (2, 1)},
        {"padding": [0, 1]},
        {"padding": "valid"},
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 3)},
        {"dilation": (1, 2)},
        {"weight": lambda: integers(6, 2, 3, 2), "groups": 2},
        {"pool_size": 3},
        {"pool_size": torch.Size([3, 2])},
        {"pool_size": (3, 2), "pool_stride": (1, 2)},
        {"pool_stride": 1},
        {"pool_size": 3, "pool_padding": (1, 0)},
        {"pool_dilation": (2, 1)},
        {"pool_size": (2, 5), "ceil_mode": True},
        {"activation": "relu"},
        {"activation": "silu"},
        {"weight": lambda: torch.nn.Parameter(integers(*FILTERS))},
    ],
    ids=name_of,
)
def test_plain_arguments(arguments: dict[str, Any]) -> None:
    output = short_way(**arguments)
    assert output is not NotImplemented
    assert_equal(output, long_way(**arguments), "output")


@pytest.mark.parametrize(
    "arguments",
    [
        {"input": lambda: integers(*IMAGE).as_subclass(Inheriting)},
        {"weight": lambda: integers(*FILTERS).as_subclass(Inheriting)},
        {"bias": lambda: integers(FILTERS[0]).as_subclass(Inheriting)},
        {"stride": True},
        {"stride": Whole(2)},
        {"stride": (1, True)},
        {"stride": (1,)},
        {"stride": 2**64},
        {"padding": Text("same")},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding": "same", "stride": (1, 2)},
        {"padding": "same", "dilation": 2**40},
        {"padding": "same", "weight": lambda: integers(4, 3, 2)},
        {"groups": True},
        {"groups": 1.0},
        {"pool_stride": 1.5},
        {"ceil_mode": 1},
        {"activation": "softmax"},
        {"activation": "r\N{LATIN SMALL LETTER E WITH ACUTE}lu"},
        {"activation": None},
    ],
    ids=name_of,
)
def test_other_arguments_are_left_to_python(arguments: dict[str, Any]) -> None:
    assert short_way(**arguments) is NotImplemented


def test_a_function_mode_sees_the_operator() -> None:
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        output = conv_max_pool2d(**tensors())
    assert torch.ops.pyconv.conv_max_pool2d in seen or torch.ops.pyconv.conv_max_pool2d.default in seen
    assert_equal(output, short_way(), "output")


def test_the_number_of_arguments_is_checked() -> None:
    with pytest.raises(TypeError, match="expected 13 arguments, but got 2"):
        _C.conv_max_pool2d(integers(*IMAGE), integers(*FILTERS))


def test_arguments_are_released() -> None:
    given = tensors()
    before = [sys.getrefcount(tensor) for tensor in given.values()]
    for _ in range(10):
        conv_max_pool2d(**given)
        assert short_way(**given, padding="full") is NotImplemented
    assert [sys.getrefcount(tensor) for tensor in given.values()] == before
