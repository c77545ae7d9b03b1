"""Saved networks: a safetensors file (https://github.com/huggingface/safetensors), which holds numbers and no
code.

    tensors   layers.N.w, layers.N.b, of each layer that has them
    metadata  format = "pyconv.network3", version = "1", mini_batch_size,
              architecture = JSON: [{"class": ..., "arguments": {...}}, ...], one object per layer

Activation functions are saved by their names in `pyconv.network3`. Of the arguments that go beyond the book's, those
are saved that differ from their defaults.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyconv.errors import DataError
from pyconv.network3 import layers
from pyconv.network3.layers import (
    ConvLayer,
    ConvPoolLayer,
    FullyConnectedLayer,
    ImageLayer,
    Layer,
    PoolLayer,
    SoftmaxLayer,
)
from pyconv.network3.network import Network

_FORMAT = "pyconv.network3"
CHECKPOINT_FORMAT = "pyconv.network3.checkpoint"
_VERSION = "1"
_ACTIVATIONS = {name: getattr(layers, name) for name in ("sigmoid", "tanh", "ReLU", "linear")}
_ARGUMENTS: dict[type[Layer], tuple[str, ...]] = {
    ConvPoolLayer: ("filter_shape", "image_shape", "poolsize", "activation_fn"),
    FullyConnectedLayer: ("n_in", "n_out", "activation_fn", "p_dropout"),
    SoftmaxLayer: ("n_in", "n_out", "p_dropout"),
    ConvLayer: ("filter_shape", "image_shape", "activation_fn"),
    PoolLayer: ("image_shape", "poolsize"),
}
_OPTIONS: dict[type[Layer], tuple[str, ...]] = {
    ConvPoolLayer: ("stride", "padding", "pool_stride", "groups", "pooling"),
    ConvLayer: ("stride", "padding", "groups"),
    PoolLayer: ("pool_stride", "pooling"),
}
_KINDS: dict[Callable[[int], bool], str] = {
    stat.S_ISDIR: "a directory",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
}
_CLASSES = {layer_class.__name__: layer_class for layer_class in _ARGUMENTS}


def import_safetensors() -> Any:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ImportError("saved networks need safetensors: pip install 'pyconv[train]'") from None
    import safetensors.torch

    return safetensors


# ----------------------------------------------------------------------------------------------------------
# Save
# ----------------------------------------------------------------------------------------------------------


def save_network(network: Network, path: str | os.PathLike[str]) -> None:
    """Save `network`; a file that was there before is replaced only when the new one is complete on the disk.

    A symbolic link stays, and the file that it leads to is written.

    Raises:
        ValueError: a layer or an activation function that is not one of `pyconv.network3`.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written, or `path` is a device, a pipe or another thing than a file.
    """
    write_file(path, network_content(network))


def network_content(network: Network, params: Sequence[Tensor] | None = None) -> bytes:
    """What `save_network` writes to the file; with `params` in the place of `network.params`, if they are given."""
    safetensors = import_safetensors()
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "architecture": json.dumps(describe(network)),
        "mini_batch_size": str(network.mini_batch_size),
    }
    tensors = {
        f"layers.{i}.{name}": param.detach().cpu().contiguous()
        for (i, name), param in zip(_parameters(network), network.params if params is None else params, strict=True)
    }
    return safetensors.torch.save(tensors, metadata=metadata)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Make `content` the content of the file, in one step; errors are as `save_network` says."""
    check_regular_file(path)
    try:
        _write_atomically(Path(os.path.realpath(path)), content)
    except OSError as error:
        if error.errno is None:
            raise
        # The file that the error names may be the temporary one, which says nothing to the caller.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError if `path` exists, and is something that renaming a file to it would destroy."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), "another kind of file")
        raise OSError(f"{os.fspath(path)}: expected a regular file, found {kind}")


def describe(network: Network) -> list[dict[str, Any]]:
    """Class and arguments of each layer.

    Raises:
        ValueError: a layer or an activation function that is not one of `pyconv.network3`.
    """
    return [_describe(layer) for layer in network.layers]


def _parameters(network: Network) -> list[tuple[int, str]]:
    """(number of the layer, name) of all parameters."""
    return [(i, name) for i, layer in enumerate(network.layers) if layer.params for name in ("w", "b")]


def _describe(layer: Layer) -> dict[str, Any]:
    if type(layer) not in _ARGUMENTS:
        raise ValueError(
            f"cannot save a layer of class {type(layer).__name__}; expected {', '.join(_CLASSES)}"
        )
    arguments = {name: getattr(layer, name) for name in _ARGUMENTS[type(layer)]}
    if "activation_fn" in arguments:
        function = arguments["activation_fn"]
        names = [name for name, known in _ACTIVATIONS.items() if known is function]
        if not names:
            raise ValueError(
                f"cannot save activation_fn {function!r}; expected one of {', '.join(_ACTIVATIONS)}"
            )
        arguments["activation_fn"] = names[0]
    if isinstance(layer, ImageLayer):
        arguments |= layer._options()
    return {"class": type(layer).__name__, "arguments": arguments}


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, flush it to the disk, rename it to `path`, and flush the
    directory."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # A plain open, not tempfile's, so that the file gets the permissions of any other new file.
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


# ----------------------------------------------------------------------------------------------------------
# Load
# ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; errors are as `load_network` says, and name what was `expected`."""
    safetensors = import_safetensors()
    with open(path, "rb"):
        pass  # safetensors reports a file that cannot be opened in words of its own
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: expected {expected} (safetensors), found another file ({error})") from None


def load_network(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Network:
    """Load a network that `Network.save` wrote; it is in inference mode, and its parameters are the saved
    bits.

    Args:
        path: the file.
        device: of the parameters; the CPU if None.

    Raises:
        DataError: not such a file, a damaged one, or one of another version.
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
    """
    path = Path(path)
    metadata, tensors = read_file(path, "a saved network")
    if metadata.get("format") != _FORMAT:
        is_checkpoint = metadata.get("format") == CHECKPOINT_FORMAT
        hint = "; the best epoch's network is best.safetensors beside it" if is_checkpoint else ""
        raise DataError(f"{path}: expected the format {_FORMAT!r}, found {metadata.get('format')!r}{hint}")
    if metadata.get("version") != _VERSION:
        raise DataError(f"{path}: expected version {_VERSION!r}, found {metadata.get('version')!r}")
    try:
        network = _construct(metadata)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path}: expected the description of a network, found a foreign one ({error!r})"
        ) from None
    _assign(path, network, tensors)
    return network.to(device).eval()


def _construct(metadata: dict[str, str]) -> Network:
    """The network that the metadata describe, without memory for its parameters."""
    described = []
    for entry in json.loads(metadata["architecture"]):
        layer_class = _CLASSES[entry["class"]]
        arguments = dict(entry["arguments"])
        required, options = set(_ARGUMENTS[layer_class]), set(_OPTIONS.get(layer_class, ()))
        if not required <= set(arguments) <= required | options:
            raise ValueError(f"{layer_class.__name__} with the arguments {sorted(arguments)}")
        if "activation_fn" in arguments:
            arguments["activation_fn"] = _ACTIVATIONS[arguments["activation_fn"]]
        with torch.device("meta"):
            described.append(layer_class(**arguments))
    return Network(described, int(metadata["mini_batch_size"]))


def _assign(path: Path, network: Network, tensors: dict[str, Tensor]) -> None:
    """Make `tensors` the parameters of `network`, if they are the ones it needs."""
    expected = {f"layers.{i}.{name}" for i, name in _parameters(network)}
    if set(tensors) != expected:
        raise DataError(f"{path}: expected the tensors {sorted(expected)}, found {sorted(tensors)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise DataError(
            f"{path}: expected tensors of one floating-point dtype, found {sorted(map(str, dtypes))}"
        )
    for i, name in _parameters(network):
        layer = network.layers[i]
        tensor, shape = tensors[f"layers.{i}.{name}"], getattr(layer, name).shape
        if tensor.shape != shape:
            raise DataError(
                f"{path}: expected layers.{i}.{name} of shape {tuple(shape)}, found {tuple(tensor.shape)}"
            )
        setattr(layer, name, nn.Parameter(tensor))
