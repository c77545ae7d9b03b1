"""Training steps of plain PyTorch models: one native call on the CPU, one CUDA graph on a GPU."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from pyconv.captured import Brake, Graphed, Group, cost_on_leaves, descend
from pyconv.lowering import (
    Facts,
    Operation,
    PlanBuilder,
    PlanTable,
    UnsupportedError,
    check_has_outputs,
    lower,
)


def compile_training(
    model: nn.Module, *, loss: str = "cross_entropy", optimizer: torch.optim.Optimizer
) -> CompiledStep | CapturedStep:
    """A training step of `model`, forward, loss, backward and update in one native call without autograd; on a GPU,
    the replay of a CUDA graph.

    Args:
        model: an nn.Sequential, nested or not, of Conv2d, MaxPool2d after it, ConvMaxPool2d, Flatten, Linear,
            LinearActDropout, ReLU, Sigmoid, Tanh, GELU, SiLU, Dropout, pyconv.Dropout and Identity, in training mode,
            with parameters of one dtype, all on the CPU or on one GPU.
        loss: "cross_entropy", the mean over the mini-batch as in :func:`torch.nn.functional.cross_entropy`, without
            ignore_index, weights and label smoothing.
        optimizer: a :class:`torch.optim.SGD` of the model's parameters. Its settings are read at each step, so that
            learning-rate schedulers work as ever; momentum buffers are those of `optimizer.state`. Parameters it does
            not have, and those that do not require a gradient, stay as they are.

    Returns:
        step(x, y) -> loss: x (N, ...) of the model's dtype, labels y (N,) int64; the loss before the update, a tensor
        of no dimensions. It trains the model's own parameters; `.grad` is neither read nor written. So neither
        `loss.backward()` nor `optimizer.step()` belongs behind it: the update has been made, and `optimizer.step()`
        would apply what an eager step left in `.grad`. Autocast does not apply. On the CPU, `print(step.plan())` shows
        the operations and how long each takes.

    Raises:
        UnsupportedError (a ValueError): a module, a loss or an optimizer that cannot be compiled; the message names it.
            Models that fit no example are found by the first step.
        FloatingPointError, by a step: the loss is NaN or infinite; the parameters are as they were before the step.
        ValueError, by a step on the CPU: labels outside the classes. (On a GPU they are an assertion of the device.)

    On a GPU:
        A mini-batch size, and settings of the optimizer other than `lr`, run a few steps as they are; then a graph is
        captured. In float64 this goes for `lr` too. Settings that change at each step are not captured. Masks of
        dropout come from the GPU's default generator. Autocast does not apply.

        A step does not wait for the GPU. From a loss that is NaN or infinite on, steps change nothing and their losses
        are NaN; FloatingPointError is raised by the first later step that finds the GPU has come that far. After it,
        training can go on.
    """
    if loss != "cross_entropy":
        raise UnsupportedError(f"loss must be 'cross_entropy', without weights or label smoothing, but got {loss!r}")
    first = next(model.parameters(), None)
    if first is not None and first.is_cuda:
        return CapturedStep(model, optimizer, first.device)
    return CompiledStep(model, optimizer)


class CompiledStep:
    """What :func:`compile_training` returns on the CPU; call it with a mini-batch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        _check_optimizer(optimizer, model)
        self.model, self.optimizer = model, optimizer
        check_has_outputs(lower(model))
        self._builder: PlanBuilder | None = None
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] = ()
        self._steps = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        # One step at a time, whichever thread asks for it; what it makes is for steps in any mode.
        with self._lock, torch.inference_mode(False):
            return self._step(x, y)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        _check_training(self.model)
        _check_settings(self.optimizer)
        self._check_examples(x, y)
        plan = self._plan_for(x).plan
        x, y = x.detach().contiguous(), y.contiguous()
        fresh = self._read_settings()
        done, costs = 0, [math.nan]
        try:
            done, costs, _ = plan.run(x, y, None, len(x), len(x), 0, 1, 0.0)
        finally:
            if done == 0:
                for parameter in fresh:
                    del self.optimizer.state[parameter]["momentum_buffer"]
        if done == 0:
            raise FloatingPointError(
                f"the loss of step {self._steps} is {costs[0]}; the parameters are as the step before left them"
            )
        self._steps += done
        _tell_schedulers(self.optimizer)
        return torch.tensor(costs[0], dtype=x.dtype)

    def plan(self) -> PlanTable:
        """What a step does, and how long each part of it takes, as a table; after the first step.

        Raises:
            RuntimeError: no step has been taken, so the shape of the examples is not known.
        """
        if self._builder is None:
            raise RuntimeError("expected a step before its plan is asked for, but none has been taken")
        return PlanTable(self._builder.plan)

    def _plan_for(self, x: Tensor) -> PlanBuilder:
        """The plan, made anew where the examples, the mini-batch or the parameters are of another shape or place."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        key = (x.dtype, tuple(x.shape[1:]), trained)
        known = self._builder is not None and key == self._key and len(x) <= self._batch and self._facts.hold()
        if not known:
            self._batch = len(x)
            self._builder = PlanBuilder(
                lower(self.model), x.shape[1:], self._batch,
                trained=lambda p: p.requires_grad and id(p) in trained, in_l2=lambda p: False,
            )  # fmt: skip
            self._key, self._facts = key, Facts(self.model)
        return self._builder

    def _check_examples(self, x: Tensor, y: Tensor) -> None:
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {name} to be a tensor, but got {type(value).__name__}")
        parameter = next(self.model.parameters())
        if x.dtype != parameter.dtype or not x.is_cpu:
            raise RuntimeError(
                f"expected x of dtype {parameter.dtype} on the CPU, like the model's parameters, "
                f"but got {x.dtype} on {x.device}"
            )
        if x.dim() < 2 or len(x) == 0:
            raise RuntimeError(f"expected x of shape (N, ...) with at least one example, but got {tuple(x.shape)}")

    def _read_settings(self) -> list[Tensor]:
        """The optimizer's; the parameters whose momentum buffers are new."""
        assert self._builder is not None
        numbers = {id(p): number for number, p in enumerate(self._builder.parameters)}
        fresh = []
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
                        buffer = state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
                        fresh.append(parameter)
                    elif (buffer.dtype, buffer.stride()) != (parameter.dtype, parameter.stride()):
                        buffer = torch.empty_like(parameter, requires_grad=False).copy_(buffer)
                        state["momentum_buffer"] = buffer
                self._builder.plan.set_step(
                    number, float(group["lr"]), float(group["weight_decay"]), float(group["momentum"]),
                    float(group["dampening"]), bool(group["nesterov"]), first, buffer,
                )  # fmt: skip
        return fresh


@dataclasses.dataclass
class _Buffers:
    """What a graph reads and writes: x (N, ...), y (N,), the loss of no dimensions."""

    x: Tensor
    y: Tensor
    loss: Tensor
    graphed: Graphed


class CapturedStep:
    """What :func:`compile_training` returns on a GPU; call it with a mini-batch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        _check_optimizer(optimizer, model)
        self.model, self.optimizer = model, optimizer
        self._device = device
        self._operations: list[Operation] = lower(model)
        check_has_outputs(self._operations)
        with torch.inference_mode(False):  # whatever mode the caller is in
            self._brake = Brake(device)
        # Where the GPU writes the flag when it comes to it, and where the host looks without waiting.
        on_gpu = device.type == "cuda"
        self._told = torch.zeros((), dtype=torch.float32, device="cpu", pin_memory=True) if on_gpu else self._brake.flag
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        self._key: tuple[Any, ...] = ()
        self._groups: list[Group] = []
        self._buffers: dict[tuple[Any, ...], _Buffers] = {}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with self._lock, torch.inference_mode(False):
            _check_training(self.model)
            _check_settings(self.optimizer)
            self._raise_if_stopped()
            self._read_settings()
            key = (x.dtype, x.shape, y.dtype, y.shape)
            buffers = self._buffers.get(key)
            if buffers is None:
                buffers = self._buffers[key] = _Buffers(
                    torch.empty_like(x, device=self._device, requires_grad=False),
                    torch.empty_like(y, device=self._device),
                    torch.empty((), dtype=x.dtype, device=self._device),
                    Graphed(self._device),
                )
            buffers.x.copy_(x.detach())
            buffers.y.copy_(y)
            buffers.graphed(self._step, buffers)
            self._told.copy_(self._brake.flag, non_blocking=True)
            _tell_schedulers(self.optimizer)
            return buffers.loss.clone()

    def _step(self, buffers: _Buffers) -> None:
        loss, leaves = cost_on_leaves(self._operations, self._groups, buffers.x, buffers.y)
        self._brake.check(loss.detach().double().reshape(1))
        buffers.loss.copy_(loss.detach()).masked_fill_(self._brake.flag.bool(), math.nan)
        descend(loss, leaves, self._groups, self._brake)

    def _raise_if_stopped(self) -> None:
        if self._told.item() == 0.0:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or a step under way would tell of the same again
        self._brake.flag.zero_()
        self._told.zero_()
        raise FloatingPointError(
            "the loss of a step is NaN or infinite; the parameters are as the step before left them, and no step after "
            "it has changed them"
        )

    def _read_settings(self) -> None:
        """The optimizer's; captured graphs are dropped where they would not see a change."""
        groups = self._read_groups()
        is_coarse = any(p.dtype == torch.float64 for group in groups for p in group.parameters)
        key = tuple(_key_of(group, is_coarse) for group in groups)
        if self._facts is None or key != self._key or not self._facts.hold():
            self._key, self._buffers, self._facts = key, {}, Facts(self.model)
            self._operations = lower(self.model)
            self._groups = groups if is_coarse else [
                dataclasses.replace(group, rate=torch.empty((), dtype=torch.float32, device=self._device))
                for group in groups
            ]  # fmt: skip
        if not is_coarse:
            for group, now in zip(self._groups, groups, strict=True):
                group.rate.fill_(now.rate)

    def _read_groups(self) -> list[Group]:
        in_model = {id(p) for p in self.model.parameters()}
        groups = []
        for settings in self.optimizer.param_groups:
            trained = [p for p in settings["params"] if id(p) in in_model and p.requires_grad]
            momentum = float(settings["momentum"])
            states = self.optimizer.state
            first = {id(p) for p in trained if momentum != 0.0 and states[p].get("momentum_buffer") is None}
            for parameter in trained:
                if id(parameter) in first:
                    states[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            for is_first in (True, False):
                parameters = [p for p in trained if (id(p) in first) == is_first]
                if parameters:
                    velocities = [states[p]["momentum_buffer"] for p in parameters] if momentum != 0.0 else []
                    groups.append(
                        Group(
                            parameters, velocities, settings["lr"], float(settings["weight_decay"]), momentum,
                            float(settings["dampening"]), bool(settings["nesterov"]), is_first,
                        )
                    )  # fmt: skip
        return groups


def _key_of(group: Group, with_rate: bool) -> tuple[Any, ...]:
    """What a graph has taken over from a group: addresses and numbers."""
    addresses = (t.data_ptr() for t in (*group.parameters, *group.velocities))
    numbers = (group.weight_decay, group.momentum, group.dampening, group.nesterov, group.is_first)
    return (*addresses, *numbers, float(group.rate) if with_rate else None)


def _check_training(model: nn.Module) -> None:
    if not model.training:
        raise RuntimeError("expected the model in training mode, but it is in evaluation mode; call model.train()")


def _tell_schedulers(optimizer: torch.optim.Optimizer) -> None:
    optimizer._opt_called = True  # what they look at to warn of a wrong order


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    if type(optimizer) is not torch.optim.SGD:
        raise UnsupportedError(
            f"expected a torch.optim.SGD, the only optimizer supported, but got {type(optimizer).__name__}"
        )
    _check_settings(optimizer)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if trainable and not any(id(p) in trainable for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedError("the optimizer has none of the model's parameters; was it made for another model?")


def _check_settings(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for name in ("maximize", "differentiable"):
            if group.get(name):
                raise UnsupportedError(f"torch.optim.SGD({name}=True) is not supported")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise UnsupportedError("the optimizer has hooks, which a compiled step would not run")
