"""Training over several processes, each of which computes the gradient of its share of every mini-batch.

mini-batch (N, features) -> rows of this process (n, features) -> gradient of their cost, times n / N
    -> sum over the processes, the gradient of the whole mini-batch's cost -> the same update in all of them

All processes have the same parameters, data and random numbers. What depends on anything else (files, callbacks, the
rate of a function of the user's) is done by the first process, which tells the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pyconv.network3.descent import Descent, MiniBatches
from pyconv.network3.layers import rows_of_mini_batch

if TYPE_CHECKING:
    from pyconv.network3.network import Network

_T = TypeVar("_T")


class Processes:
    """The processes of a group; this one alone if it is None. Methods that communicate are called by all of them, in
    the same order.

    Args:
        group: a torch.distributed.ProcessGroup, or None.
        device: of the network and the data.

    Attributes:
        count: how many they are.
        rank: the number of this one.

    Raises:
        TypeError: `group` is not a group that this process belongs to.
        ValueError: its backend is NCCL, and `device` is not the current CUDA device.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self.count, self.rank = 1, 0
        if group is None:
            return
        import torch.distributed as distributed

        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup with this process in it, but got {group!r}"
            )
        if distributed.get_backend(group) == "nccl" and (
            device.type != "cuda" or device.index != torch.cuda.current_device()
        ):
            raise ValueError(
                f"expected the network on the current CUDA device, for a process_group of NCCL, but got it on {device}"
            )
        self.count, self.rank = group.size(), group.rank()

    def share(self, count: int) -> slice:
        """Which of `count` examples are this process's: contiguous ones; the first processes take one more."""
        quotient, rest = divmod(count, self.count)
        begin = self.rank * quotient + min(self.rank, rest)
        return slice(begin, begin + quotient + (self.rank < rest))

    def mini_batches(self, count: int, progress: Callable[[Iterable[int]], Iterable[int]] | None) -> Iterable[int]:
        """The numbers of `count` mini-batches, through `progress` in the first process.

        Raises:
            ValueError: `progress` does not give all of them in order, as the other processes take them.
        """
        indices = range(count)
        if progress is None or self.rank > 0:
            return indices
        return progress(indices) if self.count == 1 else _in_order(indices, progress(indices))

    # ------------------------------------------------------------------------------------------------------
    # Communication
    # ------------------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes, the same bits in all of them."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor, group=self._group)
        return tensor

    def mean(self, sum_of: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor) -> float:
        """sum_of(x, y) / len(y), where `sum_of` is a sum over examples and each process adds up its share."""
        if self.count == 1:
            return sum_of(x, y) / len(y)
        share = self.share(len(y))
        part = sum_of(x[share], y[share]) if share.stop > share.start else 0.0
        return self.sum_(torch.tensor(part, dtype=torch.float64, device=self._device)).item() / len(y)

    def first(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """What ``function(*arguments)`` returns in the first process, which alone calls it, in all of them.

        Raises:
            RuntimeError: it raised an exception in the first process, which there goes on.
        """
        if self.count == 1:
            return function(*arguments)
        if self.rank > 0:
            result, failure = self._broadcast(None)
            if failure is not None:
                raise RuntimeError(f"the first process of the group failed: {failure}")
            return result
        try:
            result = function(*arguments)
        except BaseException as error:
            self._broadcast((None, f"{type(error).__name__}: {error}"))
            raise
        self._broadcast((result, None))
        return result

    def _broadcast(self, message: Any) -> Any:
        box = [message]
        torch.distributed.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def synchronize(self, tensors: Iterable[Tensor], generators: Sequence[torch.Generator]) -> None:
        """Give `tensors` and `generators` the values, requires_grad and states that they have in the first process."""
        if self.count == 1:
            return
        tensors = list(tensors)
        values, states = self.first(
            lambda: (
                [(tensor.detach().cpu(), tensor.requires_grad) for tensor in tensors],
                [g.get_state() for g in generators],
            )
        )
        if self.rank > 0:
            with torch.no_grad():
                for tensor, (value, requires_grad) in zip(tensors, values):
                    tensor.requires_grad_(requires_grad).copy_(value)
            for generator, state in zip(generators, states):
                generator.set_state(state)

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise ValueError, in all processes, where one has other `facts`, by name, than the first."""
        everywhere: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everywhere, facts, group=self._group)
        for name, rank in itertools.product(facts, range(self.count)):
            expected, found = everywhere[0][name], everywhere[rank][name]
            if found != expected:
                raise ValueError(
                    f"expected the same {name} in every process, but got {expected!r} in process 0 and {found!r} in "
                    f"process {rank}"
                )


def _in_order(indices: range, given: Iterable[int]) -> Iterator[int]:
    for index, other in itertools.zip_longest(indices, given):
        if index != other:
            raise ValueError(
                f"progress: expected all {len(indices)} mini-batches in order with a process_group, but got {other} "
                f"for {index}"
            )
        yield index


class DataParallelDescent(Descent):
    """`Descent` whose cost and gradients are means over the mini-batches of all processes: one sum over the processes a
    mini-batch, of one buffer. Compiled plans and CUDA graphs do not come into it: a plan updates parameters while it
    forms their gradients, which leaves no moment to add up those of other processes.

    Raises:
        ValueError: a mini-batch has fewer examples than there are processes.
    """

    def __init__(
        self, network: Network, batches: MiniBatches, decay: float, momentum: float, processes: Processes
    ) -> None:
        super().__init__(network, batches, decay, momentum)
        smallest = batches.length(len(batches) - 1)
        if smallest < processes.count:
            hint = "; drop_last=True leaves out the last one" if smallest < batches.size else ""
            raise ValueError(
                f"expected mini-batches of at least {processes.count} examples, one for each process of the "
                f"process_group, but got one of {smallest}{hint}"
            )
        self._processes = processes
        self._gradients: list[Tensor] = []

    def data_cost(self, x: Tensor, y: Tensor) -> Tensor:
        share = self._processes.share(len(x))
        with rows_of_mini_batch(self.network.layers, share.start, len(x)):
            cost = super().data_cost(x[share], y[share])
            gradients = super().gradients(cost)
        parts = [cost.detach(), *gradients]
        with torch.no_grad():
            flat = torch.cat([part.flatten() for part in parts]).mul_((share.stop - share.start) / len(x))
            self._processes.sum_(flat)
            data_cost, *self._gradients = (
                values.view(part.shape) for part, values in zip(parts, flat.split([part.numel() for part in parts]))
            )
        return data_cost

    def gradients(self, data_cost: Tensor) -> Sequence[Tensor]:
        return self._gradients
