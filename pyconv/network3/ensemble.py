"""Several networks that decide together."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyconv.network3.descent import Data
from pyconv.network3.network import Network

VOTES = ("plurality", "average")


class Ensemble:
    """Networks for the same inputs and classes.

    Args:
        networks: at least one; they may differ in everything else.

    Raises:
        ValueError: no network, or networks that do not fit each other.
        TypeError: something that is not a network.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        if isinstance(networks, Network):
            raise TypeError("expected a list of networks, but got a Network")
        self.networks = list(networks)
        for number, network in enumerate(self.networks):
            if not isinstance(network, Network):
                raise TypeError(f"expected networks, but got {type(network).__name__} as network {number}")
        if not self.networks:
            raise ValueError("expected at least one network, but got none")
        sizes = [(network.layers[0].n_in, network.layers[-1].n_out) for network in self.networks]
        for number, found in enumerate(sizes):
            if found != sizes[0]:
                raise ValueError(
                    f"expected networks from {sizes[0][0]} inputs to {sizes[0][1]} classes, as network 0, but network "
                    f"{number} goes from {found[0]} to {found[1]}"
                )

    def probabilities(self, x: Tensor) -> Tensor:
        """The mean of the networks' outputs (n, classes) for the examples x (n, features), without dropout."""
        return self._outputs(x).mean(dim=0)

    def _outputs(self, x: Tensor) -> Tensor:
        """(networks, n, classes), on the device of x and of the widest of the networks' dtypes."""
        outputs = []
        for network in self.networks:
            param = network.params[0]
            outputs.append(network.probabilities(x.to(param.device, param.dtype)).to(x.device))
        dtype = functools.reduce(torch.promote_types, (output.dtype for output in outputs))
        return torch.stack([output.to(dtype) for output in outputs])

    def predict(self, x: Tensor, vote: str = "plurality") -> Tensor:
        """The predicted classes (n,) int64 of the examples x (n, features).

        Args:
            vote: "plurality", the class that most networks predict, and of several with as many votes the one of the
                highest mean probability; or "average", the class of the highest mean probability.
        """
        if vote not in VOTES:
            raise ValueError(f"vote must be one of {', '.join(map(repr, VOTES))}, but got {vote!r}")
        outputs = self._outputs(x)
        mean = outputs.mean(dim=0)
        if vote == "average":
            return mean.argmax(dim=1)
        votes = torch.zeros_like(mean, dtype=torch.int64)
        for predicted in outputs.argmax(dim=2):
            votes += torch.nn.functional.one_hot(predicted, mean.shape[1])
        return mean.masked_fill(votes < votes.amax(dim=1, keepdim=True), -torch.inf).argmax(dim=1)

    def accuracy(self, data: Data, vote: str = "plurality") -> float:
        """The fraction of all examples of `data` whose label is predicted.

        Raises:
            RuntimeError, TypeError, ValueError: as `Network.SGD` does for its data.
        """
        x, y = self.networks[0]._prepare_evaluation("data", data)
        if len(x) == 0:
            raise ValueError("data: expected at least 1 example, but got 0")
        return int((self.predict(x, vote) == y).sum()) / len(y)
