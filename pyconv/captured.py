"""Steps of training on a GPU that are captured as CUDA graphs: what `pyconv.network3` and `compile_training` share.

    a step on static tensors: `cost_on_leaves` -> `Brake` -> `descend`;   `Graphed`: its calls, then its replays

A replay repeats the kernels of one call with the addresses and numbers of that call. So whatever changes from step to
step is read from the device: the examples, the learning rate, and whether a cost has been NaN or infinite, after which
updates change nothing. No step waits for the device. On the CPU the same steps run, and nothing is captured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyconv.lowering import Operation, execute

_WARM_UP_CALLS = 3
"""Before a capture, whose kernels must have been loaded, algorithms chosen and autograd's threads started."""


class Graphed:
    """A step as a CUDA graph: the first calls are ordinary ones, which train as any other, the others are replays.

    A step is called without autocast, and with autograd whatever mode the caller is in.

    Args:
        device: of the tensors; on another than a GPU all calls are ordinary ones.
        generators: those on the device that the step draws from, beside the default one.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device, self._generators = device, generators
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Callable[..., None], *args: object) -> None:
        """step(*args) or the replay of it: in all calls the same step, and arguments at the same addresses."""
        if self._graph is not None:
            self._graph.replay()
        elif self._device.type != "cuda":
            self._run(step, args)
        elif self._calls < _WARM_UP_CALLS:
            self._calls += 1
            side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self._run(step, args)
            current.wait_stream(side)
        else:
            self._graph = self._captured(step, args)
            self._graph.replay()

    def _captured(self, step: Callable[..., None], args: tuple[object, ...]) -> torch.cuda.CUDAGraph:
        graph, side = torch.cuda.CUDAGraph(), _side_stream(self._device)
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            # Another thread, which pins memory for a DataLoader, say, may go on meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._run(step, args)
        # A capture begins by writing the generators' seeds and offsets, on its stream. Did that happen after the first
        # replay has written its own, the replay would draw the masks of the capture's.
        torch.cuda.current_stream(self._device).wait_stream(side)
        return graph

    def _run(self, step: Callable[..., None], args: tuple[object, ...]) -> None:
        # The weights that autocast keeps in another precision would be those of the capture for ever.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
            step(*args)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of captures, which the default one cannot be. One for all: libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)


class Brake:
    """A flag on the device that the first value which is not finite sets, and under which `descend` changes nothing.

    Attributes:
        flag: of no dimensions, float32, 0 or 1: the form in which torch's fused optimizers read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        self._one = torch.ones_like(self.flag)

    def check(self, values: Tensor) -> None:
        """Set the flag if one of `values` (n,) float64 is NaN or, as float32, infinite."""
        # What GradScaler looks at gradients with: one kernel. It multiplies the values by 1 besides.
        torch._amp_foreach_non_finite_check_and_unscale_([values], self.flag, self._one)


@dataclasses.dataclass
class Group:
    """Parameters that :func:`descend` updates as a group of :class:`torch.optim.SGD`; rate is its `lr`.

    On a GPU a rate in device memory may change between replays. It is float32 there: for parameters of float64 it is to
    be a number, which a graph keeps.
    """

    parameters: list[Tensor]
    velocities: list[Tensor]
    """The momentum buffers; none without momentum."""
    rate: Tensor | float
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    is_first: bool = False
    """Whether the velocities are to become the gradients."""


def cost_on_leaves(
    operations: Sequence[Operation], groups: Sequence[Group], x: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The cross entropy of examples x (N, ...) with labels y (N,), and the leaves of its graph, one for each parameter.

    The leaves share the parameters' memory. Autograd ties a leaf to the stream of its first use, and a parameter's may
    be another than the capture's, for as long as the user holds on to some graph with it.
    """
    leaves = {id(p): p.detach().requires_grad_() for group in groups for p in group.parameters}
    on_leaves = []
    for operation in operations:
        tensors = {name: getattr(operation, name, None) for name in ("weight", "matrix", "bias")}
        replaced = {name: leaves.get(id(t), t.detach()) for name, t in tensors.items() if t is not None}
        on_leaves.append(dataclasses.replace(operation, **replaced))
    return F.cross_entropy(execute(on_leaves, x), y), list(leaves.values())


def descend(cost: Tensor, leaves: Sequence[Tensor], groups: Sequence[Group], brake: Brake) -> None:
    """One step of SGD down `cost` for all parameters of the groups, or none under the brake."""
    if not leaves:  # all parameters are frozen
        return
    gradients = iter(torch.autograd.grad(cost, leaves))
    with torch.no_grad():
        for group in groups:
            torch._fused_sgd_(
                group.parameters,
                [_laid_out_as(parameter, next(gradients)) for parameter in group.parameters],
                group.velocities,
                weight_decay=group.weight_decay, momentum=group.momentum, lr=group.rate, dampening=group.dampening,
                nesterov=group.nesterov, maximize=False, is_first_step=group.is_first, found_inf=brake.flag,
            )  # fmt: skip


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides of its parameter, which the fused step takes for granted."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
