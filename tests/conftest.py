"""Fixtures shared by all tests, and the choice of the kernels that they run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP: threads that spin while they wait make the tests slow beside other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import backends  # noqa: E402
import torch  # noqa: E402

import pyconv  # noqa: E402

OPERATOR_TESTS = (
    "test_conv_max_pool2d_",
    "test_dropout",
    "test_bias_act_dropout",
    "test_cuda_operators",
    "test_cuda_gpu",
    "test_cuda_network3",
    "test_cuda_training",
)
"""How the files begin that a backend other than the CPU runs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=backends.BACKENDS,
        default="cpu",
        help="the kernels that the tests of the operators run; with another than cpu only those tests run",
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch's conv2d says so for an even kernel with padding='same'; the reference runs it on purpose.
    config.addinivalue_line(
        "filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning"
    )
    backends.choose(config.getoption("--backend"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if backends.backend() == "cpu":
        return
    kept = [item for item in items if item.path.name.startswith(OPERATOR_TESTS)]
    kept = [item for item in kept if item.get_closest_marker("cpu_only") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(autouse=True)
def _unchanged_process_state() -> Iterator[None]:
    """Seed torch and set what the backend needs; restore what a test may change for the whole process."""
    threads, isa = torch.get_num_threads(), pyconv.isa()
    cudnn, tf32 = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    # Float32 means float32, in the CUDA kernels and in torch's; the tests of TF32 switch it on.
    torch.backends.cudnn.allow_tf32 = False
    if backends.backend() == "cuda_emulation":
        pyconv.set_isa(backends.EMULATION)
    elif backends.backend() == "cuda":
        torch.set_default_device("cuda")
        # Some of cuDNN's convolutions transform their operands: not exact on integers, and a NaN spreads. What torch
        # has besides is the reference.
        torch.backends.cudnn.enabled = False
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)
    torch.set_num_threads(threads)
    pyconv.set_isa(isa)
    torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32 = cudnn, tf32


@pytest.fixture
def cudnn(_unchanged_process_state: None) -> None:
    """torch's convolutions as most programs see them on a GPU: for tests of errors, memory formats and memory."""
    torch.backends.cudnn.enabled = True


@pytest.fixture
def kernels(_unchanged_process_state: None, request: pytest.FixtureRequest) -> None:
    """See `backends.also_emulated`."""
    if request.param == backends.EMULATION:
        pyconv.set_isa(backends.EMULATION)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran that a machine may have to skip: on the real MNIST, on CUDA kernels, on a GPU."""

    def count(marker: str, *outcomes: str) -> int:
        reports = [report for outcome in outcomes for report in terminalreporter.getreports(outcome)]
        return sum(marker in getattr(report, "keywords", ()) for report in reports)

    for marker, title, hint in (
        ("mnist", "Real MNIST", "" if os.environ.get("PYCONV_DATA") else " (PYCONV_DATA is not set)"),
        ("cuda_emulation", "Emulated CUDA kernels", "" if backends.LIBRARY.exists() else " (not built)"),
        ("gpu", "GPU", "" if backends.gpu_available() else " (none, or built without CUDA)"),
    ):
        ran = count(marker, "passed", "failed", "error")
        terminalreporter.write_line(f"{title}: {ran} tests ran, {count(marker, 'skipped')} skipped{hint}")
    if backends.backend() != "cpu":
        terminalreporter.write_line(f"Operators on the kernels of --backend={backends.backend()}")
