"""dropout and relu + dropout, forward and backward, beside torch and beside plain copies of the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.machine import peaks
from benchmarks.suites import Suite
from benchmarks.timing import Candidate, Role, Samples

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
    name: str, role: Role, function: Function, before: Function, x: Tensor, p: float, threads: int, phase: str,
    compile_mode: str | None,
) -> Candidate:  # fmt: skip
    """`phase`: "forward" (of a training step), "backward" or "full"."""
    leaf = x.clone().requires_grad_()
    grad_output = torch.ones_like(x)
    outputs: list[Tensor] = []

    def forward() -> Tensor:
        return function(leaf)

    def prepare_backward() -> None:
        outputs[:] = [function(leaf)]

    def backward() -> object:
        return torch.autograd.grad(outputs[0], leaf, grad_output)

    def full() -> object:
        return torch.autograd.grad(function(leaf), leaf, grad_output)

    run = {"forward": forward, "backward": backward, "full": full}[phase]
    check = make_check(function, leaf, p, before, grad_output)
    return Candidate(
        name, role, run, prepare_backward if phase == "backward" else None, True, threads, "", check,
        compile_mode=compile_mode,
    )  # fmt: skip


def copies(x: Tensor, threads: int, phase: str) -> Candidate:
    """What the phase cannot go below: for the forward and for the backward each, one tensor read and one written."""

    def copy() -> object:
        return x.clone()

    def two_copies() -> None:
        x.clone()
        x.clone()

    if phase == "full":
        return Candidate("two copies", "bound", two_copies, None, False, threads)
    return Candidate("copy", "bound", copy, None, False, threads)


def compiled(make: Callable[[float], Function], p: float, mode: str) -> Function:
    # Dynamo counts recompilations per code object, and every cell compiles the same functions for another size.
    torch.compiler.reset()
    return torch.compile(make(p), mode=mode, fullgraph=True, dynamic=False)


def make_input(elements: int, suite: Suite) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(suite.device)


def identity(x: Tensor) -> Tensor:
    return x


def torch_dropout(p: float) -> Function:
    return lambda x: F.dropout(x, p, True)


def torch_relu_dropout(p: float) -> Function:
    return lambda x: F.dropout(F.relu(x), p, True)


TENSORS_MOVED = {
    "dropout": {"forward": 2, "backward": 2, "full": 4},
    "relu_dropout": {"forward": 2, "backward": 3, "full": 5},
}
"""Tensors read and written, at least. ReLU's backward reads the output beside the gradient."""


def measure_dropout(
    measure: Callable[..., Samples], suite: Suite, kind: str, elements: int, threads: int, p: float, phase: str,
    ours: Function, before: Function, make_peer: Callable[[float], Function],
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    x = make_input(elements, suite)
    candidates = [
        training_step(name, role, function, before, x, p, threads, phase, mode)
        for name, role, function, mode in (
            ("pyconv", "ours", ours, None),
            ("torch eager", "peer", make_peer(p), None),
            *(
                (peers.COMPILE_MODES[mode], "peer", compiled(make_peer, p, mode), mode)
                for mode in suite.compile_modes
            ),
        )
    ]
    bound = copies(x, threads, phase)
    bytes_moved = TENSORS_MOVED[kind][phase] * x.nbytes
    measure(
        [*candidates, bound],
        kind,
        shape=f"p={p}",
        elements=elements,
        precision="float32",
        phase=phase,
        threads=threads,
        min_bytes=bytes_moved,
        bytes_over_bound=bytes_moved / ((4 if phase == "full" else 2) * x.nbytes),
        peaks=peaks(suite.device, "float32", threads),
    )


@pytest.mark.parametrize("p", [P_EIGHT_BIT, P_GENERAL])
def test_dropout(measure, suite, elements: int, threads: int, p: float, dropout_phase: str) -> None:
    import pyconv

    ours = pyconv.Dropout(p)
    arguments = elements, threads, p, dropout_phase
    measure_dropout(measure, suite, "dropout", *arguments, ours, identity, torch_dropout)


@pytest.mark.parametrize("p", [P_EIGHT_BIT, P_GENERAL])
def test_relu_dropout(measure, suite, elements: int, threads: int, p: float, dropout_phase: str) -> None:
    import pyconv.functional

    def ours(x: Tensor) -> Tensor:
        return pyconv.functional.bias_act_dropout(x, activation="relu", p=p)

    arguments = elements, threads, p, dropout_phase
    measure_dropout(measure, suite, "relu_dropout", *arguments, ours, F.relu, torch_relu_dropout)
