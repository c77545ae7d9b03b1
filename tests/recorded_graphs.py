"""CUDA graphs on the CPU: what a function asks of the dispatcher is recorded, undone, and repeated by a replay.

A replay calls the same operators on the same tensors, so whatever the function took from the host (a number, an index,
a decision) is that of the capture, as on a GPU. A read of a value during the capture is refused, as on a GPU. What this
cannot show are what streams do at a time, memory pools and which of torch's operators wait inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyconv import captured

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Graph:
    """In place of torch.cuda.CUDAGraph.

    Attributes:
        graphs: all that were captured since `on_the_cpu`, class-wide.
        replays: how often this one was replayed.
        behind_capture: whether the current stream has waited for that of the capture.
    """

    graphs: list[Graph] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.generators: list[torch.Generator] = []
        self.replays = 0
        self.behind_capture = False
        self.graphs.append(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        assert not self.calls, "a generator is registered before the capture"
        self.generators.append(generator)

    def replay(self) -> None:
        assert self.calls, "replay of a graph without a capture"
        assert self.behind_capture, "replay on a stream that does not wait for that of the capture"
        self.replays += 1
        with torch.inference_mode(False), torch.no_grad():
            for operator, args, kwargs, results in self.calls:
                for old, new in zip(_tensors(results), _tensors(operator(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    if _storage(tensor) not in self._own:
                        self._before.setdefault(_storage(tensor), (tensor, tensor.clone()))
        results = func(*args, **kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self._own |= {_storage(tensor) for tensor in _tensors(results)} - given
        self.graph.calls.append((func, args, kwargs, results))
        return results

    def undo(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _capture(graph: Graph, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
    generator_states = torch.get_rng_state(), [g.get_state() for g in graph.generators]
    recorder = _Recorder(graph)
    with recorder:
        yield
    with torch.no_grad():
        recorder.undo()
    torch.set_rng_state(generator_states[0])
    for generator, state in zip(graph.generators, generator_states[1], strict=True):
        generator.set_state(state)


class _Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)


class _CurrentStream(_Stream):
    def wait_stream(self, other: _Stream) -> None:
        assert type(other) is _Stream
        for graph in Graph.graphs:
            graph.behind_capture = bool(graph.calls)


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Makes `captured.Graphed` record graphs of tensors on the CPU; the graphs, as they come."""

    class OnTheCpu(captured.Graphed):
        def __init__(self, device: torch.device, generators: Any = ()) -> None:
            super().__init__(torch.device("cuda"), generators)

    Graph.graphs = graphs = []
    for name, fake in {
        "CUDAGraph": Graph,
        "graph": _capture,
        "current_stream": _CurrentStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(captured, "_side_stream", _Stream)
    for module in ("pyconv.training", "pyconv.network3.descent"):
        monkeypatch.setattr(f"{module}.Graphed", OnTheCpu)
    return graphs
