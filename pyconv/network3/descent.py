"""How `Network.SGD` goes through the mini-batches of an epoch: layer by layer, by a native plan, or by CUDA graphs.

MiniBatches        the training data in the order of an epoch
Descent            autograd, layer by layer (over several processes: pyconv.network3.data_parallel)
CompiledDescent    a plan on the CPU (pyconv.lowering.PlanBuilder)
CapturedDescent    a CUDA graph (pyconv.captured)

A descent has begin_epoch(eta), train(index) and end_epoch(); the last two return the costs that have become known as
(index, cost). Its `velocities` are the momentum v by parameter, empty without momentum.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyconv.augmentation import RandomDistortion
from pyconv.captured import Brake, Graphed, Group, cost_on_leaves, descend
from pyconv.lowering import Facts, generators

if TYPE_CHECKING:
    from pyconv.network3.network import Network

Data = tuple[Tensor, Tensor]
"""Examples x (n, features) of a floating-point dtype, and their labels y (n,) of an integer dtype."""

Augment = Callable[[Tensor, Tensor], object]
"""augment(indices, x): changes examples x (n, features), at `indices` (n,) of the training data, in place."""

# After so many mini-batches their costs are looked at in training layer by layer. Each look waits for the device, which
# on a GPU leaves it idle until the host has enqueued more; on the CPU there is nothing to wait for.
_COSTS_PER_LOOK = {"cpu": 1, "cuda": 100}


_CHUNK_BYTES = 2**20
"""Of examples that are distorted at once: a few milliseconds of work, and what stays in cache until it is read."""


def fingerprint(data: Data) -> str:
    """Sizes and CRC-32 of examples and labels: two data sets with the same one are the same."""
    parts = []
    for tensor in data:
        content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        parts.append(f"{'x'.join(map(str, tensor.shape))}:{zlib.crc32(content):08x}")
    return " ".join(parts)


class MiniBatches:
    """The training data, mini-batch by mini-batch, in the order of an epoch; `SGD` says what the arguments are.

    Attributes:
        x, y: the data, on the device of the network.
        size: of a mini-batch; the last one may be smaller.
        count: how many examples an epoch takes.
        order: their positions, on the device of the data; None for the given order.
        shuffle, drop_last, augment, generator: as given.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        size: int,
        shuffle: bool,
        drop_last: bool,
        augment: Augment | None,
        generator: torch.Generator | None,
    ) -> None:
        if augment is not None and not callable(augment):
            raise TypeError(f"augment must be a function of indices and examples, but got {augment!r}")
        self.count = len(x) // size * size if drop_last else len(x)
        self.x, self.y, self.size, self.augment = x.contiguous(), y.contiguous(), size, augment
        self.order: Tensor | None = None
        self.shuffle, self.drop_last, self.generator = shuffle, drop_last, generator
        # What `augment` has changed last: number of the first mini-batch, and x and y of it and those behind it.
        self._augmented: tuple[int, Tensor, Tensor] = (0, self.x[:0], self.y[:0])
        self._buffers: Data | None = None

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def length(self, index: int) -> int:
        """How many examples a mini-batch has.

        Raises:
            IndexError: there is no such mini-batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"expected mini-batches from 0 to {len(self) - 1}, but got {index}")
        return min(self.size, self.count - index * self.size)

    def begin_epoch(self, epoch: int = 0) -> None:
        self._augmented = 0, self.x[:0], self.y[:0]
        if hasattr(self.augment, "set_epoch"):
            self.augment.set_epoch(epoch)
        if self.shuffle:
            order = torch.randperm(len(self.x), generator=self.generator)[: self.count]
            self.order = order.to(self.x.device)

    def __getitem__(self, index: int) -> Data:
        """(x, y) of a mini-batch; x is a copy wherever `augment` may change it."""
        rows = self._rows(index, self.length(index))
        x, y = self.x[rows], self.y[rows]
        if self.augment is not None and self.order is None:
            x = x.clone()
        if self.augment is not None:
            changed = self.augment(self._positions(index, len(x)), x)
            if isinstance(changed, Tensor) and changed.data_ptr() != x.data_ptr():
                raise TypeError("augment returned a tensor of its own; expected it to change x in place")
            self._augmented = index, x, y
        return x, y

    def chunk(self, index: int) -> tuple[int, Tensor, Tensor]:
        """(number of the first, x, y) of mini-batches one behind the other, of which `index` is one.

        `augment`, a function of positions and examples alone, has changed x in one call. The memory of x and y is that
        of the chunk before.
        """
        if self._of_augmented(index) is None:
            if self._buffers is None:
                row_bytes = self.x.shape[1] * self.x.element_size()
                length = min(max(_CHUNK_BYTES // (row_bytes * self.size), 1) * self.size, self.count)
                self._buffers = torch.empty_like(self.x[:length]), torch.empty_like(self.y[:length])
            positions = self._positions(index, len(self._buffers[0]))
            x, y = (buffer[: len(positions)] for buffer in self._buffers)
            torch.index_select(self.x, 0, positions, out=x)
            torch.index_select(self.y, 0, positions, out=y)
            self.augment(positions, x)
            self._augmented = index, x, y
        return self._augmented

    def _rows(self, index: int, most: int) -> slice | Tensor:
        """Of the data, from mini-batch `index` on: a slice where the given order allows one, which copies nothing."""
        begin = index * self.size
        place = slice(begin, min(begin + most, self.count))
        return place if self.order is None else self.order[place]

    def _positions(self, index: int, most: int) -> Tensor:
        rows = self._rows(index, most)
        return torch.arange(rows.start, rows.stop, device=self.x.device) if isinstance(rows, slice) else rows

    def _of_augmented(self, index: int) -> Tensor | None:
        """x of a mini-batch as `augment` left it, if that is still known."""
        first, x, _ = self._augmented
        begin = (index - first) * self.size
        return x[begin : begin + self.length(index)] if 0 <= begin < len(x) else None

    def examples(self, index: int) -> Tensor:
        """x of a mini-batch, of the last ones as `augment` left them."""
        augmented = self._of_augmented(index)
        return self.x[self._rows(index, self.length(index))] if augmented is None else augmented

    @functools.cached_property
    def _not_finite_rows(self) -> Tensor:
        return (~self.x.isfinite()).any(dim=1).cpu()

    def hold_not_finite(self) -> set[int]:
        """The mini-batches with NaN or infinity in their examples."""
        rows = self._not_finite_rows[: self.count] if self.order is None else self._not_finite_rows[self.order.cpu()]
        return set((rows.nonzero().flatten() // self.size).tolist())


class Descent:
    """Epochs of mini-batches, layer by layer, in place: g = dC/dw + decay*w (biases: dC/db), v <- momentum*v + g,
    w <- w - eta*v.

    C is the log-likelihood cost; the gradient of the L2 term 0.5 * decay * sum(w^2) is decay * w, so it needs
    no autograd. Parameters that do not require a gradient stay as they are.
    """

    def __init__(self, network: Network, batches: MiniBatches, decay: float, momentum: float) -> None:
        self.network = network
        self.decay = decay
        self.momentum = momentum
        self.velocities: dict[nn.Parameter, Tensor] = {}
        self._batches = batches
        self._costs = Costs(batches.x.device)
        self._find_parameters()

    def _find_parameters(self) -> None:
        self.weights = self.network._weights
        self.trained = [param for param in self.network.params if param.requires_grad]
        self.trained_weights = [weight for weight in self.weights if weight.requires_grad]
        if self.momentum != 0.0:
            for param in self.trained:
                if param not in self.velocities:
                    self.velocities[param] = torch.zeros_like(param)

    def begin_epoch(self, eta: float) -> None:
        self._find_parameters()  # a callback may have frozen or replaced some
        self.eta = eta
        self._suspects = self._batches.hold_not_finite()

    def train(self, index: int) -> list[tuple[int, float]]:
        """Mini-batch `index`, after that before it; (index, cost) of those whose costs have become known since."""
        data_cost = self.data_cost(*self._batches[index])
        self._costs.add(index, data_cost, self.squared_weights())
        known = []
        # Before the update, which examples that are not finite must not reach.
        if self._costs.is_due or index in self._suspects or index == len(self._batches) - 1:
            known = self._costs.take(self.decay)
        if all(math.isfinite(cost) for _, cost in known):
            self.update(data_cost)
        return known

    def end_epoch(self) -> list[tuple[int, float]]:
        """(index, cost) of the mini-batches whose costs `train` has not told yet."""
        return self._costs.take(self.decay)

    def data_cost(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost of a mini-batch without the L2 term, for `update`."""
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
            return self.network.cost(x, y)

    def squared_weights(self) -> Tensor | None:
        """The sum of the squares of all weights; None where no decay asks for it."""
        if self.decay == 0.0:
            return None
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(self.weights))
            return torch.dot(norms, norms)

    def gradients(self, data_cost: Tensor) -> Sequence[Tensor]:
        """Those of `data_cost` with respect to the trained parameters."""
        return torch.autograd.grad(data_cost, self.trained) if self.trained else ()  # all may be frozen

    def update(self, data_cost: Tensor) -> None:
        if not self.trained:
            return
        gradients = self.gradients(data_cost)
        with torch.no_grad():
            if self.decay != 0.0 and self.trained_weights:
                if self.momentum != 0.0:
                    of_weights = [g for p, g in zip(self.trained, gradients) if any(p is w for w in self.weights)]
                    torch._foreach_add_(of_weights, self.trained_weights, alpha=self.decay)
                else:
                    torch._foreach_mul_(self.trained_weights, 1.0 - self.eta * self.decay)
            if self.momentum != 0.0:
                velocities = [self.velocities[param] for param in self.trained]
                torch._foreach_mul_(velocities, self.momentum)
                torch._foreach_add_(velocities, gradients)
                gradients = velocities
            torch._foreach_add_(self.trained, gradients, alpha=-self.eta)


class CompiledDescent:
    """The same in native code, several mini-batches at a time: if `ahead`, it runs ahead of `train`, a few milliseconds
    at most.

    Raises:
        UnsupportedError: a layer that a plan does not know; the message names it.
    """

    _SECONDS_AHEAD = 0.02

    def __init__(
        self, network: Network, batches: MiniBatches, decay: float, momentum: float, ahead: bool
    ) -> None:
        self._network, self._batches, self._decay, self._momentum = network, batches, decay, momentum
        self._seconds = self._SECONDS_AHEAD if ahead else 0.0
        self.velocities: dict[nn.Parameter, Tensor] = {}
        self._make_plan()

    def _make_plan(self) -> None:
        weights = set(map(id, self._network._weights))
        builder = self._network._builder(lambda p: self._decay != 0.0 and id(p) in weights)
        self._plan = builder.plan
        self._plan.set_l2(0.5 * self._decay)
        for number, parameter in enumerate(builder.parameters):
            if self._momentum != 0.0 and parameter not in self.velocities:
                self.velocities[parameter] = torch.zeros_like(parameter, requires_grad=False)
            self._plan.set_step(
                number, 0.0, self._decay if id(parameter) in weights else 0.0, self._momentum, 0.0, False, False,
                self.velocities.get(parameter),
            )  # fmt: skip
        self._facts = Facts(self._network)

    def begin_epoch(self, eta: float) -> None:
        # A callback may have changed layers and values.
        if not self._facts.hold():
            self._make_plan()
        self._plan.forget_squares()
        self._plan.set_rate(eta)
        self._known: list[float] = []
        self._first = 0

    def train(self, index: int) -> list[tuple[int, float]]:
        if self._seconds == 0.0 or not self._first <= index < self._first + len(self._known):
            self._first, self._known = index, self._run(index)
        return [(index, self._known[index - self._first])]

    def _run(self, index: int) -> list[float]:
        """The costs of mini-batch `index` and of those behind it that there was time for."""
        batches = self._batches
        batches.length(index)  # raises where there is none
        first, order = index, None
        if batches.augment is None:
            first, x, y, order, count = 0, batches.x, batches.y, batches.order, batches.count
        elif isinstance(batches.augment, RandomDistortion):
            first, x, y = batches.chunk(index)
            count = len(x)
        else:
            x, y = batches[index]
            count = len(x)
        last = -(-count // batches.size)
        return self._plan.run(x, y, order, count, batches.size, index - first, last, self._seconds)[1]

    def end_epoch(self) -> list[tuple[int, float]]:
        return []


class CapturedDescent:
    """The same on a GPU: mini-batches as replays of a CUDA graph, whose costs stay on the device until `end_epoch`.

    From a cost that is not finite on, updates change nothing, so that the parameters stay as the mini-batch before left
    them although the host hears of it later. On another device nothing is captured.

    Raises:
        UnsupportedError: a layer that a plan does not know, and whose code might wait for the device.
    """

    def __init__(self, network: Network, batches: MiniBatches, decay: float, momentum: float) -> None:
        self._operations = network._lowered()
        self._batches, self._decay = batches, decay
        device = self._device = batches.x.device
        with torch.inference_mode(False):  # whatever mode the caller is in
            self._layerwise = Descent(network, batches, decay, momentum)
            self._brake = Brake(device)
            self._index = torch.zeros(1, dtype=torch.int64, device=device)
            self._order = torch.arange(batches.count, device=device)
            # By mini-batch: its cost without the L2 term and, where that counts, the sum of the squares.
            rows = 1 if decay == 0.0 else 2
            self._costs = torch.zeros(rows, len(batches), dtype=torch.float64, device=device)
            self._x, self._y = (torch.empty_like(part[: batches.size]) for part in (batches.x, batches.y))
            self._rate = torch.zeros((), dtype=torch.float32, device=device)
        self._eta = math.nan
        groups = [self._group(own_decay) for own_decay in dict.fromkeys((decay, 0.0))]
        self._groups = [group for group in groups if group.parameters]
        self._graphs: dict[int, Graphed] = {}

    def _group(self, own_decay: float) -> Group:
        """The trained parameters that decay by so much."""
        descent = self._layerwise
        numbers = [
            i for i, p in enumerate(descent.trained)
            if own_decay == (self._decay if any(p is w for w in descent.weights) else 0.0)
        ]  # fmt: skip
        return Group(
            [descent.trained[i] for i in numbers],
            [descent.velocities[descent.trained[i]] for i in numbers] if descent.velocities else [],
            self._rate, own_decay, descent.momentum,
        )  # fmt: skip

    @property
    def velocities(self) -> dict[nn.Parameter, Tensor]:
        return self._layerwise.velocities

    def begin_epoch(self, eta: float) -> None:
        if self._batches.x.dtype == torch.float64:  # for which a rate on the device would be too coarse
            if eta != self._eta:
                self._graphs.clear()
            for group in self._groups:
                group.rate = eta
        else:
            self._rate.fill_(eta)
        self._eta = eta
        if self._batches.order is not None:
            self._order.copy_(self._batches.order)
        self._next = -1
        self._trained: list[int] = []

    def train(self, index: int) -> list[tuple[int, float]]:
        batches, length = self._batches, self._batches.length(index)
        if index != self._next:
            self._index.fill_(index)
        self._next = index + 1
        self._trained.append(index)
        graphed = self._graphs.setdefault(length, Graphed(self._device, generators(self._operations)))
        if batches.augment is None:
            graphed(self._step, length)
        else:
            for place, values in zip((self._x, self._y), batches[index]):
                place[:length].copy_(values)
            graphed(self._step_on, self._x[:length], self._y[:length])
        return []

    def end_epoch(self) -> list[tuple[int, float]]:
        # Infinite is what the brake takes for it.
        data_costs, *squares = self._costs.masked_fill(self._costs.float().isinf(), math.inf).tolist()
        return [(i, data_costs[i] + sum(0.5 * self._decay * row[i] for row in squares)) for i in self._trained]

    def _step(self, length: int) -> None:
        """Mini-batch number `self._index`, of that length."""
        batches = self._batches
        whole = batches.count // batches.size * batches.size
        if length == batches.size:
            positions = self._order[:whole].view(-1, batches.size).index_select(0, self._index).flatten()
        else:
            positions = self._order[whole:]
        self._step_on(batches.x.index_select(0, positions), batches.y.index_select(0, positions))

    def _step_on(self, x: Tensor, y: Tensor) -> None:
        """The mini-batch x (length, features), y (length,), which is number `self._index`."""
        data_cost, leaves = cost_on_leaves(self._operations, self._groups, x, y)
        squares = self._layerwise.squared_weights()
        data = data_cost.detach().reshape(1)
        costs = (data if squares is None else torch.cat([data, squares.reshape(1)])).double()
        self._costs.index_copy_(1, self._index, costs[:, None])
        self._brake.check(costs)
        descend(data_cost, leaves, self._groups, self._brake)
        self._index.add_(1)


class Costs:
    """The costs of mini-batches, left on the device until they are taken."""

    def __init__(self, device: torch.device) -> None:
        self._capacity = _COSTS_PER_LOOK.get(device.type, 1)
        self._indices: list[int] = []
        self._data_costs: list[Tensor] = []
        self._squared_weights: list[Tensor] = []

    def add(self, index: int, data_cost: Tensor, squared_weights: Tensor | None) -> None:
        self._indices.append(index)
        self._data_costs.append(data_cost.detach())
        if squared_weights is not None:
            self._squared_weights.append(squared_weights)

    @property
    def is_due(self) -> bool:
        return len(self._indices) >= self._capacity

    def take(self, decay: float) -> list[tuple[int, float]]:
        """The mini-batches added since the last call with their costs, the L2 term included."""
        if not self._indices:
            return []
        costs = _numbers(self._data_costs)
        if self._squared_weights:
            squares = _numbers(self._squared_weights)
            costs = [cost + 0.5 * decay * square for cost, square in zip(costs, squares)]
        taken = list(zip(self._indices, costs))
        for values in (self._indices, self._data_costs, self._squared_weights):
            values.clear()
        return taken


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    return [scalars[0].item()] if len(scalars) == 1 else torch.stack(list(scalars)).tolist()
