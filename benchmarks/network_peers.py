"""The book's networks as pyconv trains them and as their peers do: torch in several forms, and JAX.

All of them follow one recipe, that of `pyconv.network3`: plain SGD on the mini-batches in the given order,
weights decayed by eta * lmbda / (number of mini-batches), biases not. Only dropout is each library's own,
which divides by 1 - p where the book's does not: the same work, and the form its users have.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu, peers
from benchmarks.machine import set_precision
from benchmarks.timing import Role
from pyconv.lowering import PlanTable

Data = tuple[Tensor, Tensor]
"""Images (n, 784) float32 and labels (n,) int64."""

IMAGE = (1, 28, 28)
CLASSES = 10
KERNEL = 5


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Layers of 5x5 filters with 2x2 pooling, fully connected layers and a softmax: a row of the book's table."""

    number: int
    conv_maps: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: str
    eta: float
    lmbda: float = 0.0
    p_dropout: float = 0.0
    mini_batch_size: int = 10

    def without_dropout(self) -> Experiment:
        return dataclasses.replace(self, p_dropout=0.0)

    @property
    def images(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of the input, and behind each convolutional layer."""
        found = [IMAGE]
        for maps in self.conv_maps:
            found.append((maps, *((size - KERNEL + 1) // 2 for size in found[-1][1:])))
        return found

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the fully connected layers: the first one's inputs, and everyone's outputs but the softmax's."""
        return (math.prod(self.images[-1]), *self.hidden)


EXPERIMENTS = {
    experiment.number: experiment
    for experiment in (
        Experiment(1, (), (100,), "sigmoid", 0.1),
        Experiment(2, (20,), (100,), "sigmoid", 0.1),
        Experiment(4, (20, 40), (100,), "sigmoid", 0.1),
        Experiment(6, (20, 40), (100,), "relu", 0.03, lmbda=0.1),
        Experiment(10, (20, 40), (1000, 1000), "relu", 0.03, p_dropout=0.5),
    )
}


class PyconvTrainer:
    """`pyconv.network3.Network` through its public API."""

    name, role, layout = "pyconv.network3", "ours", ""

    def __init__(self, experiment: Experiment, device: str, seed: int = 0, init: str = "book") -> None:
        from pyconv import network3

        self.experiment = experiment
        size, generator = experiment.mini_batch_size, torch.Generator().manual_seed(seed)
        activation_fn = {"relu": network3.ReLU, "sigmoid": network3.sigmoid}[experiment.activation]
        options = {"activation_fn": activation_fn, "generator": generator, "init": init}
        layers: list[network3.Layer] = []
        for maps, image in zip(experiment.conv_maps, experiment.images, strict=False):
            shapes = (maps, image[0], KERNEL, KERNEL), (size, *image)
            layers.append(network3.ConvPoolLayer(*shapes, (2, 2), **options))
        for n_in, n_out in itertools.pairwise(experiment.widths):
            layers.append(network3.FullyConnectedLayer(n_in, n_out, p_dropout=experiment.p_dropout, **options))
        layers.append(network3.SoftmaxLayer(experiment.widths[-1], CLASSES, experiment.p_dropout))
        for layer in layers:
            layer.generator = None  # it has drawn the initial values; masks come from the device's own
        self.network = network3.Network(layers, size).to(device)

    def parameters(self) -> list[Tensor]:
        """Copies of w and b of each layer, in order, as the book shapes them."""
        return [p.detach().clone() for p in self.network.params]

    def train(self, data: Data) -> float:
        """One epoch over `data`; the seconds of training without evaluation, by the network's own account."""
        return self._seconds(data, 1)[0]

    def train_captured(self, data: Data) -> float:
        """Two epochs; the seconds of training in the second. In the first a GPU's step is captured, as it is before the
        timing of the captured peers."""
        return self._seconds(data, 2)[1]

    def _seconds(self, data: Data, epochs: int) -> list[float]:
        e = self.experiment
        one_batch = tuple(part[: e.mini_batch_size] for part in data)
        with redirect_stdout(io.StringIO()):
            history = self.network.SGD(data, epochs, e.mini_batch_size, e.eta, one_batch, None, e.lmbda)
        return history["seconds"]

    def accuracy(self, data: Data) -> float:
        return self.network.accuracy(data)

    def timed_plan(self, data: Data) -> PlanTable:
        """The plan of a step with its times over `data`, on the CPU."""
        x, y = data
        builder = self.network._builder(lambda parameter: self.experiment.lmbda != 0.0 and parameter.dim() > 1)
        for number in range(len(builder.parameters)):
            builder.plan.set_step(number, 1e-4, self.experiment.lmbda * 1e-5, 0.0, 0.0, False, False, None)
        size = self.experiment.mini_batch_size
        builder.plan.run(x, y, None, len(x), size, 0, len(x) // size, math.inf)
        return PlanTable(builder.plan)


class TorchTrainer:
    """A plain torch loop: nn.Conv2d, nn.MaxPool2d, nn.Linear, and SGD by hand.

    Args:
        parameters: w and b of each layer as the book shapes them.
        order: of `peers.ORDERS`.
        compile_mode: None for eager, else a mode of torch.compile, for model and loss and for the update.
        graphed: capture the whole step in a CUDA graph.
    """

    role: Role = "peer"

    def __init__(
        self, experiment: Experiment, parameters: Sequence[Tensor], layout: torch.memory_format = peers.NCHW,
        order: str = "conv-pool-relu", compile_mode: str | None = None, graphed: bool = False,
    ) -> None:  # fmt: skip
        self.experiment, self.memory_format, self.graphed = experiment, layout, graphed
        self.layout = peers.LAYOUT_NAMES[layout]
        kind = "torch eager" if compile_mode is None else peers.COMPILE_MODES[compile_mode]
        self.name = f"{kind}{f' {peers.GRAPH}' if graphed else ''} {self.layout} {order}"
        self.model = _torch_model(experiment, order).to(parameters[0].device, parameters[0].dtype)
        self.model = self.model.to(memory_format=layout)
        self.params = list(self.model.parameters())
        with torch.no_grad():
            for target, source in zip(self.params, parameters, strict=True):
                target.copy_(source.T if source.dim() == 2 else source)
        self.weights = [p for p in self.params if p.dim() > 1]
        self._captured: gpu.Captured | None = None

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.model(x), y)

        self.loss, self.update = loss, self._update
        if compile_mode is not None:
            options = {"mode": compile_mode, "dynamic": False, "fullgraph": True}
            self.loss, self.update = torch.compile(loss, **options), torch.compile(self._update, **options)

    def parameters(self) -> list[Tensor]:
        return [p.detach().T.clone() if p.dim() == 2 else p.detach().clone() for p in self.params]

    def step(self, x: Tensor, y: Tensor, decay: float) -> None:
        """One mini-batch; `decay` is eta * lmbda / (number of mini-batches)."""
        gradients = torch.autograd.grad(self.loss(x, y), self.params)
        with torch.no_grad():
            self.update(gradients, decay)

    def _update(self, gradients: Sequence[Tensor], decay: float) -> None:
        if decay:
            torch._foreach_mul_(self.weights, 1 - decay)
        torch._foreach_add_(self.params, gradients, alpha=-self.experiment.eta)

    def train(self, data: Data) -> None:
        """One epoch over `data`."""
        self.model.train()
        size = self.experiment.mini_batch_size
        batches = list(zip(self._images(data[0]).split(size), data[1].split(size), strict=True))
        decay = self.experiment.eta * self.experiment.lmbda / len(batches)
        step = self._captured_step(*batches[0], decay) if self.graphed else self.step
        with torch.enable_grad():
            for x, y in batches:
                step(x, y, decay)

    def accuracy(self, data: Data) -> float:
        self.model.eval()
        with torch.no_grad():
            correct = [
                (self.model(x).argmax(1) == y).sum()
                for x, y in zip(self._images(data[0]).split(500), data[1].split(500), strict=True)
            ]
        return int(sum(correct)) / len(data[1])

    def _images(self, x: Tensor) -> Tensor:
        return x.view(-1, *IMAGE).to(self.params[0].dtype, memory_format=self.memory_format)

    def _captured_step(self, x: Tensor, y: Tensor, decay: float) -> Callable[[Tensor, Tensor, float], None]:
        """`step` as a replay on static buffers, captured once; what the steps before the capture did is undone."""
        if self._captured is None:
            before = [p.detach().clone() for p in self.params]
            self._x, self._y = x.clone(), y.clone()
            self._captured = gpu.Captured(lambda: self.step(self._x, self._y, decay))
            with torch.enable_grad():
                self._captured.capture()
            with torch.no_grad():
                torch._foreach_copy_(self.params, before)

        def replay(x: Tensor, y: Tensor, decay: float) -> None:
            self._x.copy_(x)
            self._y.copy_(y)
            self._captured()

        return replay


def _torch_model(experiment: Experiment, order: str) -> nn.Module:
    activation = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[experiment.activation]
    modules: list[nn.Module] = []
    for maps, image in zip(experiment.conv_maps, experiment.images, strict=False):
        pooled = [nn.MaxPool2d(2), activation()]
        modules += [nn.Conv2d(image[0], maps, KERNEL), *(pooled if order == "conv-pool-relu" else pooled[::-1])]
    modules.append(nn.Flatten())

    def dropout() -> list[nn.Module]:
        return [nn.Dropout(experiment.p_dropout)] if experiment.p_dropout > 0 else []

    for n_in, n_out in itertools.pairwise(experiment.widths):
        modules += [*dropout(), nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*modules, *dropout(), nn.Linear(experiment.widths[-1], CLASSES))


class JaxTrainer:
    """The same step under `jax.jit`, NHWC, parameters donated; on all cores, since XLA takes no limit."""

    name, role, layout = "JAX jit NHWC conv-pool-relu", "peer", "channels_last"

    def __init__(self, experiment: Experiment, parameters: Sequence[Tensor]) -> None:
        import jax
        import jax.numpy as jnp

        self.experiment = experiment
        arrays = [jnp.asarray(p.cpu().numpy()) for p in parameters]
        # (K, C, R, S) -> (R, S, C, K)
        self.params = [a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for a in arrays]
        # pyconv and torch flatten (C, H, W); NHWC flattens (H, W, C).
        self._first_dense = first_dense = 2 * len(experiment.conv_maps)
        channels, height, width = experiment.images[-1]
        dense = self.params[first_dense].reshape(channels, height, width, -1).transpose(1, 2, 0, 3)
        self.params[first_dense] = dense.reshape(experiment.widths[0], -1)
        self.key = jax.random.key(0)
        p_dropout, eta = experiment.p_dropout, experiment.eta
        activation = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[experiment.activation]

        def drop(x, key):
            if p_dropout == 0.0:
                return x
            kept = jax.random.bernoulli(key, 1 - p_dropout, x.shape)
            return jnp.where(kept, x / (1 - p_dropout), 0)

        def loss(params, x, y, key):
            for w, b in zip(params[:first_dense:2], params[1:first_dense:2], strict=True):
                x = jax.lax.conv_general_dilated(
                    x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
                x = activation(x + b)
            x = x.reshape(len(x), -1)
            dense = list(zip(params[first_dense::2], params[first_dense + 1 :: 2], strict=True))
            for i, (w, b) in enumerate(dense):
                x = drop(x, jax.random.fold_in(key, i)) @ w + b
                if i < len(dense) - 1:
                    x = activation(x)
            return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean()

        def step(params, x, y, key, decay):
            gradients = jax.grad(loss)(params, x, y, key)
            decayed = [p * (1 - decay) if p.ndim > 1 else p for p in params]
            return [p - eta * g for p, g in zip(decayed, gradients, strict=True)]

        self._jax, self._step, self._batches = jax, jax.jit(step, donate_argnums=0), {}

    def parameters(self) -> list[Tensor]:
        import numpy as np

        arrays = [np.asarray(p) for p in self.params]
        arrays = [a.transpose(3, 2, 0, 1) if a.ndim == 4 else a for a in arrays]
        channels, height, width = self.experiment.images[-1]
        dense = arrays[self._first_dense].reshape(height, width, channels, -1).transpose(2, 0, 1, 3)
        arrays[self._first_dense] = dense.reshape(self.experiment.widths[0], -1)
        # JAX's arrays are read-only views; torch wants memory of its own.
        return [torch.from_numpy(np.array(a, order="C")) for a in arrays]

    def train(self, data: Data) -> None:
        """One epoch over `data`, whose mini-batches are handed to JAX once."""
        size = self.experiment.mini_batch_size
        batches = self._batches.get(id(data))
        if batches is None:
            x, y = data[0].cpu().numpy().reshape(-1, *IMAGE[1:], 1), data[1].cpu().numpy().astype("int32")
            batches = [
                (self._jax.device_put(x[i : i + size]), self._jax.device_put(y[i : i + size]))
                for i in range(0, len(x), size)
            ]
            self._batches[id(data)] = batches
        decay = self.experiment.eta * self.experiment.lmbda / len(batches)
        for x, y in batches:
            self.key, key = self._jax.random.split(self.key)
            self.params = self._step(self.params, x, y, key, decay)
        self._jax.block_until_ready(self.params)


Trainer = PyconvTrainer | TorchTrainer | JaxTrainer


def trainers(
    experiment: Experiment, device: str, threads: int, cores: int, compile_modes: Sequence[str]
) -> tuple[list[Trainer], dict[str, str]]:
    """Ours first, then every peer from the same parameters; and the reasons of those left out by name."""
    torch.compiler.reset()
    set_precision("float32")
    torch.backends.cudnn.benchmark = device == "cuda"
    ours = PyconvTrainer(experiment, device)
    start = ours.parameters()
    found: list[Trainer] = [ours]
    # Without a convolution, layout and order are the same to everyone.
    orders = tuple(peers.ORDERS) if experiment.conv_maps else tuple(peers.ORDERS)[:1]
    for layout in (peers.NCHW, peers.NHWC) if experiment.conv_maps else (peers.NCHW,):
        for order in orders:
            found.append(TorchTrainer(experiment, start, layout, order))
            if device == "cuda":
                found.append(TorchTrainer(experiment, start, layout, order, graphed=True))
    found += [
        TorchTrainer(experiment, start, peers.NHWC, order, mode)
        for mode in compile_modes
        for order in orders
    ]
    left_out = {
        name: "not in this suite" for mode, name in peers.COMPILE_MODES.items() if mode not in compile_modes
    }
    if not peers.module_available("jax"):
        left_out[JaxTrainer.name] = "jax is not installed"
    elif device == "cpu" and threads != cores:
        left_out[JaxTrainer.name] = f"JAX uses all {cores} cores, this is a run on {threads}"
    else:
        found.append(JaxTrainer(experiment, start))
    return found, left_out
