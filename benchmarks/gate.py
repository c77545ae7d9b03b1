"""The regression gate: speed-ups over the best peer beside those of a committed result, benchmark by benchmark.

Ratios are compared, never times. A benchmark has regressed where even the upper end of its new 95 % interval lies
below (1 - margin) times the committed median.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.comparison import Comparison, comparisons

DEFAULT_MARGIN = 0.15
SUITE = "quick"


@dataclasses.dataclass(frozen=True)
class Row:
    """One benchmark's speed-up as committed and as measured now; None on the side that lacks it.

    Attributes:
        bound: the least that the new interval may reach.
    """

    name: str
    committed: Comparison | None
    new: Comparison | None
    bound: float

    @property
    def verdict(self) -> str:
        if self.new is None:
            return "not measured"
        if self.committed is None:
            return "not committed"
        return "REGRESSED" if self.new.high < self.bound else "ok"


def find_baseline(folder: Path, cpu: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The committed result of the quick suite on the CPU: one of the CPU model `cpu` if there is one, of these the
    newest.

    ResultError if the folder holds none.
    """
    found = [(path, results.load(path)) for path in sorted(folder.glob("*.json"))]
    found = [entry for entry in found if (entry[1]["suite"], entry[1]["device"]) == (SUITE, "cpu")]
    if not found:
        raise results.ResultError(
            f"{folder} holds no result of the suite {SUITE!r} to compare with; "
            f"`python -m benchmarks run --suite {SUITE} --json FILE` writes one"
        )
    return max(found, key=lambda entry: (entry[1]["machine_info"]["cpu"] == cpu, entry[1]["datetime"]))


def compare(baseline: dict[str, Any], result: dict[str, Any], margin: float) -> list[Row]:
    """A row for every benchmark of either result, those that fell most first, then those that one side lacks.

    ResultError if they are of different devices or have none in common.
    """
    if baseline["device"] != result["device"]:
        raise results.ResultError(
            f"a result on {result['device']} cannot be compared with one on {baseline['device']}"
        )
    committed = {comparison.name: comparison for comparison in comparisons(baseline)}
    new = {comparison.name: comparison for comparison in comparisons(result)}
    if not committed.keys() & new.keys():
        raise results.ResultError("the result and the committed one have no benchmark in common")
    rows = []
    for name in committed.keys() | new.keys():
        bound = (1 - margin) * committed[name].ratio if name in committed else 0.0
        rows.append(Row(name, committed.get(name), new.get(name), bound))

    def fall(row: Row) -> tuple[float, str]:
        both = row.committed is not None and row.new is not None
        return (row.new.ratio / row.committed.ratio if both else float("inf")), row.name

    return sorted(rows, key=fall)


def has_regressed(rows: list[Row]) -> bool:
    return any(row.verdict == "REGRESSED" for row in rows)


def format_report(rows: list[Row], baseline: dict[str, Any], result: dict[str, Any], margin: float) -> str:
    """The rows as a table, what the machines differ in, and a last line that says how it ended."""
    return "\n".join([*_differences(baseline, result), *_table(rows), *_conclusion(rows, margin)])


def _differences(baseline: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    before, now = baseline["machine_info"], result["machine_info"]
    for what, key in (("CPU", "cpu"), ("number of cores", "cores"), ("PyTorch", "torch")):
        if before[key] != now[key]:
            yield f"another {what} than the committed result's: {now[key]}, not {before[key]}"


def _table(rows: list[Row]) -> list[str]:
    lines = [("verdict", "committed", "now (95 % interval)", "bound", "benchmark")]
    for row in rows:
        now = "" if row.new is None else f"{row.new.ratio:.2f}x ({row.new.low:.2f} to {row.new.high:.2f})"
        committed = "" if row.committed is None else f"{row.committed.ratio:.2f}x"
        bound = "" if row.committed is None else f"{row.bound:.2f}x"
        lines.append((row.verdict, committed, now, bound, row.name))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _conclusion(rows: list[Row], margin: float) -> Iterator[str]:
    verdicts = [row.verdict for row in rows]
    for verdict, text in (("not measured", "committed but not measured now"), ("not committed", "not committed yet")):
        if verdict in verdicts:
            yield f"{verdicts.count(verdict)} {text}, so not compared"
    fallen, compared = verdicts.count("REGRESSED"), verdicts.count("REGRESSED") + verdicts.count("ok")
    yield f"{fallen} of {compared} speed-ups are more than {100 * margin:g} % below the committed ones"
