"""Checkpoints of network3's trainings: a training that was interrupted and goes on, against one that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import pyconv
from pyconv import network3
from pyconv.network3 import ConvPoolLayer, FullyConnectedLayer, Network, SoftmaxLayer
from tests.training_support import make_data, make_network

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

MB = 10
DATA = make_data(70, torch.float32)
OTHER = make_data(40, torch.float32, seed=2)


class Interruption(Exception):
    pass


def network(seed=0, p_dropout=0.4, generator=None):
    net = make_network(dtype=torch.float32, p_dropout=p_dropout, seed=seed)
    if generator is not None:
        net.layers[2].generator = generator
    return net


def sgd(net, epochs, *, eta=0.05, stop_after=None, **options):
    """Train; with stop_after, until an exception after that epoch."""

    def callback(record):
        if record["epoch"] == stop_after:
            raise Interruption

    arguments = {"momentum": 0.5, "shuffle": True, "lmbda": 0.3, "verbose": False, "callback": callback, **options}
    lmbda = arguments.pop("lmbda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return net.SGD(DATA, epochs, MB, eta() if isinstance(eta, type(lambda: 0)) else eta, OTHER, OTHER, lmbda,
                       **arguments)  # fmt: skip


def without_seconds(history):
    return {key: values for key, values in json.loads(history.to_json()).items() if key != "seconds"}


def cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


def plateau():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "layer by layer"])
@pytest.mark.parametrize("stop_after", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0, "lmbda": 0.0, "shuffle": False},
        {"eta": cosine},
        {"eta": plateau},
        {"diagnose": True, "restore_best": True, "drop_last": False},
    ],
    ids=["momentum", "plain", "cosine", "plateau", "best"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, options, stop_after, compiled):
    torch.manual_seed(7)
    whole = network()
    expected = sgd(whole, 5, compiled=compiled, **options)
    state = torch.get_rng_state()

    torch.manual_seed(7)
    with pytest.raises(Interruption):
        sgd(network(), 5, stop_after=stop_after, checkpoint=tmp_path, compiled=compiled, **options)
    torch.manual_seed(99)  # a process of its own would have another state, and other initial weights
    resumed = network(seed=5)
    history = sgd(resumed, 5, checkpoint=tmp_path, resume=True, compiled=compiled, **options)

    assert without_seconds(history) == without_seconds(expected)
    for ours, theirs in zip(resumed.params, whole.params, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "layer by layer"])
def test_what_callbacks_change_is_resumed(tmp_path, compiled):
    """Parameters and random numbers, also by the callback of the epoch after which the training was interrupted."""

    def run(stop_after=None, seed=0, **options):
        torch.manual_seed(seed)
        net = network(seed=seed)

        def callback(record):
            with torch.no_grad():
                net.layers[2].w.mul_(0.5)
            torch.rand(3)
            if record["epoch"] == stop_after:
                raise Interruption

        return net, sgd(net, 4, callback=callback, compiled=compiled, **options)

    whole, expected = run()
    state = torch.get_rng_state()
    with pytest.raises(Interruption):
        run(stop_after=1, checkpoint=tmp_path)
    resumed, history = run(seed=5, checkpoint=tmp_path, resume=True)
    assert without_seconds(history) == without_seconds(expected)
    assert all(torch.equal(a, b) for a, b in zip(resumed.params, whole.params, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_saved_best_network_is_the_one_that_was_evaluated(tmp_path):
    net, evaluated = network(), []

    def callback(record):
        evaluated.append(net.layers[-1].b.detach().clone())
        with torch.no_grad():
            net.layers[-1].b.fill_(7.0)

    sgd(net, 1, callback=callback, checkpoint=tmp_path)
    assert torch.equal(network3.load_network(tmp_path / "best.safetensors").layers[-1].b, evaluated[0])


def test_generators_of_ones_own_are_resumed(tmp_path):
    def run(stop_after=None, checkpoint=None, seed=11, resume=False):
        torch.manual_seed(seed)
        own, orders = (torch.Generator().manual_seed(seed + i) for i in (1, 2))
        net = network(generator=own)
        history = sgd(net, 4, generator=orders, stop_after=stop_after, checkpoint=checkpoint, resume=resume)
        return net, history

    whole, expected = run()
    with pytest.raises(Interruption):
        run(stop_after=1, checkpoint=tmp_path)
    resumed, history = run(checkpoint=tmp_path, seed=50, resume=True)
    assert without_seconds(history) == without_seconds(expected)
    assert all(torch.equal(a, b) for a, b in zip(resumed.params, whole.params, strict=True))


def test_best_is_a_network_of_its_own(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(Network, "_count_correct", lambda self, x, y: next(accuracies) * len(y))
    net, snapshots = network(), []
    net.SGD(DATA, 3, MB, 0.05, OTHER, None, verbose=False, checkpoint=tmp_path,
            callback=lambda _: snapshots.append([p.detach().clone() for p in net.params]))  # fmt: skip
    best = network3.load_network(tmp_path / "best.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(best.params, snapshots[1], strict=True))
    assert not any(path.name.endswith(".tmp") for path in tmp_path.iterdir())


def test_a_finished_training_is_only_read_and_can_be_prolonged(tmp_path):
    torch.manual_seed(1)
    first = sgd(network(), 2, checkpoint=tmp_path)
    again = network(seed=3)
    assert without_seconds(sgd(again, 2, checkpoint=tmp_path, resume=True)) == without_seconds(first)
    longer = sgd(again, 4, checkpoint=tmp_path, resume=True)
    torch.manual_seed(1)
    assert without_seconds(longer) == without_seconds(sgd(network(), 4))


def test_resume_without_a_checkpoint_begins(tmp_path):
    torch.manual_seed(1)
    history = sgd(network(), 2, checkpoint=tmp_path / "not" / "there yet", resume=True)
    torch.manual_seed(1)
    assert without_seconds(history) == without_seconds(sgd(network(), 2))


def test_a_training_is_not_overwritten(tmp_path):
    sgd(network(), 1, checkpoint=tmp_path)
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a training already: give resume=True"):
        sgd(network(), 1, checkpoint=tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmbda": 0.4}, "expected lmbda 0.3, but got 0.4"),
        ({"momentum": 0.25}, "expected momentum 0.5, but got 0.25"),
        ({"shuffle": False}, "expected shuffle True, but got False"),
        ({"drop_last": False}, "expected drop_last True, but got False"),
        ({"generator": torch.Generator()}, "expected number of random number generators 2, but got 3"),
        ({"eta": 0.06}, "expected the learning rates of the training to be resumed, 0.05 in epoch 0, but got 0.06"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(tmp_path, change, message):
    with pytest.raises(Interruption):
        sgd(network(), 3, stop_after=0, checkpoint=tmp_path)
    net = network(seed=4)
    before = [p.detach().clone() for p in net.params]
    with pytest.raises(ValueError, match=message):
        sgd(net, 3, checkpoint=tmp_path, resume=True, **change)
    if "eta" not in change:
        assert all(torch.equal(a, b) for a, b in zip(net.params, before, strict=True))


def test_other_data_and_networks_are_refused(tmp_path):
    with pytest.raises(Interruption):
        sgd(network(), 3, stop_after=0, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"expected layer 2 \{.*: 0.4\}\}, but got \{.*: 0.3\}\}$"):
        sgd(network(p_dropout=0.3), 3, checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="expected layers"):
        sgd(Network([SoftmaxLayer(18 * 18, 10)], MB), 3, checkpoint=tmp_path, resume=True)
    x, y = DATA
    with pytest.raises(ValueError, match="expected training_data"):
        network().SGD((x + 0.001, y), 3, MB, 0.05, OTHER, OTHER, 0.3, momentum=0.5, shuffle=True, verbose=False,
                      checkpoint=tmp_path, resume=True)  # fmt: skip


def test_other_frozen_parameters_and_test_data_are_refused(tmp_path):
    sgd(network(), 1, checkpoint=tmp_path, momentum=0.0)
    frozen = network()
    frozen.layers[0].w.requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected trained \[True.*\], but got \[False, True"):
        sgd(frozen, 2, checkpoint=tmp_path, resume=True, momentum=0.0)
    with pytest.raises(ValueError, match="expected test_data '40x324:.*', but got None"):
        network().SGD(DATA, 2, MB, 0.05, OTHER, None, 0.3, shuffle=True, verbose=False, checkpoint=tmp_path,
                      resume=True)  # fmt: skip


def test_fewer_epochs_than_the_checkpoint_holds_are_refused(tmp_path):
    sgd(network(), 3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="expected epochs to be at least 3, which .* holds, but got 2"):
        sgd(network(), 2, checkpoint=tmp_path, resume=True)


def test_a_schedule_that_has_gone_on_is_refused(tmp_path):
    """The rates that it has left may be those of the epochs to be replayed, and later ones differ."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5)
    sgd(network(), 2, eta=schedule, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="expected a fresh schedule, .* but got one of epoch 2"):
        sgd(network(), 8, eta=schedule, checkpoint=tmp_path, resume=True)


def test_numbers_of_numpy_are_settings(tmp_path):
    options = {"lmbda": np.float32(0.25), "momentum": np.float64(0.5), "shuffle": np.bool_(True)}
    sgd(network(), 1, checkpoint=tmp_path, **options)
    history = sgd(network(), 2, checkpoint=tmp_path, resume=True, lmbda=0.25)
    assert len(history["epoch"]) == 2


def test_a_checkpoint_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expected a directory, found a file"):
        sgd(network(), 1, checkpoint=tmp_path / "file")


def test_a_directory_that_cannot_be_written_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write anywhere
    net = network()
    before = [p.detach().clone() for p in net.params]
    with pytest.raises(PermissionError, match="the directory is not writable"):
        sgd(net, 1, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.params, before, strict=True))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    sgd(network(), 1, checkpoint=tmp_path)
    last, best = tmp_path / "last.safetensors", tmp_path / "best.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(pyconv.DataError, match="expected a checkpoint"):
        sgd(network(), 2, checkpoint=tmp_path, resume=True)
    shutil.copy(best, last)
    with pytest.raises(pyconv.DataError, match="expected the format 'pyconv.network3.checkpoint'"):
        sgd(network(), 2, checkpoint=tmp_path, resume=True)


def test_a_layer_that_cannot_be_saved_is_refused_before_the_training(tmp_path):
    class Own(FullyConnectedLayer):
        pass

    net = Network([Own(18 * 18, 10), SoftmaxLayer(10, 10)], MB)
    before = [p.detach().clone() for p in net.params]
    with pytest.raises(ValueError, match="cannot save a layer of class Own"):
        net.SGD(DATA, 1, MB, 0.1, OTHER, None, verbose=False, compiled=False, checkpoint=tmp_path / "new")
    assert all(torch.equal(a, b) for a, b in zip(net.params, before, strict=True))
    assert not (tmp_path / "new").exists()


def test_a_killed_process_leaves_a_checkpoint_that_goes_on(tmp_path):
    """SIGKILL in the middle of an epoch: what was finished before is on the disk."""
    code = (
        "import sys, torch\n"
        "from tests.test_network3_resume import network, sgd\n"
        "torch.manual_seed(7)\n"
        "def augment(indices, x, calls=[]):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 * 7 + 4:\n"
        "        import os, signal\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sgd(network(), 5, checkpoint=sys.argv[1], augment=augment)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed = network(seed=8)
    history = sgd(resumed, 5, checkpoint=tmp_path, resume=True, augment=lambda indices, x: None)
    torch.manual_seed(7)
    whole = network()
    assert without_seconds(history) == without_seconds(sgd(whole, 5, augment=lambda indices, x: None))
    assert all(torch.equal(a, b) for a, b in zip(resumed.params, whole.params, strict=True))


def test_convolutional_layers_on_pooled_sizes(tmp_path):
    """Momentum of a parameter that does not require a gradient does not exist, and is not asked for."""
    def frozen():
        net = Network([ConvPoolLayer((3, 1, 5, 5), (MB, 1, 18, 18), init="he"), SoftmaxLayer(3 * 49, 10)], MB)
        net.layers[0].w.requires_grad_(False)
        return net

    torch.manual_seed(2)
    net = frozen()
    filters = net.layers[0].w.clone()
    with pytest.raises(Interruption):
        sgd(net, 3, stop_after=1, checkpoint=tmp_path)
    history = sgd(frozen(), 3, checkpoint=tmp_path, resume=True)
    assert len(history["epoch"]) == 3 and torch.equal(net.layers[0].w, filters)
