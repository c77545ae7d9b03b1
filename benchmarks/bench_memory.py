"""Memory: saved bytes per element of a training step, and the peak of a KSH1 block at N = 128."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import memory, peers
from benchmarks.shapes import PHASES, case_named

BATCH = 2
"""Saved bytes per element do not depend on the number of images."""


def test_saved_bytes_conv_max_pool2d(record, suite, memory_shape: str) -> None:
    case = case_named(memory_shape, BATCH)
    problem = peers.make_problem(case, "float32", suite.device)
    # Compiling for a figure that is known (2 to 5 bytes) is not worth a GPU suite's time.
    modes = suite.compile_modes if suite.device == "cpu" else ()
    # A captured graph holds its memory for good, saved or not.
    found, _ = peers.implementations(problem, PHASES["full"], modes, graphs=False)
    pooled = problem.grad_output.numel()

    def measure(implementation: peers.Implementation):
        inputs = (implementation.x, *implementation.parameters)
        return lambda: memory.saved_bytes(implementation.call, inputs) / pooled

    record(
        {i.name: (i.role, measure(i)) for i in found},
        "saved_bytes",
        unit="bytes per pooled element beyond x, w, y",
        shape=memory_shape,
        batch=BATCH,
        precision="float32",
    )


def test_saved_bytes_dropout(record, suite) -> None:
    import pyconv

    elements = 2**20
    functions = {
        "pyconv": ("ours", pyconv.Dropout(0.5)),
        "torch eager": ("peer", lambda x: F.dropout(x, 0.5, True)),
    }

    def saved(function, count: int) -> int:
        x = torch.randn(count, device=suite.device, requires_grad=True)
        return memory.saved_bytes(lambda: function(x), [x])

    def measure(function):
        # The difference, because a call saves its random state whatever the size.
        return lambda: (saved(function, 2 * elements) - saved(function, elements)) / elements

    record(
        {name: (role, measure(function)) for name, (role, function) in functions.items()},
        "saved_bytes",
        unit="bytes per element beyond x, y",
        shape="dropout",
        elements=elements,
        precision="float32",
    )


def test_peak_memory(record, suite) -> None:
    if suite.name == "quick":
        pytest.skip("KSH1 at N = 128 takes minutes on two cores; the suite `full` has it")
    shape, batch = "KSH1", 128
    # PyTorch's defaults: TF32 in convolutions, where the device has it.
    precision = "tf32" if suite.device == "cuda" else "float32"
    names = {f"pyconv {layout}": "ours" for layout in ("channels_last", "NCHW")}
    names |= {
        f"torch eager {layout} {order}": "peer"
        for layout in ("NCHW", "channels_last")
        for order in peers.ORDERS
    }

    def measure(name: str, cudnn_benchmark: bool = False):
        return lambda: memory.peak_bytes(
            shape, batch, name, suite.device, precision=precision, cudnn_benchmark=cudnn_benchmark
        )

    values = {name: (role, measure(name)) for name, role in names.items()}
    if suite.device == "cuda":
        values |= {
            f"{name}, cudnn.benchmark": (role, measure(name, True))
            for name, role in names.items()
            if role == "peer"
        }
    record(
        values,
        "peak_memory",
        unit="bytes above x, w, b and their gradients",
        shape=shape,
        batch=batch,
        precision=precision,
    )
