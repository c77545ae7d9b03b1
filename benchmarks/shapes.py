"""The named shapes of tests/cases.py, and what one of them costs: FLOPs, the least traffic, the roofline."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

# tests/ holds test modules and is no package that could be imported by name.
_TESTS = str(Path(__file__).resolve().parent.parent / "tests")
if _TESTS not in sys.path:
    sys.path.append(_TESTS)

from cases import CASES, Case  # noqa: E402

__all__ = [
    "CASES",
    "Case",
    "Phase",
    "PHASES",
    "case_named",
    "conv2d_arguments",
    "flops",
    "max_pool2d_arguments",
    "min_bytes",
]


def case_named(name: str, batch: int | None = None) -> Case:
    """The case called `name`, with `batch` images instead of its own number if `batch` is given."""
    for case in CASES:
        if case.name == name:
            return case if batch is None else case.with_batch(batch)
    raise KeyError(f"tests/cases.py has no case {name!r}; it has {', '.join(case.name for case in CASES)}")


def conv2d_arguments(case: Case) -> dict[str, Any]:
    """The keyword arguments of `torch.nn.functional.conv2d`."""
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}


def max_pool2d_arguments(case: Case) -> dict[str, Any]:
    """The keyword arguments of `torch.nn.functional.max_pool2d`."""
    return {
        "kernel_size": case.pool_size,
        "stride": case.pool_stride,
        "padding": case.pool_padding,
        "dilation": case.pool_dilation,
        "ceil_mode": case.ceil_mode,
    }


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the work that is timed by itself.

    Attributes:
        forward, backward: which of them is timed; a backward timed alone follows an untimed forward.
        input_grad, parameter_grad: which gradients are asked for. Neither: inference, without autograd.
    """

    name: str
    forward: bool
    backward: bool
    input_grad: bool
    parameter_grad: bool

    @property
    def grad(self) -> bool:
        return self.input_grad or self.parameter_grad


PHASES = {
    phase.name: phase
    for phase in (
        Phase("forward_inference", True, False, False, False),
        Phase("forward_training", True, False, True, True),
        Phase("backward_no_input_grad", False, True, False, True),
        Phase("backward_only_input_grad", False, True, True, False),
        Phase("backward_input_grad", False, True, True, True),
        Phase("full_no_input_grad", True, True, False, True),
        Phase("full", True, True, True, True),
    )
}


def flops(case: Case, phase: Phase) -> int:
    """Dense-equivalent FLOPs: each of forward, input gradient and weight gradient counts the whole
    convolution.

    The gradient of max-pooling is sparse, so a backward that uses this may pass 100 % of the machine's peak.
    """
    gradients = phase.backward * (phase.input_grad + phase.parameter_grad)
    return case.flops * (phase.forward + gradients)


def min_bytes(case: Case, phase: Phase, element_size: int) -> int:
    """The least memory traffic of the fused operator: every tensor it needs read once, every result written
    once.

    The forward of a training step also writes one byte per pooled element, and the backward reads it.
    """
    x, w, b, y = (
        math.prod(s) for s in (case.input_shape, case.weight_shape, case.bias_shape, case.output_shape)
    )
    total = 0
    if phase.forward:
        total += (x + w + b + y) * element_size + y * phase.grad
    if phase.backward:
        total += y * element_size + y
        total += phase.parameter_grad * (x + w + b) * element_size  # reads x; writes dW and db
        total += phase.input_grad * (w + x) * element_size  # reads w; writes dX
    return total
