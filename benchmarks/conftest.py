"""The suite's options and fixtures, and the shape of the JSON that pytest-benchmark writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import machine, results
from benchmarks.suites import SUITES, Suite
from benchmarks.timing import Candidate, Role, Samples, run_rounds

_LOAD_BEFORE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyconv benchmarks")
    group.addoption("--suite", choices=tuple(SUITES), default="quick", help="which cells to measure")
    group.addoption("--budget", type=float, help="seconds of rounds per benchmark; default: the suite's own")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOAD_BEFORE] = os.getloadavg()[0]


def suite_of(config: pytest.Config) -> Suite:
    return SUITES[config.getoption("suite")]


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
    if "memory_shape" in metafunc.fixturenames:
        metafunc.parametrize("memory_shape", suite.memory_shapes)


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    return suite_of(request.config)


@pytest.fixture(autouse=True)
def _threads_are_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, suite: Suite) -> Callable[..., Samples]:
    """`measure(candidates, kind, **facts)`: check, time in interleaved rounds, report in extra_info."""
    budget = request.config.getoption("budget") or suite.budget_seconds

    def run(candidates: list[Candidate], kind: str, **facts: Any) -> Samples:
        samples = run_rounds(benchmark, candidates, device=suite.device, budget_seconds=budget)
        benchmark.extra_info |= {"kind": kind, "device": suite.device, **facts, **samples.report()}
        return samples

    return run


@pytest.fixture
def record(benchmark: Any, suite: Suite) -> Callable[..., None]:
    """`record(values, kind, unit=..., **facts)`: put figures that are no times into the same JSON.

    `values` maps an implementation to its role and a function that measures it; the plugin times the first
    one once, because it keeps no benchmark without a time.
    """

    def run(values: dict[str, tuple[Role, Callable[[], float]]], kind: str, **facts: Any) -> None:
        (first, (role, measure_first)), *others = values.items()
        figures = {first: {"role": role, "value": benchmark.pedantic(measure_first, rounds=1, iterations=1)}}
        for name, (role, measure_value) in others:
            figures[name] = {"role": role, "value": measure_value()}
        benchmark.extra_info |= {
            "kind": kind,
            "device": suite.device,
            "ours": first,
            "values": figures,
            **facts,
        }

    return run


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine.describe()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    suite = suite_of(config)
    results.finish(output_json, suite.name, suite.device, config.stash[_LOAD_BEFORE])
