"""Interleaved timing: every candidate once per round, round after round, and the ratios within a round.

A machine that is shared changes its speed from second to second, so an absolute time is context and a ratio
of two times taken milliseconds apart is evidence. In every round each peer runs once and then ours; a ratio
is formed inside each round, and the figure reported is the median of those ratios with its deciles and a 95 %
interval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

Role = Literal["ours", "peer", "bound"]
"""ours: pyconv; peer: a competitor, one of which is the best; bound: context, such as a copy or a no-op."""

MIN_BLOCK_SECONDS = 2e-3
"""A timed block repeats a short call until the fastest candidate fills this, far above the clock's noise."""
MAX_BLOCK_SECONDS = 0.25
MAX_CALLS = 2000
MIN_ROUNDS = 7
"""Below six rounds no 95 % order-statistics interval of a median exists."""
MAX_ROUNDS = 61


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of the work to be timed.

    Attributes:
        run: the work; timed.
        prepare: what must precede each call, untimed (the forward before a timed backward); None for nothing.
        grad: whether autograd records.
        threads: the number of threads it runs on.
        layout: memory format of its data, for the report.
        check: raises if the answer is wrong; called once before timing.
        warm_up: whether every block starts with a call that is not timed.
    """

    name: str
    role: Role
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    grad: bool = False
    threads: int = 1
    layout: str = ""
    check: Callable[[], None] | None = None
    warm_up: bool = True


@dataclasses.dataclass(frozen=True)
class Summary:
    """A sample: median, 10th and 90th percentile, and [low, high], the median's 95 % interval."""

    median: float
    p10: float
    p90: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Summary:
        if not sample:
            raise ValueError("a summary needs at least one value, but the sample is empty")
        ordered = sorted(sample)
        rank = _interval_rank(len(ordered))
        p10, p90 = _quantile(ordered, 0.1), _quantile(ordered, 0.9)
        return cls(statistics.median(ordered), p10, p90, ordered[rank], ordered[-1 - rank])

    def as_dict(self, digits: int = 6) -> dict[str, float]:
        return {key: float(f"{value:.{digits}g}") for key, value in dataclasses.asdict(self).items()}


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _interval_rank(n: int, confidence: float = 0.95) -> int:
    """The largest 0-based rank r such that [x(r), x(n-1-r)] covers the median with at least `confidence`.

    The number of values below the median is binomial(n, 1/2) whatever the distribution. 0 (the whole range)
    where the sample is too small for any interval of that confidence.
    """
    tail = 0.0
    rank = -1
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        rank = k
    return max(rank, 0)


class Timer:
    """Times blocks of calls on one device: by CUDA events on a GPU, by the monotonic clock elsewhere."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def block(self, candidate: Candidate, calls: int) -> float:
        """Seconds per call over `calls` calls, after one that is not timed if the candidate warms up.

        The untimed call brings code, weights and the worker threads back after another candidate's turn: what
        is reported is the time with a warm cache, for every candidate alike.
        """
        if candidate.threads != torch.get_num_threads():
            torch.set_num_threads(candidate.threads)
        with torch.set_grad_enabled(candidate.grad):
            if candidate.warm_up:
                if candidate.prepare:
                    candidate.prepare()
                candidate.run()
                self.synchronize()
            if self.device.type == "cuda":
                return self._cuda_block(candidate, calls)
            return self._cpu_block(candidate, calls)

    @staticmethod
    def _cpu_block(candidate: Candidate, calls: int) -> float:
        run, prepare, clock = candidate.run, candidate.prepare, time.perf_counter
        if prepare is None:
            start = clock()
            for _ in range(calls):
                run()
            return (clock() - start) / calls
        total = 0.0
        for _ in range(calls):
            prepare()
            start = clock()
            run()
            total += clock() - start
        return total / calls

    def _cuda_block(self, candidate: Candidate, calls: int) -> float:
        run, prepare = candidate.run, candidate.prepare
        pairs = 1 if prepare is None else calls
        starts, stops = ([torch.cuda.Event(enable_timing=True) for _ in range(pairs)] for _ in range(2))
        if prepare is None:
            starts[0].record()
            for _ in range(calls):
                run()
            stops[0].record()
        else:
            for start, stop in zip(starts, stops, strict=True):
                prepare()
                start.record()
                run()
                stop.record()
        self.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True)) / 1e3 / calls


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds per call of every candidate, one entry per round and candidate."""

    candidates: Sequence[Candidate]
    seconds: dict[str, list[float]]
    calls: int

    def _with_role(self, role: Role) -> list[str]:
        return [c.name for c in self.candidates if c.role == role]

    @property
    def ours(self) -> str:
        """The headline: the first candidate of ours. Further ones are reported beside it."""
        return self._with_role("ours")[0]

    @property
    def best_peer(self) -> str | None:
        """The peer with the smallest median, None without peers."""
        peers = self._with_role("peer")
        return min(peers, key=lambda name: statistics.median(self.seconds[name])) if peers else None

    def ratio(self, numerator: str, denominator: str) -> Summary:
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return Summary.of([a / b for a, b in pairs])

    def difference(self, minuend: str, subtrahend: str) -> Summary:
        pairs = zip(self.seconds[minuend], self.seconds[subtrahend], strict=True)
        return Summary.of([a - b for a, b in pairs])

    def report(self) -> dict[str, Any]:
        """What goes into the benchmark's extra_info; times in seconds per call, ratios over 1 where ours is
        faster.

        Against a bound the difference counts too: what ours costs beyond a copy, a no-op, an import of torch
            alone.
        """
        implementations: dict[str, Any] = {}
        for candidate in self.candidates:
            name = candidate.name
            entry: dict[str, Any] = {
                "role": candidate.role,
                "layout": candidate.layout,
                "threads": candidate.threads,
                "seconds": Summary.of(self.seconds[name]).as_dict(),
            }
            if candidate.role != "ours":
                entry["ratio_to_ours"] = self.ratio(name, self.ours).as_dict()
                if candidate.role == "bound":
                    entry["ours_minus_this_seconds"] = self.difference(self.ours, name).as_dict()
            elif self.best_peer is not None:
                entry["speedup_over_best_peer"] = self.ratio(self.best_peer, name).as_dict()
            implementations[name] = entry
        return {
            "ours": self.ours,
            "best_peer": self.best_peer,
            "rounds": len(self.seconds[self.ours]),
            "calls_per_round": self.calls,
            "implementations": implementations,
        }


def run_rounds(
    benchmark: Any,
    candidates: Sequence[Candidate],
    *,
    device: torch.device | str = "cpu",
    budget_seconds: float = 2.0,
) -> Samples:
    """Check every candidate, then time them in interleaved rounds held by the pytest-benchmark fixture
    `benchmark`.

    The plugin times our block; its `setup` runs, outside that time, every other candidate once. The order of
    the others rotates from round to round, so that none always follows the same neighbour.
    """
    ours = next(c for c in candidates if c.role == "ours")
    others = [c for c in candidates if c is not ours]
    timer = Timer(device)
    for candidate in candidates:
        _check(candidate)
    calls, rounds = _calibrate(timer, candidates, budget_seconds)
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}

    def run_and_time_every_peer_once() -> None:
        first = len(seconds[ours.name]) % len(others) if others else 0
        for candidate in others[first:] + others[:first]:
            seconds[candidate.name].append(timer.block(candidate, calls))

    def run_ours() -> None:
        seconds[ours.name].append(timer.block(ours, calls))

    with _restored_threads(), _without_garbage_collection():
        benchmark.pedantic(run_ours, setup=run_and_time_every_peer_once, rounds=rounds, iterations=1)
    return Samples(candidates, seconds, calls)


def _check(candidate: Candidate) -> None:
    if candidate.check is None:
        return
    torch.set_num_threads(candidate.threads)
    with torch.set_grad_enabled(candidate.grad):
        try:
            candidate.check()
        except AssertionError as error:
            raise AssertionError(
                f"{candidate.name} gives a wrong answer, so it is not timed: {error}"
            ) from None


def _calibrate(timer: Timer, candidates: Sequence[Candidate], budget_seconds: float) -> tuple[int, int]:
    """(calls per block, rounds): blocks long enough to measure, as many rounds as the budget holds."""
    for candidate in candidates:
        if candidate.warm_up:
            timer.block(candidate, 1)
    per_call = [timer.block(candidate, 1) for candidate in candidates]
    calls = min(math.ceil(MIN_BLOCK_SECONDS / min(per_call)), MAX_CALLS)
    calls = max(1, min(calls, math.floor(MAX_BLOCK_SECONDS / max(per_call))))
    # Where there is a prepare(), it takes about as long as run().
    per_round = sum(
        (calls + candidate.warm_up) * seconds * (1 if candidate.prepare is None else 2)
        for candidate, seconds in zip(candidates, per_call, strict=True)
    )
    return calls, max(MIN_ROUNDS, min(MAX_ROUNDS, round(budget_seconds / per_round)))


@contextlib.contextmanager
def _restored_threads():
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _without_garbage_collection():
    """A collection in the middle of one candidate's block would be charged to it alone."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
