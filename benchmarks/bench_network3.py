"""Whole training steps of the book's experiments 6 and 10 at its mini-batch size."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.network_peers import (
    CLASSES,
    EXPERIMENTS,
    IMAGE,
    Data,
    Experiment,
    PyconvTrainer,
    Trainer,
    trainers,
)
from benchmarks.timing import Candidate

STEPS = 50
"""Mini-batches per timed call: enough that starting and ending an epoch is a small part of it."""
_CHECKED_STEPS = 5
"""Few, since rounding sends float32 trajectories apart at the first near-tie of a pooling window; but more than the
steps that precede a capture."""
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


def checks_against_eager(found: list[Trainer], data: Data) -> dict[str, Callable[[], None]]:
    """By name: a check that a trainer ends its first steps at the parameters of the first torch trainer."""

    def end_of(trainer: Trainer) -> list[Tensor]:
        trainer.train(data)
        return [p.double().cpu() for p in trainer.parameters()]

    reference = end_of(found[1])

    def check(trainer: Trainer) -> None:
        got = reference if trainer is found[1] else end_of(trainer)
        for parameter, expected in zip(got, reference, strict=True):
            peers.check_close(parameter, expected, _TOLERANCE, f"a parameter of {trainer.name}")

    return {trainer.name: functools.partial(check, trainer) for trainer in found}


@pytest.mark.parametrize("number", EXPERIMENTS, ids=lambda number: f"experiment{number}")
def test_training_step(measure, suite, threads: int, number: int) -> None:
    experiment = EXPERIMENTS[number]
    torch.set_num_threads(threads)
    # On a GPU, captured steps are the peers that count; compiling takes the time that the layers' goals need.
    modes = suite.compile_modes if suite.device == "cpu" else ()
    cores = len(os.sched_getaffinity(0))
    # Without dropout, since everyone has masks of their own.
    plain, _ = trainers(experiment.without_dropout(), suite.device, threads, cores, modes)
    checks = checks_against_eager(plain, make_data(_CHECKED_STEPS, experiment, suite.device))
    found, left_out = trainers(experiment, suite.device, threads, cores, modes)
    data = make_data(STEPS, experiment, suite.device)

    def candidate(trainer: Trainer) -> Candidate:
        captured = suite.device == "cuda" and isinstance(trainer, PyconvTrainer)
        train = trainer.train_captured if captured else trainer.train
        # A step of ten images is a matter of the host, which the peers' epochs must not leave out.
        return Candidate(
            trainer.name, trainer.role, lambda: train(data), None, True, threads, trainer.layout,
            checks[trainer.name], by_clock=True, own_account=captured,
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
