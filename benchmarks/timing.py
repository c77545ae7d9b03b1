"""Interleaved timing: every candidate once per round, round after round, and the ratios within a round.

A machine that is shared changes its speed from second to second, so an absolute time is context and a ratio
of two times taken milliseconds apart is evidence. In every round each peer runs once and then ours; a ratio
is formed inside each round, and the figure reported is the median of those ratios with its deciles and a 95 %
interval. A candidate that fails is left out of the rounds and its error is reported in its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from benchmarks import gpu
from benchmarks.journal import ROUNDS
from benchmarks.limits import OutOfTime, TimeLeft, at_most

Role = Literal["ours", "peer", "bound"]
"""ours: pyconv; peer: a competitor, one of which is the best; bound: context, such as a copy or a no-op."""

MIN_BLOCK_SECONDS = 2e-3
"""A timed block repeats a short call until the fastest candidate fills this, far above the clock's noise."""
MAX_BLOCK_SECONDS = 0.25
MAX_CALLS = 2000
WARM_CALL_SECONDS = 0.05
"""From here on a call is its own warm-up: what it begins with is a thousandth of it."""
MIN_ROUNDS = 7
"""Below six rounds no 95 % order-statistics interval of a median exists."""
MAX_ROUNDS = 61
_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of the work to be timed.

    Attributes:
        run: the work; timed. With `own_account` it returns seconds.
        prepare: what must precede each call, untimed (the forward before a timed backward); None for nothing.
        grad: whether autograd records.
        threads: the number of threads it runs on.
        layout: memory format of its data, for the report.
        check: raises if the answer is wrong; called once before timing.
        warm_up: whether every block starts with a call that is not timed.
        compile_mode: mode of torch.compile, which the first call then takes long for; None if not compiled.
        by_clock: on a GPU, whether the host's part of the work counts too.
        own_account: whether the seconds that count are those that `run` returns, because it does other work besides.
    """

    name: str
    role: Role
    run: Callable[[], Any]
    prepare: Callable[[], object] | None = None
    grad: bool = False
    threads: int = 1
    layout: str = ""
    check: Callable[[], None] | None = None
    warm_up: bool = True
    compile_mode: str | None = None
    by_clock: bool = False
    own_account: bool = False


class GpuLost(RuntimeError):
    """A fault after which no call of the process reaches the GPU any more."""


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


@dataclasses.dataclass(frozen=True)
class Block:
    """Seconds per call: with warm caches, and on a GPU with a flushed L2 cache too."""

    seconds: float
    flushed_seconds: float | None = None


class Timer:
    """Times blocks of calls on one device: by CUDA events on a GPU, by the monotonic clock elsewhere."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def block(self, candidate: Candidate, calls: int) -> Block:
        """Seconds per call over `calls` calls, after one that is not timed if the candidate warms up.

        The untimed call brings code, weights and the worker threads back after another candidate's turn: what
        is reported is the time with a warm cache, for every candidate alike.
        """
        if candidate.threads != torch.get_num_threads():
            torch.set_num_threads(candidate.threads)
        with torch.set_grad_enabled(candidate.grad):
            if self.device == "cuda" and not candidate.by_clock:
                return Block(*gpu.block_seconds(candidate.run, candidate.prepare, calls, candidate.warm_up))
            if candidate.warm_up:
                if candidate.prepare:
                    candidate.prepare()
                candidate.run()
                self.synchronize()
            return Block(self._by_clock(candidate, calls))

    def _by_clock(self, candidate: Candidate, calls: int) -> float:
        run, prepare, clock = candidate.run, candidate.prepare, time.perf_counter
        if candidate.own_account:
            return sum(run() for _ in range(calls)) / calls
        if prepare is None:
            start = clock()
            for _ in range(calls):
                run()
            self.synchronize()
            return (clock() - start) / calls
        total = 0.0
        for _ in range(calls):
            prepare()
            self.synchronize()
            start = clock()
            run()
            self.synchronize()
            total += clock() - start
        return total / calls


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds per call of every candidate, one entry per round and candidate.

    Attributes:
        flushed_seconds: the same with a flushed L2 cache; empty where there is none to flush.
        failed: the candidates that were not timed, and why.
    """

    candidates: Sequence[Candidate]
    seconds: dict[str, list[float]]
    calls: int
    flushed_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def _fastest(self, role: Role) -> str | None:
        names = [c.name for c in self.candidates if c.role == role]
        return min(names, key=lambda name: statistics.median(self.seconds[name]), default=None)

    @property
    def ours(self) -> str:
        """The headline: on the CPU the first candidate of ours, with further ones reported beside it; on a GPU, whose
        users choose the layout for its speed, the fastest."""
        if self.flushed_seconds:
            return self._fastest("ours")
        return next(c.name for c in self.candidates if c.role == "ours")

    @property
    def best_peer(self) -> str | None:
        """The peer with the smallest median, None without peers."""
        return self._fastest("peer")

    def ratio(self, numerator: str, denominator: str) -> Summary:
        return _ratio(self.seconds, numerator, denominator)

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
                **self._figures(self.seconds, candidate),
            }
            if candidate.role == "bound":
                entry["ours_minus_this_seconds"] = self.difference(self.ours, name).as_dict()
            if self.flushed_seconds:
                entry["flushed_l2"] = self._figures(self.flushed_seconds, candidate)
            implementations[name] = entry
        return {
            "ours": self.ours,
            "best_peer": self.best_peer,
            "rounds": len(self.seconds[self.ours]),
            "calls_per_round": self.calls,
            "implementations": implementations,
            "failed": self.failed,
        }

    def _figures(self, seconds: dict[str, list[float]], candidate: Candidate) -> dict[str, Any]:
        name = candidate.name
        figures = {"seconds": Summary.of(seconds[name]).as_dict()}
        if candidate.role != "ours":
            figures["ratio_to_ours"] = _ratio(seconds, name, self.ours).as_dict()
        elif self.best_peer is not None:
            figures["speedup_over_best_peer"] = _ratio(seconds, self.best_peer, name).as_dict()
        return figures


def _ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> Summary:
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return Summary.of([a / b for a, b in pairs])


def run_rounds(
    benchmark: Any,
    candidates: Sequence[Candidate],
    *,
    device: str = "cpu",
    budget_seconds: float = 2.0,
    time_left: TimeLeft | None = None,
    fatal: Mapping[str, str] | None = None,
    trying: Callable[[str], None] = lambda name: None,
) -> Samples:
    """Check every candidate, then time them in interleaved rounds held by the pytest-benchmark fixture
    `benchmark`.

    The plugin times our block; its `setup` runs, outside that time, every other candidate once. The order of
    the others rotates from round to round, so that none always follows the same neighbour.

    Args:
        time_left: bounds what compiled candidates may take; None for no limit.
        fatal: candidates not to be tried, since they ended a process before, and why.
        trying: told each candidate's name before its first call, and ROUNDS before the rounds.

    Raises:
        RuntimeError: every candidate of ours failed; GpuLost: the GPU is lost to this process.
    """
    timer = Timer(device)
    failed = dict(fatal or {})
    time_left = time_left or TimeLeft()
    for candidate in candidates:
        if candidate.name not in failed:
            trying(candidate.name)
            if (reason := _failure(timer, candidate, time_left)) is not None:
                failed[candidate.name] = reason
    candidates = [c for c in candidates if c.name not in failed]
    if all(c.role != "ours" for c in candidates):
        raise RuntimeError(f"nothing of pyconv's could be timed: {_listing(failed)}")
    trying(ROUNDS)
    calls, rounds, warm_up = _calibrate(timer, candidates, budget_seconds)
    if not warm_up:
        candidates = [dataclasses.replace(c, warm_up=False) for c in candidates]
    ours = next(c for c in candidates if c.role == "ours")
    others = [c for c in candidates if c is not ours]
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    flushed_seconds: dict[str, list[float]] = {c.name: [] for c in candidates}

    def time_once(candidate: Candidate) -> None:
        block = timer.block(candidate, calls)
        seconds[candidate.name].append(block.seconds)
        if block.flushed_seconds is not None:
            flushed_seconds[candidate.name].append(block.flushed_seconds)

    def run_and_time_every_peer_once() -> None:
        first = len(seconds[ours.name]) % len(others) if others else 0
        for candidate in others[first:] + others[:first]:
            time_once(candidate)

    def run_ours() -> None:
        time_once(ours)

    with _restored_threads(), _without_garbage_collection():
        benchmark.pedantic(run_ours, setup=run_and_time_every_peer_once, rounds=rounds, iterations=1)
    if not all(flushed_seconds.values()):
        flushed_seconds = {}
    return Samples(candidates, seconds, calls, flushed_seconds, failed)


def _failure(timer: Timer, candidate: Candidate, time_left: TimeLeft) -> str | None:
    """Check the candidate and time it once; why it cannot take part, or None."""
    limit = None
    if candidate.compile_mode is not None:
        limit = time_left.for_compiling(candidate.compile_mode)
        if limit is not None and limit <= 0:
            return "no time left to compile it"
    try:
        with at_most(limit):
            _check(candidate)
            timer.block(candidate, 1)
        return None
    except (Exception, OutOfTime) as error:
        reason = describe(error)
    if timer.device == "cuda":
        gc.collect()
        if not gpu.is_usable():
            raise GpuLost(reason)
        torch.cuda.empty_cache()
    return reason


def describe(error: BaseException) -> str:
    """The error's type and the first lines of its message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}"


def _listing(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failed.items())


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


def _calibrate(timer: Timer, candidates: Sequence[Candidate], budget_seconds: float) -> tuple[int, int, bool]:
    """(calls per block, rounds, whether to warm up): blocks long enough to measure, as many rounds as the budget
    holds."""

    def seconds_of_a_round(calls: int) -> tuple[float, list[float]]:
        start = time.perf_counter()
        per_call = [timer.block(candidate, calls).seconds for candidate in candidates]
        return time.perf_counter() - start, per_call

    per_round, per_call = seconds_of_a_round(1)
    calls = min(math.ceil(MIN_BLOCK_SECONDS / min(per_call)), MAX_CALLS)
    calls = max(1, min(calls, math.floor(MAX_BLOCK_SECONDS / max(per_call))))
    if calls > 1:
        per_round, _ = seconds_of_a_round(calls)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, round(budget_seconds / per_round)))
    return calls, rounds, min(per_call) < WARM_CALL_SECONDS


@contextlib.contextmanager
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A collection in the middle of one candidate's block would be charged to it alone."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
