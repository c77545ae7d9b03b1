"""What a feedforward network computes, as a list of the fused operators: the step between modules and compiled plans.

modules (nn.Sequential)  -> lower()      -> [ConvMaxPool2d, Dense, BiasActDropout, ...]
layers of network3       -> their _lowered()   "
the list                 -> PlanBuilder  -> a native plan (pyconv._C.TrainingPlan)
the list, examples       -> execute()    -> their outputs, by the functional operators
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from pyconv import _C, functional, modules

Pair = tuple[int, int]

MONOTONE = ("none", "relu", "sigmoid", "tanh")
"""Activations that may stand on either side of max-pooling."""


@dataclasses.dataclass(frozen=True)
class ConvMaxPool2d:
    """``activation(max_pool2d(conv2d(x, weight)) + bias)``; without pooling, the window is one position."""

    weight: Tensor
    bias: Tensor | None
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pool_size: Pair = (1, 1)
    pool_stride: Pair | None = None
    pool_padding: Pair = (0, 0)
    pool_dilation: Pair = (1, 1)
    ceil_mode: bool = False
    activation: str = "none"
    image_size: tuple[int, int, int] | None = None
    """(C, H, W) that the rows of its input are to be read as; None where they have that shape."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """``x @ matrix``, or ``x @ matrix.T`` where the inputs lie along the columns."""

    matrix: Tensor
    inputs_are_rows: bool

    @property
    def inputs(self) -> int:
        return self.matrix.shape[0 if self.inputs_are_rows else 1]

    @property
    def outputs(self) -> int:
        return self.matrix.shape[1 if self.inputs_are_rows else 0]


@dataclasses.dataclass(frozen=True)
class BiasActDropout:
    """``dropout(activation(x + bias), p)``; a bias is for the last dimension."""

    bias: Tensor | None = None
    activation: str = "none"
    p: float = 0.0
    inverted: bool = True
    generator: torch.Generator | None = None

    @property
    def is_random(self) -> bool:
        return 0.0 < self.p < 1.0

    @property
    def does_nothing(self) -> bool:
        return self.bias is None and self.activation == "none" and self.p == 0.0


@dataclasses.dataclass(frozen=True)
class Flatten:
    """All dimensions but the first become one."""


Operation = ConvMaxPool2d | Dense | BiasActDropout | Flatten


class UnsupportedError(ValueError):
    """Something a plan cannot express; the message names it."""


# ------------------------------------------------------------------------------------------------------------
# Modules
# ------------------------------------------------------------------------------------------------------------


def lower(model: nn.Module) -> list[Operation]:
    """The operations of an nn.Sequential, nested or not.

    Raises:
        UnsupportedError: a module that is not among those listed in `SUPPORTED`, or that has a setting, a hook or a
            parametrization which a plan does not know.
    """
    if not isinstance(model, nn.Sequential):
        raise UnsupportedError(
            f"expected an nn.Sequential, whose order of computation is known, but got {type(model).__name__}"
        )
    entries = list(_leaves(model, ""))
    check_parameters(entries)
    operations: list[Operation] = []
    previous: nn.Module | None = None
    while entries:
        used = _first_operation(entries, previous, operations)
        previous = entries[used - 1][1]
        del entries[:used]
    return operations


class Facts:
    """What operations that were made of a model depend on, as it was when this was made; cheap to ask at each step.

    It holds on to the modules and parameters, so that no other one gets the id of one of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m, _getter_of_settings(m)) for m in model.modules()]
        self._parameters = list(model.parameters())
        self._then = self._now()

    def hold(self) -> bool:
        """Whether the model still is as it was."""
        try:
            return self._now() == self._then
        except (KeyError, RuntimeError):  # a setting is gone, or a tensor now, which has no one truth value
            return False

    def _now(self) -> list[Any]:
        facts: list[Any] = [_has_global_hooks()]
        for m, settings_of in self._modules:
            own = vars(m)
            facts.append((len(own), settings_of(own)))
            facts += map(id, m._modules.values())
            facts += map(id, m._parameters.values())
            facts += map(len, _hooks_of_module(m))
        for p in self._parameters:
            facts += (p.data_ptr(), p.dtype, p.shape, p.stride(), p.requires_grad, bool(_hooks_of(p)))
        return facts


def _getter_of_settings(module: nn.Module) -> Callable[[dict[str, Any]], Any]:
    """For a module's dictionary: its numbers, strings, tuples and functions."""
    kinds = (int, float, str, tuple)
    names = [n for n, v in vars(module).items() if not n.startswith("_") and (isinstance(v, kinds) or callable(v))]
    return operator.itemgetter(*names)  # each module has at least `training`


def _hooks_of_module(m: nn.Module) -> tuple[dict[int, Any], ...]:
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def _has_global_hooks() -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(torch.nn.modules.module, f"_global_{kind}_hooks", None) for kind in kinds)


SUPPORTED = (
    "Conv2d, MaxPool2d after it, ConvMaxPool2d, Flatten, Linear, LinearActDropout, ReLU, Sigmoid, Tanh, GELU, SiLU, "
    "Dropout, pyconv.Dropout, Identity, Sequential"
)


def _leaves(module: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    check_plain(f"module {prefix[:-1]}" if prefix else "the model", module)
    for name, child in module._modules.items():  # named_children() leaves out what comes again
        if child is None:
            continue
        if type(child) is nn.Sequential:
            yield from _leaves(child, f"{prefix}{name}.")
            continue
        check_plain(f"module {prefix}{name}", child)
        if type(child) is not nn.Identity:
            yield prefix + name, child


def check_plain(name: str, module: nn.Module) -> None:
    """Refuse what runs other code than the module's class: hooks, parametrizations, a forward of its own."""
    named = f"{name} ({type(module).__name__})"
    if any(isinstance(p, UninitializedTensorMixin) for p in module._parameters.values()):
        raise UnsupportedError(f"{named} is not initialised; run the model once")
    if any(_hooks_of_module(module)) or _has_global_hooks():
        raise UnsupportedError(f"{named} has hooks, which a plan would not run")
    own = [
        method for method, value in vars(module).items()
        if callable(value) and hasattr(type(module), method) and method != "_compiled_call_impl"
    ]  # fmt: skip
    if isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward:
        own.append("forward")
    if own:
        raise UnsupportedError(f"{named} has a {own[0]} of its own, which a plan would not run")
    if torch.nn.utils.parametrize.is_parametrized(module):
        raise UnsupportedError(f"{named} is parametrized")


def check_parameters(entries: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse parameters that modules share, that have hooks, and that differ in dtype or device from the first one."""
    first: tuple[str, Tensor] | None = None
    owners: list[tuple[str, int, range]] = []
    for name, module in entries:
        for kind in ("weight", "bias"):
            if isinstance(getattr(module, kind, None), Tensor) and kind not in module._parameters:
                raise UnsupportedError(f"{kind} of module {name} ({type(module).__name__}) is not a parameter")
        for kind, parameter in module.named_parameters(recurse=False):
            named = f"{kind} of module {name} ({type(module).__name__})"
            storage, place = _memory_of(parameter)
            for other, other_storage, other_place in owners:
                if storage == other_storage and place.start < other_place.stop and other_place.start < place.stop:
                    raise UnsupportedError(f"{named} is also the {other}; shared parameters are not supported")
            owners.append((named, storage, place))
            if _hooks_of(parameter):
                raise UnsupportedError(f"{named} has hooks, which a plan would not run")
            first = first or (named, parameter)
            if (parameter.dtype, parameter.device) != (first[1].dtype, first[1].device):
                raise UnsupportedError(
                    f"expected parameters of one dtype and device, but {first[0]} is {first[1].dtype} on "
                    f"{first[1].device} and {named} is {parameter.dtype} on {parameter.device}"
                )


def _memory_of(tensor: Tensor) -> tuple[int, range]:
    """A number of its storage, and which of the storage's elements it lies among."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return tensor.untyped_storage()._cdata, range(first, first + (last + 1 if tensor.numel() > 0 else 0))


def _hooks_of(parameter: Tensor) -> list[Any]:
    return [h for h in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)) if h]


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, numbers.Integral):
        return int(value), int(value)
    return int(value[0]), int(value[-1])


def _activation(module: nn.Module) -> str | None:
    """The name of the activation that a module is; None if it is none."""
    kinds = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.SiLU: "silu", nn.GELU: "gelu"}
    name = kinds.get(type(module))
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return name


def _first_operation(
    entries: list[tuple[str, nn.Module]], previous: nn.Module | None, operations: list[Operation]
) -> int:
    """Appends the operation that the first modules are; how many they are."""
    name, module = entries[0]
    following = [other for _, other in entries[1:3]]
    if not module.training and getattr(module, "p", 0.0) > 0.0:
        raise UnsupportedError(
            f"module {name} ({type(module).__name__}) is in evaluation mode, in which it drops nothing, "
            "and the model is to be trained"
        )
    if type(module) is nn.Conv2d:
        return _convolution(name, module, following, operations)
    if type(module) is modules.ConvMaxPool2d:
        operations.append(
            ConvMaxPool2d(
                module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups,
                module.pool_size, module.pool_stride, module.pool_padding, module.pool_dilation, module.ceil_mode,
                module.activation,
            )
        )  # fmt: skip
    elif type(module) is nn.Linear:
        operations += [Dense(module.weight, False), BiasActDropout(module.bias)]
    elif type(module) is modules.LinearActDropout:
        operations += [
            Dense(module.weight, False),
            BiasActDropout(module.bias, module.activation, module.p, module.inverted),
        ]
    elif type(module) is nn.Flatten:
        if module.start_dim != 1 or module.end_dim != -1:
            raise UnsupportedError(
                f"module {name} (Flatten): expected start_dim=1 and end_dim=-1, but got {module.start_dim} and "
                f"{module.end_dim}"
            )
        operations.append(Flatten())
    elif type(module) is nn.Dropout:
        operations.append(BiasActDropout(p=module.p))
    elif type(module) is modules.Dropout:
        operations.append(BiasActDropout(p=module.p, inverted=module.inverted))
    elif (activation := _activation(module)) is not None:
        operations.append(BiasActDropout(activation=activation))
    elif type(module) is nn.MaxPool2d:
        behind = "is the first module" if previous is None else f"stands behind {type(previous).__name__}"
        raise UnsupportedError(
            f"module {name} (MaxPool2d) {behind}; expected it behind a Conv2d, or behind the ReLU, Sigmoid or Tanh "
            "that follows one, and without return_indices"
        )
    else:
        raise UnsupportedError(f"module {name} ({module}) is not supported; supported are {SUPPORTED}")
    return 1


def _convolution(name: str, conv: nn.Conv2d, following: list[nn.Module], operations: list[Operation]) -> int:
    if conv.padding_mode != "zeros":
        raise UnsupportedError(f"module {name} (Conv2d): padding_mode {conv.padding_mode!r} is not supported")
    pool, activation = None, "none"
    used = 1
    for module in following:
        found = _activation(module)
        if type(module) is nn.MaxPool2d and pool is None and activation in MONOTONE:
            if module.return_indices:
                break
            pool = module
        elif found is not None and activation == "none":
            activation = found
        else:
            break
        used += 1
    pooling: dict[str, object] = {}
    if pool is not None:
        pooling = {
            "pool_size": _pair(pool.kernel_size), "pool_stride": _pair(pool.stride),
            "pool_padding": _pair(pool.padding), "pool_dilation": _pair(pool.dilation), "ceil_mode": pool.ceil_mode,
        }  # fmt: skip
    operations.append(
        ConvMaxPool2d(
            conv.weight, conv.bias, _pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else _pair(conv.padding), _pair(conv.dilation), conv.groups,
            activation=activation, **pooling,
        )
    )  # fmt: skip
    return used


# ------------------------------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------------------------------


_CONV_ARGUMENTS = (
    "stride", "padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding", "pool_dilation",
    "ceil_mode", "activation",
)  # fmt: skip


def joined(operations: Iterable[Operation]) -> Iterator[Operation]:
    """The same with as few passes over bias, activation and dropout as can be, which may come after a Flatten then."""
    pending = BiasActDropout()
    for operation in operations:
        if isinstance(operation, BiasActDropout):
            both = _joined(pending, operation)
            if both is None:
                yield pending
                both = operation
            pending = both
            continue
        if not isinstance(operation, Flatten):
            if not pending.does_nothing:
                yield pending
            pending = BiasActDropout()
        yield operation
    if not pending.does_nothing:
        yield pending


def _joined(first: BiasActDropout, second: BiasActDropout) -> BiasActDropout | None:
    """Both as one, if it can be."""
    if first.does_nothing:
        return second
    if first.p > 0 or second.bias is not None or (first.activation != "none" and second.activation != "none"):
        return None
    activation = first.activation if first.activation != "none" else second.activation
    return BiasActDropout(first.bias, activation, second.p, second.inverted, second.generator)


def execute(operations: Iterable[Operation], x: Tensor) -> Tensor:
    """The outputs (N, outputs) of examples x (N, ...) in training, by the functional operators and with autograd.

    Raises:
        UnsupportedError: examples of a shape that an operation does not take; as by a plan.
    """
    for o in joined(operations):
        if isinstance(o, ConvMaxPool2d):
            if o.image_size is not None:
                x = x.reshape(len(x), *o.image_size)
            _check_images(tuple(x.shape[1:]))
            arguments = {name: getattr(o, name) for name in _CONV_ARGUMENTS}
            x = functional.conv_max_pool2d(x, o.weight, o.bias, **arguments)
        elif isinstance(o, Dense):
            _check_inputs(o, tuple(x.shape[1:]))
            x = x @ (o.matrix if o.inputs_are_rows else o.matrix.T)
        elif isinstance(o, BiasActDropout):
            x = functional.bias_act_dropout(
                x, o.bias, activation=o.activation, p=o.p, inverted=o.inverted, generator=o.generator
            )
        else:
            x = x.flatten(1)
    return x


def generators(operations: Iterable[Operation]) -> list[torch.Generator]:
    """Those that the operations draw from, beside the device's default one."""
    passes = [o for o in operations if isinstance(o, BiasActDropout) and o.is_random]
    return [o.generator for o in passes if o.generator is not None]


def _check_images(shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise UnsupportedError(f"expected images (C, H, W) before a convolution, but got {shape}")


def _check_inputs(o: Dense, shape: tuple[int, ...]) -> None:
    if shape != (o.inputs,):
        hint = "; is a Flatten missing?" if _count(shape) == o.inputs else ""
        raise UnsupportedError(f"expected {o.inputs} inputs of a fully connected layer, but got {shape}{hint}")


# ------------------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------------------


class PlanBuilder:
    """Makes a native plan of operations, for examples of one shape and mini-batches up to a size.

    Args:
        example_shape: of one example, without the mini-batch.
        batch: the largest mini-batch.
        trained: whether a parameter is to be updated.
        in_l2: whether a parameter's squares belong to the cost.

    Attributes:
        plan: pyconv._C.TrainingPlan.
        parameters: the tensors of the plan, by number.
    """

    def __init__(
        self, operations: Sequence[Operation], example_shape: Sequence[int], batch: int, trained, in_l2
    ) -> None:
        self._trained, self._in_l2 = trained, in_l2
        self.parameters: list[Tensor] = []
        self._shape = tuple(example_shape)
        tensors = [t for operation in operations for t in _tensors(operation)]
        if not tensors:
            raise UnsupportedError("expected a model with parameters, but got none")
        classes = _classes(operations)
        self.plan = _C.TrainingPlan(tensors[0], batch, _count(self._shape), classes)
        self._batch = batch
        for operation in joined(operations):
            if isinstance(operation, Flatten):
                self._shape = (_count(self._shape),)
            elif isinstance(operation, BiasActDropout):
                self._bias_act_dropout(operation)
            elif isinstance(operation, ConvMaxPool2d):
                self._conv_max_pool2d(operation)
            else:
                self._dense(operation)
        self.plan.finish()

    def _parameter(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        try:
            number = self.plan.add_parameter(tensor, self._trained(tensor), self._in_l2(tensor))
        except RuntimeError as error:
            raise UnsupportedError(str(error).splitlines()[0]) from None
        self.parameters.append(tensor)
        return number

    def _conv_max_pool2d(self, o: ConvMaxPool2d) -> None:
        if o.image_size is not None:
            if _count(o.image_size) != _count(self._shape):
                raise UnsupportedError(f"expected images {o.image_size} before a convolution, but got {self._shape}")
            self._shape = o.image_size
        _check_images(self._shape)
        size = (self._batch, *self._shape)
        arguments = functional._schema_arguments(
            o.weight.shape[2:],
            **{name: getattr(o, name) for name in _CONV_ARGUMENTS},
        )
        self._shape = tuple(
            self.plan.add_conv_max_pool2d(self._parameter(o.weight), self._parameter(o.bias), size, *arguments)
        )

    def _dense(self, o: Dense) -> None:
        _check_inputs(o, self._shape)
        if not o.matrix.is_contiguous() or o.matrix.numel() == 0:
            raise UnsupportedError(
                f"expected a contiguous matrix with elements in a fully connected layer, but got one of size "
                f"{tuple(o.matrix.shape)} and strides {o.matrix.stride()}"
            )
        self.plan.add_dense(self._parameter(o.matrix), o.inputs_are_rows)
        self._shape = (o.outputs,)

    def _bias_act_dropout(self, o: BiasActDropout) -> None:
        scale = 1.0 / (1.0 - o.p) if o.is_random and o.inverted else float(o.p < 1.0)
        generator = self.plan.add_generator(o.generator) if o.is_random else -1
        self.plan.add_bias_act_dropout(
            _count(self._shape), self._parameter(o.bias), o.activation, o.p, scale, generator
        )


def _tensors(operation: Operation) -> list[Tensor]:
    found = [getattr(operation, name, None) for name in ("weight", "matrix", "bias")]
    return [tensor for tensor in found if tensor is not None]


def check_has_outputs(operations: Sequence[Operation]) -> None:
    """Refuse what has no fully connected layer, whose outputs a loss is computed from."""
    if not any(isinstance(operation, Dense) for operation in operations):
        raise UnsupportedError("expected a fully connected layer before the loss, but the model has none")


def _classes(operations: Sequence[Operation]) -> int:
    """The outputs of the last fully connected layer."""
    check_has_outputs(operations)
    return [operation for operation in operations if isinstance(operation, Dense)][-1].outputs


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


class PlanTable:
    """A plan in words: `rows` of operation, input, output, kernels, flops and bytes; `print` it for a table.

    Where the plan has run, the rows have forward_seconds and backward_seconds of a mini-batch too, on average over
    `mini_batches`; the backward includes the update of the operation's parameters.

    Args:
        plan: a pyconv._C.TrainingPlan.
    """

    _HEADINGS = ("operation", "input", "output", "kernels", "MFLOP", "KiB moved at least")
    _TIME_HEADINGS = ("forward us", "backward us")

    def __init__(self, plan: _C.TrainingPlan) -> None:
        self.rows = plan.describe()
        self.buffer_bytes = plan.buffer_bytes
        self.mini_batches = plan.mini_batches
        for row in self.rows:
            for key in ("forward_seconds", "backward_seconds"):
                total = row.pop(key)
                if self.mini_batches > 0:
                    row[key] = total / self.mini_batches

    def __str__(self) -> str:
        lines = [self._HEADINGS + (self._TIME_HEADINGS if self.mini_batches > 0 else ())]
        lines += [self._cells(row) for row in [*self.rows, self.total]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        text = ["  ".join(cells).rstrip() for cells in padded]
        legend = [
            f"kernels: forward, backward; of {_C.isa()}. MFLOP: forward and backward, as if nothing were skipped.",
            f"Between the operations: {self.buffer_bytes / 1024:.0f} KiB of buffers.",
        ]
        return "\n".join([*text, *legend])

    __repr__ = __str__

    def _cells(self, row: dict[str, Any]) -> tuple[str, ...]:
        cells = (row["operation"], row["input"], row["output"], row["kernels"])
        cells += (f"{row['flops'] / 1e6:.2f}", f"{row['bytes'] / 1024:.1f}")
        if self.mini_batches > 0:
            cells += (f"{row['forward_seconds'] * 1e6:.1f}", f"{row['backward_seconds'] * 1e6:.1f}")
        return cells

    @property
    def total(self) -> dict[str, Any]:
        """A row of the sums."""
        numbers = [key for key, value in self.rows[0].items() if not isinstance(value, str)]
        sums = {key: sum(row[key] for row in self.rows) for key in numbers}
        return {"operation": "a mini-batch", "input": "", "output": "", "kernels": "", **sums}
