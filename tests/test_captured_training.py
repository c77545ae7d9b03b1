"""Training as on a GPU, in CUDA graphs, as far as a machine without one can tell: the steps run on the CPU.

Each test runs the steps as they are, and as graphs that are recorded and replayed (tests/recorded_graphs.py).
tests/test_cuda_network3.py and tests/test_cuda_training.py are for a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import warnings
import weakref
from collections.abc import Iterator

import pytest
import recorded_graphs
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_support import (
    IMAGE_LAYERS,
    MB,
    OPTIONS,
    SETTINGS,
    assert_same_parameters,
    difference,
    eager_step,
    make_data,
    make_model,
    make_network,
    make_network_of,
    mini_batch,
    step_both,
    train,
)

import pyconv
from pyconv import lowering, network3
from pyconv.captured import Brake, Group, cost_on_leaves, descend
from pyconv.network3 import FullyConnectedLayer, network
from pyconv.network3.descent import CapturedDescent, MiniBatches
from pyconv.training import CapturedStep

CPU = torch.device("cpu")


@pytest.fixture(params=["steps", "graphs"], autouse=True)
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[recorded_graphs.Graph] | None:
    """The graphs that a test captures; None where steps run as they are."""
    return recorded_graphs.on_the_cpu(monkeypatch) if request.param == "graphs" else None


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """`SGD(compiled=True)` takes the captured step for tensors on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "CompiledDescent", lambda *args: CapturedDescent(*args[:4]))
        yield


def train_captured(net: network3.Network, data, **options):
    with as_on_a_gpu():
        return train(net, data, True, **options)


# ------------------------------------------------------------------------------------------------------------
# network3
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_dropout", [0.0, 0.5])
@pytest.mark.parametrize("lmbda", [0.0, 2.0])
def test_fifty_mini_batches_in_float64(lmbda: float, p_dropout: float, graphs) -> None:
    """The eager descent, the CPU's plan, and the captured step, which is replayed from the fourth mini-batch on."""
    eager, planned, captured = (make_network(p_dropout=p_dropout) for _ in range(3))
    data = make_data(50 * MB)
    expected, rng = train(eager, data, False, lmbda=lmbda)
    train(planned, data, True, lmbda=lmbda)
    history, captured_rng = train_captured(captured, data, lmbda=lmbda)
    assert_same_parameters(captured, eager)
    assert_same_parameters(captured, planned)
    assert history["train_cost"][0] == pytest.approx(expected["train_cost"][0], rel=1e-12)
    assert history["validation_accuracy"] == expected["validation_accuracy"]
    assert torch.equal(rng, captured_rng)
    if graphs is not None:
        assert [graph.replays for graph in graphs] == [47]


@pytest.mark.parametrize("image_layers", IMAGE_LAYERS)
def test_layers_beyond_the_books(image_layers: str) -> None:
    eager, captured = (make_network_of(image_layers) for _ in range(2))
    data = make_data(10 * MB)
    expected, _ = train(eager, data, False, lmbda=2.0)
    history, _ = train_captured(captured, data, lmbda=2.0)
    assert_same_parameters(captured, eager)
    assert history["train_cost"] == pytest.approx(expected["train_cost"], rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_training(options: dict, graphs) -> None:
    """Five epochs: the last mini-batch, of 8 examples, is replayed too."""
    eager, captured = (make_network(p_dropout=0.25) for _ in range(2))
    data = make_data(7 * MB + 8)
    expected, rng = train(eager, data, False, epochs=5, **options)
    history, captured_rng = train_captured(captured, data, epochs=5, **options)
    assert_same_parameters(captured, eager)
    assert history["train_cost"] == pytest.approx(expected["train_cost"], rel=1e-10)
    assert torch.equal(rng, captured_rng)
    if graphs is not None and "eta" not in options:
        assert [graph.replays for graph in graphs] == ([32, 2] if options.get("drop_last") is False else [32])


def test_a_falling_rate_needs_no_new_capture(graphs) -> None:
    """In float32. For float64 a rate on the device is too coarse, and of bfloat16 and float16 torch's fused SGD of the
    CPU is wrong; tests/test_cuda_network3.py has them on a GPU."""
    options = {"eta": lambda epoch: 0.1 * 0.5**epoch, "lmbda": 0.5, "momentum": 0.5}
    eager, captured = (make_network(dtype=torch.float32) for _ in range(2))
    data = make_data(MB, torch.float32)
    train(eager, data, False, epochs=6, **options)
    train_captured(captured, data, epochs=6, **options)
    assert_same_parameters(captured, eager, 1e-5)
    if graphs is not None:
        assert [graph.replays for graph in graphs] == [3]


@pytest.mark.parametrize("frozen", [(0, 1), (2,), (4, 5, 6), tuple(range(8))], ids=str)
def test_frozen_parameters_stay(frozen: tuple[int, ...]) -> None:
    eager, captured = (make_network() for _ in range(2))
    for net in (eager, captured):
        for i in frozen:
            net.params[i].requires_grad_(False)
    start = [p.detach().clone() for p in eager.params]
    expected, _ = train(eager, make_data(20 * MB), False, lmbda=0.5, momentum=0.5)
    history, _ = train_captured(captured, make_data(20 * MB), lmbda=0.5, momentum=0.5)
    assert_same_parameters(captured, eager)
    for i, (p, s) in enumerate(zip(captured.params, start, strict=True)):
        assert torch.equal(p, s) == (i in frozen)
    assert history["train_cost"][0] == pytest.approx(expected["train_cost"][0], rel=1e-12)


def test_augmented_examples() -> None:
    def augment(indices: torch.Tensor, x: torch.Tensor) -> None:
        x.mul_(1.0 + 0.01 * indices[:, None])

    eager, captured = (make_network(p_dropout=0.5) for _ in range(2))
    options = {"epochs": 4, "shuffle": True, "drop_last": False, "augment": augment}
    train(eager, make_data(8 * MB + 3), False, **options)
    train_captured(captured, make_data(8 * MB + 3), **options)
    assert_same_parameters(captured, eager)


@pytest.mark.parametrize("chosen", [list(range(7)), [9, 2, 11, 3, 4, 40, 5]], ids=str)
def test_mini_batches_that_progress_leaves_out_are_not_trained(chosen: list[int]) -> None:
    eager, captured = make_network(), make_network()
    data = make_data(50 * MB)
    expected, _ = train(eager, data, False, progress=lambda indices: chosen)
    history, _ = train_captured(captured, data, progress=lambda indices: chosen)
    assert_same_parameters(captured, eager)
    assert history["train_cost"] == pytest.approx(expected["train_cost"], rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "momentum": 0.9, "lmbda": 1.0}], ids=str)
@pytest.mark.parametrize(("mini_batch_number", "value"), [(0, math.nan), (1, math.inf), (12, math.nan), (20, math.inf)])
def test_examples_that_are_not_finite_change_nothing(mini_batch_number: int, value: float, options: dict) -> None:
    """Nor do the finite mini-batches after them; the host hears of it at the end of the epoch."""
    data, validation = make_data(20 * MB + 4), make_data(20)
    data[0][MB * mini_batch_number + 2, 5] = value

    def stopped(net: network3.Network, compiled: bool) -> str:
        torch.manual_seed(3)
        with pytest.raises(network3.DivergenceError) as caught, as_on_a_gpu():
            net.SGD(
                data, 2, MB, 0.05, validation, None, verbose=False, compiled=compiled, drop_last=False,
                **{"lmbda": 0.0, **options},
            )  # fmt: skip
        return str(caught.value)

    eager, captured = make_network(), make_network()
    message = stopped(eager, False)
    assert stopped(captured, True) == message and "the parameters are as the mini-batch before left them" in message
    assert_same_parameters(captured, eager)


@pytest.mark.parametrize(("dtype", "eta"), [(torch.float32, 1e12), (torch.float64, 1e12), (torch.float64, 1e50)])
def test_divergence_sets_the_parameters_back(dtype: torch.dtype, eta: float, monkeypatch) -> None:
    """Where the cost is finite in float64 alone, too. The flag on a GPU takes that for infinite; here it is made to."""
    check = Brake.check
    monkeypatch.setattr(Brake, "check", lambda brake, values: check(brake, values.float().double()))
    net = make_network(activation_fn=network3.linear, dtype=dtype)
    start = [p.detach().clone() for p in net.params]
    with as_on_a_gpu(), pytest.raises(network3.DivergenceError, match="eta is probably too large"):
        net.SGD(make_data(20 * MB, dtype), 2, MB, eta, make_data(20, dtype), None, 0.1, verbose=False)
    assert all(torch.equal(p, s) for p, s in zip(net.params, start, strict=True))


def test_a_generator_of_a_layer(graphs) -> None:
    eager, captured = (make_network(p_dropout=0.5) for _ in range(2))
    for net in (eager, captured):
        net.layers[2].generator = torch.Generator().manual_seed(7)
    train(eager, make_data(20 * MB), False)
    train_captured(captured, make_data(20 * MB))
    assert_same_parameters(captured, eager)
    if graphs is not None:
        assert [graph.generators for graph in graphs] == [[captured.layers[2].generator]]


def test_a_layer_of_the_users_is_trained_layer_by_layer_after_one_warning(graphs) -> None:
    class Scaled(FullyConnectedLayer):
        def forward(self, inpt):
            return 2 * super().forward(inpt)

    net = make_network()
    net.layers[2] = Scaled(36, 21, dtype=torch.float64)
    with as_on_a_gpu(), pytest.warns(UserWarning, match=r"training is not compiled: layer 2 \(Scaled\)") as caught:
        net.SGD(make_data(60), 1, MB, 0.1, make_data(20), None, verbose=False)
    assert len(caught) == 1 and not graphs


def test_in_inference_mode_and_under_autocast(graphs) -> None:
    """Recorded graphs are for a device "cuda", for which autocast cannot be on here."""
    eager, captured = (make_network(dtype=torch.float32, p_dropout=0.5) for _ in range(2))
    options = {"lmbda": 0.1, "momentum": 0.5, "epochs": 6}
    train_captured(eager, make_data(MB, torch.float32), **options)
    with torch.inference_mode(), torch.autocast("cpu", enabled=graphs is None):
        train_captured(captured, make_data(MB, torch.float32), **options)
    assert all(torch.equal(c, e) for c, e in zip(captured.params, eager.params, strict=True))


def test_graphs_go_with_the_training(monkeypatch) -> None:
    """Their memory must not wait for a garbage collection."""
    descents = []
    monkeypatch.setattr(CapturedDescent, "begin_epoch", lambda self, eta, begin=CapturedDescent.begin_epoch: (
        descents.append(weakref.ref(self)), begin(self, eta)
    ))  # fmt: skip
    gc.disable()
    try:
        train_captured(make_network(p_dropout=0.5), make_data(8 * MB))
        assert descents[0]() is None
    finally:
        gc.enable()


def test_a_step_reads_no_value_back() -> None:
    """Fake tensors have no values, so whatever would wait for one raises. The update has no kernel for them."""
    with FakeTensorMode():
        net = make_network(dtype=torch.float32, p_dropout=0.5).requires_grad_(False)
        x, y = torch.empty(3 * MB, 18 * 18), torch.empty(3 * MB, dtype=torch.int64)
        batches = MiniBatches(x, y, MB, shuffle=False, drop_last=True, augment=None, generator=None)
        descent = CapturedDescent(net, batches, 0.1, 0.9)
        descent.begin_epoch(0.1)
        for index in range(3):
            assert descent.train(index) == []


# ------------------------------------------------------------------------------------------------------------
# The update
# ------------------------------------------------------------------------------------------------------------


def test_leaves_share_the_memory_of_the_trained_parameters() -> None:
    """And nothing asks for gradients of the others."""
    net = make_network()
    trained = net.params[:3]
    groups = [Group(trained[:1], [], 0.1), Group(trained[1:], [], 0.1)]
    _, leaves = cost_on_leaves(net._lowered(), groups, *make_data(MB))
    assert [leaf.data_ptr() for leaf in leaves] == [p.data_ptr() for p in trained]
    assert not any(leaf is p for leaf, p in zip(leaves, trained, strict=True))
    cost, leaves = cost_on_leaves(net._lowered(), [], *make_data(MB))
    assert leaves == [] and not cost.requires_grad


def test_gradients_of_another_layout_than_their_parameters() -> None:
    parameter = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1).requires_grad_()
    before = parameter.detach().clone()
    cost = (parameter * torch.arange(24.0).view(4, 2, 3)).sum()
    descend(cost, [parameter], [Group([parameter], [], 0.5)], Brake(CPU))
    assert torch.equal(parameter.detach(), before - 0.5 * torch.arange(24.0).view(4, 2, 3))


def test_the_brake_holds() -> None:
    parameter = torch.ones(3, requires_grad=True)
    velocity, brake = torch.ones(3), Brake(CPU)
    group = Group([parameter], [velocity], torch.tensor(0.1), momentum=0.5)
    brake.check(torch.tensor([1.0, math.inf], dtype=torch.float64))
    brake.check(torch.tensor([1.0, 2.0], dtype=torch.float64))
    descend(parameter.sum() * math.nan, [parameter], [group], brake)
    assert torch.equal(parameter.detach(), torch.ones(3)) and torch.equal(velocity, torch.ones(3))
    brake.flag.zero_()
    descend(parameter.sum(), [parameter], [group], brake)
    assert torch.equal(velocity, torch.full((3,), 1.5))


# ------------------------------------------------------------------------------------------------------------
# Plain PyTorch
# ------------------------------------------------------------------------------------------------------------


def outputs_and_gradients(model: nn.Sequential, x: torch.Tensor, by_operations: bool) -> list[torch.Tensor]:
    torch.manual_seed(5)
    output = lowering.execute(lowering.lower(model), x) if by_operations else model(x)
    return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


def test_the_operations_of_a_model_give_what_it_gives() -> None:
    model = make_model()
    x, _ = mini_batch(8, 0)
    actual, expected = (outputs_and_gradients(model, x, by_operations) for by_operations in (True, False))
    for a, e in zip(actual, expected, strict=True):
        assert difference(a, e) <= 1e-12


def test_bias_activation_and_dropout_are_one_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), pyconv.Dropout(0.5), nn.Tanh(), nn.Dropout(0.0))
    kinds = [type(o).__name__ for o in lowering.joined(lowering.lower(model))]
    assert kinds == ["Dense", "Flatten", "BiasActDropout", "BiasActDropout"]
    x = torch.randn(4, 6)
    actual, expected = (outputs_and_gradients(model, x, by_operations) for by_operations in (True, False))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_of_a_sequential_model(settings: dict, graphs) -> None:
    eager = make_model()
    captured = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), **settings) for m in (eager, captured)]
    step = CapturedStep(captured, optimizers[1], CPU)
    losses = []
    for i, n in enumerate([8] * 10 + [3, 8, 13, 1]):
        x, y = mini_batch(n, i)
        torch.manual_seed(i)
        expected = eager_step(eager, optimizers[0], x, y)
        torch.manual_seed(i)
        losses.append((step(x, y), expected))
    for loss, expected in losses:  # each its own, not what the last replay wrote
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_parameters(captured, eager)
    for p, e in zip(captured.parameters(), eager.parameters(), strict=True):
        buffers = [o.state[q].get("momentum_buffer") for o, q in zip(optimizers, (e, p), strict=True)]
        assert ("momentum" in settings) == (buffers[1] is not None)
        if buffers[1] is not None:
            assert difference(buffers[1], buffers[0]) <= 1e-9
    if graphs is not None:
        assert len(graphs) == 1 and graphs[0].replays >= 7


def test_a_scheduler_of_the_rate_needs_no_new_capture(graphs) -> None:
    eager = make_model(torch.float32)
    captured = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (eager, captured)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    step = CapturedStep(captured, optimizers[1], CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(12):
            x, y = mini_batch(8, i, torch.float32)
            torch.manual_seed(i)
            eager_step(eager, optimizers[0], x, y)
            torch.manual_seed(i)
            step(x, y)
            for scheduler in schedulers:
                scheduler.step()
    for p, e in zip(captured.parameters(), eager.parameters(), strict=True):
        assert difference(p, e) <= 1e-5
    if graphs is not None:
        assert [graph.replays for graph in graphs] == [8]  # the first step makes the momentum's buffers


def test_settings_and_parameters_that_change() -> None:
    """Momentum, weight decay, freezing, buffers loaded, parameters replaced, and eager steps in between."""
    eager = make_model()
    captured = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (eager, captured)]
    step = CapturedStep(captured, optimizers[1], CPU)
    for i in range(48):
        for model, optimizer in zip((eager, captured), optimizers, strict=True):
            if i == 8:
                optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.1)
            elif i == 16:
                model[7].weight.requires_grad_(False)
                model[7].weight.grad = None
            elif i == 24:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif i == 32:
                model[7].weight.data = model[7].weight.data.clone() * 0.5
            elif i == 40:
                model[11].weight = nn.Parameter(model[11].weight.detach() * 0.5)
                optimizer.param_groups[0]["params"][-1] = model[11].weight
        x, y = mini_batch(8, i)
        torch.manual_seed(i)
        eager_step(eager, optimizers[0], x, y)
        torch.manual_seed(i)
        eager_step(captured, optimizers[1], x, y) if i % 7 == 6 else step(x, y)
    assert_same_parameters(captured, eager)


def test_two_groups_and_parameters_left_out() -> None:
    eager = make_model()
    captured = copy.deepcopy(eager)
    optimizers = [
        torch.optim.SGD([{"params": [m[7].weight], "lr": 0.2}, {"params": [m[7].bias, m[11].weight]}], lr=0.05)
        for m in (eager, captured)
    ]
    step = CapturedStep(captured, optimizers[1], CPU)
    for i in range(8):
        step_both(eager, optimizers[0], step, i)
    assert_same_parameters(captured, eager)


@pytest.mark.parametrize("steps_before", [0, 1, 6])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_told_later(steps_before: int) -> None:
    model = make_model()
    step = CapturedStep(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), CPU)
    step._told = torch.zeros(())  # apart from the flag, as on a GPU
    x, y = mini_batch(8, 0)
    for _ in range(steps_before):
        assert math.isfinite(step(x, y))
    before = [p.detach().clone() for p in model.parameters()]
    assert math.isnan(step(x * math.inf, y))
    with pytest.raises(FloatingPointError, match="the parameters are as the step before left them"):
        step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert math.isfinite(step(x, y))
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_steps_until_the_host_looks_change_nothing_either() -> None:
    model = make_model()
    step = CapturedStep(model, torch.optim.SGD(model.parameters(), lr=0.1), CPU)
    step._told = torch.zeros(())
    step._told.copy_ = lambda *_, **__: None  # as on a GPU that has not come so far
    x, y = mini_batch(8, 0)
    before = [p.detach().clone() for p in model.parameters()]
    assert math.isnan(step(x * math.nan, y))
    for _ in range(6):
        assert math.isnan(step(x, y))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = CapturedStep(model, optimizer, CPU)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(pyconv.UnsupportedError, match=r"expected 4 inputs of a fully connected layer, but got \(5,\)"):
        step(torch.zeros(2, 5), labels)
    with pytest.raises(pyconv.UnsupportedError, match=r"got \(2, 2\); is a Flatten missing\?"):
        step(torch.zeros(2, 2, 2), labels)
    model.eval()
    with pytest.raises(RuntimeError, match="call model.train()"):
        step(torch.zeros(2, 4), labels)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 1 \(BatchNorm1d"):
        CapturedStep(nn.Sequential(model, nn.BatchNorm1d(3)), optimizer, CPU)
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3))
    optimizer = torch.optim.SGD(convolution.parameters(), lr=0.1)
    with pytest.raises(pyconv.UnsupportedError, match="expected a fully connected layer before the loss"):
        CapturedStep(convolution, optimizer, CPU)
    convolution.extend([nn.Flatten(), nn.Linear(8, 3)])
    with pytest.raises(pyconv.UnsupportedError, match=r"expected images \(C, H, W\) before.* but got \(4, 4\)"):
        CapturedStep(convolution, optimizer, CPU)(torch.zeros(2, 4, 4), labels)
    with pytest.raises(ValueError, match="expected a torch.optim.SGD, .* but got Adam"):
        CapturedStep(model, torch.optim.Adam(model.parameters()), CPU)
