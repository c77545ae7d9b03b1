"""The fixed cost of one call: pyconv on a 1x1x5x5 input beside an operator that does nothing (noop.cpp)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.suites import Cell
from benchmarks.timing import Candidate


@pytest.fixture(scope="module")
def noop():
    """The operator of noop.cpp, compiled once and then kept in torch's cache of extensions."""
    from torch.utils import cpp_extension

    source = Path(__file__).resolve().parent / "noop.cpp"
    try:
        # As pyconv is built: load() optimises nothing by itself, which makes two thirds of the time.
        flags = ["-O2", "-DNDEBUG"]
        cpp_extension.load("pyconv_benchmarks_noop", [str(source)], extra_cflags=flags, is_python_module=False)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"the no-op operator needs a C++ compiler and ninja: {str(error).splitlines()[0]}")
    return torch.ops.pyconv_benchmarks.noop.default


@pytest.mark.parametrize("phase_name", ["forward_inference", "forward_training", "full"])
def test_overhead(measure, suite, noop, phase_name: str) -> None:
    cell = Cell("tiny", 1, phase_name=phase_name)
    problem = peers.make_problem(cell.case, cell.precision, suite.device)
    found, left_out = peers.implementations(problem, cell.phase)
    candidates = [peers.candidate(problem, implementation, cell.phase, 1) for implementation in found]
    x, w, b = (t.clone().requires_grad_(cell.phase.grad) for t in (problem.x, problem.w, problem.b))
    shape, grad_output = list(cell.case.output_shape), problem.grad_output

    def forward() -> torch.Tensor:
        return noop(x, w, b, shape)

    def full() -> object:
        return torch.autograd.grad(forward(), (x, w, b), grad_output)

    run = full if cell.phase.backward else forward
    candidates.append(Candidate("no-op operator", "bound", run, None, cell.phase.grad, 1))
    measure(
        candidates,
        "overhead",
        shape=cell.shape,
        batch=1,
        precision=cell.precision,
        phase=phase_name,
        threads=1,
        left_out=left_out,
    )
