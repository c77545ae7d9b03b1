"""conv_max_pool2d, layer by layer: one benchmark per (shape, batch, precision, phase, threads)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import peers
from benchmarks.machine import peaks
from benchmarks.shapes import flops, min_bytes
from benchmarks.suites import Cell
from benchmarks.timing import Candidate, Role


def test_conv_max_pool2d(measure, suite, cell: Cell, threads: int) -> None:
    problem = peers.make_problem(cell.case, cell.precision, suite.device)
    torch.set_num_threads(threads)
    found, left_out = peers.implementations(problem, cell.phase, cell.compile_modes)
    candidates = [peers.candidate(problem, implementation, cell.phase, threads) for implementation in found]
    measure(
        candidates,
        "conv_max_pool2d",
        shape=cell.shape,
        batch=cell.batch,
        precision=cell.precision,
        phase=cell.phase_name,
        threads=threads,
        flops=flops(cell.case, cell.phase),
        min_bytes=min_bytes(cell.case, cell.phase, problem.x.element_size()),
        peaks=peaks(suite.device, cell.precision, threads),
        left_out=left_out,
    )


def test_scaling(measure, suite, scaling_shape: str) -> None:
    """Ours on two threads against ours on one, its "peer" here, at N = 10; are the bits the same?"""
    if len(suite.thread_counts) < 2:
        pytest.skip("needs a CPU with two cores")
    cell = Cell(scaling_shape, 10)
    problem = peers.make_problem(cell.case, cell.precision, suite.device)

    def candidate(threads: int, role: Role) -> Candidate:
        ours = peers.implementations(problem, cell.phase)[0][0]
        return dataclasses.replace(
            peers.candidate(problem, ours, cell.phase, threads),
            name="pyconv on 1 thread" if threads == 1 else f"pyconv on {threads} threads",
            role=role,
        )

    def results(candidate: Candidate) -> list[torch.Tensor]:
        torch.set_num_threads(candidate.threads)
        return list(candidate.run())

    one, two = candidate(1, "peer"), candidate(2, "ours")
    same_bits = all(torch.equal(a, b) for a, b in zip(results(one), results(two), strict=True))
    measure(
        [two, one],
        "scaling",
        shape=cell.shape,
        batch=cell.batch,
        precision=cell.precision,
        phase=cell.phase_name,
        threads=2,
        same_bits=same_bits,
    )
