"""What training measured, epoch by epoch, and what it says about overfitting."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from typing import Any


class History(dict[str, list[Any]]):
    """What `Network.SGD` measured: lists with one entry per epoch, and the best of them.

    Keys:
        epoch: number of the epoch, from 0.
        eta: learning rate of the epoch.
        train_cost: mean cost of the epoch's mini-batches, each before its update, including the L2 term.
        train_accuracy: fraction after the epoch, without dropout and distortions; None unless `diagnose` asked for it.
        validation_cost: mean cost after the epoch, without the L2 term; None unless `diagnose` asked for it.
        validation_accuracy: fraction after the epoch.
        test_accuracy: fraction after the epoch; None where the validation accuracy was below the best so far.
        seconds: wall time of the epoch's training, without the evaluation.

    Attributes:
        validation_size: number of validation examples.
        best_validation_accuracy: the highest; where several epochs reached it, the last of them counts as the
            best.
        best_epoch, best_iteration: the epoch, and its last mini-batch counted over all epochs, from 0.
        best_test_accuracy: after the best epoch; None without test data.
    """

    KEYS = (
        "epoch", "eta", "train_cost", "train_accuracy", "validation_cost", "validation_accuracy", "test_accuracy",
        "seconds",
    )  # fmt: skip
    _ATTRIBUTES = (
        "validation_size", "best_validation_accuracy", "best_epoch", "best_iteration", "best_test_accuracy"
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__({key: [] for key in self.KEYS})
        self.validation_size = 0
        self.best_validation_accuracy = 0.0
        self.best_epoch = -1
        self.best_iteration = -1
        self.best_test_accuracy: float | None = None

    def _append(self, record: dict[str, Any]) -> None:
        for key in self.KEYS:
            self[key].append(record[key])

    @property
    def epochs_without_improvement(self) -> int:
        """How many epochs have gone by since the validation accuracy last rose above all before it."""
        accuracies = self["validation_accuracy"]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each epoch, under a line with the keys; what is None is left empty."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.KEYS)
            writer.writerows(zip(*(self[key] for key in self.KEYS)))

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the keys as columns and the epoch as index; needs pandas."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            if error.name != "pandas":
                raise
            raise ImportError("History.to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(dict(self)).set_index("epoch")

    def to_json(self) -> str:
        """Everything as one JSON object; `from_json` gives the same History back."""
        return json.dumps({**self, **{name: getattr(self, name) for name in self._ATTRIBUTES}})

    @classmethod
    def from_json(cls, text: str) -> History:
        """The History that `to_json` wrote.

        Raises:
            ValueError: `text` is not one.
        """
        try:
            values = json.loads(text)
            history = cls()
            for key in cls.KEYS:
                history[key] = list(values[key])
            for name in cls._ATTRIBUTES:
                setattr(history, name, values[name])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a History as JSON, but got another text ({error!r})") from None
        if len({len(history[key]) for key in cls.KEYS}) != 1:
            raise ValueError("expected a History as JSON, but got lists of different lengths")
        return history


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """How well a network does on what it has seen, and on what it has not.

    Attributes:
        overfitting: whether the accuracy on the training data is further above that on the validation data than
            sampling explains.
        epoch: the last one, whose figures these are.
        train_accuracy, validation_accuracy: fractions.
        gap: the first minus the second.
        sampling_error: two standard errors of the validation accuracy.
        lowest_cost_epoch: in which the validation cost was lowest.
        cost_rise: the last validation cost over the lowest, minus 1.
        verdict: all this in words.
    """

    overfitting: bool
    epoch: int
    train_accuracy: float
    validation_accuracy: float
    gap: float
    sampling_error: float
    lowest_cost_epoch: int
    cost_rise: float
    verdict: str

    def __str__(self) -> str:
        return self.verdict


_RISING_COST = 0.1
"""A validation cost that has risen by so much over its lowest is no longer noise between epochs."""


def diagnose(history: History) -> Diagnosis:
    """Say from the curves of a training whether the network overfits, and what helps.

    Args:
        history: of ``Network.SGD(..., diagnose=True)``.

    Raises:
        ValueError: the history has no accuracies on the training data.
    """
    if not history["epoch"] or history["train_accuracy"][-1] is None:
        raise ValueError("expected a History with the accuracy on the training data; train with diagnose=True")
    train, validation = history["train_accuracy"][-1], history["validation_accuracy"][-1]
    # Of a fraction of n independent examples; the second term keeps it from being 0 where all are right.
    n = history.validation_size
    sampling_error = 2.0 * math.sqrt(validation * (1.0 - validation) / n + 1.0 / (4.0 * n * n))
    costs = history["validation_cost"]
    # A training that was resumed may have been asked for it in its last epochs only.
    lowest = min((epoch for epoch, cost in enumerate(costs) if cost is not None), key=costs.__getitem__)
    rise = costs[-1] / costs[lowest] - 1.0 if costs[lowest] > 0.0 else 0.0
    gap = train - validation
    overfitting = gap > sampling_error
    epoch = history["epoch"][-1]
    said = [
        f"After epoch {epoch} the network gets {train:.2%} of the training data right and {validation:.2%} of the "
        f"validation data: a gap of {100 * gap:.2f} points, where the size of the validation set alone makes up to "
        f"{100 * sampling_error:.2f}."
    ]
    if overfitting:
        said.append("It overfits: it has learned things about the training data that are not true of other data.")
        if rise > _RISING_COST:
            said.append(
                f"The validation cost has risen by {rise:.0%} since epoch {history['epoch'][lowest]}: the network "
                f"grows more and more sure of its mistakes."
            )
        said.append("More data, or distortions of them, help most; then dropout, a larger lmbda, fewer parameters.")
    else:
        said.append("It does not overfit.")
        if history.epochs_without_improvement == 0:
            said.append("It was still improving: train it for longer.")
        else:
            said.append("More parameters or a smaller learning rate at the end may raise both accuracies.")
    return Diagnosis(
        overfitting, epoch, train, validation, gap, sampling_error, history["epoch"][lowest], rise, " ".join(said)
    )
