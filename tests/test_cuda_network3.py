"""pyconv.network3 and the command line on a GPU: `make test-gpu`."""

from __future__ import annotations

import gc
import json
import math

import backends
import pytest
import torch

from pyconv import cli
from pyconv.network3 import DivergenceError, load_digits, load_network
from pyconv.network3.descent import CapturedDescent, Descent, MiniBatches
from pyconv.network3.experiments import EXPERIMENTS, Experiment
from pyconv.network3.layers import ReLU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.gpu_available(), reason="needs a GPU and a build with CUDA"),
]

MB = 10
SMALL = Experiment((6, 8), (20,), ReLU, 0.1, 0.1, 1, init="he")
DROPOUT = Experiment((6, 8), (20,), ReLU, 0.1, 0.1, 1, p_dropout=0.5, init="he")


@pytest.fixture(autouse=True)
def _tensors_are_made_on_the_cpu():
    """As in a user's script, whatever the other tests of the backend want; and digits instead of MNIST."""
    torch.set_default_device("cpu")


def make_network(experiment: Experiment, device: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return experiment.network(MB).to(device, dtype)


def some_digits(n: int):
    training, validation, test = load_digits()
    return (training[0][:n], training[1][:n]), validation, test


def test_float64_follows_the_cpu_over_an_epoch() -> None:
    """Far from near-ties, the trajectories agree to rounding."""
    training, validation, _ = some_digits(300)
    networks = [make_network(SMALL, device, torch.float64) for device in ("cpu", "cuda")]
    histories = [net.SGD(training, 1, MB, 0.05, validation, None, 0.1, verbose=False) for net in networks]
    for on_cpu, on_gpu in zip(networks[0].params, networks[1].params, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-8, atol=1e-10)
    assert histories[1]["train_cost"] == pytest.approx(histories[0]["train_cost"], rel=1e-10)
    assert histories[1]["validation_accuracy"] == histories[0]["validation_accuracy"]


def test_float32_learns_with_dropout_and_repeats_itself() -> None:
    training, validation, test = load_digits()

    def train():
        net = make_network(EXPERIMENTS["demo"], "cuda")
        for layer in net.layers[2:]:
            layer.p_dropout = 0.3
        torch.manual_seed(1)
        history = net.SGD(training, 5, MB, 0.1, validation, test, 0.1, verbose=False)
        return net, history

    (first, history), (second, _) = train(), train()
    assert history.best_validation_accuracy > 0.9
    # The matrix products are cuBLAS's; on one stream it repeats its bits as the operators of pyconv do.
    assert all(torch.equal(a, b) for a, b in zip(first.params, second.params, strict=True))
    assert all(p.device.type == "cuda" for p in first.params)


def test_a_captured_epoch_does_not_wait_for_the_gpu() -> None:
    """Only its end does."""
    net = make_network(DROPOUT, "cuda").train()
    x, y = (part[: 20 * MB + 3].cuda() for part in load_digits()[0])
    batches = MiniBatches(x, y, MB, shuffle=True, drop_last=False, augment=None, generator=None)
    descent = CapturedDescent(net, batches, 0.1, 0.9)
    for epoch in range(5):
        batches.begin_epoch()
        descent.begin_epoch(0.1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if epoch == 4 else "default")  # all is captured by then
        try:
            for index in range(len(batches)):
                assert descent.train(index) == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        costs = dict(descent.end_epoch())
    assert list(costs) == list(range(21)) and all(math.isfinite(cost) for cost in costs.values())


def test_layer_by_layer_training_waits_for_the_gpu_only_to_look_at_costs() -> None:
    net = make_network(DROPOUT, "cuda").train()
    x, y = (part[: 7 * MB].cuda() for part in load_digits()[0])
    batches = MiniBatches(x, y, MB, shuffle=False, drop_last=True, augment=None, generator=None)
    descent = Descent(net, batches, 0.1, 0.9)
    descent.begin_epoch(0.05)
    descent.train(0)  # libraries are loaded, algorithms chosen
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(1, 6):
            assert descent.train(index) == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(descent.train(6)) == 7


OPTIONS = {
    "plain": {},
    "momentum and decay": {"momentum": 0.9, "lmbda": 3.0},
    "falling eta": {"eta": lambda epoch: 0.05 / (1 + epoch)},
    "shuffled, last mini-batch": {"shuffle": True, "drop_last": False},
    "augmented": {"shuffle": True, "augment": lambda indices, x: x.mul_(1.0 + 0.001 * indices[:, None])},
    "progress": {"progress": lambda indices: [3, 1, 0, 7, 9]},
}


def trained(experiment: Experiment, compiled: bool, dtype: torch.dtype, **options):
    """A network after five epochs, its history and the state of the generator."""
    training, validation, _ = some_digits(12 * MB + 4)
    net = make_network(experiment, "cuda", dtype)
    torch.manual_seed(2)
    arguments = {"lmbda": 0.1, "eta": 0.05, **options}
    history = net.SGD(
        training, 5, MB, validation_data=validation, test_data=None, verbose=False, compiled=compiled, **arguments
    )
    return net, history, torch.cuda.get_rng_state()


@pytest.mark.parametrize("experiment", [SMALL, DROPOUT], ids=["without dropout", "dropout"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_training_is_that_layer_by_layer(options: dict, experiment: Experiment) -> None:
    """In float64; masks and the state in which the generator is left included."""
    eager, expected, rng = trained(experiment, False, torch.float64, **options)
    captured, history, captured_rng = trained(experiment, True, torch.float64, **options)
    for p, e in zip(captured.params, eager.params, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-8, atol=1e-10)
    assert history["train_cost"] == pytest.approx(expected["train_cost"], rel=1e-9)
    assert torch.equal(captured_rng, rng)


def test_mini_batches_are_replays(monkeypatch) -> None:
    """But the first three."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    trained(DROPOUT, True, torch.float32)
    assert len(replays) == 5 * 12 - 3 and len(set(replays)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_training_in_other_formats_learns(dtype: torch.dtype) -> None:
    training, validation, _ = load_digits()
    net = make_network(EXPERIMENTS["demo"], "cuda", dtype)
    before = net.accuracy(validation)
    history = net.SGD(training, 3, MB, lambda epoch: 0.1 * 0.7**epoch, validation, None, 0.1, verbose=False)
    assert history["train_cost"][-1] < history["train_cost"][0]
    assert history.best_validation_accuracy > max(0.6, before)


def test_a_generator_of_a_layer() -> None:
    networks = []
    for compiled in (False, True):
        net = make_network(DROPOUT, "cuda", torch.float64)
        net.layers[2].generator = torch.Generator("cuda").manual_seed(7)
        training, validation, _ = some_digits(12 * MB)
        torch.manual_seed(2)
        net.SGD(training, 2, MB, 0.05, validation, None, verbose=False, compiled=compiled)
        networks.append(net)
    for e, p in zip(networks[0].params, networks[1].params, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-8, atol=1e-10)
    states = [net.layers[2].generator.get_state() for net in networks]
    assert torch.equal(*states)


@pytest.mark.parametrize("mini_batch", [0, 2, 9, 12])
def test_examples_that_are_not_finite_change_nothing(mini_batch: int) -> None:
    messages, networks = [], []
    for compiled in (False, True):
        (x, y), validation, _ = some_digits(12 * MB + 4)
        x = x.clone()
        x[MB * mini_batch + 1, 5] = math.nan
        net = make_network(SMALL, "cuda", torch.float64)
        with pytest.raises(DivergenceError) as caught:
            net.SGD(
                (x, y), 1, MB, 0.05, validation, None, 0.1, verbose=False, compiled=compiled, drop_last=False,
                momentum=0.5,
            )  # fmt: skip
        messages.append(str(caught.value))
        networks.append(net)
    assert messages[0] == messages[1] and f"mini-batch {mini_batch} of epoch 0" in messages[1]
    for e, p in zip(networks[0].params, networks[1].params, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-8, atol=1e-10)


def test_divergence_sets_the_parameters_back() -> None:
    net = make_network(SMALL, "cuda")
    start = [p.detach().clone() for p in net.params]
    training, validation, _ = some_digits(12 * MB)
    with pytest.raises(DivergenceError, match="eta is probably too large"):
        net.SGD(training, 2, MB, 1e12, validation, None, 0.1, verbose=False)
    assert all(torch.equal(p, s) for p, s in zip(net.params, start, strict=True))


def test_graphs_go_with_the_training() -> None:
    """Their memory, of 2 MiB at least each, is there for the next training, without a garbage collection."""
    training, validation, _ = some_digits(12 * MB)
    net = make_network(DROPOUT, "cuda")
    reserved = []
    gc.disable()
    try:
        for _ in range(10):
            net.SGD(training, 1, MB, 0.05, validation, None, verbose=False)
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
    finally:
        gc.enable()
    assert reserved[-1] <= reserved[1] + 8 * 2**20


def test_a_saved_network_moves_between_the_devices(tmp_path) -> None:
    pytest.importorskip("safetensors")
    _, validation, _ = some_digits(10)
    on_gpu = make_network(SMALL, "cuda", torch.float64)
    on_gpu.save(tmp_path / "network")
    for device in ("cpu", "cuda"):
        loaded = load_network(tmp_path / "network", device=device)
        assert all(p.device.type == device for p in loaded.params)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(loaded.params, on_gpu.params, strict=True))
        assert loaded.accuracy(validation) == on_gpu.accuracy(validation)


def test_command_line(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--epochs", "2", "--device", "cuda", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2 and records[-1]["validation_accuracy"] > 0.8
    accuracies = []
    for device in ("cuda", "cpu"):
        assert (
            cli.main(["eval", "network-demo.safetensors", "--data", "digits", "--device", device, "--json"])
            == 0
        )
        accuracies.append(json.loads(capsys.readouterr().out)["test"]["accuracy"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
