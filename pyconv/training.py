"""Training steps of plain PyTorch models as one native call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyconv.lowering import Operation, PlanBuilder, lower


def compile_training(
    model: nn.Module, *, loss: str = "cross_entropy", optimizer: torch.optim.Optimizer
) -> CompiledStep:
    """A training step of `model`, forward, loss, backward and update in one native call without autograd.

    Args:
        model: an nn.Sequential, nested or not, of Conv2d, MaxPool2d after it, ConvMaxPool2d, Flatten, Linear,
            LinearActDropout, ReLU, Sigmoid, Tanh, GELU, SiLU, Dropout, pyconv.Dropout and Identity, in training mode,
            with parameters of one dtype on the CPU.
        loss: "cross_entropy", the mean over the mini-batch as in :func:`torch.nn.functional.cross_entropy`.
        optimizer: a :class:`torch.optim.SGD` of the model's parameters. Its settings are read at each step, so that
            learning-rate schedulers work as ever; momentum buffers are those of `optimizer.state`. Parameters it does
            not have, and those that do not require a gradient, stay as they are.

    Returns:
        step(x, y) -> loss: x (N, ...) of the model's dtype, labels y (N,) int64; the loss before the update, a tensor
        of no dimensions. It trains the model's own parameters; `.grad` is neither read nor written.

    Raises:
        UnsupportedError (a ValueError): a module or an optimizer that cannot be compiled; the message names it.
        FloatingPointError, by a step: the loss is NaN or infinite; the parameters are as they were before the step.
    """
    if loss != "cross_entropy":
        raise ValueError(f"loss must be 'cross_entropy', but got {loss!r}")
    return CompiledStep(model, optimizer)


class CompiledStep:
    """What :func:`compile_training` returns; call it with a mini-batch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        _check_optimizer(optimizer)
        self.model, self.optimizer = model, optimizer
        self._operations: list[Operation] = lower(model)
        self._builder: PlanBuilder | None = None
        self._key: tuple[Any, ...] = ()
        self._steps = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.model.training:
            raise RuntimeError("expected the model in training mode, but it is in evaluation mode; call model.train()")
        plan = self._plan_for(x).plan
        self._read_settings()
        done, costs, finite = plan.run(x.contiguous(), y.contiguous(), None, len(x), len(x), 0, 1, 0.0)
        if not finite:
            raise FloatingPointError(
                f"the loss of step {self._steps} is {costs[0]}; the parameters are as the step before left them"
            )
        self._steps += done
        self.optimizer._opt_called = True  # what schedulers look at to warn of a wrong order
        return torch.tensor(costs[0], dtype=x.dtype)

    def _plan_for(self, x: Tensor) -> PlanBuilder:
        """The plan, made anew where the examples, the mini-batch or the parameters are of another shape or place."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        facts = ((id(p), p.dtype, p.shape, p.stride(), p.requires_grad) for p in self.model.parameters())
        key = (x.dtype, tuple(x.shape[1:]), frozenset(trained), *facts)
        if self._builder is None or key != self._key or len(x) > self._batch:
            self._batch = max(len(x), 1)
            self._operations = lower(self.model)
            self._builder = PlanBuilder(
                self._operations, x.shape[1:], self._batch,
                trained=lambda p: p.requires_grad and id(p) in trained, in_l2=lambda p: False,
            )  # fmt: skip
            self._key = key
        return self._builder

    def _read_settings(self) -> None:
        assert self._builder is not None
        numbers = {id(p): number for number, p in enumerate(self._builder.parameters)}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                number = numbers.get(id(parameter))
                if number is None or not parameter.requires_grad:
                    continue
                buffer, first = None, False
                if group["momentum"] != 0:
                    state = self.optimizer.state[parameter]
                    buffer = state.get("momentum_buffer")
                    first = buffer is None
                    if first:
                        buffer = state["momentum_buffer"] = torch.zeros_like(parameter)
                self._builder.plan.set_step(
                    number, float(group["lr"]), float(group["weight_decay"]), float(group["momentum"]),
                    float(group["dampening"]), bool(group["nesterov"]), first, buffer,
                )  # fmt: skip


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(f"expected a torch.optim.SGD, but got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ValueError("torch.optim.SGD(maximize=True) is not supported")
