"""pyconv.network3 and the command line on a GPU: `make test-gpu`."""

from __future__ import annotations

import json

import backends
import pytest
import torch

from pyconv import cli
from pyconv.network3 import load_digits, load_network
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


def test_training_waits_for_the_gpu_only_to_look_at_costs() -> None:
    """Of 100 mini-batches one look, at the last; all other steps are enqueued without a wait."""
    from pyconv.network3.network import _Costs, _Descent

    net = make_network(DROPOUT, "cuda").train()
    x, y = (part[:MB].cuda() for part in load_digits()[0])
    descent, costs = _Descent(net, 0.05, 0.1), _Costs(x.device)
    descent.update(descent.data_cost(x, y))  # libraries are loaded, algorithms chosen
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(5):
            data_cost = descent.data_cost(x, y)
            costs.add(index, data_cost, descent.squared_weights())
            descent.update(data_cost)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(costs.take(0.1)) == 5


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
