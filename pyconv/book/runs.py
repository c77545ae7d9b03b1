"""Runs of the book's experiments: RESULTS/EXPERIMENT/SEED/, with a checkpoint while one trains, run.json at its end.

    run.json    {"format", "experiment", "seed", "settings", "data", "parameters", "history", "labels",
                 "predictions", "machine"}; predictions of the test digits by the best epoch's network, one character
                 for each
    vote.json   RESULTS/VOTE/NUMBER/: {"format", "experiment", "number", "seeds", "labels", "predictions"}, the last by
                 way of voting

The epoch is chosen on the validation set alone; the test set is not looked at before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyconv
from pyconv.errors import DataError
from pyconv.machine import cpu_model
from pyconv.network3 import Ensemble, History, Network, expand_mnist, load_network
from pyconv.network3.checkpoint import finished_epochs
from pyconv.network3.descent import Data, fingerprint
from pyconv.network3.ensemble import VOTES as WAYS
from pyconv.network3.experiments import EXPERIMENTS, VOTES, Experiment
from pyconv.network3.serialization import write_file

RUN_FORMAT, VOTE_FORMAT = "pyconv.book.run.1", "pyconv.book.vote.1"
MINI_BATCH_SIZE = 10

MNIST = {
    "training": "50000x784:0e503824 50000:d1d55ed5",
    "validation": "10000x784:a8b1c556 10000:3d797077",
    "test": "10000x784:373d28e6 10000:091bdade",
}
"""Fingerprints of the real data."""


class BusyError(RuntimeError):
    """Another process trains this run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of an experiment.

    Attributes:
        experiment: its name in `EXPERIMENTS`.
        seed: of initial weights, dropout, expanded data and all else that is random.
        settings: of the training, by name.
        data: fingerprints of training, validation and test data.
        parameters: how many numbers were trained.
        history: of the training.
        labels, predictions: of the test digits, one character for each.
        machine: versions, instruction set, threads, model of the CPU.
    """

    experiment: str
    seed: int
    settings: dict[str, Any]
    data: dict[str, str]
    parameters: int
    history: History
    labels: str
    predictions: str
    machine: dict[str, Any]

    @property
    def test_accuracy(self) -> float:
        return accuracy(self.predictions, self.labels)

    @property
    def notes(self) -> list[str]:
        """How the run differs from the book's experiment."""
        notes = []
        epochs, of_book = self.settings["epochs"], EXPERIMENTS[self.experiment].epochs
        if epochs != of_book:
            notes.append(f"{epochs} of {of_book} epochs")
        if self.data != MNIST:
            notes.append("not MNIST")
        return notes


@dataclasses.dataclass(frozen=True)
class VoteResult:
    """What networks of one experiment give together.

    Attributes:
        experiment: its name in `VOTES`.
        number: of the group of networks, from 0.
        seeds: of its networks.
        labels: of the test digits, one character for each.
        predictions: the same by way of voting, see `Ensemble.predict`.
    """

    experiment: str
    number: int
    seeds: list[int]
    labels: str
    predictions: dict[str, str]

    def test_accuracy(self, way: str = "plurality") -> float:
        return accuracy(self.predictions[way], self.labels)


def accuracy(predictions: str, labels: str) -> float:
    """The fraction of digits that are predicted."""
    return sum(p == label for p, label in zip(predictions, labels)) / len(labels)


def _digits(values: Tensor) -> str:
    return "".join(map(str, values.tolist()))


_SETS = {"training", "validation", "test"}
_MEASURED = ("train_cost", "train_accuracy", "validation_cost", "validation_accuracy", "seconds")
"""Keys of a run's history under which there is a number for each epoch."""


def _are_digits(text: object) -> bool:
    return isinstance(text, str) and text.isascii() and text.isdecimal()


def _check(path: Path, expected: str, parts: dict[str, bool]) -> None:
    """DataError unless all `parts` of a file are those that belong there."""
    foreign = [name for name, fits in parts.items() if not fits]
    if foreign:
        raise DataError(f"{path}: expected {expected}, found a file with other {', '.join(foreign)}")


class Results:
    """The directory with the runs; nothing is made there before it is needed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def directory(self, experiment: str, number: int) -> Path:
        return self.path / experiment / str(number)

    def run(self, experiment: str, seed: int) -> Run | None:
        """The finished run, if there is one.

        Raises:
            DataError: its file is a foreign or a damaged one.
        """
        path = self.directory(experiment, seed) / "run.json"
        values = self._read(path, RUN_FORMAT)
        if values is None:
            return None
        try:
            run = Run(**{**values, "history": History.from_json(json.dumps(values["history"]))})
            _check(path, f"the run of experiment {experiment}, seed {seed}", {
                "experiment": run.experiment == experiment,
                "seed": run.seed == seed,
                "settings": len(run.history["epoch"]) == run.settings["epochs"] > 0,
                "data": _SETS == set(run.data) and run.data["training"].partition("x")[0].isdecimal(),
                "parameters": isinstance(run.parameters, int),
                "history": all(isinstance(value, (int, float)) for key in _MEASURED for value in run.history[key]),
                "labels": _are_digits(run.labels),
                "predictions": _are_digits(run.predictions) and len(run.predictions) == len(run.labels),
                "machine": set(machine()) <= set(run.machine),
            })  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: expected a run, found a damaged one ({error!r})") from None
        return run

    def vote(self, experiment: str, number: int) -> VoteResult | None:
        """The finished vote, if there is one; as `run`."""
        path = self.directory(experiment, number) / "vote.json"
        values = self._read(path, VOTE_FORMAT)
        if values is None:
            return None
        try:
            vote = VoteResult(**values)
            predictions = [vote.predictions[way] for way in WAYS]
            _check(path, f"vote {number} of {experiment}", {
                "experiment": vote.experiment == experiment,
                "number": vote.number == number,
                "seeds": vote.seeds == list(vote_seeds(experiment, number)),
                "labels": _are_digits(vote.labels),
                "predictions": all(_are_digits(p) and len(p) == len(vote.labels) for p in predictions),
            })  # fmt: skip
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: expected a vote, found a damaged one ({error!r})") from None
        return vote

    def runs(self, experiment: str) -> list[Run]:
        """All finished runs of an experiment, by seed."""
        found = (self.run(experiment, seed) for seed in self._numbers(experiment))
        return [run for run in found if run is not None]

    def begun(self, experiment: str) -> int:
        """How many runs of an experiment have finished epochs, but not all."""
        directories = (self.directory(experiment, seed) for seed in self._numbers(experiment))
        return sum(
            (directory / "last.safetensors").exists() and not (directory / "run.json").exists()
            for directory in directories
        )

    def votes(self, experiment: str) -> list[VoteResult]:
        """All finished votes, by number."""
        found = (self.vote(experiment, number) for number in self._numbers(experiment))
        return [vote for vote in found if vote is not None]

    def network(self, experiment: str, seed: int) -> Network:
        """The best epoch's network of a run."""
        return load_network(self.directory(experiment, seed) / "best.safetensors")

    def save_run(self, run: Run) -> None:
        values = {"format": RUN_FORMAT, **vars(run), "history": json.loads(run.history.to_json())}
        self._write(self.directory(run.experiment, run.seed) / "run.json", values)

    def save_vote(self, vote: VoteResult) -> None:
        self._write(self.directory(vote.experiment, vote.number) / "vote.json", {"format": VOTE_FORMAT, **vars(vote)})

    @contextlib.contextmanager
    def locked(self, experiment: str, number: int) -> Iterator[Path]:
        """The directory of a run, which no other process gets meanwhile.

        Raises:
            BusyError: another has it.
        """
        directory = self.directory(experiment, number)
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"experiment {experiment}, seed {number}: another process trains it") from None
            yield directory

    def _numbers(self, experiment: str) -> list[int]:
        folder = self.path / experiment
        # As `directory` writes them: not 07 beside 7.
        names = [p.name for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name == str(int(name)))

    @staticmethod
    def _read(path: Path, form: str) -> dict[str, Any] | None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path}: expected JSON, found a damaged file ({error})") from None
        if not isinstance(values, dict) or values.pop("format", None) != form:
            raise DataError(f"{path}: expected the format {form!r}, found another")
        return values

    @staticmethod
    def _write(path: Path, values: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(values, indent=1) + "\n").encode())


@dataclasses.dataclass(frozen=True)
class MnistData:
    """Training, validation and test data, and by seed the expanded training data, of which one is kept."""

    training: Data
    validation: Data
    test: Data
    _expanded: dict[int, Data] = dataclasses.field(default_factory=dict)

    def training_of(self, experiment: Experiment, seed: int) -> Data:
        if not experiment.expanded:
            return self.training
        if seed not in self._expanded:
            self._expanded.clear()
            self._expanded[seed] = expand_mnist(self.training, seed)
        return self._expanded[seed]


def _settings(experiment: Experiment, epochs: int | None) -> dict[str, Any]:
    settings = dataclasses.asdict(experiment)
    settings["activation_fn"] = experiment.activation_fn.__name__
    for name in ("title", "book_accuracy"):
        del settings[name]
    settings["epochs"] = experiment.epochs if epochs is None else epochs
    return json.loads(json.dumps(settings))


def train(
    results: Results,
    name: str,
    seed: int,
    data: MnistData,
    *,
    epochs: int | None = None,
    on_start: Callable[[int, int], None] = lambda done, epochs: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Run:
    """Train experiment `name` from `seed`, or go on where that was interrupted; a finished run is only read.

    Args:
        epochs: instead of the experiment's.
        on_start: called before the training with the number of finished epochs and of all.
        on_epoch: called after each epoch with its record, see `History`.

    Raises:
        BusyError: another process trains it.
        ValueError: the directory holds a run with other settings or data.
    """
    experiment = EXPERIMENTS[name]
    settings = _settings(experiment, epochs)
    fingerprints = {
        part: fingerprint(getattr(data, part)) for part in ("training", "validation", "test")
    }
    with results.locked(name, seed) as directory:
        run = results.run(name, seed)
        if run is not None:
            for what, expected, found in (("settings", settings, run.settings), ("data", fingerprints, run.data)):
                if found != expected:
                    differences = ", ".join(
                        f"expected {key} {expected.get(key)!r}, found {found.get(key)!r}"
                        for key in sorted({*found, *expected})
                        if found.get(key) != expected.get(key)
                    )
                    raise ValueError(
                        f"{directory} holds a run with other {what}: {differences}; take another directory for the "
                        f"results, or delete this one"
                    )
            return run
        torch.manual_seed(seed)
        network = experiment.network(MINI_BATCH_SIZE)
        on_start(finished_epochs(directory), settings["epochs"])
        history = network.SGD(
            data.training_of(experiment, seed), settings["epochs"], MINI_BATCH_SIZE,
            experiment.rate(settings["epochs"]), data.validation, None, experiment.lmbda, **experiment.options(seed),
            checkpoint=directory, resume=True, diagnose=10_000, callback=on_epoch, verbose=False, restore_best=True,
        )  # fmt: skip
        run = Run(
            name, seed, settings, fingerprints, sum(p.numel() for p in network.params), history,
            _digits(data.test[1]), _digits(network.predict(data.test[0])), machine(),
        )  # fmt: skip
        results.save_run(run)
        (directory / "last.safetensors").unlink()
        return run


def vote(results: Results, name: str, number: int, data: MnistData) -> VoteResult:
    """Let the networks of group `number` vote, whose runs are finished: seeds from networks * number on."""
    entry = VOTES[name]
    seeds = vote_seeds(name, number)
    ensemble = Ensemble([results.network(entry.experiment, seed) for seed in seeds])
    x, y = data.test
    result = VoteResult(
        name, number, list(seeds), _digits(y), {way: _digits(ensemble.predict(x, way)) for way in WAYS}
    )
    results.save_vote(result)
    return result


def vote_seeds(name: str, number: int) -> range:
    """The seeds of the networks of a group."""
    networks = VOTES[name].networks
    return range(networks * number, networks * (number + 1))


def machine() -> dict[str, Any]:
    """Versions, instruction set, threads and model of the CPU."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": pyconv.isa(),
        "pyconv": pyconv.__version__,
        "torch": str(torch.__version__),
    }
