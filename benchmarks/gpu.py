"""What timing on a GPU needs: a queue that stays full, a flushed cache, captured graphs.

A GPU runs behind the host, which only enqueues work. A time between two events is the work's own only where the
queue never runs empty between them; so a kernel that spins goes first, for as long as the host takes to enqueue
the rest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FLUSH_BYTES = 256 * 2**20
"""Overwritten to flush the L2 cache: several times the largest (126 MB on a B200, 50 MB on an H100)."""
_MAX_FLUSHED_CALLS = 10
"""A flush may take longer than the call that follows it."""
_SPIN_MARGIN = 1.5
_MAX_SPIN_SECONDS = 0.02
"""A call that waits for the GPU itself seems to take long to enqueue; holding the queue cannot help it."""
_CALIBRATION_CYCLES = 20_000_000
_WARM_UP_CALLS = 3
"""Before a capture: cuDNN chooses its algorithms in the first, and autograd's threads start."""

Pair = tuple[torch.cuda.Event, torch.cuda.Event]


def block_seconds(
    run: Callable[[], object], prepare: Callable[[], object] | None, calls: int, warm_up: bool
) -> tuple[float, float]:
    """Seconds per call with a warm and with a flushed L2 cache, by events.

    Args:
        prepare: what must precede each call, untimed; None for nothing.
        warm_up: whether a call that is not timed goes first.
    """
    begin = time.perf_counter()
    if warm_up:
        _prepare(prepare)
        run()
    enqueue_seconds = time.perf_counter() - begin

    _hold_queue(calls * enqueue_seconds)
    if prepare is None:
        warm = [_between_events(run, calls)]
    else:
        warm = []
        for _ in range(calls):
            prepare()
            warm.append(_between_events(run))

    flushed = []
    flushed_calls = min(calls, _MAX_FLUSHED_CALLS)
    _hold_queue(flushed_calls * enqueue_seconds)
    for _ in range(flushed_calls):
        _prepare(prepare)
        _flush_buffer().zero_()
        flushed.append(_between_events(run))
    torch.cuda.synchronize()
    return _seconds(warm) / calls, _seconds(flushed) / flushed_calls


def _prepare(prepare: Callable[[], object] | None) -> None:
    if prepare is not None:
        prepare()


def _between_events(run: Callable[[], object], calls: int = 1) -> Pair:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()  # its result is freed at once: kept ones would make the allocator ask the driver for more
    stop.record()
    return start, stop


def _seconds(pairs: list[Pair]) -> float:
    return sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3


def _hold_queue(seconds: float) -> None:
    """Keep the GPU busy while the host enqueues what takes it about `seconds`."""
    torch.cuda._sleep(int(min(_SPIN_MARGIN * seconds, _MAX_SPIN_SECONDS) * _cycles_per_second()))


@functools.cache
def _cycles_per_second() -> float:
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # brings the clock up
    pair = _between_events(lambda: torch.cuda._sleep(_CALIBRATION_CYCLES))
    torch.cuda.synchronize()
    return _CALIBRATION_CYCLES / _seconds([pair])


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


class Captured:
    """A function without arguments as the replay of a CUDA graph, captured at its first call.

    Every call gives the same objects, into whose memory the replay has written.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self) -> Any:
        if self._graph is None:
            self.capture()
        self._graph.replay()
        return self._result

    def capture(self) -> None:
        """Capture now; the calls that precede a capture run, with all that they change."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                self._function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._function()
        self._graph = graph


def is_usable() -> bool:
    """Whether the GPU still works: after a kernel's illegal access every call of the process fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
