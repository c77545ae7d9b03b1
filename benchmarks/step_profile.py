"""Where the time of a compiled training step goes, operation by operation, beside the machine's peaks."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import machine
from benchmarks.bench_network3 import make_data
from benchmarks.network_peers import EXPERIMENTS, PyconvTrainer

_WARM_UP, _STEPS = 50, 1000


def run(number: int, *, batch: int, threads: int) -> str:
    """A table: microseconds, and what they are of the FMA peak and of the bandwidth of a copy."""
    torch.set_num_threads(threads)
    experiment = dataclasses.replace(EXPERIMENTS[number], mini_batch_size=batch)
    peaks = machine.peaks("cpu", "float32", threads)
    trainer = PyconvTrainer(experiment, "cpu")
    trainer.timed_plan(make_data(_WARM_UP, experiment, "cpu"))
    table = trainer.timed_plan(make_data(_STEPS, experiment, "cpu"))
    lines = [
        f"experiment {number}, N = {batch}, {threads} threads; peaks {peaks['gflops']} GFLOP/s ({peaks['method']}), "
        f"copy {peaks['copy_gb_per_second']} GB/s"
    ]
    lines.append(f"{'operation':36}{'forward us':>12}{'backward us':>13}{'share':>8}{'FMA peak':>10}{'copy':>8}")
    total = _seconds(table.total)
    for row in [*table.rows, table.total]:
        seconds = _seconds(row)
        of_peak = row["flops"] / seconds / 1e9 / peaks["gflops"]
        of_copy = row["bytes"] / seconds / 1e9 / peaks["copy_gb_per_second"]
        lines.append(
            f"{row['operation']:36}{row['forward_seconds'] * 1e6:12.1f}{row['backward_seconds'] * 1e6:13.1f}"
            f"{seconds / total:8.0%}{of_peak:10.0%}{of_copy:8.0%}"
        )
    return "\n".join(lines)


def _seconds(row: dict[str, float]) -> float:
    return row["forward_seconds"] + row["backward_seconds"]
