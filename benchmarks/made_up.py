"""Made-up results, for the tests of what reads results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import results

OURS, PEER = "pyconv channels_last", "torch eager NCHW conv-pool-relu"


def summary(median: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    low, high = (median if end is None else end for end in (low, high))
    return {"median": median, "p10": low, "p90": high, "low": low, "high": high}


def timed(speedup: dict[str, float], seconds: float = 1e-3) -> dict[str, Any]:
    """What extra_info says of two implementations, ours taking `seconds`."""
    entry = {"layout": "", "threads": 1}
    return {
        "device": "cpu",
        "ours": OURS,
        "best_peer": PEER,
        "rounds": 7,
        "calls_per_round": 1,
        "implementations": {
            OURS: {"role": "ours", "speedup_over_best_peer": speedup, "seconds": summary(seconds), **entry},
            PEER: {
                "role": "peer",
                "ratio_to_ours": speedup,
                "seconds": summary(seconds * speedup["median"]),
                **entry,
            },
        },
    }


def result_of(infos: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A result of the suite quick whose benchmarks have the given names and extra_info."""
    machine = dict.fromkeys(("cpu", "architecture", "system", "python", "torch", "torch_cpu_capability"), "x")
    return {
        "format_version": results.FORMAT_VERSION,
        "suite": "quick",
        "device": "cpu",
        "load_before": 0.0,
        "datetime": "2020-01-01",
        "version": "5",
        "commit_info": {},
        "machine_info": {**machine, "cores": 2, "packages": {}, "pyconv": None},
        "benchmarks": [
            {"name": name, "fullname": f"f::{name}", "stats": {"median": 1e-3}, "extra_info": info}
            for name, info in infos.items()
        ],
    }


def stack_result(speedup: dict[str, float]) -> dict[str, Any]:
    """A result with one benchmark, of the two-layer stack."""
    return result_of({"test_stack": {"kind": "stack", "phase": "full", **timed(speedup)}})


def layer_result(speedups: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """A result with a benchmark for each shape, the first shape's being the slowest."""
    return result_of(
        {
            f"test_conv_max_pool2d[{shape}]": {
                "kind": "conv_max_pool2d",
                "shape": shape,
                "batch": 10,
                "precision": "float32",
                "phase": "full",
                "threads": 1,
                **timed(speedup, seconds=1 / (1 + index)),
            }
            for index, (shape, speedup) in enumerate(speedups.items())
        }
    )
