"""dropout and relu + dropout, forward and backward, beside torch and beside plain copies of the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.suites import Suite
from benchmarks.timing import Candidate, Role

P_EIGHT_BIT = 0.5
"""p * 256 is an integer: a draw takes one byte of the generator's output."""
P_GENERAL = 0.3
"""A draw takes four bytes."""
_STANDARD_DEVIATIONS = 6

Function = Callable[[Tensor], Tensor]


def make_check(
    function: Function, x: Tensor, p: float, before: Function, grad_output: Tensor
) -> Callable[[], None]:
    """A check that `function` is dropout after `before`: its values, its fraction, its backward's mask."""

    def check() -> None:
        y = function(x)
        (grad,) = torch.autograd.grad(y, x, grad_output)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            undropped = before(leaf) / (1 - p)
        (kept_grad,) = torch.autograd.grad(undropped, leaf, grad_output)
        undropped, y = undropped.detach(), y.detach()
        kept = y != 0
        assert torch.allclose(y[kept], undropped[kept]), "a kept element is not the input over 1 - p"
        live = undropped != 0
        count, dropped = int(live.sum()), int((live & ~kept).sum())
        allowed = _STANDARD_DEVIATIONS * math.sqrt(count * p * (1 - p))
        assert abs(dropped - count * p) <= allowed, f"{dropped} of {count} elements dropped with p = {p}"
        expected = torch.where(kept, kept_grad, torch.zeros_like(kept_grad))
        assert torch.allclose(grad[live], expected[live]), "the backward does not use the forward's mask"

    return check


def training_step(
    name: str, role: Role, function: Function, before: Function, x: Tensor, p: float, threads: int
) -> Candidate:
    leaf = x.clone().requires_grad_()
    grad_output = torch.ones_like(x)

    def run() -> object:
        return torch.autograd.grad(function(leaf), leaf, grad_output)

    return Candidate(
        name, role, run, None, True, threads, "", make_check(function, leaf, p, before, grad_output)
    )


def two_copies(x: Tensor, threads: int) -> Candidate:
    """What forward and backward cannot go below: one tensor read and one written, twice."""

    def run() -> None:
        x.clone()
        x.clone()

    return Candidate("two copies", "bound", run, None, False, threads)


def compiled(function: Function, suite: Suite) -> dict[str, Function]:
    torch.compiler.reset()
    return {
        peers.COMPILE_MODES[mode]: torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
        for mode in suite.compile_modes
    }


def make_input(elements: int, suite: Suite) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(suite.device)


@pytest.mark.parametrize("p", [P_EIGHT_BIT, P_GENERAL])
def test_dropout(measure, suite, elements: int, threads: int, p: float) -> None:
    import pyconv

    torch.set_num_threads(threads)
    x = make_input(elements, suite)

    def identity(x: Tensor) -> Tensor:
        return x

    def torch_dropout(x: Tensor) -> Tensor:
        return F.dropout(x, p, True)

    functions: dict[str, tuple[Role, Function]] = {"pyconv": ("ours", pyconv.Dropout(p))}
    functions |= {"torch eager": ("peer", torch_dropout)}
    functions |= {name: ("peer", function) for name, function in compiled(torch_dropout, suite).items()}
    candidates = [
        training_step(name, role, function, identity, x, p, threads)
        for name, (role, function) in functions.items()
    ]
    measure(
        [*candidates, two_copies(x, threads)],
        "dropout",
        shape=f"p={p}",
        elements=elements,
        precision="float32",
        phase="full",
        threads=threads,
    )


@pytest.mark.parametrize("p", [P_EIGHT_BIT, P_GENERAL])
def test_relu_dropout(measure, suite, elements: int, threads: int, p: float) -> None:
    import pyconv.functional

    torch.set_num_threads(threads)
    x = make_input(elements, suite)

    def ours(x: Tensor) -> Tensor:
        return pyconv.functional.bias_act_dropout(x, activation="relu", p=p)

    def torch_relu_dropout(x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), p, True)

    functions: dict[str, tuple[Role, Function]] = {"pyconv": ("ours", ours)}
    functions |= {"torch eager": ("peer", torch_relu_dropout)}
    functions |= {name: ("peer", function) for name, function in compiled(torch_relu_dropout, suite).items()}
    candidates = [
        training_step(name, role, function, F.relu, x, p, threads)
        for name, (role, function) in functions.items()
    ]
    measure(
        [*candidates, two_copies(x, threads)],
        "relu_dropout",
        shape=f"p={p}",
        elements=elements,
        precision="float32",
        phase="full",
        threads=threads,
    )
