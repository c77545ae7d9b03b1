"""A pytest plugin that runs the suite for a GPU on the CPU, on small shapes: `-p benchmarks.fake_cuda`.

No time or size that comes out means anything. What it shows is that every path of the suite works: torch.cuda's
functions are replaced by ones that keep its rules (an event has no time before a synchronisation, nothing
synchronises inside a capture, memory is asked of the allocator alone), and tensors "on cuda" live on the CPU.
The replay of a graph computes nothing; so a captured training step is found wrong, and is left out.

torch.compile gives the function itself, and fails in the mode "max-autotune" as a compiler may. Where
$PYCONV_FAKE_CUDA_FAULT names a file that does not exist, the first capture creates it and ends the process, as a
segmentation fault would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import gpu, machine, shapes, suites, timing

_EXIT_OF_A_FAULT = 139


class _OnCpu(TorchFunctionMode):
    """Puts on the CPU what is asked to be on the GPU."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {key: _without_cuda(value) for key, value in (kwargs or {}).items()}
        return function(*map(_without_cuda, args), **kwargs)


def _without_cuda(value: Any) -> Any:
    is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return "cpu" if is_device else value


class _Device:
    """The state of the one GPU."""

    synchronisations = 0
    capturing = False

    @classmethod
    def synchronize(cls, device: object = None) -> None:
        if cls.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        cls.synchronisations += 1


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._has_time = enable_timing
        self._recorded: tuple[float, int] | None = None

    def record(self, stream: object = None) -> None:
        self._recorded = time.perf_counter(), _Device.synchronisations

    def elapsed_time(self, end: _Event) -> float:
        if not (self._has_time and end._has_time and self._recorded and end._recorded):
            raise RuntimeError("both events must be recorded and made with enable_timing")
        if end._recorded[1] == _Device.synchronisations:
            raise RuntimeError("both events must be completed before calculating elapsed time")
        return 1e3 * (end._recorded[0] - self._recorded[0])


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)


class _Graph:
    is_captured = False

    def replay(self) -> None:
        if not self.is_captured:
            raise RuntimeError("replay of a graph without a capture")


@contextlib.contextmanager
def _graph(graph: _Graph) -> Iterator[None]:
    fault = os.environ.get("PYCONV_FAKE_CUDA_FAULT")
    if fault and not Path(fault).exists():
        Path(fault).touch()
        os._exit(_EXIT_OF_A_FAULT)
    _Device.capturing = True
    try:
        yield
        graph.is_captured = True
    finally:
        _Device.capturing = False


def _compile(
    function: Callable[..., Any], *, mode: str, fullgraph: bool = False, dynamic: bool | None = None
) -> Any:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no valid choice for this convolution")

    return fail if mode == "max-autotune" else function


_PROPERTIES = types.SimpleNamespace(
    name="No GPU (test)", major=9, minor=0, multi_processor_count=1, total_memory=2**30
)
_FUNCTIONS: dict[str, Any] = {
    "Event": _Event,
    "Stream": _Stream,
    "CUDAGraph": _Graph,
    "graph": _graph,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: _Stream(),
    "synchronize": _Device.synchronize,
    "_sleep": lambda cycles: time.sleep(cycles * 1e-12) if isinstance(cycles, int) else None,
    "is_available": lambda: True,
    "get_device_properties": lambda device: _PROPERTIES,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_allocated": lambda device=None: 2**30,
}


def _small(case: shapes.Case) -> shapes.Case:
    return case.reduced().with_batch(1)


def pytest_configure(config: pytest.Config) -> None:
    for name, function in _FUNCTIONS.items():
        setattr(torch.cuda, name, function)
    torch.compile = _compile
    _OnCpu().__enter__()
    torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Of a network's steps, too few for a figure."""
    for item in session.items:
        if hasattr(item.module, "STEPS"):
            item.module.STEPS = 1


named = shapes.case_named
shapes.case_named = suites.case_named = lambda name, batch=None: _small(named(name, batch))
suites.SUITES["gpu"] = dataclasses.replace(suites.SUITES["gpu"], dropout_elements=(2**20,))
machine._MATMUL_SIZE["cuda"], machine._COPY_BYTES["cuda"] = 64, 2**20
gpu._FLUSH_BYTES, gpu._CALIBRATION_CYCLES = 2**20, 10**9
timing.MIN_ROUNDS = timing.MAX_ROUNDS = 2
timing.MAX_CALLS = 1
