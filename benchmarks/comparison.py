"""pyconv beside the best peer, benchmark by benchmark: what the reports show and the gate compares."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from benchmarks import goals

Outcome = Literal["faster", "even", "slower"]
"""By the 95 % interval of the speed-up: above 1, holding 1, below 1. A win and a loss need the same evidence."""

_OWN_PEER = "scaling"
"""The kind of benchmark whose "peer" is pyconv itself, on one thread."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The speed-up of pyconv over the best peer in one benchmark, over 1 where pyconv is faster.

    Attributes:
        ratio: the median; on a GPU of the worse cache, warm or flushed.
        low, high: its 95 % interval.
        info: the benchmark's extra_info.
    """

    name: str
    ratio: float
    low: float
    high: float
    info: dict[str, Any]

    @property
    def outcome(self) -> Outcome:
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "even"


def comparisons(result: dict[str, Any]) -> list[Comparison]:
    """One for each benchmark that has a peer, from the worst ratio to the best."""
    found = []
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if "implementations" not in info or info["kind"] == _OWN_PEER:
            continue
        figures = goals.over_best_peer(info)
        if figures is not None:
            found.append(Comparison(benchmark["name"], *figures, info))
    return sorted(found, key=lambda comparison: (comparison.ratio, comparison.name))


def counts(found: list[Comparison]) -> dict[Outcome, int]:
    outcomes = [comparison.outcome for comparison in found]
    return {outcome: outcomes.count(outcome) for outcome in ("faster", "even", "slower")}


def sentence(found: list[Comparison]) -> str:
    """How many are faster than the best peer, how many slower, and how many cannot be told apart."""
    if not found:
        return "no benchmark has a peer"
    count = counts(found)
    return (
        f"{count['faster']} of {len(found)} cells faster than the best peer, {count['slower']} slower, "
        f"{count['even']} even (the 95 % interval holds 1x)"
    )
