"""A recipe that reaches 99.6 % on the real MNIST: pyconv.network3 beside the same training in plain torch."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.network_peers import IMAGE, Data, Experiment, PyconvTrainer, TorchTrainer
from benchmarks.timing import Summary

COPIES = 10
"""Of every training image: itself, and the others distorted, each in its own way."""
PASSES = 5
"""Over all of them."""
MOMENTUM = 0.9
EXPERIMENT = Experiment(
    0, conv_maps=(20, 40), hidden=(500,), activation="relu", eta=0.006, lmbda=4.0, p_dropout=0.4, mini_batch_size=10
)


def eta(number: int) -> float:
    """Of a pass: falls from EXPERIMENT.eta towards 0 along half a wave of the cosine."""
    return EXPERIMENT.eta * 0.5 * (1 + math.cos(math.pi * (number + 0.5) / PASSES))


DEGREES, SCALE, SHEAR, PIXELS = 10.0, 0.08, 0.1, 1.5
"""The most by which a distortion turns, enlarges or reduces, shears and shifts an image."""


def distorted(data: Data, seed: int) -> Data:
    """COPIES of every image: the first as it is, the others under random affine maps, bilinear."""
    generator = torch.Generator().manual_seed(seed)
    _, height, width = IMAGE

    def uniform(count: int, most: float) -> Tensor:
        return most * (2 * torch.rand(count, generator=generator) - 1)

    copies = [data[0]]
    for part in data[0].split(1000) * (COPIES - 1):
        n = len(part)
        angle, shear = uniform(n, math.radians(DEGREES)), uniform(n, SHEAR)
        scale_x, scale_y = 1 + uniform(n, SCALE), 1 + uniform(n, SCALE)
        cosine, sine = angle.cos(), angle.sin()
        # grid_sample's coordinates run from -1 to 1.
        right, down = uniform(n, 2 * PIXELS / width), uniform(n, 2 * PIXELS / height)
        top = torch.stack([cosine * scale_x, (shear * cosine - sine) * scale_y, right], 1)
        bottom = torch.stack([sine * scale_x, (shear * sine + cosine) * scale_y, down], 1)
        grid = F.affine_grid(torch.stack([top, bottom], 1), [n, *IMAGE], align_corners=False)
        copies.append(F.grid_sample(part.view(-1, *IMAGE), grid, align_corners=False).flatten(1))
    return torch.cat(copies), data[1].repeat(COPIES)


class PyconvRecipe(PyconvTrainer):
    """`pyconv.network3`; He's initial weights, and a new order in every pass."""

    def __init__(self, seed: int) -> None:
        super().__init__(EXPERIMENT, "cpu", seed, init="he")

    def train_passes(self, data: Data, count: int) -> float:
        """The first `count` passes; seconds without evaluation."""
        e = self.experiment
        few = tuple(part[:1000] for part in data)
        history = self.network.SGD(
            data, count, e.mini_batch_size, eta, few, None, e.lmbda, momentum=MOMENTUM, shuffle=True, verbose=False
        )
        return sum(history["seconds"])


class TorchRecipe(TorchTrainer):
    """A plain torch loop with torch.optim.SGD, fused, which is its fastest form on a CPU."""

    def __init__(self, seed: int, layout: torch.memory_format, order: str, compile_mode: str | None) -> None:
        super().__init__(EXPERIMENT, PyconvRecipe(seed).parameters(), layout, order, compile_mode)
        biases = [p for p in self.params if p.dim() == 1]
        self._optimizer = torch.optim.SGD(
            [{"params": self.weights}, {"params": biases, "weight_decay": 0.0}], lr=1.0, momentum=MOMENTUM, fused=True
        )

    def train_passes(self, data: Data, count: int) -> float:
        """The first `count` passes; seconds."""
        start = time.perf_counter()
        self.model.train()
        x, y = self._images(data[0]), data[1]
        size = self.experiment.mini_batch_size
        batches = len(x) // size
        weights, biases = self._optimizer.param_groups
        weights["weight_decay"] = self.experiment.lmbda / batches
        for number in range(count):
            weights["lr"] = biases["lr"] = eta(number)
            for indices in torch.randperm(len(x))[: batches * size].split(size):
                loss = self.loss(x[indices], y[indices])
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
        return time.perf_counter() - start


def run(
    data: Path | None, *, first_seed: int, seeds: int, peer_seeds: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Time everyone on one copy of the training images, in turn, if there is to be a round; then train ours in full
    from `seeds` seeds, and the best peer of the rounds from `peer_seeds` of them.

    Returns:
        the recipe, the machine, by trainer the seconds of each timed round and their ratio to ours, and of the whole
        trainings the seconds, those of the distortions included, and the accuracies.
    """
    from pyconv import network3

    folder = data or os.environ.get("PYCONV_DATA")
    if folder is None:
        raise SystemExit("no MNIST: give --data FOLDER or set PYCONV_DATA to the folder of the four IDX files")
    training, validation, test = network3.load_data_shared(str(folder))
    torch.set_num_threads(threads)
    ours = PyconvRecipe.name
    makers: dict[str, Callable[[int], PyconvRecipe | TorchRecipe]] = {ours: PyconvRecipe}
    for mode, layouts in ((None, (peers.NCHW, peers.NHWC)), ("default", (peers.NHWC,))):
        for layout in layouts:
            for order in peers.ORDERS:
                maker = functools.partial(TorchRecipe, layout=layout, order=order, compile_mode=mode)
                makers[maker(0).name] = maker
    one_copy = {}
    if rounds > 0:
        copy = tuple(part[: len(training[0])] for part in distorted(training, 0))
        seconds = _timed({name: make(0) for name, make in makers.items()}, copy, rounds)
        one_copy = {
            name: {
                "seconds": [round(s, 3) for s in seconds[name]],
                "ratio_to_ours": Summary.of(
                    [a / b for a, b in zip(seconds[name], seconds[ours], strict=True)]
                ).median,
            }
            for name in makers
        }
    rivals = [name for name in one_copy if name != ours]
    best_peer = min(rivals, key=lambda name: one_copy[name]["ratio_to_ours"], default=None)
    trainings = []
    for name, count in ((ours, seeds), (best_peer, peer_seeds if best_peer else 0)):
        for seed in range(first_seed, first_seed + count):
            start = time.perf_counter()
            expanded = distorted(training, seed)
            torch.manual_seed(seed)
            trainer = makers[name](seed)
            preparation = time.perf_counter() - start
            trainings.append(
                {
                    "trainer": name,
                    "seed": seed,
                    "seconds": round(preparation + trainer.train_passes(expanded, PASSES), 1),
                    "validation_accuracy": trainer.accuracy(validation),
                    "test_accuracy": trainer.accuracy(test),
                }
            )
            print(_line(trainings[-1]), flush=True)
    return {
        "machine_info": machine.describe(),
        "threads": threads,
        "recipe": {**dataclasses.asdict(EXPERIMENT), "copies": COPIES, "passes": PASSES, "momentum": MOMENTUM},
        "one_copy": one_copy,
        "best_peer": best_peer,
        "trainings": trainings,
    }


def _timed(
    trainers: dict[str, PyconvRecipe | TorchRecipe], data: Data, rounds: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    few = tuple(part[: 20 * EXPERIMENT.mini_batch_size] for part in data)
    for trainer in trainers.values():
        trainer.train_passes(few, 1)  # compiles
    for number in range(rounds):
        for name, trainer in trainers.items():
            seconds[name].append(trainer.train_passes(data, 1))
            print(f"round {number}: {name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def _line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['trainer']:44} seed {entry['seed']}: {entry['seconds']:7.1f} s, "
        f"validation {entry['validation_accuracy']:.2%}, test {entry['test_accuracy']:.2%}"
    )


def format_report(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    lines = [f"{recipe['passes']} passes over {recipe['copies']} copies of every image, {report['threads']} threads"]
    for name, entry in report["one_copy"].items():
        per_copy = Summary.of(entry["seconds"]).median
        lines.append(f"{name:44} {per_copy:7.2f} s a copy (median), {entry['ratio_to_ours']:.2f}x ours")
    lines += map(_line, report["trainings"])
    ours = [e["test_accuracy"] for e in report["trainings"] if e["trainer"] == PyconvRecipe.name]
    if ours:
        lines.append(f"mean test accuracy of ours over {len(ours)} seeds: {sum(ours) / len(ours):.3%}")
    return "\n".join(lines)
