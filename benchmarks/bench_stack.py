"""The book's two convolution-pooling layers one after the other, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.machine import peaks
from benchmarks.shapes import PHASES, case_named, flops, min_bytes
from benchmarks.suites import NETWORK3_SHAPES
from benchmarks.timing import Candidate, Role

BATCH = 10
CASES = tuple(case_named(name, BATCH) for name in NETWORK3_SHAPES)
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = peers.TOLERANCES["float32"]


class Stack:
    """Data of both layers, and the exact output and gradients in float64."""

    def __init__(self, device: str) -> None:
        first, second = (peers.make_problem(case, "float32", device) for case in CASES)
        self.x, self.grad_output = first.x, second.grad_output
        self.parameters = (first.w, first.b, second.w, second.b)
        exact = [t.double().requires_grad_() for t in (self.x, *self.parameters)]
        output = torch_stack("conv-pool-relu")(*exact)
        self.exact_output = output.detach()
        self.exact_gradients = torch.autograd.grad(output, exact, self.grad_output.double())

    def candidate(
        self, name: str, role: Role, layout: torch.memory_format, threads: int, input_grad: bool,
        make: Callable[[list[Tensor]], tuple[Callable[[Tensor], Tensor], list[Tensor]]],
    ) -> Candidate:  # fmt: skip
        """`make(parameters)` gives the stack's forward and the parameters it really reads."""
        x = peers.memory_format(self.x, layout).requires_grad_(input_grad)
        grad_output = peers.memory_format(self.grad_output, layout)
        copies = [peers.memory_format(p, layout) if p.dim() == 4 else p.clone() for p in self.parameters]
        forward, parameters = make(copies)
        wanted = [x] * input_grad + parameters
        exact = self.exact_gradients[0 if input_grad else 1 :]

        def check() -> None:
            output = forward(x)
            peers.check_close(output.detach(), self.exact_output, OUTPUT_TOLERANCE, "the output")
            for got, expected in zip(torch.autograd.grad(output, wanted, grad_output), exact, strict=True):
                peers.check_close(
                    got, expected, GRADIENT_TOLERANCE, f"a gradient of shape {tuple(got.shape)}"
                )

        def run() -> object:
            return torch.autograd.grad(forward(x), wanted, grad_output)

        return Candidate(name, role, run, None, True, threads, peers.LAYOUT_NAMES[layout], check)


def torch_stack(order: str) -> Callable[..., Tensor]:
    first, second = (peers.ORDERS[order](case) for case in CASES)
    return lambda x, w1, b1, w2, b2: second(first(x, w1, b1), w2, b2)


def _ours(layout: torch.memory_format):
    def make(parameters: list[Tensor]) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        modules = [
            peers.pyconv_module(case, layout, w, b)
            for case, w, b in zip(CASES, parameters[::2], parameters[1::2], strict=True)
        ]
        return torch.nn.Sequential(*modules), [p for module in modules for p in (module.weight, module.bias)]

    return make


def _peer(layer: Callable[..., Tensor]):
    def make(parameters: list[Tensor]) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        leaves = [p.requires_grad_() for p in parameters]
        return lambda x: layer(x, *leaves), leaves

    return make


@pytest.mark.parametrize("input_grad", [False, True], ids=["no_input_grad", "input_grad"])
def test_stack(measure, suite, threads: int, input_grad: bool) -> None:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    stack = Stack(suite.device)
    layouts = (peers.NCHW, peers.NHWC)
    candidates = [
        stack.candidate(
            f"pyconv {peers.LAYOUT_NAMES[layout]}", "ours", layout, threads, input_grad, _ours(layout)
        )
        for layout in layouts
    ]
    for order in peers.ORDERS:
        layer = torch_stack(order)
        for layout in layouts:
            name = f"torch eager {peers.LAYOUT_NAMES[layout]} {order}"
            candidates.append(stack.candidate(name, "peer", layout, threads, input_grad, _peer(layer)))
        for mode in suite.compile_modes:
            name = f"{peers.COMPILE_MODES[mode]} channels_last {order}"
            compiled = _peer(torch.compile(layer, mode=mode, fullgraph=True, dynamic=False))
            candidates.append(stack.candidate(name, "peer", peers.NHWC, threads, input_grad, compiled))
    full, first_phase = PHASES["full"], PHASES["full" if input_grad else "full_no_input_grad"]
    measure(
        candidates,
        "stack",
        shape="+".join(NETWORK3_SHAPES),
        batch=BATCH,
        precision="float32",
        phase=first_phase.name,
        threads=threads,
        flops=flops(CASES[0], first_phase) + flops(CASES[1], full),
        min_bytes=min_bytes(CASES[0], first_phase, 4) + min_bytes(CASES[1], full, 4),
        peaks=peaks(suite.device, "float32", threads),
    )
