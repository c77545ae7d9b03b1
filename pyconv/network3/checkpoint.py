"""Checkpoints of `Network.SGD`: a directory with the state after the last epoch, and the best epoch's network.

    last.safetensors    last.NAME, best.NAME    the network's parameters and those of its best epoch
                        velocity.NAME           momentum, where there is some
                        generator.N             states of the random number generators
                        metadata                format = "pyconv.network3.checkpoint", version = "1",
                                                settings and history = JSON
    best.safetensors    what `Network.save` writes

Each file is replaced only when the new one is complete on the disk, the best epoch's first: whenever the process
dies, the two are those of an epoch's end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyconv.errors import DataError
from pyconv.network3.history import History
from pyconv.network3.serialization import (
    CHECKPOINT_FORMAT,
    import_safetensors,
    network_content,
    read_file,
    write_file,
)

if TYPE_CHECKING:
    from pyconv.network3.network import Network

_VERSION = "1"


def finished_epochs(path: str | os.PathLike[str]) -> int:
    """How many epochs the training of the checkpoint `path` has finished; 0 if there is none."""
    last = Path(path) / "last.safetensors"
    if not last.exists():
        return 0
    metadata, _ = _read(last)
    return len(_history(last, metadata)["epoch"])


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of this format and version."""
    metadata, tensors = read_file(path, "a checkpoint")
    found = metadata.get("format"), metadata.get("version")
    if found != (CHECKPOINT_FORMAT, _VERSION):
        raise DataError(f"{path}: expected the format {CHECKPOINT_FORMAT!r}, version {_VERSION!r}, found {found}")
    return metadata, tensors


def _history(path: Path, metadata: dict[str, str]) -> History:
    try:
        return History.from_json(metadata["history"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: expected a history, found none ({error!r})") from None


class Checkpoint:
    """The directory `path`, made where it is missing, for trainings of `network` with these settings.

    Args:
        settings: what a training must share with the one that it continues, by name; JSON values.
        generators: of all random numbers; None is PyTorch's default on the CPU.
        velocities: by parameter.

    Raises:
        ValueError: the network has a layer that cannot be saved.
        ImportError: safetensors is not installed.
        OSError: `path` is not a directory, or nothing can be written there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        network: Network,
        settings: Mapping[str, Any],
        generators: Iterable[torch.Generator | None],
        velocities: Mapping[torch.nn.Parameter, Tensor],
    ) -> None:
        self._last, self._best = Path(path) / "last.safetensors", Path(path) / "best.safetensors"
        self._network = network
        self._generators: list[torch.Generator] = []
        for generator in generators:
            generator = torch.default_generator if generator is None else generator
            if all(generator is not known for known in self._generators):
                self._generators.append(generator)
        self._settings = json.loads(
            json.dumps({**settings, "number of random number generators": len(self._generators)})
        )
        self._velocities = velocities
        # What cannot be saved is noticed before the training.
        network_content(network)
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"{os.fspath(path)}: expected a directory, found a file") from None
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{os.fspath(path)}: the directory is not writable")

    @property
    def exists(self) -> bool:
        return self._last.exists()

    def save(self, history: History, best_params: list[Tensor]) -> None:
        """Save the state after the epoch that is the history's last."""
        safetensors = import_safetensors()
        tensors: dict[str, Tensor] = {}
        for (name, param), best in zip(self._named_parameters(), best_params):
            tensors[f"last.{name}"], tensors[f"best.{name}"] = param.detach(), best
            if param in self._velocities:
                tensors[f"velocity.{name}"] = self._velocities[param]
        for number, generator in enumerate(self._generators):
            tensors[f"generator.{number}"] = generator.get_state()
        content = safetensors.torch.save(
            # Copies: safetensors refuses tensors that share memory.
            {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
            metadata={
                "format": CHECKPOINT_FORMAT,
                "version": _VERSION,
                "settings": json.dumps(self._settings),
                "history": history.to_json(),
            },
        )
        if history.best_epoch == history["epoch"][-1]:
            write_file(self._best, network_content(self._network, best_params))
        write_file(self._last, content)

    def load(self) -> tuple[History, list[Tensor]]:
        """Set parameters, velocities and generators to the saved state; its history and best epoch's parameters,
        the latter on the CPU.

        Raises:
            ValueError: a training with other settings; both are named.
            DataError: not a checkpoint, a damaged one, or one of another version. Nothing has been changed.
        """
        metadata, tensors = _read(self._last)
        history = _history(self._last, metadata)
        try:
            settings = dict(json.loads(metadata["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._last}: expected settings, found others ({error!r})") from None
        for name in sorted({*settings, *self._settings}):
            expected, found = settings.get(name), self._settings.get(name)
            if expected != found:
                if name == "layers" and isinstance(expected, list) and len(expected) == len(found):
                    number = next(j for j, pair in enumerate(zip(expected, found)) if pair[0] != pair[1])
                    name, expected, found = f"layer {number}", expected[number], found[number]
                raise ValueError(
                    f"{self._last}: a training is resumed with its own settings: expected {name} "
                    f"{expected!r}, but got {found!r}"
                )
        targets = self._targets()
        shapes = {name: (tuple(target.shape), target.dtype) for name, target in targets.items()}
        saved = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if saved != shapes:
            raise DataError(f"{self._last}: expected the tensors {shapes}, found {saved}")
        for number, generator in enumerate(self._generators):
            generator.set_state(tensors[f"generator.{number}"])
        with torch.no_grad():
            for name, target in targets.items():
                if not name.startswith(("generator.", "best.")):
                    target.copy_(tensors[name])
        return history, [tensors[f"best.{name}"] for name, _ in self._named_parameters()]

    def _targets(self) -> dict[str, Tensor]:
        targets: dict[str, Tensor] = {}
        for name, param in self._named_parameters():
            targets[f"last.{name}"] = targets[f"best.{name}"] = param
            if param in self._velocities:
                targets[f"velocity.{name}"] = self._velocities[param]
        for number, generator in enumerate(self._generators):
            targets[f"generator.{number}"] = generator.get_state()
        return targets

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """In the order of `Network.params`."""
        return [
            (f"layers.{j}.{number}", param)
            for j, layer in enumerate(self._network.layers)
            for number, param in enumerate(layer.params)
        ]
