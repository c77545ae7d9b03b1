"""The experiments of the book's chapter 6 as data, a recipe that goes beyond them, and the demo.

Every network has the form: convolutional layers, fully connected layers, softmax over the ten digits, on images of
28x28.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyconv.augmentation import RandomDistortion
from pyconv.network3.layers import (
    Activation,
    ConvLayer,
    ConvPoolLayer,
    FullyConnectedLayer,
    Layer,
    ReLU,
    SoftmaxLayer,
    sigmoid,
    tanh,
)
from pyconv.network3.network import Network

_SIDE, _CLASSES = 28, 10


@dataclass(frozen=True)
class Convolution:
    """A convolutional layer, by default of the form that all of the book's have.

    Attributes:
        filters: number of filters.
        size: height and width of a filter.
        padding: zeros on each side of the image.
        pool: height and width of the pooling window; 1 for no pooling.
    """

    filters: int
    size: int = 5
    padding: int = 0
    pool: int = 2


@dataclass(frozen=True)
class Experiment:
    """One network and how it is trained.

    Attributes:
        filters: number of filters of each convolutional layer; or a `Convolution`, where it differs from the book's.
        hidden: width of each fully connected layer.
        activation_fn: of all these layers.
        eta, lmbda, epochs: arguments of `Network.SGD`.
        expanded: trained on the training images and their shifts (`expand_mnist`).
        p_dropout: of the fully connected layers and the softmax layer.
        init: of the weights, see the layers.
        momentum, shuffle: arguments of `Network.SGD`.
        falling: eta falls to 0 along half a wave of the cosine, from the first epoch to behind the last.
        distortion: arguments of the `pyconv.RandomDistortion` under which every epoch sees the training images; None
            for the images as they are.
        book_accuracy: percentage of MNIST's test images that the book reports; None where it reports none.
        title: the network in words.
    """

    filters: tuple[int | Convolution, ...]
    hidden: tuple[int, ...]
    activation_fn: Activation
    eta: float
    lmbda: float
    epochs: int
    expanded: bool = False
    p_dropout: float = 0.0
    init: str = "book"
    momentum: float = 0.0
    shuffle: bool = False
    falling: bool = False
    distortion: Mapping[str, float] | None = None
    book_accuracy: float | None = None
    title: str = ""

    def rate(self, epochs: int) -> float | Callable[[int], float]:
        """`eta` for `Network.SGD` with so many epochs."""
        if not self.falling:
            return self.eta
        return lambda epoch: self.eta * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))

    def options(self, seed: int) -> dict[str, Any]:
        """Further arguments of `Network.SGD`."""
        augment = None if self.distortion is None else RandomDistortion(**self.distortion, seed=seed)
        return {"momentum": self.momentum, "shuffle": self.shuffle, "augment": augment}

    def network(self, mini_batch_size: int = 10, device: torch.device | str | None = None) -> Network:
        """The untrained network; its initial values come from PyTorch's default generator."""
        layers: list[Layer] = []
        maps, side = 1, _SIDE
        for entry in self.filters:
            form = entry if isinstance(entry, Convolution) else Convolution(entry)
            filter_shape = form.filters, maps, form.size, form.size
            image_shape = mini_batch_size, maps, side, side
            options = {
                "activation_fn": self.activation_fn, "padding": form.padding, "init": self.init, "device": device
            }  # fmt: skip
            if form.pool == 1:
                layers.append(ConvLayer(filter_shape, image_shape, **options))
            else:
                layers.append(ConvPoolLayer(filter_shape, image_shape, form.pool, **options))
            maps, side = form.filters, (side + 2 * form.padding - form.size + 1) // form.pool
        width = maps * side * side
        for n_out in self.hidden:
            layers.append(
                FullyConnectedLayer(
                    width, n_out, self.activation_fn, self.p_dropout, init=self.init, device=device
                )
            )
            width = n_out
        layers.append(SoftmaxLayer(width, _CLASSES, self.p_dropout, device=device))
        return Network(layers, mini_batch_size)


@dataclass(frozen=True)
class Vote:
    """Networks of one experiment, trained from different seeds, that vote.

    Attributes:
        title: in words.
        experiment: its name in `EXPERIMENTS`.
        networks: how many.
        book_accuracy: as in `Experiment`.
    """

    title: str
    experiment: str
    networks: int
    book_accuracy: float | None = None


_TWO = "two convolutional layers, fully connected"


def _on_expanded_data(hidden: tuple[int, ...], book_accuracy: float) -> Experiment:
    title = f"{_TWO} {', '.join(map(str, hidden))}, ReLU, expanded data"
    return Experiment(
        (20, 40), hidden, ReLU, 0.03, 0.1, 60, expanded=True, book_accuracy=book_accuracy, title=title
    )


EXPERIMENTS: dict[str, Experiment] = {
    "demo": Experiment((20, 40), (100,), ReLU, 0.1, 0.1, 30, init="he", title=f"{_TWO} 100, ReLU"),
    "1": Experiment((), (100,), sigmoid, 0.1, 0.0, 60, book_accuracy=97.80, title="fully connected 100"),
    "2": Experiment(
        (20,), (100,), sigmoid, 0.1, 0.0, 60, book_accuracy=98.78,
        title="a convolutional layer, fully connected 100",
    ),
    "3": Experiment((20,), (), sigmoid, 0.1, 0.0, 60, title="a convolutional layer alone"),
    "4": Experiment((20, 40), (100,), sigmoid, 0.1, 0.0, 60, book_accuracy=99.06, title=f"{_TWO} 100"),
    "5": Experiment((20, 40), (100,), tanh, 0.1, 0.0, 60, title=f"{_TWO} 100, tanh"),
    "6": Experiment((20, 40), (100,), ReLU, 0.03, 0.1, 60, book_accuracy=99.23, title=f"{_TWO} 100, ReLU"),
    "7": _on_expanded_data((100,), 99.37),
    "8-300": _on_expanded_data((300,), 99.46),
    "8-1000": _on_expanded_data((1000,), 99.43),
    "9-100": _on_expanded_data((100, 100), 99.43),
    "9-300": _on_expanded_data((300, 300), 99.48),
    "9-1000": _on_expanded_data((1000, 1000), 99.47),
    "10": Experiment(
        (20, 40), (1000, 1000), ReLU, 0.03, 0.0, 40, expanded=True, p_dropout=0.5, book_accuracy=99.60,
        title=f"{_TWO} 1000, 1000, ReLU, dropout, expanded data",
    ),
    "best": Experiment(
        (32, Convolution(64, 3, padding=1, pool=1), Convolution(64, 3, padding=1)), (256,), ReLU, 0.005, 0.4, 60,
        p_dropout=0.5, init="he", momentum=0.9, shuffle=True, falling=True,
        distortion={"shift": 1.5, "rotation": 10.0, "scale": 0.08, "shear": 0.1},
        title="three convolutional layers, fully connected 256, ReLU, dropout, distorted images",
    ),
}  # fmt: skip
"""By the experiment's number; those of 8 and 9 are told apart by the width of the fully connected layers. The demo and
the best recipe that we know are not the book's."""

VOTES: dict[str, Vote] = {
    "11": Vote("plurality vote of five networks of experiment 10", "10", 5, book_accuracy=99.67),
    "best-vote": Vote("vote of five networks of experiment best", "best", 5),
}
"""By the experiment's number."""

_BEST_VARIANTS = {"8": "8-300", "9": "9-300"}


def find_experiment(name: str) -> tuple[str, Experiment]:
    """The full name and the experiment called `name`; "8" and "9" mean the variant that the book found best.

    Raises:
        ValueError: there is none.
    """
    full_name = _BEST_VARIANTS.get(name, name)
    if full_name in EXPERIMENTS:
        return full_name, EXPERIMENTS[full_name]
    if name in VOTES:
        raise ValueError(
            f"experiment {name} is a {VOTES[name].title}, which `python -m pyconv book run {name}` trains one by one"
        )
    raise ValueError(f"expected one of {', '.join([*EXPERIMENTS, *_BEST_VARIANTS])}, but got {name!r}")
