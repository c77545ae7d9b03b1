"""A training step of KSH's network ("AlexNet", examples/ksh.py) at full width, with dropout, momentum and weight decay.

The peers are the same layers of plain torch under its fused SGD, the fastest of its three forms on a CPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyconv
from benchmarks import peers
from benchmarks.machine import peaks, set_precision
from benchmarks.timing import Candidate, Role
from pyconv.training import CompiledStep

# examples/ holds scripts and is no package that could be imported by name. It comes first, as when one of them is run.
_EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
if _EXAMPLES not in sys.path:
    sys.path.insert(0, _EXAMPLES)

from ksh import ksh  # noqa: E402

Step = Callable[[Tensor, Tensor], Tensor]
MakeStep = Callable[[nn.Module, torch.optim.Optimizer], Step]

CLASSES = 1000
P_DROPOUT = 0.5
_CHECKED_STEPS = 2
"""The second one has a momentum."""
_CHECKED_RATE = 0.01
_TIMED_RATE = 1e-6
"""So small that many steps on one mini-batch leave the network as it is: how many units are dead decides the cost."""
_TOLERANCE = peers.TOLERANCES["float32"][1]


def torch_ksh(order: str, p_dropout: float) -> nn.Sequential:
    """The network of examples/ksh.py in plain torch, its parameters in the same order."""

    def pooled(conv: nn.Module) -> list[nn.Module]:
        behind = [nn.MaxPool2d(3, stride=2), nn.ReLU()]
        return [conv, *(behind if order == "conv-pool-relu" else behind[::-1])]

    return nn.Sequential(
        *pooled(nn.Conv2d(3, 96, 11, stride=4, padding=2)),
        *pooled(nn.Conv2d(96, 256, 5, padding=2, groups=2)),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        *pooled(nn.Conv2d(384, 256, 3, padding=1, groups=2)),
        nn.Flatten(),
        nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(p_dropout),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(p_dropout),
        nn.Linear(4096, CLASSES),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def start() -> list[Tensor]:
    """The parameters that everyone starts from."""
    torch.manual_seed(0)
    return [p.detach() for p in ksh().parameters()]


@functools.lru_cache(maxsize=1)
def mini_batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 224, 224, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def _started(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = model.to(dtype)
    with torch.no_grad():
        for target, source in zip(model.parameters(), start(), strict=True):
            target.copy_(source)
    return model


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, fused=True)


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, compile_mode: str | None = None) -> Step:
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    if compile_mode is not None:
        loss_of = torch.compile(loss_of, mode=compile_mode, dynamic=False, fullgraph=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compiled_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> CompiledStep:
    return pyconv.compile_training(model, optimizer=optimizer)


def _moved(model: nn.Module, step: Step, x: Tensor, y: Tensor) -> list[Tensor]:
    """How far the checked steps move each parameter."""
    for _ in range(_CHECKED_STEPS):
        step(x, y)
    return [p.detach().double() - source for p, source in zip(model.parameters(), start(), strict=True)]


@functools.lru_cache(maxsize=1)
def exactly_moved(size: int) -> list[Tensor]:
    """The same in float64."""
    model = _started(torch_ksh("conv-pool-relu", 0.0), torch.float64)
    x, y = mini_batch(size)
    return _moved(model, eager_step(model, _optimizer(model, _CHECKED_RATE)), x.double(), y)


def candidate(
    name: str, role: Role, threads: int, size: int, make_model: Callable[[float], nn.Module], make_step: MakeStep,
    layout: torch.memory_format = peers.NCHW, compile_mode: str | None = None,
) -> tuple[Candidate, Step]:  # fmt: skip
    """`make_model(p_dropout)` gives the model, and `make_step` its step; and the step that is timed."""
    x, y = mini_batch(size)
    x = peers.memory_format(x, layout)

    def made(p_dropout: float, rate: float) -> tuple[nn.Module, Step]:
        model = _started(make_model(p_dropout)).to(memory_format=layout).train()
        return model, make_step(model, _optimizer(model, rate))

    def check() -> None:
        for moved, exact in zip(_moved(*made(0.0, _CHECKED_RATE), x, y), exactly_moved(size), strict=True):
            peers.check_close(moved, exact, _TOLERANCE, f"the update of a parameter of shape {tuple(exact.shape)}")

    _, step = made(P_DROPOUT, _TIMED_RATE)
    return Candidate(
        name, role, lambda: step(x, y), None, True, threads, peers.LAYOUT_NAMES[layout], check,
        compile_mode=compile_mode,
    ), step  # fmt: skip


def test_ksh_step(measure, suite, threads: int, ksh_batch: int) -> None:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    set_precision("float32")

    def ours(p_dropout: float) -> nn.Module:
        return ksh(classes=CLASSES, p_dropout=p_dropout)

    headline, step = candidate("pyconv compile_training", "ours", threads, ksh_batch, ours, compiled_step)
    candidates = [headline, candidate("pyconv layer by layer", "ours", threads, ksh_batch, ours, eager_step)[0]]
    for order in peers.ORDERS:
        theirs = functools.partial(torch_ksh, order)
        for layout in (peers.NCHW, peers.NHWC):
            name = f"torch eager {peers.LAYOUT_NAMES[layout]} {order}"
            candidates.append(candidate(name, "peer", threads, ksh_batch, theirs, eager_step, layout)[0])
        for mode in suite.compile_modes:
            name = f"{peers.COMPILE_MODES[mode]} channels_last {order}"
            compiled = functools.partial(eager_step, compile_mode=mode)
            candidates.append(candidate(name, "peer", threads, ksh_batch, theirs, compiled, peers.NHWC, mode)[0])
    headline.run()  # the first step makes the plan
    rows = step.plan().rows
    measure(
        candidates,
        "ksh_step",
        shape="KSH",
        batch=ksh_batch,
        precision="float32",
        phase="training step",
        threads=threads,
        flops=sum(row["flops"] for row in rows),
        min_bytes=sum(row["bytes"] for row in rows),
        peaks=peaks("cpu", "float32", threads),
    )
