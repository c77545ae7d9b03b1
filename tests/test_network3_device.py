"""pyconv.network3 on other devices than the CPU, as far as a machine without a GPU can tell.

What trains layer by layer on a GPU differs in one thing: the costs stay on the device, and the host looks at a hundred
of them at a time. Here the CPU is made to do the same. tests/test_captured_training.py does so for captured training;
tests/test_cuda_network3.py is for a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pyconv.network3 import (
    ConvPoolLayer,
    DivergenceError,
    FullyConnectedLayer,
    Network,
    ReLU,
    SoftmaxLayer,
)
from pyconv.network3.descent import _COSTS_PER_LOOK, Costs, Descent, MiniBatches

MB = 10


def make_network(p_dropout: float = 0.0, device: str | None = None) -> Network:
    options = {"device": device}
    layers = [
        ConvPoolLayer((4, 1, 3, 3), (MB, 1, 8, 8), (2, 2), ReLU, init="he", **options),
        FullyConnectedLayer(36, 12, ReLU, p_dropout, init="he", **options),
        SoftmaxLayer(12, 3, p_dropout, **options),
    ]
    return Network(layers, MB)


def make_data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def train(costs_per_look: int, data, monkeypatch: pytest.MonkeyPatch, **options):
    """The network after two epochs, and either its history or the error that stopped it."""
    monkeypatch.setitem(_COSTS_PER_LOOK, "cpu", costs_per_look)
    torch.manual_seed(0)
    net = make_network(p_dropout=0.5)
    arguments = {"eta": 0.1, "lmbda": 0.2, "verbose": False, "compiled": False, **options}
    try:
        result = net.SGD(data, 2, MB, validation_data=make_data(20), test_data=None, **arguments)
    except DivergenceError as error:
        result = error
    return net, result


@pytest.mark.parametrize("costs_per_look", [7, 100])
def test_how_often_costs_are_looked_at_changes_nothing(costs_per_look, monkeypatch) -> None:
    every, expected = train(1, make_data(250), monkeypatch)
    some, history = train(costs_per_look, make_data(250), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(every.params, some.params, strict=True))
    assert history["train_cost"] == expected["train_cost"]
    assert history["validation_accuracy"] == expected["validation_accuracy"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mini_batch", [3, 24])
def test_examples_that_are_not_finite_stop_before_their_update(mini_batch, value, monkeypatch) -> None:
    data = make_data(250)
    data[0][MB * mini_batch + 4, 2] = value
    every, expected = train(1, data, monkeypatch)
    some, error = train(100, data, monkeypatch)
    assert isinstance(error, DivergenceError) and str(error) == str(expected)
    assert (error.epoch, error.mini_batch) == (0, mini_batch)
    assert "its examples hold NaN or infinity" in str(error)
    assert all(torch.equal(a, b) for a, b in zip(every.params, some.params, strict=True))


def test_the_mini_batch_at_which_training_diverged_is_found(monkeypatch) -> None:
    data = make_data(250)
    every, expected = train(1, data, monkeypatch, eta=1e12)
    some, error = train(100, data, monkeypatch, eta=1e12)
    assert isinstance(error, DivergenceError) and str(error) == str(expected)
    assert "eta is probably too large" in str(error) and error.mini_batch < 24
    assert all(torch.equal(a, b) for a, b in zip(every.params, some.params, strict=True))
    assert all(p.isfinite().all() for p in some.params)


def test_costs_that_progress_leaves_untold_are_of_their_epoch(monkeypatch) -> None:
    """Where it leaves out the last mini-batch, at which a look is due."""
    options = {"progress": lambda indices: list(indices)[:7]}
    _, expected = train(1, make_data(250), monkeypatch, **options)
    _, history = train(100, make_data(250), monkeypatch, **options)
    assert history["train_cost"] == expected["train_cost"] and min(history["train_cost"]) > 0


def test_a_step_reads_no_value_back(monkeypatch) -> None:
    """Fake tensors have no values, so whatever would wait for one raises."""
    monkeypatch.setitem(_COSTS_PER_LOOK, "cpu", 100)
    with FakeTensorMode():
        net = make_network(p_dropout=0.5)
        x, y = torch.empty(MB, 64), torch.empty(MB, dtype=torch.int64)
        batches = MiniBatches(x, y, MB, shuffle=False, drop_last=True, augment=None, generator=None)
        descent, costs = Descent(net, batches, 0.1, 0.9), Costs(x.device)
        descent.eta = 0.1
        for index in range(3):
            data_cost = descent.data_cost(x, y)
            costs.add(index, data_cost, descent.squared_weights())
            assert not costs.is_due
            descent.update(data_cost)
        with pytest.raises(DataDependentOutputException):
            costs.take(0.1)


def test_forward_and_prediction_stay_on_the_device() -> None:
    with FakeTensorMode(), torch.no_grad():
        net = make_network(p_dropout=0.5, device="cuda").requires_grad_(False)
        x = torch.empty(5001, 64, device="cuda")
        assert (net(x).device.type, net(x).shape) == ("cuda", (5001, 3))
        predicted = net.predict(x)
        assert (predicted.device.type, predicted.dtype, predicted.shape) == ("cuda", torch.int64, (5001,))
        loss = net.cost(x, torch.empty(5001, dtype=torch.int64, device="cuda"))
        assert loss.device.type == "cuda" and loss.shape == ()


def test_data_are_moved_to_the_device_of_the_parameters_once() -> None:
    net = make_network(device="meta")
    x, y = net._prepare("training_data", make_data(25), MB)
    assert (x.device.type, y.device.type, len(x), len(y)) == ("meta", "meta", 20, 20)


def test_what_is_saved_lies_on_the_cpu(tmp_path, monkeypatch) -> None:
    """A file that a GPU's network wrote can be read without one."""
    safetensors = pytest.importorskip("safetensors.torch")
    saved = {}

    def save(tensors, metadata):
        saved.update(tensors)
        return b""

    monkeypatch.setattr(safetensors, "save", save)
    asked = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: asked.append(tensor) or cpu(tensor))
    net = make_network()
    net.save(tmp_path / "network")
    assert len(asked) == len(saved) == 6 and all(t.device.type == "cpu" for t in saved.values())
