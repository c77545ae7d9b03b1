"""The performance goals as data, and what a result file says about each of them.

Every goal has metrics; a metric picks benchmarks of the result, takes one figure from each, and reports the
worst of them, with the benchmark it came from. Ratios are against the best peer of the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

Benchmark = dict[str, Any]
Info = dict[str, Any]
"""The extra_info of a benchmark."""
Figures = tuple[float, float, float]
"""The figure, and the ends of its 95 % interval (or the figure itself where it has none)."""
Select = Callable[[Info], bool]

NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of a goal, which should be large.

    Attributes:
        what: names the figure.
        select: whether a benchmark takes part.
        figure: the figure of a benchmark that does; None if it has none, for want of such a peer.
        goal, stretch: its bounds; stretch None where there is none.
        unit: printed after the figure.
        lower_end: whether the lower end of the interval is what counts, not the figure.
    """

    what: str
    select: Select
    figure: Callable[[Info], Figures | None]
    _: dataclasses.KW_ONLY
    goal: float
    stretch: float | None = None
    unit: str = "x"
    lower_end: bool = False

    sign: ClassVar[str] = ">="

    def counts(self, figures: Figures) -> float:
        """The number that is held against the bounds."""
        return figures[1] if self.lower_end else figures[0]

    def reaches(self, figures: Figures, bound: float | None) -> bool:
        return bound is not None and self.counts(figures) >= bound

    def worst(self, found: Sequence[tuple[Figures, str]]) -> tuple[Figures, str]:
        return min(found, key=lambda entry: self.counts(entry[0]))


@dataclasses.dataclass(frozen=True)
class AtMost(Metric):
    """A figure that should be small."""

    sign: ClassVar[str] = "<="

    def reaches(self, figures: Figures, bound: float | None) -> bool:
        return bound is not None and self.counts(figures) <= bound

    def worst(self, found: Sequence[tuple[Figures, str]]) -> tuple[Figures, str]:
        return max(found, key=lambda entry: self.counts(entry[0]))


class Goal:
    """A goal and its metrics; `device` is "cpu", "cuda" or "any"."""

    def __init__(self, id: str, device: str, what: str, *metrics: Metric) -> None:
        self.id, self.device, self.what, self.metrics = id, device, what, metrics


@dataclasses.dataclass(frozen=True)
class Row:
    """A metric and its worst benchmark; `figures` is None where nothing of the result bears on it."""

    goal: Goal
    metric: Metric
    figures: Figures | None
    where: str
    count: int

    @property
    def verdict(self) -> str:
        if self.figures is None:
            return NOT_MEASURED
        if self.metric.reaches(self.figures, self.metric.stretch):
            return "stretch met"
        return "met" if self.metric.reaches(self.figures, self.metric.goal) else "MISSED"

    @property
    def verdict_text(self) -> str:
        """The verdict, and whether the interval allows the other one."""
        if self.figures is None or self.metric.lower_end:
            return self.verdict
        bound = self.metric.stretch if self.verdict == "stretch met" else self.metric.goal
        _, low, high = self.figures
        return f"{self.verdict}, within noise" if low < bound <= high else self.verdict


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def _interval(summary: dict[str, float]) -> Figures:
    return summary["median"], summary["low"], summary["high"]


def _worse(entry: dict[str, Any], key: str) -> Figures | None:
    """A summary of an implementation that should be large; on a GPU the smaller of those with a warm and with a
    flushed cache."""
    found = [place[key] for place in (entry, entry.get("flushed_l2", {})) if key in place]
    return min(map(_interval, found), default=None)


def over_best_peer(info: Info) -> Figures | None:
    """The speed-up of ours over the best peer."""
    return _worse(info["implementations"][info["ours"]], "speedup_over_best_peer")


def over_best_of(prefix: str, without: str = "\0") -> Callable[[Info], Figures | None]:
    """The speed-up over the best peer whose name starts with `prefix` and does not contain `without`."""

    def figure(info: Info) -> Figures | None:
        ratios = [
            _worse(entry, "ratio_to_ours")
            for name, entry in info["implementations"].items()
            if entry["role"] == "peer" and name.startswith(prefix) and without not in name
        ]
        return min(ratios, default=None)

    return figure


def fraction_of_peak(info: Info) -> Figures:
    """Dense-equivalent FLOP/s of ours over the FMA peak, in percent; the interval is that of the deciles."""
    entry = info["implementations"][info["ours"]]
    percent, seconds = 100 * entry["fraction_of_peak"], entry["seconds"]
    return percent, percent * seconds["median"] / seconds["p90"], percent * seconds["median"] / seconds["p10"]


def multiple_of_peak(info: Info) -> Figures:
    percent, low, high = fraction_of_peak(info)
    return percent / 100, low / 100, high / 100


def over_bound(name: str) -> Callable[[Info], Figures]:
    """Time of ours over that of a bound."""

    def figure(info: Info) -> Figures:
        median, low, high = _interval(info["implementations"][name]["ratio_to_ours"])
        return 1 / median, 1 / high, 1 / low

    return figure


def percent_of_bound(name: str) -> Callable[[Info], Figures]:
    """Bytes per second of ours, the least it has to move, as a percentage of the bound's."""

    def figure(info: Info) -> Figures:
        median, low, high = _worse(info["implementations"][name], "ratio_to_ours")
        percent = 100 * info["bytes_over_bound"]
        return percent * median, percent * low, percent * high

    return figure


def microseconds_beyond(name: str) -> Callable[[Info], Figures]:
    """Time of ours minus that of a bound."""

    def figure(info: Info) -> Figures:
        median, low, high = _interval(info["implementations"][name]["ours_minus_this_seconds"])
        return 1e6 * median, 1e6 * low, 1e6 * high

    return figure


def percent_same_bits(info: Info) -> Figures:
    percent = 100.0 if info["same_bits"] else 0.0
    return percent, percent, percent


def our_worst_value(info: Info) -> Figures:
    worst = max(entry["value"] for entry in info["values"].values() if entry["role"] == "ours")
    return worst, worst, worst


def our_value_over_best_eager(info: Info) -> Figures | None:
    eager = [e["value"] for name, e in info["values"].items() if e["role"] == "peer" and "eager" in name]
    if not eager or min(eager) == 0:
        return None
    ratio = our_worst_value(info)[0] / min(eager)
    return ratio, ratio, ratio


# ------------------------------------------------------------------------------------------------------------
# Selections
# ------------------------------------------------------------------------------------------------------------


def cells(kind: str, **wanted: Any) -> Select:
    """Benchmarks of `kind` whose facts have the given values, or one of them where a tuple is given."""

    def select(info: Info) -> bool:
        return info["kind"] == kind and all(
            info.get(key) in value if isinstance(value, tuple) else info.get(key) == value
            for key, value in wanted.items()
        )

    return select


def layer(
    shape: str | tuple[str, ...], *, phase: str = "full", precision: Any = "float32", **wanted: Any
) -> Select:
    return cells("conv_max_pool2d", shape=shape, phase=phase, precision=precision, **wanted)


def _forward(shape: str, batch: int) -> Select:
    return layer(shape, phase="forward_inference", batch=batch)


def _gradients(shape: str, batch: int) -> Select:
    return layer(shape, phase=("backward_no_input_grad", "backward_only_input_grad"), batch=batch)


def _step(experiment: int) -> Select:
    return cells("network3_step", shape=f"experiment {experiment}", batch=10)


def _dropout(kind: str | tuple[str, ...], phase: str | tuple[str, ...]) -> Select:
    """Tensors of at least 2^20 elements, where the work and not the call is what costs."""
    kinds = (kind,) if isinstance(kind, str) else kind
    phases = (phase,) if isinstance(phase, str) else phase

    def select(info: Info) -> bool:
        return info["kind"] in kinds and info["phase"] in phases and info["elements"] >= 2**20

    return select


def _saved_by_layers(info: Info) -> bool:
    return info["kind"] == "saved_bytes" and info["shape"] != "dropout"


def _in_no_suite(info: Info) -> bool:
    """For goals that take whole trainings: the table says "not measured", for it must not leave them out."""
    return False


_GRAPH = "CUDA graph"
_AUTOTUNE = "torch.compile max-autotune"
_LARGE_LAYERS = ("KSH2", "KSH5", "CIFAR64", "VGG")
_SPEEDRUN = ("speedrun-1", "speedrun-2", "speedrun-3")
_SHORT = ("float16", "bfloat16")
_bfloat16 = cells("conv_max_pool2d", precision="bfloat16", phase="full")
_full_dropout, _full_relu_dropout = _dropout("dropout", "full"), _dropout("relu_dropout", "full")
_one_way_dropout = _dropout(("dropout", "relu_dropout"), ("forward", "backward"))
_wide_weight_gradient = layer(_SPEEDRUN[1:], phase="backward_no_input_grad", precision=_SHORT)


def _ksh1(what: str, phase: str, precision: str, eager: float, autotuned: float) -> tuple[Metric, Metric]:
    select = layer("KSH1", phase=phase, precision=precision, batch=128)
    return (
        Metric(f"{what}, {precision}: eager", select, over_best_of("torch eager", _GRAPH), goal=eager),
        Metric(f"{what}, {precision}: max-autotune", select, over_best_of(_AUTOTUNE), goal=autotuned),
    )


GOALS = (
    Goal(
        "C1",
        "cpu",
        "L1+L2 stack, forward + backward, N = 10",
        *(
            metric
            for what, phase in (("", "full"), (", without L1's input gradient", "full_no_input_grad"))
            for metric in (
                Metric(f"against the best peer{what}", cells("stack", phase=phase), over_best_peer, goal=4, stretch=6),
                Metric(
                    f"against eager NCHW{what}",
                    cells("stack", phase=phase),
                    over_best_of("torch eager NCHW"),
                    goal=6,
                    stretch=10,
                ),
            )
        ),
    ),
    Goal(
        "C2",
        "cpu",
        "forward, fraction of the FMA peak, N = 10",
        Metric("L2", _forward("L2", 10), fraction_of_peak, goal=75, stretch=85, unit="%"),
        Metric("L1", _forward("L1", 10), fraction_of_peak, goal=55, stretch=70, unit="%"),
    ),
    Goal(
        "C3",
        "cpu",
        "L2 weight and input gradient, N = 10, dense-equivalent FLOPs over the FMA peak",
        Metric("each gradient", _gradients("L2", 10), multiple_of_peak, goal=1.5, stretch=2.5),
    ),
    Goal(
        "C4",
        "cpu",
        "large layers, forward + backward",
        Metric("KSH1 with input gradient", layer("KSH1"), over_best_peer, goal=3),
        Metric("KSH1 without", layer("KSH1", phase="full_no_input_grad"), over_best_peer, goal=1.5),
        Metric("KSH2, KSH5, CIFAR64, VGG", layer(_LARGE_LAYERS), over_best_peer, goal=1.4, stretch=1.7),
    ),
    Goal(
        "C5",
        "cpu",
        "never below the best peer, lower end of the 95 % interval, committed list",
        Metric(
            "worst cell", cells("conv_max_pool2d"), over_best_peer, goal=0.95, stretch=1.1, lower_end=True
        ),
    ),
    Goal(
        "C6",
        "cpu",
        "fixed overhead: 1x1x5x5 forward + backward beyond a no-op operator",
        AtMost(
            "difference",
            cells("overhead", phase="full"),
            microseconds_beyond("no-op operator"),
            goal=20,
            stretch=10,
            unit=" us",
        ),
    ),
    Goal(
        "C7",
        "cpu",
        "dropout and relu + dropout, forward + backward, from 2^20 elements",
        Metric("dropout against the best peer", _full_dropout, over_best_peer, goal=20, stretch=60),
        AtMost("dropout's time over a copy's", _full_dropout, over_bound("two copies"), goal=2),
        Metric(
            "relu + dropout against the best peer", _full_relu_dropout, over_best_peer, goal=20, stretch=60
        ),
        AtMost("relu + dropout's time over a copy's", _full_relu_dropout, over_bound("two copies"), goal=2),
    ),
    Goal(
        "C8",
        "cpu",
        "two threads over one, N >= 10",
        Metric("speed-up", cells("scaling"), over_best_peer, goal=1.8),
        Metric("same bits", cells("scaling"), percent_same_bits, goal=100, unit="%"),
    ),
    Goal(
        "C9",
        "cpu",
        "whole training step, N = 10",
        Metric("experiment 6", _step(6), over_best_peer, goal=5, stretch=8),
        Metric("experiment 10", _step(10), over_best_peer, goal=4, stretch=5),
    ),
    Goal(
        "C10",
        "cpu",
        "bfloat16, forward + backward, against the best bfloat16 peer",
        Metric("worst cell", _bfloat16, over_best_peer, goal=1.5, stretch=2),
    ),
    Goal(
        "C11",
        "cpu",
        "fixed recipe, five seeds, mean MNIST test accuracy >= 99.60 %, against the best peer's time",
        Metric("time", _in_no_suite, over_best_peer, goal=4, stretch=6),
    ),
    Goal(
        "M1",
        "any",
        "bytes saved for the backward per pooled element beyond x, w, y",
        AtMost("worst shape", _saved_by_layers, our_worst_value, goal=1, unit=" B"),
    ),
    Goal(
        "M2",
        "any",
        "peak memory of a KSH1 N = 128 block above x, w, b and their gradients",
        AtMost("fraction of the best eager's", cells("peak_memory"), our_value_over_best_eager, goal=0.25),
    ),
    Goal(
        "M3",
        "any",
        "bytes that dropout saves per element",
        AtMost("p = 0.5", cells("saved_bytes", shape="dropout"), our_worst_value, goal=0, unit=" B"),
    ),
    Goal(
        "G1",
        "cuda",
        "KSH1, N = 128, against the best of, same TF32 setting on both sides",
        *(
            metric
            for precision in ("tf32", "float32")
            for metrics in (
                _ksh1("forward", "forward_inference", precision, 3, 1.5),
                _ksh1("full", "full", precision, 2.5, 1.5),
                _ksh1("full without dX", "full_no_input_grad", precision, 2.5, 1.5),
            )
            for metric in metrics
        ),
    ),
    Goal(
        "G2",
        "cuda",
        "CIFAR speed-run layers, float16, N = 2000, full",
        *(
            Metric(
                f"{shape} against max-autotune",
                layer(shape, precision="float16"),
                over_best_of(_AUTOTUNE),
                goal=1.3,
                stretch=1.6,
            )
            for shape in _SPEEDRUN
        ),
    ),
    Goal(
        "G3",
        "cuda",
        "experiment 6's training step, N = 10; five-net ensemble of experiment 11",
        Metric("step against eager", _step(6), over_best_of("torch eager", _GRAPH), goal=8),
        Metric("step against graph-captured eager", _step(6), over_best_of(f"torch eager {_GRAPH}"), goal=3),
        AtMost("ensemble", _in_no_suite, our_worst_value, goal=5, stretch=1, unit=" min"),
    ),
    Goal(
        "G4",
        "cuda",
        "dropout, rate over that of a copy of the same tensor",
        *(
            Metric(f"{what} {phase}", _dropout(kind, phase), percent_of_bound("copy"), goal=85, unit="%")
            for what, kind in (("dropout", "dropout"), ("relu + dropout", "relu_dropout"))
            for phase in ("forward", "backward")
        ),
        Metric("each against torch's best", _one_way_dropout, over_best_peer, goal=1),
    ),
    Goal(
        "G5",
        "cuda",
        "weight gradient on sparse tensor cores, C, K >= 64, against cuDNN's dense one (research)",
        Metric("weight gradient", _wide_weight_gradient, over_best_of("torch eager"), goal=1.3),
    ),
)


def evaluate(result: dict[str, Any]) -> Iterator[Row]:
    """A row for every metric of the goals of the result's device."""
    for goal in GOALS:
        if goal.device not in ("any", result["device"]):
            continue
        for metric in goal.metrics:
            yield _row(goal, metric, result["benchmarks"])


def _row(goal: Goal, metric: Metric, benchmarks: Sequence[Benchmark]) -> Row:
    found = [
        (figures, benchmark["name"])
        for benchmark in benchmarks
        if metric.select(benchmark["extra_info"])
        and (figures := metric.figure(benchmark["extra_info"])) is not None
    ]
    if not found:
        return Row(goal, metric, None, "", 0)
    figures, where = metric.worst(found)
    return Row(goal, metric, figures, where, len(found))


def format_table(result: dict[str, Any]) -> str:
    """The goal table as text: under each goal its metrics, each with the worst figure and where it was."""
    rows = list(evaluate(result))
    columns = [("", "goal", "stretch", "measured (95 % interval)", "verdict", "worst benchmark")]
    columns += [(f"    {what}", *rest) for what, *rest in map(texts, rows)]
    widths = [max(len(line[i]) for line in columns) for i in range(len(columns[0]))]
    aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in columns]
    lines = [aligned[0]]
    for index, (row, text) in enumerate(zip(rows, aligned[1:], strict=True)):
        if index == 0 or row.goal is not rows[index - 1].goal:
            lines.append(f"{row.goal.id} {row.goal.what}")
        lines.append(text)
    return "\n".join(lines)


def format_runs(results: Sequence[dict[str, Any]]) -> str:
    """The goal table of several runs of a suite on one machine: of each metric's figure in every run, the median and
    the extremes. What is measured in no run, or only in some, is said. One run gives its own table."""
    if len(results) == 1:
        return format_table(results[0])
    devices = {result["device"] for result in results}
    if len(devices) > 1:
        raise ValueError(f"expected runs of one device, but got runs of {' and '.join(sorted(devices))}")
    of_runs = f"median of {len(results)} runs (lowest to highest)"
    suites = {result["suite"] for result in results}
    if len(suites) > 1:
        raise ValueError(f"expected runs of one suite, but got runs of {' and '.join(sorted(suites))}")
    columns = [("", "goal", "stretch", of_runs, "verdict", "worst benchmark")]
    headings = [""]
    for rows in zip(*map(evaluate, results), strict=True):
        row = rows[0]
        found = sorted((row.metric.counts(r.figures), r.where) for r in rows if r.figures is not None)
        name, goal, stretch, measured, verdict, where = texts(row)
        if found:
            values = [value for value, _ in found]
            middle = statistics.median(values)
            unit, runs = row.metric.unit, "" if len(found) == len(results) else f", in {len(found)} runs"
            measured = f"{middle:.3g}{unit} ({values[0]:.3g} to {values[-1]:.3g}{runs})"
            ends = (middle, middle) if row.metric.lower_end else (values[0], values[-1])
            verdict = dataclasses.replace(row, figures=(middle, *ends)).verdict_text
            where = row.metric.worst([((value, value, value), place) for value, place in found])[1]
        columns.append((f"    {name}", goal, stretch, measured, verdict, where))
        headings.append(f"{row.goal.id} {row.goal.what}")
    widths = [max(len(line[i]) for line in columns) for i in range(len(columns[0]))]
    lines = []
    for heading, previous, line in zip(headings, ["", *headings], columns, strict=False):
        if heading != previous:
            lines.append(heading)
        lines.append("  ".join(map(str.ljust, line, widths)).rstrip())
    return "\n".join(lines)


def texts(row: Row) -> tuple[str, ...]:
    """(metric, goal, stretch, measured, verdict, worst benchmark) as in a table; empty where there is none."""
    metric = row.metric
    stretch = "" if metric.stretch is None else f"{metric.stretch:g}{metric.unit}"
    measured, where = "", ""
    if row.figures is not None:
        value, low, high = row.figures
        measured = f"{value:.3g}{metric.unit}" + (f" ({low:.3g} to {high:.3g})" if low != high else "")
        where = row.where if row.count == 1 else f"{row.where}, of {row.count}"
    return (
        metric.what,
        f"{metric.sign} {metric.goal:g}{metric.unit}",
        stretch,
        measured,
        row.verdict_text,
        where,
    )
