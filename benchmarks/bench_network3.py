"""Whole training steps of the book's experiments 6 and 10 at its mini-batch size."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import peers
from benchmarks.network_peers import CLASSES, EXPERIMENTS, IMAGE, Data, Experiment, Trainer, trainers
from benchmarks.timing import Candidate

STEPS = 50
"""Mini-batches per timed call: enough that starting and ending an epoch is a small part of it."""
_CHECKED_STEPS = 3
"""Few, since rounding sends float32 trajectories apart at the first near-tie of a pooling window."""
_TOLERANCE = 1e-3


def make_data(mini_batches: int, experiment: Experiment, device: str) -> Data:
    """Random images and labels: what a step costs does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    count = mini_batches * experiment.mini_batch_size
    features = torch.Size(IMAGE).numel()
    return (
        torch.rand(count, features, generator=generator).to(device),
        torch.randint(CLASSES, (count,), generator=generator).to(device),
    )


def check_against_eager(
    experiment: Experiment, device: str, threads: int, compile_modes: tuple[str, ...]
) -> None:
    """Every trainer, without dropout, ends its first steps at the parameters of the first torch trainer."""
    data = make_data(_CHECKED_STEPS, experiment, device)
    found, _ = trainers(
        experiment.without_dropout(), device, threads, len(os.sched_getaffinity(0)), compile_modes
    )
    ends = []
    for trainer in found:
        trainer.train(data)
        ends.append([p.double().cpu() for p in trainer.parameters()])
    reference = ends[1]
    for trainer, parameters in zip(found, ends, strict=True):
        for got, expected in zip(parameters, reference, strict=True):
            peers.check_close(got, expected, _TOLERANCE, f"a parameter of {trainer.name}")


@pytest.mark.parametrize("number", EXPERIMENTS, ids=lambda number: f"experiment{number}")
def test_training_step(measure, suite, threads: int, number: int) -> None:
    experiment = EXPERIMENTS[number]
    torch.set_num_threads(threads)
    check_against_eager(experiment, suite.device, threads, suite.compile_modes)
    found, left_out = trainers(
        experiment, suite.device, threads, len(os.sched_getaffinity(0)), suite.compile_modes
    )  # fmt: skip
    data = make_data(STEPS, experiment, suite.device)

    def candidate(trainer: Trainer) -> Candidate:
        return Candidate(
            trainer.name, trainer.role, lambda: trainer.train(data), None, True, threads, trainer.layout
        )  # fmt: skip

    measure(
        [candidate(trainer) for trainer in found],
        "network3_step",
        shape=f"experiment {number}",
        batch=experiment.mini_batch_size,
        precision="float32",
        phase=f"{STEPS} training steps",
        threads=threads,
        left_out=left_out,
    )
