"""Result files as one HTML page that needs nothing else: tables that sort, bars as inline SVG, losses as plain as wins.

Data flow: result JSON -> `_section` (texts, sort keys and the places of the bars) -> report_page.html (Jinja2, with
report_page.css and report_page.js inside). The page depends on the results alone: no clock, no path, no network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks import goals, results
from benchmarks.comparison import Comparison, comparisons, counts, sentence
from benchmarks.report_terminal import format_seconds, measured_peaks, second_core
from benchmarks.shapes import CASES, Case

FOLDER = Path(__file__).resolve().parent
_SUITE_ORDER = ("full", "all", "quick", "gpu")
_WORST = 3
"""Cells named at the top at least, slower or not."""
_MIB = 2**20

PHASE_NAMES = {
    "forward_inference": "forward, inference",
    "forward_training": "forward, training",
    "backward_no_input_grad": "backward, no dX",
    "backward_only_input_grad": "backward, dX alone",
    "backward_input_grad": "backward",
    "full_no_input_grad": "forward + backward, no dX",
    "full": "forward + backward",
}
_CASES = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class Group:
    """Kinds of benchmarks that share a table; `size` names the fact that says how large a case is."""

    title: str
    kinds: tuple[str, ...]
    text: str
    size: str = "batch"

    @property
    def size_title(self) -> str:
        return {"batch": "N", "elements": "Elements"}[self.size]


GROUPS = (
    Group(
        "The book's network",
        ("stack", "network3_step"),
        "Both convolutional layers one after the other, and whole training steps. dX is the gradient of the input.",
    ),
    Group(
        "KSH's network",
        ("ksh_step",),
        "A training step of the network of Krizhevsky, Sutskever and Hinton: forward, backward and update.",
    ),
    Group(
        "Layers",
        ("conv_max_pool2d",),
        "Convolution, max-pooling, bias and ReLU on N images. dX is the gradient of the input.",
    ),
    Group("Dropout", ("dropout", "relu_dropout"), "Alone, and after ReLU.", size="elements"),
    Group(
        "Augmentation",
        ("random_distortion",),
        "Random distortions of N images of 1x28x28, the random numbers included.",
    ),
    Group("Smallest call", ("overhead",), "An input of 1x1x5x5: what a call costs, whatever it computes."),
)


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


def load_all(paths: Iterable[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(file name without its ending, result) of every file, and of every *.json of a folder, in the page's order.

    ResultError if a file is no result, or where there is none at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise results.ResultError(
                    f"{path} holds no result (*.json); `python -m benchmarks run --json FILE` writes one"
                )
            files += inside
        else:
            files.append(path)
    found = [(path.stem, results.load(path)) for path in files]
    return sorted(found, key=lambda entry: (entry[1]["device"], _suite_rank(entry[1]["suite"]), entry[0]))


def _suite_rank(suite: str) -> int:
    return _SUITE_ORDER.index(suite) if suite in _SUITE_ORDER else len(_SUITE_ORDER)


def render(found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The page, of (name, result) pairs; the same text for the same pairs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(f"result-{index}", name, result) for index, (name, result) in enumerate(found, 1)]
    return environment.get_template("report_page.html").render(sections=sections)


# ------------------------------------------------------------------------------------------------------------
# Bars
# ------------------------------------------------------------------------------------------------------------


class LogAxis:
    """A logarithmic axis from a round number to a round number, with 1 on it and the medians of `found`.

    An interval makes room for itself up to a factor of two around its median; what it has beyond is cut off.
    """

    width = 190
    height = 20
    _margin = 16
    """Left and right, for half a label."""
    _most_ticks = 8
    _room = 2.0

    def __init__(self, found: Iterable[Comparison]) -> None:
        low = high = 1.0
        for c in found:
            low = min(low, max(c.low, c.ratio / self._room))
            high = max(high, min(c.high, c.ratio * self._room))
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = [float(f"{digit}e{exponent}") for exponent in decades for digit in (1, 2, 5)]
        self.low = max((n for n in numbers if n <= low and n < 1), default=0.5)
        self.high = min((n for n in numbers if n >= high and n > 1), default=2.0)
        ticks = [n for n in numbers if self.low <= n <= self.high]
        if len(ticks) > self._most_ticks:
            ticks = [n for n in ticks if math.log10(n).is_integer()]
        self.ticks = [(self.x(n), f"{n:g}x") for n in ticks]
        self.one = self.x(1.0)

    def x(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self._margin + part * (self.width - 2 * self._margin), 1)

    def bar(self, comparison: Comparison) -> dict[str, Any]:
        """Where the bar from 1x to the median begins, how wide it is, the interval's line, and its ends on the axis."""
        start, end = sorted((self.one, self.x(comparison.ratio)))
        ends = [self.x(value) for value in (comparison.low, comparison.high) if self.low <= value <= self.high]
        line = [self.x(min(max(value, self.low), self.high)) for value in (comparison.low, comparison.high)]
        return {"x": start, "width": round(max(end - start, 0.5), 1), "line": line, "ends": ends}


# ------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------


def _section(id: str, name: str, result: dict[str, Any]) -> dict[str, Any]:
    found = comparisons(result)
    slower = [comparison for comparison in found if comparison.outcome == "slower"]
    rows = list(goals.evaluate(result))
    verdicts = [row.verdict for row in rows]
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    machine = result["machine_info"]
    return {
        "id": id,
        "name": name,
        "suite": result["suite"],
        "device": {"cpu": "CPU", "cuda": "GPU"}[result["device"]],
        "on_gpu": result["device"] == "cuda",
        "machine": machine.get("gpu", {}).get("name") if result["device"] == "cuda" else machine["cpu"],
        "measured": result["datetime"][:16].replace("T", " "),
        "cells": len(found),
        "counts": counts(found),
        "sentence": sentence(found),
        "warnings": second_core(result),
        "worst_title": "every slower cell" if len(slower) > _WORST else "the worst cells",
        "worst": [_worst(comparison) for comparison in (slower if len(slower) > _WORST else found[:_WORST])],
        "verdicts": {
            "met": sum(verdict in ("met", "stretch met") for verdict in verdicts),
            "missed": verdicts.count("MISSED"),
            "open": verdicts.count(goals.NOT_MEASURED),
        },
        "goals": [_goal(row) for row in rows if row.figures is not None],
        "open_goals": [
            f"{row.goal.id} {row.goal.what}: {row.metric.what}" for row in rows if row.figures is None
        ],
        "tables": [table for group in GROUPS if (table := _table(group, found, result["device"])) is not None],
        "scaling": [_scaling(info) for info in infos if info["kind"] == "scaling"],
        "bounds": [row for info in infos for row in _bounds(info)],
        "saved": [_memory(info) for info in infos if info["kind"] == "saved_bytes"],
        "peak": [_memory(info) for info in infos if info["kind"] == "peak_memory"],
        "environment": _environment(result),
        "missing": _missing(result),
    }


def _worst(comparison: Comparison) -> dict[str, Any]:
    info = comparison.info
    facts = [_case(info)]
    facts += [f"N = {info['batch']}"] if "batch" in info else []
    facts += [f"{info['elements']:,} elements"] if "elements" in info else []
    facts += [str(info[key]) for key in ("precision",) if key in info]
    facts += [_phase(info)] if "phase" in info else []
    facts += [_threads(info["threads"])] if "threads" in info and info["device"] == "cpu" else []
    return {"speedup": _speedup(comparison), "outcome": comparison.outcome, "text": ", ".join(facts)}


def _goal(row: goals.Row) -> dict[str, Any]:
    what, goal, stretch, measured, verdict, where = goals.texts(row)
    return {
        "id": row.goal.id,
        "rank": goals.GOALS.index(row.goal),
        "what": row.goal.what,
        "metric": what,
        "goal": goal.replace(">=", "\N{GREATER-THAN OR EQUAL TO}").replace("<=", "\N{LESS-THAN OR EQUAL TO}"),
        "stretch": stretch,
        "measured": measured,
        "verdict": verdict,
        "kind": "missed" if row.verdict == "MISSED" else "met",
        "where": where,
    }


def _table(group: Group, found: Sequence[Comparison], device: str) -> dict[str, Any] | None:
    """The comparisons of a group, worst first; None if there are none."""
    chosen = [comparison for comparison in found if comparison.info["kind"] in group.kinds]
    if not chosen:
        return None
    axis = LogAxis(chosen)
    return {
        "title": group.title,
        "text": group.text,
        "sentence": sentence(chosen),
        "shapes": sorted({(_case(c.info), _shape(c.info)) for c in chosen if _shape(c.info)}),
        "size_title": group.size_title,
        "with_threads": device == "cpu",
        "with_roofline": any("peaks" in comparison.info for comparison in chosen),
        "axis": axis,
        "rows": [_row(group, comparison, axis) for comparison in chosen],
    }


def _row(group: Group, comparison: Comparison, axis: LogAxis) -> dict[str, Any]:
    info = comparison.info
    entry = info["implementations"][info["ours"]]
    place, cache = _headline(entry)
    roofline = place.get("fraction_of_roofline")
    return {
        "name": comparison.name,
        "case": _case(info),
        "shape": _shape(info),
        "size": info.get(group.size),
        "precision": info.get("precision", ""),
        "phase": _phase(info),
        "threads": info.get("threads"),
        "outcome": comparison.outcome,
        "ratio": comparison.ratio,
        "speedup": _times(comparison.ratio),
        "interval": f"{_number(comparison.low)} to {_number(comparison.high)}",
        "bar": axis.bar(comparison),
        "roofline": roofline,
        "roofline_text": "" if roofline is None else _percent(roofline),
        "seconds": place["seconds"]["median"],
        "time": format_seconds(place["seconds"]["median"]),
        "cache": cache,
        "ours": info["ours"],
        "best_peer": info["best_peer"],
        "rounds": info["rounds"],
        "calls": info["calls_per_round"],
        "gflops": place.get("gflops"),
        "peak_text": _percent(place["fraction_of_peak"]) if "fraction_of_peak" in place else "",
        "implementations": _implementations(info),
        "with_flushed": "flushed_l2" in entry,
        "not_timed": [*info.get("failed", {}).items(), *info.get("left_out", {}).items()],
    }


def _headline(entry: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The figures whose speed-up is the headline, and the state of the GPU's cache where they were taken."""
    if "flushed_l2" not in entry:
        return entry, ""
    flushed = entry["flushed_l2"]
    if flushed["speedup_over_best_peer"]["median"] < entry["speedup_over_best_peer"]["median"]:
        return flushed, "flushed"
    return entry, "warm"


def _implementations(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours, peers and bounds, the fastest first."""
    rows = []
    for name, entry in info["implementations"].items():
        ratio = entry.get("ratio_to_ours")
        flushed = entry.get("flushed_l2")
        rows.append(
            {
                "name": name,
                "role": {"ours": "pyconv", "peer": "peer", "bound": "bound"}[entry["role"]],
                "is_headline": name == info["ours"],
                "seconds": entry["seconds"]["median"],
                "time": format_seconds(entry["seconds"]["median"]),
                "deciles": " to ".join(format_seconds(entry["seconds"][end]) for end in ("p10", "p90")),
                "ratio": "" if ratio is None else _summary(ratio),
                "flushed_time": "" if flushed is None else format_seconds(flushed["seconds"]["median"]),
                "flushed_ratio": _summary(flushed["ratio_to_ours"])
                if flushed is not None and "ratio_to_ours" in flushed
                else "",
            }
        )
    return sorted(rows, key=lambda row: (row["seconds"], row["name"]))


def _scaling(info: dict[str, Any]) -> dict[str, Any]:
    summary = info["implementations"][info["ours"]]["speedup_over_best_peer"]
    return {
        "case": _case(info),
        "shape": _shape(info),
        "size": info.get("batch"),
        "ratio": summary["median"],
        "speedup": _times(summary["median"]),
        "interval": f"{_number(summary['low'])} to {_number(summary['high'])}",
        "same_bits": "yes" if info.get("same_bits") else "NO",
    }


def _bounds(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside what it cannot go below: a copy, an operator that does nothing, an import of torch alone."""
    rows = []
    for name, entry in info.get("implementations", {}).items():
        if entry["role"] != "bound":
            continue
        ours = info["implementations"][info["ours"]]["seconds"]["median"]
        beyond = entry["ours_minus_this_seconds"]["median"]
        ratio = 1 / entry["ratio_to_ours"]["median"]
        rows.append(
            {
                "case": _case(info),
                "size": info.get("elements"),
                "phase": _phase(info),
                "threads": info.get("threads"),
                "seconds": ours,
                "time": format_seconds(ours),
                "bound": name,
                "ratio": ratio,
                "ratio_text": _times(ratio),
                "beyond": beyond,
                "beyond_text": format_seconds(beyond),
            }
        )
    return rows


def _memory(info: dict[str, Any]) -> dict[str, Any]:
    """The largest figure of ours beside the smallest of the peers'."""
    values = info["values"]
    in_mib = info["kind"] == "peak_memory"

    def text(value: float) -> str:
        return f"{value / _MIB:,.0f} MiB" if in_mib else f"{value:.2f} B"

    ours = max(entry["value"] for entry in values.values() if entry["role"] == "ours")
    peers = {name: entry["value"] for name, entry in values.items() if entry["role"] == "peer"}
    peer = min(peers, key=lambda name: peers[name], default=None)
    largest = max(entry["value"] for entry in values.values()) or 1.0
    entries = sorted(values.items(), key=lambda item: (item[1]["value"], item[0]))
    return {
        "case": _case(info) + (f", N = {info['batch']}" if "batch" in info else ""),
        "shape": _shape(info),
        "precision": info.get("precision", ""),
        "unit": info["unit"],
        "ours": ours,
        "ours_text": text(ours),
        "peer": peer,
        "peer_value": None if peer is None else peers[peer],
        "peer_text": "" if peer is None else text(peers[peer]),
        "outcome": "even" if peer is None else _less(ours, peers[peer]),
        "bars": [round(100 * value / largest, 1) for value in (ours, peers.get(peer, 0.0))],
        "entries": [
            {"name": name, "text": text(entry["value"]), "role": entry["role"]} for name, entry in entries
        ],
        "failed": list(info.get("failed", {}).items()),
    }


def _less(ours: float, peer: float) -> str:
    return "less" if ours < peer else "more" if ours > peer else "even"


def _environment(result: dict[str, Any]) -> list[tuple[str, str]]:
    info = result["machine_info"]
    rows = [("CPU", f"{info['cpu']}, {info['cores']} cores, {info['architecture']}, {info['system']}")]
    if "gpu" in info:
        gpu = info["gpu"]
        facts = [gpu["name"], f"compute capability {gpu['capability']}"]
        facts += [f"{gpu['multiprocessors']} multiprocessors"] if "multiprocessors" in gpu else []
        facts += [f"{gpu['memory_gib']} GiB"] if "memory_gib" in gpu else []
        rows += [("GPU", ", ".join(facts)), ("CUDA", f"{gpu['cuda']}, cuDNN {gpu['cudnn']}")]
    ours = info["pyconv"]
    rows.append(
        ("pyconv", "not importable" if ours is None else ", ".join(f"{k} {v}" for k, v in sorted(ours.items())))
    )
    rows.append(("PyTorch", f"{info['torch']}, CPU capability {info['torch_cpu_capability']}"))
    rows.append(("Python", info["python"]))
    rows += sorted(info["packages"].items())
    for precision, threads, peak in measured_peaks(result):
        on = f", {_threads(threads)}" if result["device"] == "cpu" else ""
        rows.append(
            (
                f"peak {precision}{on}",
                f"{peak['gflops']:,.0f} GFLOP/s ({peak['method']}), copy {peak['copy_gb_per_second']:,.0f} GB/s",
            )
        )
    rows.append(("load before", f"{result['load_before']:g} runnable processes in the minute before"))
    return rows


def _missing(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(benchmark or implementation, why it has no figure)."""
    rows = list(result.get("not_measured", {}).items())
    for benchmark in result["benchmarks"]:
        failed = benchmark["extra_info"].get("failed", {})
        rows += [(f"{benchmark['name']}: {name}", reason) for name, reason in failed.items()]
    return rows


# ------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------


def _case(info: dict[str, Any]) -> str:
    prefix = {"dropout": "dropout ", "relu_dropout": "relu + dropout "}.get(info["kind"], "")
    return prefix + info.get("shape", info["kind"])


def _phase(info: dict[str, Any]) -> str:
    phase = info.get("phase", "")
    return PHASE_NAMES.get(phase, phase)


def _shape(info: dict[str, Any]) -> str:
    """The extents of a named shape, in the order of computation; empty for other cases."""
    case = _CASES.get(info.get("shape", ""))
    return "" if case is None else shape_text(case)


def shape_text(case: Case) -> str:
    """For example "3x224x224, 96 kernels 11x11, stride 4, padding 2, pool 3x3, stride 2"."""

    def pair(values: tuple[int, int] | str, always: bool = False) -> str:
        if isinstance(values, str):
            return values
        return f"{values[0]}x{values[1]}" if always or values[0] != values[1] else f"{values[0]}"

    parts = [f"{case.C}x{case.H}x{case.W}", f"{case.K} kernels {pair(case.kernel, always=True)}"]
    parts += [f"stride {pair(case.stride)}"] if case.stride != (1, 1) else []
    parts += [f"padding {pair(case.padding)}"] if case.padding != (0, 0) else []
    parts += [f"dilation {pair(case.dilation)}"] if case.dilation != (1, 1) else []
    parts += [f"{case.groups} groups"] if case.groups != 1 else []
    parts.append(f"pool {pair(case.pool_size, always=True)}")
    pool_stride = case.pool_stride or case.pool_size
    parts += [f"stride {pair(pool_stride)}"] if pool_stride != case.pool_size else []
    parts += [f"padding {pair(case.pool_padding)}"] if case.pool_padding != (0, 0) else []
    return ", ".join(parts)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _number(value: float) -> str:
    """Two digits below 0.1, two decimals below ten, then three digits at least."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{_number(value)}x"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _summary(summary: dict[str, float]) -> str:
    return f"{_times(summary['median'])} ({_number(summary['low'])} to {_number(summary['high'])})"


def _speedup(comparison: Comparison) -> str:
    return f"{_times(comparison.ratio)} ({_number(comparison.low)} to {_number(comparison.high)})"
