"""The machine's own rates: what every "percent of peak" of the same run is a percentage of."""

from __future__ import annotations

from benchmarks.machine import TORCH_DTYPES, peaks


def test_peaks(record, suite) -> None:
    threads = max(suite.thread_counts)

    def matmul(precision: str):
        return lambda: peaks(suite.device, precision, threads)["gflops"]

    rates = {f"arithmetic, {precision}, GFLOP/s": ("bound", matmul(precision)) for precision in TORCH_DTYPES}
    rates["copy, read + written, GB/s"] = (
        "bound", lambda: peaks(suite.device, "float32", threads)["copy_gb_per_second"],
    )  # fmt: skip
    record(rates, "peaks", unit="rates measured in this run", threads=threads)
