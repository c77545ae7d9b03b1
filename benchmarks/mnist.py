"""Experiment 6 on the real MNIST: pyconv.network3 and plain torch loops, an epoch of each in turn."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, peers
from benchmarks.network_peers import EXPERIMENTS, PyconvTrainer, TorchTrainer, Trainer
from benchmarks.timing import Summary


def run(data: Path | None, *, epochs: int, threads: int, device: str, seed: int) -> dict[str, Any]:
    """Train every trainer from the same parameters for `epochs` epochs, alternating after each.

    Only training is timed. The accuracies are those after the last epoch.

    Returns:
        machine, threads, epochs, and by trainer: seconds of each epoch, ratio to ours, validation and test
            accuracy.
    """
    from pyconv import network3

    folder = data or os.environ.get("PYCONV_DATA")
    if folder is None:
        raise SystemExit(
            "no MNIST: give --data FOLDER or set PYCONV_DATA to the folder of the four IDX files"
        )
    training, validation, test = (
        tuple(part.to(device) for part in split) for split in network3.load_data_shared(str(folder))
    )
    torch.set_num_threads(threads)
    experiment = EXPERIMENTS[6]
    ours = PyconvTrainer(experiment, device, seed)
    start = ours.parameters()
    rivals = [
        TorchTrainer(experiment, start, layout, "conv-relu-pool", graphed=graphed)
        for graphed in ((False, True) if device == "cuda" else (False,))
        for layout in (peers.NCHW, peers.NHWC)
    ]
    everyone: list[Trainer] = [ours, *rivals]
    seconds: dict[str, list[float]] = {trainer.name: [] for trainer in everyone}
    for epoch in range(epochs):
        for trainer in everyone:
            begin = time.perf_counter()
            own_account = trainer.train(training)
            if device == "cuda":
                torch.cuda.synchronize()
            # SGD of network3 also evaluates after the epoch and says how long the training alone took.
            seconds[trainer.name].append(own_account or time.perf_counter() - begin)
            print(f"epoch {epoch}: {trainer.name}: {seconds[trainer.name][-1]:.2f} s", flush=True)
    return {
        "machine_info": machine.describe(),
        "experiment": experiment.number,
        "device": device,
        "threads": threads,
        "epochs": epochs,
        "seed": seed,
        "trainers": {
            trainer.name: {
                "role": trainer.role,
                "seconds_per_epoch": [round(s, 3) for s in seconds[trainer.name]],
                "ratio_to_ours": Summary.of(
                    [a / b for a, b in zip(seconds[trainer.name], seconds[ours.name], strict=True)]
                ).median,
                "validation_accuracy": trainer.accuracy(validation),
                "test_accuracy": trainer.accuracy(test),
            }
            for trainer in everyone
        },
    }


def format_report(report: dict[str, Any]) -> str:
    lines = [f"experiment {report['experiment']}, {report['epochs']} epochs, {report['threads']} threads"]
    for name, entry in report["trainers"].items():
        per_epoch = Summary.of(entry["seconds_per_epoch"]).median
        lines.append(
            f"{name:40} {per_epoch:8.2f} s per epoch (median), {entry['ratio_to_ours']:.2f}x ours, "
            f"validation {entry['validation_accuracy']:.2%}, test {entry['test_accuracy']:.2%}"
        )
    return "\n".join(lines)
