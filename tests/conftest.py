"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP: threads that spin while they wait make the tests slow beside other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import pyconv  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    # torch's conv2d says so for an even kernel with padding='same'; the reference runs it on purpose.
    config.addinivalue_line(
        "filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning"
    )


@pytest.fixture(autouse=True)
def _unchanged_process_state() -> Iterator[None]:
    """Seed torch, and restore what a test may change for the whole process: thread count and ISA."""
    torch.manual_seed(0)
    threads, isa = torch.get_num_threads(), pyconv.isa()
    yield
    torch.set_num_threads(threads)
    pyconv.set_isa(isa)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests read the real MNIST: those marked `mnist` are skipped where $PYCONV_DATA is not set."""

    def count(*outcomes: str) -> int:
        reports = [report for outcome in outcomes for report in terminalreporter.getreports(outcome)]
        return sum("mnist" in getattr(report, "keywords", ()) for report in reports)

    hint = "" if os.environ.get("PYCONV_DATA") else " (PYCONV_DATA is not set)"
    terminalreporter.write_line(
        f"Real MNIST: {count('passed', 'failed', 'error')} tests ran, {count('skipped')} skipped{hint}"
    )
