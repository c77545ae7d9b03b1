"""What the tests of compiled and of captured training share: networks and models, their eager steps, comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyconv
from pyconv import network3
from pyconv.network3 import ConvLayer, ConvPoolLayer, FullyConnectedLayer, Network, PoolLayer, SoftmaxLayer

MB = 10


def make_network(
    activation_fn=network3.ReLU, dtype=torch.float64, p_dropout: float = 0.0, mb: int = MB, seed: int = 0
) -> Network:
    """Two convolutional layers, the second with windows that do not divide, then two fully connected ones."""
    g = torch.Generator().manual_seed(seed)
    options = {"activation_fn": activation_fn, "dtype": dtype, "generator": g}
    layers = [
        ConvPoolLayer((6, 1, 5, 5), (mb, 1, 18, 18), (2, 2), **options),
        ConvPoolLayer((9, 6, 3, 3), (mb, 6, 7, 7), (2, 2), **options),
        FullyConnectedLayer(9 * 2 * 2, 21, p_dropout=p_dropout, **options),
        SoftmaxLayer(21, 10, p_dropout, dtype=dtype),
    ]
    with torch.no_grad():
        layers[-1].w.normal_(0.0, 0.3, generator=g)
    return Network(layers, mb)


IMAGE_LAYERS = {
    "arguments": lambda mb, options: [
        ConvPoolLayer((6, 1, 5, 5), (mb, 1, 18, 18), 3, stride=(1, 2), padding=(2, 1), pool_stride=2, **options),
        ConvPoolLayer((9, 2, 3, 3), (mb, 6, 8, 3), (2, 1), padding=1, groups=3, **options),
    ],
    "no pooling": lambda mb, options: [
        ConvLayer((6, 1, 5, 5), (mb, 1, 18, 18), stride=2, **options),
        ConvLayer((8, 3, 3, 3), (mb, 6, 7, 7), padding=(0, 1), groups=2, **options),
    ],
    "pooling apart": lambda mb, options: [
        ConvLayer((6, 1, 5, 5), (mb, 1, 18, 18), padding=1, **options),
        PoolLayer((mb, 6, 16, 16), 3, pool_stride=2),
        ConvLayer((9, 6, 3, 3), (mb, 6, 7, 7), **options),
        PoolLayer((mb, 9, 5, 5)),
    ],
}
"""Layers beyond the book's that a plan knows, for images of 18x18."""


def make_network_of(image_layers: str, activation_fn=network3.ReLU, dtype=torch.float64, seed: int = 0) -> Network:
    """Those image layers, then a softmax layer."""
    g = torch.Generator().manual_seed(seed)
    layers = IMAGE_LAYERS[image_layers](MB, {"activation_fn": activation_fn, "dtype": dtype, "generator": g})
    layers.append(SoftmaxLayer(layers[-1].n_out, 10, dtype=dtype))
    with torch.no_grad():
        layers[-1].w.normal_(0.0, 0.3, generator=g)
    return Network(layers, MB)


def make_data(count: int, dtype=torch.float64, seed: int = 1) -> network3.network.Data:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 18 * 18, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (count,), generator=g)


def train(
    network: Network, data, compiled: bool, eta=0.05, lmbda: float = 0.0, epochs: int = 1, seed: int = 3, **options
):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = network.SGD(
            data, epochs, network.mini_batch_size, eta, data, None, lmbda, verbose=False, compiled=compiled, **options
        )
    return history, torch.get_rng_state()


OPTIONS = {
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.5, "lmbda": 3.0},
    "falling eta": {"eta": lambda epoch: 0.1 / (1 + epoch)},
    "shuffled": {"shuffle": True},
    "last mini-batch": {"drop_last": False},
    "all": {"momentum": 0.9, "lmbda": 1.0, "eta": lambda epoch: 0.02 * 0.5**epoch, "shuffle": True, "drop_last": False},
}


def make_model(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        pyconv.ConvMaxPool2d(8, 4, 2, 1, activation="tanh"),
        nn.Flatten(),
        nn.Identity(),
        pyconv.Dropout(0.25),
        nn.Linear(16, 33),
        nn.SiLU(),
        pyconv.Dropout(0.5),
        pyconv.LinearActDropout(33, 12, activation="sigmoid", p=0.5),
        nn.Linear(12, 5, bias=False),
    ).to(dtype)


def mini_batch(n: int, seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 12, 12, generator=g, dtype=torch.float64).to(dtype), torch.randint(5, (n,), generator=g)


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, x, y) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_both(
    eager: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[Tensor, Tensor], Tensor], seed: int, n: int = 8
) -> tuple[Tensor, Tensor]:
    """An eager step and `step` on the same mini-batch with the same masks; their losses."""
    x, y = mini_batch(n, seed)
    torch.manual_seed(seed)
    expected = eager_step(eager, optimizer, x, y)
    torch.manual_seed(seed)
    return expected, step(x, y)


SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.3},
]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm()) / max(float(b.norm()), torch.finfo(torch.float64).tiny)


def assert_same_parameters(actual: nn.Module, expected: nn.Module, bound: float = 1e-10) -> None:
    """Each parameter, by the norm of the difference over the norm."""
    for a, e in zip(actual.parameters(), expected.parameters(), strict=True):
        assert difference(a, e) <= bound
