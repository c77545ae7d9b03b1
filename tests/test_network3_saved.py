"""Saved networks: Network.save and load_network."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys

import pytest
import torch

from pyconv import DataError
from pyconv.network3 import (
    ConvLayer,
    ConvPoolLayer,
    FullyConnectedLayer,
    Network,
    PoolLayer,
    ReLU,
    SoftmaxLayer,
    linear,
    load_network,
    sigmoid,
    tanh,
)

safetensors_torch = pytest.importorskip("safetensors.torch")


def make_network(dtype=torch.float32, seed=0):
    options = {"dtype": dtype, "generator": torch.Generator().manual_seed(seed)}
    network = Network(
        [
            ConvPoolLayer((3, 1, 5, 5), (10, 1, 12, 12), (2, 4), ReLU, **options),
            FullyConnectedLayer(24, 7, tanh, 0.25, **options),
            FullyConnectedLayer(7, 6, linear, **options),
            FullyConnectedLayer(6, 5, sigmoid, **options),
            SoftmaxLayer(5, 10, 0.5, **options),
        ],
        10,
    )
    with torch.no_grad():
        network.params[0][0, 0, 0, 0] = -0.0
        network.params[-1].normal_(generator=options["generator"])
    return network


def make_network_beyond_the_book():
    options = {"generator": torch.Generator().manual_seed(0)}
    return Network(
        [
            PoolLayer((10, 4, 24, 20), 2, pooling="l2"),
            ConvPoolLayer(
                (6, 2, 5, 3), (10, 4, 12, 10), (2, 2), ReLU, padding=(2, 1), groups=2, pool_stride=1, **options
            ),
            ConvPoolLayer((4, 6, 3, 3), (10, 6, 11, 9), (2, 2), tanh, stride=2, pooling="l2", **options),
            ConvLayer((3, 4, 2, 2), (10, 4, 2, 2), sigmoid, padding=1, **options),
            PoolLayer((10, 3, 3, 3), (2, 2), pool_stride=(1, 2)),
            SoftmaxLayer(6, 10, **options),
        ],
        10,
    )


def split(content):
    """The header of a file, in which safetensors writes the metadata in any order, and the bytes of its tensors."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_is_bitwise(dtype, tmp_path):
    network = make_network(dtype)
    network.save(tmp_path / "network.safetensors")
    loaded = load_network(tmp_path / "network.safetensors")
    assert repr(loaded) == repr(network)
    assert loaded.mini_batch_size == 10 and not loaded.training
    for ours, theirs in zip(network.params, loaded.params, strict=True):
        assert isinstance(theirs, torch.nn.Parameter) and theirs.requires_grad and theirs.dtype == dtype
        assert torch.equal(bits(ours), bits(theirs))


def test_a_loaded_network_predicts_and_trains(tmp_path):
    network = make_network()
    network.save(tmp_path / "network.safetensors")
    loaded = load_network(str(tmp_path / "network.safetensors"))
    x, y = torch.rand(40, 144), torch.randint(0, 10, (40,))
    with torch.no_grad():
        assert torch.equal(loaded(x), network.eval()(x))
    before = loaded.params[0].detach().clone()
    loaded.SGD((x, y), 1, 10, 0.1, (x, y), (x, y), verbose=False)
    assert not torch.equal(loaded.params[0], before)


def test_format(tmp_path):
    """The file is readable without pyconv."""
    network = make_network()
    path = tmp_path / "network.safetensors"
    network.save(path)
    header, _ = split(path.read_bytes())
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pyconv.network3"
    assert metadata["version"] == "1"
    assert metadata["mini_batch_size"] == "10"
    assert json.loads(metadata["architecture"])[:2] == [
        {
            "class": "ConvPoolLayer",
            "arguments": {
                "filter_shape": [3, 1, 5, 5],
                "image_shape": [10, 1, 12, 12],
                "poolsize": [2, 4],
                "activation_fn": "ReLU",
            },
        },
        {
            "class": "FullyConnectedLayer",
            "arguments": {"n_in": 24, "n_out": 7, "activation_fn": "tanh", "p_dropout": 0.25},
        },
    ]
    assert sorted(header) == sorted(f"layers.{i}.{name}" for i in range(5) for name in "wb")
    assert header["layers.1.w"]["shape"] == [24, 7]


def test_the_bytes_of_the_books_layers(tmp_path):
    """A file of the book's three layers holds the book's arguments only, in this order."""
    path = tmp_path / "network.safetensors"
    network = make_network()
    network.save(path)
    layers = enumerate(network.layers)
    expected = safetensors_torch.save(
        {f"layers.{i}.{name}": getattr(layer, name).detach() for i, layer in layers for name in "wb"},
        metadata={
            "format": "pyconv.network3",
            "version": "1",
            "architecture": '[{"class": "ConvPoolLayer", "arguments": {"filter_shape": [3, 1, 5, 5], "image_shape": '
            '[10, 1, 12, 12], "poolsize": [2, 4], "activation_fn": "ReLU"}}, '
            '{"class": "FullyConnectedLayer", "arguments": {"n_in": 24, "n_out": 7, "activation_fn": "tanh", '
            '"p_dropout": 0.25}}, '
            '{"class": "FullyConnectedLayer", "arguments": {"n_in": 7, "n_out": 6, "activation_fn": "linear", '
            '"p_dropout": 0.0}}, '
            '{"class": "FullyConnectedLayer", "arguments": {"n_in": 6, "n_out": 5, "activation_fn": "sigmoid", '
            '"p_dropout": 0.0}}, '
            '{"class": "SoftmaxLayer", "arguments": {"n_in": 5, "n_out": 10, "p_dropout": 0.5}}]',
            "mini_batch_size": "10",
        },
    )
    assert path.stat().st_size == len(expected) and split(path.read_bytes()) == split(expected)


def test_layers_beyond_the_book(tmp_path):
    path = tmp_path / "network.safetensors"
    network = make_network_beyond_the_book()
    network.save(path)
    loaded = load_network(path)
    assert repr(loaded) == repr(network)
    for ours, theirs in zip(network.params, loaded.params, strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    x = torch.rand(10, 4 * 24 * 20)
    with torch.no_grad():
        assert torch.equal(loaded(x), network.eval()(x))
    loaded.save(tmp_path / "again.safetensors")
    assert split((tmp_path / "again.safetensors").read_bytes()) == split(path.read_bytes())
    architecture = split(path.read_bytes())[0]["__metadata__"]["architecture"]
    assert [entry["arguments"] for entry in json.loads(architecture)[:5]] == [
        {"image_shape": [10, 4, 24, 20], "poolsize": [2, 2], "pooling": "l2"},
        {
            "filter_shape": [6, 2, 5, 3], "image_shape": [10, 4, 12, 10], "poolsize": [2, 2], "activation_fn": "ReLU",
            "padding": [2, 1], "pool_stride": [1, 1], "groups": 2,
        },
        {
            "filter_shape": [4, 6, 3, 3], "image_shape": [10, 6, 11, 9], "poolsize": [2, 2], "activation_fn": "tanh",
            "stride": [2, 2], "pooling": "l2",
        },
        {
            "filter_shape": [3, 4, 2, 2], "image_shape": [10, 4, 2, 2], "activation_fn": "sigmoid", "padding": [1, 1],
        },
        {"image_shape": [10, 3, 3, 3], "poolsize": [2, 2], "pool_stride": [1, 2]},
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "network.safetensors"
    make_network().save(path)
    before = path.read_bytes()

    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        make_network(seed=1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["network.safetensors"]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "network.safetensors"
    path.write_bytes(b"before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_network().save(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["network.safetensors"]


def test_the_file_is_complete_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(
            "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size
        )
        fsync(descriptor)

    def record_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    path = tmp_path / "network.safetensors"
    make_network().save(path)
    assert events == [path.stat().st_size, "rename", "directory"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    make_network().save(tmp_path / "network.safetensors")
    assert (tmp_path / "network.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(target)
    for seed in (0, 1):  # to a file that is not there yet, and to one that is
        network = make_network(seed=seed)
        network.save(link)
        assert link.is_symlink() and not target.is_symlink()
        assert torch.equal(load_network(target).params[0], network.params[0])
    assert os.listdir(tmp_path / "elsewhere") == ["target"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_not_a_regular_file_is_not_replaced(linked, tmp_path):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    path = link if linked else fifo
    with pytest.raises(OSError, match="expected a regular file, found a named pipe") as caught:
        make_network().save(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert stat.S_ISFIFO(fifo.stat().st_mode) and link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]


def test_an_error_names_the_path_that_was_given(tmp_path, monkeypatch):
    path = tmp_path / "network.safetensors"

    def fail(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", source, None, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError) as caught:
        make_network().save(path)
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert ".tmp" not in str(caught.value)


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "network.safetensors"
    with pytest.raises(
        ValueError, match="cannot save activation_fn .*cos.*; expected one of sigmoid, tanh, ReLU, linear"
    ):
        Network([FullyConnectedLayer(6, 5, torch.cos), SoftmaxLayer(5, 3)], 10).save(path)

    class OwnLayer(SoftmaxLayer):
        pass

    with pytest.raises(ValueError, match="cannot save a layer of class OwnLayer"):
        Network([OwnLayer(5, 3)], 10).save(path)
    with pytest.raises(FileNotFoundError):
        make_network().save(tmp_path / "nowhere" / "network.safetensors")
    assert os.listdir(tmp_path) == []


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    network = make_network()
    path = tmp_path / "network.safetensors"
    network.save(path)
    for module in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: load_network(path), lambda: network.save(path)):
        with pytest.raises(
            ImportError, match=r"^saved networks need safetensors: pip install 'pyconv\[train\]'$"
        ):
            call()


# ----------------------------------------------------------------------------------------------------------
# Foreign files
# ----------------------------------------------------------------------------------------------------------


def rewrite(path, *, tensors=None, **metadata):
    """Save a sound network with some of its metadata or tensors replaced; None takes an entry away."""
    make_network().save(path)
    content = path.read_bytes()
    described = {**split(content)[0]["__metadata__"], **metadata}
    loaded = {**safetensors_torch.load(content), **(tensors or {})}
    safetensors_torch.save_file(
        {name: tensor for name, tensor in loaded.items() if tensor is not None},
        path,
        metadata={name: value for name, value in described.items() if value is not None},
    )


SOFTMAX = {"class": "SoftmaxLayer", "arguments": {"n_in": 5, "n_out": 10, "p_dropout": 0.0}}


def architecture(**changes):
    return json.dumps([{**SOFTMAX, "arguments": {**SOFTMAX["arguments"], **changes}}])


def convolutional(class_name="ConvPoolLayer", **changes):
    """The architecture of the sound network with other arguments of its first layer."""
    arguments = {
        "filter_shape": [3, 1, 5, 5], "image_shape": [10, 1, 12, 12], "poolsize": [2, 4], "activation_fn": "ReLU",
    }  # fmt: skip
    arguments = {name: value for name, value in {**arguments, **changes}.items() if value is not None}
    return json.dumps([{"class": class_name, "arguments": arguments}])


FOREIGN = {
    "another version": ({"version": "2"}, "expected version '1', found '2'"),
    "no version": ({"version": None}, "expected version '1', found None"),
    "another format": ({"format": "pt"}, "expected the format 'pyconv.network3', found 'pt'"),
    "a checkpoint": (
        {"format": "pyconv.network3.checkpoint"},
        "found 'pyconv.network3.checkpoint'; the best epoch's network is best.safetensors beside it",
    ),
    "no architecture": ({"architecture": None}, "found a foreign one .*architecture"),
    "no JSON": ({"architecture": "[{"}, "found a foreign one"),
    "deep JSON": ({"architecture": "[" * 100_000}, "found a foreign one"),
    "a number": ({"architecture": "5"}, "found a foreign one"),
    "no layers": ({"architecture": "[]"}, "found a foreign one .*at least one layer"),
    "an unknown class": (
        {"architecture": json.dumps([{**SOFTMAX, "class": "Network"}])},
        "found a foreign one",
    ),
    "an unknown argument": ({"architecture": architecture(device="cpu")}, "with the arguments"),
    "an option of another layer": (
        {"architecture": convolutional("ConvLayer", poolsize=None, pooling="max")},
        r"ConvLayer with the arguments \['activation_fn', 'filter_shape', 'image_shape', 'pooling'\]",
    ),
    "a book's argument that is missing": (
        {"architecture": convolutional(poolsize=None, pool_stride=2)},
        r"ConvPoolLayer with the arguments",
    ),
    "an option out of range": ({"architecture": convolutional(stride=0)}, "stride must be at least 1, but got 0"),
    "an option of text": ({"architecture": convolutional(padding="same")}, "padding must be an int or a pair"),
    "an option of numbers that are not whole": (
        {"architecture": convolutional(pool_stride=[1, 2.0])},
        r"pool_stride\[1\] must be an int, but got float",
    ),
    "groups that do not fit": ({"architecture": convolutional(groups=3)}, "for 3 input maps in 3 groups"),
    "an unknown pooling": ({"architecture": convolutional(pooling=["max"])}, "pooling must be 'max' or 'l2'"),
    "no parameters": (
        {
            "architecture": json.dumps(
                [{"class": "PoolLayer", "arguments": {"image_shape": [10, 1, 4, 4], "poolsize": [2, 2]}}]
            )
        },
        "expected at least one layer with parameters",
    ),
    "a size of text": ({"architecture": architecture(n_in="5")}, "n_in must be an int, but got str"),
    "a size that overflows": ({"architecture": architecture(n_out=2**62)}, "found a foreign one"),
    "a foreign function": (
        {
            "architecture": json.dumps(
                [
                    {
                        "class": "FullyConnectedLayer",
                        "arguments": {"n_in": 5, "n_out": 5, "activation_fn": "eval", "p_dropout": 0.0},
                    }
                ]
            )
        },
        "found a foreign one .*eval",
    ),
    "another mini-batch size": ({"mini_batch_size": "20"}, "image_shape .* mini-batches of 10"),
    "no mini-batch size": ({"mini_batch_size": "ten"}, "found a foreign one .*ten"),
    "too few layers": (
        {"architecture": architecture()},
        r"expected the tensors \['layers.0.b', 'layers.0.w'\], found",
    ),
    "a missing tensor": ({"tensors": {"layers.1.b": None}}, "expected the tensors"),
    "an additional tensor": ({"tensors": {"layers.5.w": torch.zeros(1)}}, "expected the tensors"),
    "another shape": (
        {"tensors": {"layers.1.w": torch.zeros(7, 24)}},
        r"expected layers.1.w of shape \(24, 7\), found \(7, 24\)",
    ),
    "another dtype": (
        {"tensors": {"layers.1.w": torch.zeros(24, 7, dtype=torch.float64)}},
        "expected tensors of one floating-point dtype, found .*float32.*float64",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks(name, tmp_path):
    changes, message = FOREIGN[name]
    path = tmp_path / "network.safetensors"
    rewrite(path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_network(path)
    assert str(caught.value).startswith(f"{path}: expected ")


def test_a_description_of_any_size_allocates_nothing(tmp_path):
    """A matrix of 10^18 elements is described, but the tensor in the file is small."""
    path = tmp_path / "network.safetensors"
    rewrite(
        path,
        architecture=architecture(n_in=10**9, n_out=10**9),
        tensors={name: None for name in [f"layers.{i}.{p}" for i in range(1, 5) for p in "wb"]},
    )
    with pytest.raises(
        DataError, match=r"expected layers.0.w of shape \(1000000000, 1000000000\), found \(3, 1, 5, 5\)"
    ):
        load_network(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, world", b"\xff" * 100, None],
    ids=["empty", "text", "a header of 2^64 bytes", "truncated"],
)
def test_files_of_another_kind(content, tmp_path):
    path = tmp_path / "network.safetensors"
    make_network().save(path)
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(DataError, match=r"expected a saved network \(safetensors\), found another file"):
        load_network(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_network(tmp_path / "nowhere")
