"""The time of a suite that must end by itself: who may still compile, and what is left out for want of time."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

SECONDS_OF_A_BENCHMARK = 4.0
"""Expected without compilation: data, the exact answer, checks, rounds."""
SECONDS_TO_AUTOTUNE = 20.0
"""Expected of a benchmark's peers in torch.compile's mode max-autotune, beyond the above."""


class OutOfTime(BaseException):
    """Raised inside what takes too long. Not an Exception, which a compiler may catch to try something else."""


class TimeLeft:
    """What one benchmark may spend.

    Args:
        deadline: time.time() at which the suite must have ended; None for no limit.
        later: number of benchmarks that come after this one.
        later_autotuned: number of these that want a peer in the mode max-autotune.
    """

    def __init__(self, deadline: float | None = None, later: int = 0, later_autotuned: int = 0) -> None:
        self._deadline = deadline
        self._later_seconds = later * SECONDS_OF_A_BENCHMARK
        self._later_autotune_seconds = later_autotuned * SECONDS_TO_AUTOTUNE

    def seconds(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self._deadline is None else self._deadline - time.time()

    def is_over(self) -> bool:
        left = self.seconds()
        return left is not None and left < SECONDS_OF_A_BENCHMARK

    def for_compiling(self, mode: str) -> float | None:
        """Seconds for a compiled peer of `mode`, so that later benchmarks get theirs; None for no limit.

        The goals name max-autotune, so the default mode gets only what that leaves.
        """
        left = self.seconds()
        if left is None:
            return None
        reserved = self._later_seconds + (0.0 if mode == "max-autotune" else self._later_autotune_seconds)
        return left - reserved - SECONDS_OF_A_BENCHMARK


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`; None for no limit. Only signals reach into a compiler, and they
    reach the main thread alone: elsewhere there is no limit."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
