"""A result file as a table for the terminal: losses as plainly as wins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.comparison import comparisons, sentence

_FACTS = ("kind", "shape", "batch", "elements", "precision", "phase", "threads")


def format_result(result: dict[str, Any], *, every_implementation: bool = False) -> str:
    """Machine, then one line per benchmark sorted from the worst ratio to the best, then the memory figures, then
    what failed or was left out.

    Args:
        every_implementation: follow each line by one for every implementation.
    """
    return "\n".join(
        [*_machine(result), "", *_times(result, every_implementation), *_values(result), *_failures(result)]
    )


def _machine(result: dict[str, Any]) -> list[str]:
    info = result["machine_info"]
    ours = info["pyconv"] or {}
    lines = [
        f"suite {result['suite']} on {result['device']}, {result['datetime']}",
        f"load {result['load_before']} in the minute before",
        f"CPU {info['cpu']}, {info['cores']} cores, torch {info['torch']} ({info['torch_cpu_capability']}), "
        f"pyconv {ours.get('version', 'not importable')} ({ours.get('isa', '-')})",
    ]
    if "gpu" in info:
        gpu = info["gpu"]
        lines.append(f"GPU {gpu['name']} ({gpu['capability']}), CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}")
    for precision, threads, peak in measured_peaks(result):
        lines.append(
            f"peak {precision}, {threads} threads: {peak['gflops']:.0f} GFLOP/s ({peak['method']}), "
            f"copy {peak['copy_gb_per_second']:.0f} GB/s"
        )
    return [*lines, *second_core(result)]


def second_core(result: dict[str, Any]) -> list[str]:
    """A warning where two threads hardly compute more than one: figures of two threads then say little."""
    rates = {
        threads: peak["gflops"] for precision, threads, peak in measured_peaks(result) if precision == "float32"
    }
    if result["device"] != "cpu" or not {1, 2} <= rates.keys() or rates[2] >= 1.5 * rates[1]:
        return []
    return [
        f"two threads reach only {rates[2] / rates[1]:.2f} times one thread's peak: the cores are shared or busy, and "
        "figures of 2 threads say little"
    ]


def measured_peaks(result: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(precision, threads, peaks) of every combination that a benchmark has measured, in order."""
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    found = {(info["precision"], info["threads"]): info["peaks"] for info in infos if "peaks" in info}
    for (precision, threads), peaks in sorted(found.items()):
        yield precision, threads, peaks


def _times(result: dict[str, Any], every_implementation: bool) -> list[str]:
    rows = []
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if "implementations" not in info:
            continue
        entry = info["implementations"][info["ours"]]
        rows.append((entry.get("speedup_over_best_peer"), benchmark["name"], info, entry))
    rows.sort(key=lambda row: (row[0] is not None, row[0]["median"] if row[0] else 0.0))
    if not rows:
        return []
    lines = [
        sentence(comparisons(result)),
        "speed-up over the best peer (95 % interval), worst first; time of ours (10th to 90th percentile)",
    ]
    for speedup, _, info, entry in rows:
        ratio = "       -              " if speedup is None else (
            f"{speedup['median']:7.2f}x ({speedup['low']:.2f}-{speedup['high']:.2f})".ljust(24)
        )  # fmt: skip
        flag = " " if speedup is None or speedup["low"] >= 0.95 else "!"
        lines.append(
            f"{flag}{ratio} {_time(entry['seconds'])}{_efficiency(entry)}  {_facts(info)}  {info['ours']}, "
            f"best peer: {info['best_peer']}"
        )
        if "flushed_l2" in entry:
            lines.append(_flushed(entry["flushed_l2"]))
        if every_implementation:
            for other, figures in info["implementations"].items():
                lines.append(f"      {figures['role']:5}  {_time(figures['seconds'])}  {other}")
    lines.append("! marks a lower end below 0.95x")
    return lines


def _efficiency(entry: dict[str, Any]) -> str:
    parts = [
        f"{100 * entry[key]:4.0f}% of {name}"
        for key, name in (("fraction_of_peak", "peak"), ("fraction_of_roofline", "roofline"))
        if key in entry
    ]
    return "  " + ", ".join(parts) if parts else ""


def _flushed(entry: dict[str, Any]) -> str:
    speedup = entry.get("speedup_over_best_peer")
    ratio = (
        "" if speedup is None else f"{speedup['median']:7.2f}x ({speedup['low']:.2f}-{speedup['high']:.2f})"
    )
    return f" {ratio:24} {_time(entry['seconds'])}{_efficiency(entry)}  the same with a flushed L2 cache"


def _values(result: dict[str, Any]) -> list[str]:
    lines = []
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        if "values" in info:
            lines += ["", f"{_facts(info)}: {info['unit']}"]
            lines += [f"  {entry['value']:16.2f}  {name}" for name, entry in info["values"].items()]
    return lines


def _failures(result: dict[str, Any]) -> list[str]:
    lines = [f"  {name}: {reason}" for name, reason in result.get("not_measured", {}).items()]
    for benchmark in result["benchmarks"]:
        failed = benchmark["extra_info"].get("failed", {})
        lines += [f"  {benchmark['name']}: {name}: {reason}" for name, reason in failed.items()]
    return ["", "failed or left out:", *lines] if lines else []


def _facts(info: dict[str, Any]) -> str:
    names = {"batch": "N=", "threads": "threads=", "elements": "elements="}
    return " ".join(f"{names.get(key, '')}{info[key]}" for key in _FACTS if key in info)


def _time(seconds: dict[str, float]) -> str:
    median, p10, p90 = (format_seconds(seconds[key]) for key in ("median", "p10", "p90"))
    return f"{median:>8} ({p10} to {p90})".ljust(32)


def format_seconds(value: float) -> str:
    """Three digits in s, ms or us, whichever fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"
