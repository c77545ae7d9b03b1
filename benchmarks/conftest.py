"""The suite's options and fixtures, and the journal that they keep."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, machine
from benchmarks.journal import Journal, Progress
from benchmarks.limits import TimeLeft
from benchmarks.suites import SUITES, Cell, Suite
from benchmarks.timing import Candidate, GpuLost, Role, Samples, describe, run_rounds

EXIT_GPU_LOST = 70
_LONGEST_REASON = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyconv benchmarks")
    group.addoption("--suite", choices=tuple(SUITES), default="quick", help="which cells to measure")
    group.addoption("--budget", type=float, help="seconds of rounds per benchmark; default: the suite's own")
    group.addoption("--journal", type=Path, help="file that every measurement is written to at once")
    group.addoption("--deadline", type=float, help="time.time() at which no further benchmark may start")


def suite_of(config: pytest.Config) -> Suite:
    return SUITES[config.getoption("suite")]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("journal") is not None:
        config.pluginmanager.register(Recorder(config), Recorder.NAME)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Benchmarks ask for what the suite decides by the names of their arguments."""
    suite = suite_of(metafunc.config)
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", suite.cells, ids=lambda cell: cell.id())
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", suite.thread_counts, ids=lambda threads: f"t{threads}")
    if "scaling_shape" in metafunc.fixturenames:
        metafunc.parametrize("scaling_shape", suite.scaling_shapes)
    if "elements" in metafunc.fixturenames:
        metafunc.parametrize("elements", suite.dropout_elements)
    if "dropout_phase" in metafunc.fixturenames:
        metafunc.parametrize("dropout_phase", suite.dropout_phases)
    if "network3_step" in metafunc.fixturenames:
        names = [f"experiment{number}-N{batch}" for number, batch in suite.network3_steps]
        metafunc.parametrize("network3_step", suite.network3_steps, ids=names)
    if "ksh_batch" in metafunc.fixturenames:
        metafunc.parametrize("ksh_batch", suite.ksh_batches, ids=lambda batch: f"N{batch}")
    if "memory_shape" in metafunc.fixturenames:
        metafunc.parametrize("memory_shape", suite.memory_shapes)


class Recorder:
    """Writes the journal, leaves out what it already holds, and keeps an eye on the time."""

    NAME = "pyconv-recorder"

    def __init__(self, config: pytest.Config) -> None:
        self.journal = Journal(config.getoption("journal"))
        self.progress: Progress = self.journal.read()
        self.suite = suite_of(config)
        self._deadline: float | None = config.getoption("deadline")
        self._items: list[pytest.Item] = []
        self._written: set[str] = set()

    def pytest_sessionstart(self) -> None:
        self.journal.append(machine_info=machine.describe())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = self.progress.done()

        def is_wanted(item: pytest.Item) -> bool:
            # Of a test whose parameters are an empty list, pytest makes one that it skips.
            return item.nodeid not in done and item.get_closest_marker("skip") is None

        config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
        items[:] = filter(is_wanted, items)
        self._items = list(items)

    def time_left(self, item: pytest.Item) -> TimeLeft:
        later = self._items[self._items.index(item) + 1 :]
        cells = [other.callspec.params.get("cell") for other in later if hasattr(other, "callspec")]
        autotuned = [
            cell for cell in cells if isinstance(cell, Cell) and "max-autotune" in cell.compile_modes
        ]
        return TimeLeft(self._deadline, len(later), len(autotuned))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.time_left(item).is_over():
            pytest.skip("the suite's time was over")

    def write(self, item: pytest.Item, benchmark: Any) -> None:
        """The plugin's entry without raw rounds, and without the parameters, which are objects of this package;
        extra_info says the same in plain values."""
        entry = benchmark.stats.as_dict(include_data=False)
        self.journal.append(
            benchmark={key: entry[key] for key in ("group", "name", "fullname", "stats", "extra_info")}
        )
        self._written.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed or report.nodeid in self._written:
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        self.journal.append(not_measured=report.nodeid, reason=_error_line(reason))
        self._written.add(report.nodeid)
        if self.suite.device == "cuda" and not gpu.is_usable():
            pytest.exit(f"the GPU is lost to this process: {_error_line(reason)}", returncode=EXIT_GPU_LOST)


def _error_line(text: str) -> str:
    """The line of pytest's report that names the error: the first that it marks with an E, or else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line[2:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines[-1:] or [""])[0][:_LONGEST_REASON]


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    return suite_of(request.config)


@pytest.fixture(autouse=True)
def _process_state_is_restored(suite: Suite) -> Iterator[None]:
    threads, cudnn_benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    if suite.device == "cuda":
        gc.collect()  # graphs and compiled functions hold memory in cycles
        torch.cuda.empty_cache()


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, suite: Suite) -> Callable[..., Samples]:
    """`measure(candidates, kind, **facts)`: check, time in interleaved rounds, report in extra_info.

    A candidate that fails is reported with its error; if it is pyconv's, the test fails too, after the report.
    """
    config, item = request.config, request.node
    budget = config.getoption("budget") or suite.budget_seconds
    recorder: Recorder | None = config.pluginmanager.get_plugin(Recorder.NAME)

    def run(candidates: list[Candidate], kind: str, **facts: Any) -> Samples:
        attempt: dict[str, Any] = {}
        current = ""

        def trying(name: str) -> None:
            nonlocal current
            current = name
            recorder.journal.append(trying=name, test=item.nodeid)

        if recorder is not None:
            fatal = recorder.progress.fatal.get(item.nodeid, {})
            attempt = {"time_left": recorder.time_left(item), "fatal": fatal, "trying": trying}
        try:
            samples = run_rounds(benchmark, candidates, device=suite.device, budget_seconds=budget, **attempt)
        except GpuLost as error:
            if recorder is None:
                raise
            recorder.journal.append(fatal=current, test=item.nodeid, reason=str(error))
            pytest.exit(f"{current} lost the GPU to this process: {error}", returncode=EXIT_GPU_LOST)
        benchmark.extra_info |= {"kind": kind, "device": suite.device, **facts, **samples.report()}
        if recorder is not None:
            recorder.write(item, benchmark)
        roles = {candidate.name: candidate.role for candidate in candidates}
        ours = {name: reason for name, reason in samples.failed.items() if roles.get(name) == "ours"}
        assert not ours, f"failed and were not timed: {ours}"
        return samples

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, suite: Suite) -> Callable[..., None]:
    """`record(values, kind, unit=..., **facts)`: put figures that are no times into the same result.

    `values` maps an implementation to its role and a function that measures it. The plugin keeps no benchmark without
    a time, so it is given that of the whole.
    """
    recorder: Recorder | None = request.config.pluginmanager.get_plugin(Recorder.NAME)

    def run(values: dict[str, tuple[Role, Callable[[], float]]], kind: str, **facts: Any) -> None:
        figures: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}

        def measure_all() -> None:
            for name, (role, measure_value) in values.items():
                try:
                    figures[name] = {"role": role, "value": measure_value()}
                except Exception as error:
                    failed[name] = describe(error)

        benchmark.pedantic(measure_all, rounds=1, iterations=1)
        assert figures, f"nothing could be measured: {failed}"
        benchmark.extra_info |= {
            "kind": kind,
            "device": suite.device,
            "ours": next(iter(figures)),
            "values": figures,
            "failed": failed,
            **facts,
        }
        if recorder is not None:
            recorder.write(request.node, benchmark)
        ours = {name: reason for name, reason in failed.items() if values[name][0] == "ours"}
        assert not ours, f"failed and were not measured: {ours}"

    return run
