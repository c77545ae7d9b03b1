"""Learning rates of `Network.SGD` by epoch: a number, a function of the epoch, or a schedule of torch.optim."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Eta = float | Callable[[int], float] | LRScheduler


def checked_number(value: float, name: str) -> float:
    """`value` as a float, if it is a finite number that is not negative."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, but got {value!r}")
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be finite and not negative, but got {value}")
    return float(value)


class Rate:
    """The learning rate of one epoch after the other.

    A schedule's optimizer is only where it keeps the rate: it need not hold the network's parameters, and its
    ``step`` is not called.
    """

    def __init__(self, eta: Eta) -> None:
        self._eta = eta
        if isinstance(eta, LRScheduler):
            self._momentum = self._momenta()
            if isinstance(eta, ReduceLROnPlateau) and eta.mode != "max":
                raise ValueError(
                    f"eta: a ReduceLROnPlateau is given the validation accuracy: expected its mode to be 'max', but "
                    f"got {eta.mode!r}"
                )
        elif isinstance(eta, numbers.Real):
            checked_number(eta, "eta")
        elif not callable(eta):
            raise TypeError(
                f"eta must be a number, a function of the epoch or a schedule of torch.optim.lr_scheduler, but got "
                f"{eta!r}"
            )

    def of_epoch(self, epoch: int) -> float:
        """The rate of the epoch that comes next, number `epoch`."""
        if isinstance(self._eta, LRScheduler):
            rates = {group["lr"] for group in self._eta.optimizer.param_groups}
            if len(rates) != 1:
                raise ValueError(f"expected a schedule of one learning rate, but got {sorted(rates)} of its groups")
            rate = rates.pop()
            return checked_number(getattr(rate, "item", lambda: rate)(), f"the schedule's rate of epoch {epoch}")
        if callable(self._eta):
            return checked_number(self._eta(epoch), f"eta({epoch})")
        return float(self._eta)

    def end_epoch(self, validation_accuracy: float) -> None:
        if not isinstance(self._eta, LRScheduler):
            return
        with warnings.catch_warnings():
            # The schedule looks whether its optimizer has made a step, which is never.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            if isinstance(self._eta, ReduceLROnPlateau):
                self._eta.step(validation_accuracy)
            else:
                self._eta.step()
        if self._momenta() != self._momentum:
            raise ValueError(
                "the schedule changes the momentum, which is constant in SGD; give it cycle_momentum=False"
            )

    def replay(self, etas: Sequence[float], validation_accuracies: Sequence[float]) -> None:
        """Go through the epochs of an earlier training, which had these rates.

        Raises:
            ValueError: another rate than the training had, or a schedule that has gone on before.
        """
        steps = getattr(self._eta, "last_epoch", 0)  # a ChainedScheduler does not tell
        if isinstance(self._eta, LRScheduler) and steps != 0:
            raise ValueError(
                f"expected a fresh schedule, which goes through the epochs of the training to be resumed, but got one "
                f"of epoch {steps}"
            )
        for epoch, (eta, accuracy) in enumerate(zip(etas, validation_accuracies)):
            rate = self.of_epoch(epoch)
            if rate != eta:
                raise ValueError(
                    f"expected the learning rates of the training to be resumed, {eta} in epoch {epoch}, but got {rate}"
                )
            self.end_epoch(accuracy)

    def _momenta(self) -> list[object]:
        return [(group.get("momentum"), group.get("betas")) for group in self._eta.optimizer.param_groups]
