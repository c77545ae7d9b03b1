"""Who competes: pyconv and the implementations it is measured against, over one set of data per case.

Every implementation gets its data in the layout it likes best, made outside the timing, and computes
`relu(max_pool2d(conv2d(x, w), ...) + b)`, or the equal other order `max_pool2d(relu(conv2d(x, w, b)), ...)`,
whichever its name says. Peers are plain functions over torch.nn.functional, the form with the least overhead;
pyconv runs as the module that its users write.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from benchmarks.machine import set_precision
from benchmarks.shapes import Case, Phase, conv2d_arguments, max_pool2d_arguments
from benchmarks.timing import Candidate, Role

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (N, C, H, W), w (K, C / groups, R, S), b (K,)) -> y (N, K, PH, PW)."""

NCHW = torch.contiguous_format
NHWC = torch.channels_last
LAYOUT_NAMES = {NCHW: "NCHW", NHWC: "channels_last"}

TOLERANCES = {
    "float64": (1e-12, 1e-9),
    "float32": (1e-4, 1e-2),
    "tf32": (5e-3, 2e-1),
    "float16": (5e-3, 2e-1),
    "bfloat16": (2e-2, 3e-1),
}
"""Largest norm(got - exact) / norm(exact) of the output and of each gradient, exact in float64.

The gradients' is far wider, because rounding flips the winner of a window whose two best values nearly tie:
each flip moves one gradient entry, and a fraction f of flips gives an error of about sqrt(2 f). It still tells
a right answer from one with a wrong factor, a lost term or a shift, which is what must be known before a time
means anything; the precise bounds are the tests' business. The output's tells float32 from TF32.
"""


def memory_format(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy of a 4-D tensor with the strides of `layout`, also for C = 1, which `Tensor.to` leaves alone."""
    return torch.empty_like(tensor, memory_format=layout).copy_(tensor)


# ------------------------------------------------------------------------------------------------------------
# Data and answers
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data of one case, NCHW."""

    case: Case
    precision: str
    device: str
    x: Tensor
    w: Tensor
    b: Tensor
    grad_output: Tensor


@functools.lru_cache(maxsize=2)
def make_problem(case: Case, precision: str, device: str) -> Problem:
    """Random signed data, scaled so that outputs are of order one; the same for the same arguments."""
    dtype = set_precision(precision)
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)

    fan_in = case.flops // max(1, 2 * torch.Size(case.conv_shape).numel())
    x, w, b = normal(case.input_shape), normal(case.weight_shape, fan_in**-0.5), normal(case.bias_shape, 0.1)
    return Problem(case, precision, device, x, w, b, normal(case.output_shape))


@functools.lru_cache(maxsize=2)
def exact_answer(case: Case, precision: str, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of x, w and b, of `make_problem`'s data in float64 on the same device."""
    problem = make_problem(case, precision, device)
    torch.backends.cudnn.benchmark = False  # trying every algorithm costs more than one slow run
    exact = {name: getattr(problem, name).double().requires_grad_() for name in ("x", "w", "b")}
    with torch.enable_grad():
        output = conv_pool_relu(case)(*exact.values())
        gradients = torch.autograd.grad(output, list(exact.values()), problem.grad_output.double())
    return output.detach(), dict(zip(exact, gradients, strict=True))


def check_close(got: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    """AssertionError unless norm(got - exact) <= tolerance * norm(exact) and the shapes agree."""
    assert got.shape == exact.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    error = (got.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    assert error <= tolerance, (
        f"{what} differs from the float64 reference by {error:.2e}, allowed is {tolerance:.0e}"
    )


# ------------------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------------------


def conv_pool_relu(case: Case) -> Layer:
    """Equivalent to: `relu(max_pool2d(conv2d(x, w, b)))`: the activation sees pooled elements only."""
    conv, pool = conv2d_arguments(case), max_pool2d_arguments(case)
    return lambda x, w, b: F.relu(F.max_pool2d(F.conv2d(x, w, b, **conv), **pool))


def conv_relu_pool(case: Case) -> Layer:
    """Equivalent to: `max_pool2d(relu(conv2d(x, w, b)))`: the usual order in model code."""
    conv, pool = conv2d_arguments(case), max_pool2d_arguments(case)
    return lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b, **conv)), **pool)


ORDERS: dict[str, Callable[[Case], Layer]] = {
    "conv-pool-relu": conv_pool_relu,
    "conv-relu-pool": conv_relu_pool,
}

GRAPH = "CUDA graph"
COMPILE_MODES = {"default": "torch.compile", "max-autotune": "torch.compile max-autotune"}


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A layer with its data in its own layout: `call()` is the forward.

    Attributes:
        graphed: the whole phase runs as the replay of a CUDA graph.
        compile_mode: of torch.compile, whose first call takes long; None if not compiled.
    """

    name: str
    role: Role
    layout: torch.memory_format
    call: Callable[[], Tensor]
    x: Tensor
    parameters: tuple[Tensor, Tensor]
    grad_output: Tensor
    graphed: bool = False
    compile_mode: str | None = None


def _leaves(problem: Problem, layout: torch.memory_format, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
    x = memory_format(problem.x, layout).requires_grad_(phase.input_grad)
    w = memory_format(problem.w, layout).requires_grad_(phase.parameter_grad)
    return x, w, problem.b.clone().requires_grad_(phase.parameter_grad)


def pyconv_module(case: Case, layout: torch.memory_format, w: Tensor, b: Tensor) -> torch.nn.Module:
    """The module as its user writes it, carrying the given weight and bias."""
    import pyconv

    module = pyconv.ConvMaxPool2d(
        case.C, case.K, case.kernel, **case.kwargs(), activation="relu", device=w.device, dtype=w.dtype
    ).to(memory_format=layout)  # fmt: skip
    with torch.no_grad():
        module.weight.copy_(w)
        module.bias.copy_(b)
    return module


def _ours(problem: Problem, layout: torch.memory_format, phase: Phase) -> Implementation:
    x, w, b = _leaves(problem, layout, phase)
    module = pyconv_module(problem.case, layout, w.detach(), b.detach()).requires_grad_(phase.parameter_grad)
    return Implementation(
        f"pyconv {LAYOUT_NAMES[layout]}", "ours", layout, lambda: module(x), x, (module.weight, module.bias),
        memory_format(problem.grad_output, layout),
    )  # fmt: skip


def _peer(
    problem: Problem, layout: torch.memory_format, phase: Phase, name: str, layer: Layer, **attributes: Any
) -> Implementation:
    """`attributes`: graphed, compile_mode."""
    x, w, b = _leaves(problem, layout, phase)
    grad_output = memory_format(problem.grad_output, layout)
    return Implementation(name, "peer", layout, lambda: layer(x, w, b), x, (w, b), grad_output, **attributes)


def _compiled(
    problem: Problem, layout: torch.memory_format, phase: Phase, name: str, layer: Layer, mode: str
) -> Implementation:
    compiled = torch.compile(layer, mode=mode, fullgraph=True, dynamic=False)
    peer = _peer(problem, layout, phase, name, compiled, compile_mode=mode)
    if problem.device == "cuda":
        # As of a module's parameters, and of data that another compiled layer gives: graphs copy other inputs.
        for tensor in (peer.x, *peer.parameters):
            torch._dynamo.mark_static_address(tensor)
    return peer


def implementations(
    problem: Problem, phase: Phase, compile_modes: Iterable[str] = (), *, graphs: bool = True
) -> tuple[list[Implementation], dict[str, str]]:
    """Every implementation of one phase, ours first, and the reasons of those left out by name.

    pyconv's headline is NCHW, torch's default and so what users have who change nothing; channels_last is measured
    beside it.
    Eager peers come in both layouts and both orders, on a GPU as captured graphs too; compiled ones in both orders on
    channels_last data: the compiler lays out what lies between by itself, and on such data it has no copy to make at
    the ends. On a GPU, cuDNN tries its algorithms for all of them (cudnn.benchmark).

    Args:
        compile_modes: of `COMPILE_MODES`, in the order in which they are compiled, which takes from seconds to minutes
            for each.
        graphs: whether captured graphs take part, on a GPU.
    """
    # Dynamo counts recompilations per code object, and every cell compiles the same functions for another
    # shape.
    torch.compiler.reset()
    case, cuda = problem.case, problem.device == "cuda"
    torch.backends.cudnn.benchmark = cuda
    set_precision(problem.precision)
    found = [_ours(problem, layout, phase) for layout in (NCHW, NHWC)]
    left_out = {
        name: "not asked for in this cell of the suite"
        for mode, name in COMPILE_MODES.items()
        if mode not in compile_modes
    }
    orders = {order: make(case) for order, make in ORDERS.items()}
    for layout in (NCHW, NHWC):
        for order, layer in orders.items():
            name = f"{LAYOUT_NAMES[layout]} {order}"
            found.append(_peer(problem, layout, phase, f"torch eager {name}", layer))
            if cuda and graphs and (phase.forward or not phase.backward):
                found.append(
                    _peer(problem, layout, phase, f"torch eager {GRAPH} {name}", layer, graphed=True)
                )
    if cuda and graphs and phase.backward and not phase.forward:
        left_out[f"torch eager {GRAPH}"] = "a backward alone is not captured"
    for mode in compile_modes:
        for order, layer in orders.items():
            name = f"{COMPILE_MODES[mode]} {LAYOUT_NAMES[NHWC]} {order}"
            found.append(_compiled(problem, NHWC, phase, name, layer, mode))
    return found, left_out


# ------------------------------------------------------------------------------------------------------------
# Phases
# ------------------------------------------------------------------------------------------------------------


def candidate(problem: Problem, implementation: Implementation, phase: Phase, threads: int) -> Candidate:
    """`implementation` running `phase`, with a check of what it gives, and of its output, against float64."""
    forward, grad_output = implementation.call, implementation.grad_output
    wanted = [implementation.x] * phase.input_grad + list(implementation.parameters) * phase.parameter_grad
    names = ["x"] * phase.input_grad + ["w", "b"] * phase.parameter_grad
    output_tolerance, gradient_tolerance = TOLERANCES[problem.precision]

    prepare = None
    if not phase.backward:
        run = forward
    elif phase.forward:

        def run() -> object:
            return torch.autograd.grad(forward(), wanted, grad_output)
    else:
        outputs: list[Tensor] = []

        def prepare() -> None:
            outputs[:] = [forward()]

        def run() -> object:
            return torch.autograd.grad(outputs[0], wanted, grad_output)

    timed = gpu.Captured(run) if implementation.graphed else run

    def check() -> None:
        exact_output, exact_gradients = exact_answer(problem.case, problem.precision, problem.device)
        torch.backends.cudnn.benchmark = problem.device == "cuda"
        output = forward() if phase.backward else timed()
        check_close(output.detach(), exact_output, output_tolerance, "the output")
        if phase.backward:
            if prepare is not None:
                prepare()
            for name, gradient in zip(names, timed(), strict=True):
                check_close(gradient, exact_gradients[name], gradient_tolerance, f"the gradient of {name}")

    return Candidate(
        implementation.name, implementation.role, timed, prepare, phase.grad, threads,
        LAYOUT_NAMES[implementation.layout], check, compile_mode=implementation.compile_mode,
    )  # fmt: skip


def module_available(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None
