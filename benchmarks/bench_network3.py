"""Whole training steps of the book's experiments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.machine import peaks
from benchmarks.network_peers import EXPERIMENTS, Data, Experiment, PyconvTrainer, Trainer, trainers
from benchmarks.timing import Candidate
from pyconv.network3.data import load_digits

_STEPS = {(1, 10): 500, (6, 1): 250, (6, 128): 20}
_OTHER_STEPS = 100
"""Mini-batches per timed call: enough that starting and ending an epoch is a small part of it."""
_CHECKED_STEPS = 5
"""Few, since rounding sends float32 trajectories apart at the first near-tie of a pooling window; but more than the
steps that precede a capture."""
_TOLERANCE = 1e-3


def make_data(mini_batches: int, experiment: Experiment, device: str) -> Data:
    """Handwritten digits, those inside the package over and over: how many values are 0 decides what a step costs."""
    with contextlib.redirect_stderr(io.StringIO()):  # it says which data it loads
        (x, y), *_ = load_digits()
    positions = torch.arange(mini_batches * experiment.mini_batch_size) % len(x)
    return x[positions].to(device), y[positions].to(device)


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


def test_training_step(measure, suite, threads: int, network3_step: tuple[int, int]) -> None:
    number, batch = network3_step
    experiment = dataclasses.replace(EXPERIMENTS[number], mini_batch_size=batch)
    torch.set_num_threads(threads)
    # On a GPU, captured steps are the peers that count; compiling takes the time that the layers' goals need.
    modes = suite.compile_modes if suite.device == "cpu" else ()
    cores = len(os.sched_getaffinity(0))
    # Without dropout, since everyone has masks of their own.
    plain, _ = trainers(experiment.without_dropout(), suite.device, threads, cores, modes)
    checks = checks_against_eager(plain, make_data(_CHECKED_STEPS, experiment, suite.device))
    found, left_out = trainers(experiment, suite.device, threads, cores, modes)
    steps = _STEPS.get(network3_step, _OTHER_STEPS)
    data = make_data(steps, experiment, suite.device)
    rows = PyconvTrainer(experiment, "cpu").network.compile().rows

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
        phase=f"{steps} training steps",
        threads=threads,
        flops=steps * sum(row["flops"] for row in rows),
        min_bytes=steps * sum(row["bytes"] for row in rows),
        peaks=peaks(suite.device, "float32", threads),
        left_out=left_out,
    )
