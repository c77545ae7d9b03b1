"""Compiled training steps against the eager ones: network3's and those of plain PyTorch models."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyconv
from pyconv import network3
from pyconv.network3 import ConvPoolLayer, FullyConnectedLayer, Network, SoftmaxLayer

MB = 10


def make_network(
    activation_fn=network3.ReLU, dtype=torch.float64, p_dropout: float = 0.0, mb: int = MB, seed: int = 0
) -> Network:
    """Two convolutional layers, the second with windows that do not divide, then two fully connected ones."""
    g = torch.Generator().manual_seed(seed)
    options = {"activation_fn": activation_fn, "dtype": dtype, "generator": g}
    layers = [
        ConvPoolLayer((6, 1, 5, 5), (mb, 1, 18, 18), (2, 2), **options),
        ConvPoolLayer((9, 6, 3, 3), (mb, 6, 7, 7), (2, 2), **options),
        FullyConnectedLayer(9 * 2 * 2, 21, p_dropout=p_dropout, **options),
        SoftmaxLayer(21, 10, p_dropout, dtype=dtype),
    ]
    with torch.no_grad():
        layers[-1].w.normal_(0.0, 0.3, generator=g)
    return Network(layers, mb)


def make_data(count: int, dtype=torch.float64, seed: int = 1) -> network3.network.Data:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 18 * 18, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (count,), generator=g)


def train(
    network: Network, data, compiled: bool, eta=0.05, lmbda: float = 0.0, epochs: int = 1, seed: int = 3, **options
):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = network.SGD(
            data, epochs, network.mini_batch_size, eta, data, None, lmbda, verbose=False, compiled=compiled, **options
        )
    return history, torch.get_rng_state()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm()) / max(float(b.norm()), torch.finfo(torch.float64).tiny)


@pytest.mark.parametrize("p_dropout", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("lmbda", [0.0, 2.0])
@pytest.mark.parametrize(
    "activation_fn", [network3.ReLU, network3.sigmoid, network3.tanh, network3.linear], ids=lambda f: f.__name__
)
def test_fifty_mini_batches_in_float64(activation_fn, lmbda: float, p_dropout: float) -> None:
    """Dropout's masks agree bit by bit, or the parameters would not agree at all."""
    eager, compiled = (make_network(activation_fn, p_dropout=p_dropout) for _ in range(2))
    start = [p.detach().clone() for p in eager.params]
    data = make_data(50 * MB)
    expected, rng = train(eager, data, False, lmbda=lmbda)
    history, compiled_rng = train(compiled, data, True, lmbda=lmbda)
    for p, e, s in zip(compiled.params, eager.params, start, strict=True):
        assert difference(p, e) <= 1e-10
        assert difference(e, s) > 1e-4, "a parameter that does not move proves nothing"
    assert history["train_cost"][0] == pytest.approx(expected["train_cost"][0], rel=1e-12)
    assert torch.equal(rng, compiled_rng)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_fifty_single_steps_from_common_weights(dtype: torch.dtype, bound: float) -> None:
    eager, compiled = (make_network(dtype=dtype, p_dropout=0.5) for _ in range(2))
    x, y = make_data(50 * MB, dtype)
    for i in range(50):
        compiled.load_state_dict(eager.state_dict())
        batch = x[i * MB : (i + 1) * MB], y[i * MB : (i + 1) * MB]
        train(eager, batch, False, lmbda=0.1, seed=i)
        train(compiled, batch, True, lmbda=0.1, seed=i)
        assert max(difference(p, e) for p, e in zip(compiled.params, eager.params, strict=True)) <= bound


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", [isa for isa in pyconv.compiled_isas() if isa != "avx512_bf16"])
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    try:
        pyconv.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    eager, compiled = (make_network(dtype=dtype, p_dropout=0.5) for _ in range(2))
    data = make_data(2 * MB, dtype)
    train(eager, data, False, lmbda=0.1)
    train(compiled, data, True, lmbda=0.1)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    assert max(difference(p, e) for p, e in zip(compiled.params, eager.params, strict=True)) <= bound


@pytest.mark.parametrize("mb", [1, 3, 32, 1024])
def test_mini_batch_sizes(mb: int) -> None:
    eager, compiled = (make_network(mb=mb, p_dropout=0.5) for _ in range(2))
    data = make_data(3 * mb + mb // 2)
    train(eager, data, False)
    train(compiled, data, True)
    assert max(difference(p, e) for p, e in zip(compiled.params, eager.params, strict=True)) <= 1e-10


@pytest.mark.cpu_only
def test_threads_do_not_change_a_bit() -> None:
    ends = []
    for threads in (1, 2, 3, 9):
        torch.set_num_threads(threads)
        network = make_network(dtype=torch.float32, p_dropout=0.5, mb=64)
        train(network, make_data(5 * 64, torch.float32), True, lmbda=0.1)
        ends.append(network.params)
    for several in ends[1:]:
        for one, other in zip(ends[0], several, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [(0, 1), (2,), (0, 1, 2, 3), (4, 5, 6), tuple(range(8))], ids=str)
def test_frozen_parameters_stay(frozen: tuple[int, ...]) -> None:
    eager, compiled = (make_network() for _ in range(2))
    for network in (eager, compiled):
        for i in frozen:
            network.params[i].requires_grad_(False)
    start = [p.detach().clone() for p in eager.params]
    expected, _ = train(eager, make_data(20 * MB), False, lmbda=0.5)
    history, _ = train(compiled, make_data(20 * MB), True, lmbda=0.5)
    for i, (p, e, s) in enumerate(zip(compiled.params, eager.params, start, strict=True)):
        assert difference(p, e) <= 1e-10
        assert torch.equal(p, s) == (i in frozen)
    assert history["train_cost"][0] == pytest.approx(expected["train_cost"][0], rel=1e-12)


def wide_network(layout: str, activation: str, widths: tuple[int, ...], dtype: torch.dtype, p: float):
    """Fully connected layers as network3 lays them out, inputs along the rows, or as nn.Linear does."""
    torch.manual_seed(5)
    if layout == "rows":
        fn = {"relu": network3.ReLU, "sigmoid": network3.sigmoid}[activation]
        hidden = [
            FullyConnectedLayer(a, b, fn, p, init="lecun", dtype=dtype)
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        return Network([*hidden, SoftmaxLayer(widths[-1], 7, p, dtype=dtype)], 1)
    modules: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        modules += [pyconv.Dropout(p), nn.Linear(a, b), {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[activation]()]
    return nn.Sequential(*modules, pyconv.Dropout(p), nn.Linear(widths[-1], 7)).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 10, 11, 37, 130])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("widths", [(70, 1100, 33, 16), (33, 300, 520)], ids=str)
def test_wide_layers(layout: str, activation: str, n: int, widths: tuple[int, ...]) -> None:
    """All blocks, tails and parts of the loops, with many zeros among the inputs and with few."""
    eager = wide_network(layout, activation, widths, torch.float64, 0.5 if activation == "relu" else 0.0)
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01) for m in (eager, compiled)]
    g = torch.Generator().manual_seed(n)
    batches = [(torch.rand(n, widths[0], generator=g, dtype=torch.float64), torch.randint(7, (n,), generator=g))] * 3
    run = compiled_steps(compiled, optimizers[1]) if layout == "rows" else pyconv.compile_training(
        compiled, optimizer=optimizers[1]
    )  # fmt: skip
    for i, (x, y) in enumerate(batches):
        x[:, ::3] = 0.0
        torch.manual_seed(i)
        optimizers[0].zero_grad()
        (eager.cost(x, y) if layout == "rows" else F.cross_entropy(eager(x), y)).backward()
        optimizers[0].step()
        torch.manual_seed(i)
        run(x, y)
    for p, e in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert difference(p, e) <= 1e-10


def compiled_steps(network: Network, optimizer: torch.optim.SGD):
    """Steps of a network3.Network with the settings of an optimizer of one group."""
    network.mini_batch_size = 1024
    builder = network._builder(lambda p: False)
    group = optimizer.param_groups[0]
    for number, p in enumerate(builder.parameters):
        builder.plan.set_step(
            number, group["lr"], group["weight_decay"], group["momentum"], 0.0, False, False, torch.zeros_like(p)
        )
    return lambda x, y: builder.plan.run(x, y, None, len(x), len(x), 0, 1, 0.0)


OPTIONS = {
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.5, "lmbda": 3.0},
    "falling eta": {"eta": lambda epoch: 0.1 / (1 + epoch)},
    "shuffled": {"shuffle": True},
    "last mini-batch": {"drop_last": False},
    "all": {"momentum": 0.9, "lmbda": 1.0, "eta": lambda epoch: 0.02 * 0.5**epoch, "shuffle": True, "drop_last": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_training(options: dict) -> None:
    """Three epochs, 8 of 10 examples left over by the last whole mini-batch."""
    eager, compiled, plain = (make_network(p_dropout=0.25) for _ in range(3))
    data = make_data(7 * MB + 8)
    expected, rng = train(eager, data, False, epochs=3, **options)
    history, compiled_rng = train(compiled, data, True, epochs=3, **options)
    for p, e in zip(compiled.params, eager.params, strict=True):
        assert difference(p, e) <= 1e-10
    assert history["train_cost"] == pytest.approx(expected["train_cost"], rel=1e-10)
    assert torch.equal(rng, compiled_rng)
    train(plain, data, True, epochs=3)
    assert difference(plain.params[0], compiled.params[0]) > 1e-4, "the options have no effect"


@pytest.mark.parametrize("compiled", [False, True])
def test_momentum_is_that_of_torch(compiled: bool) -> None:
    network, other = make_network(), make_network()
    data = make_data(20 * MB)
    train(network, data, compiled, eta=0.05, lmbda=4.0, momentum=0.9)
    weights = [layer.w for layer in other.layers]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 4.0 / 20}, {"params": [layer.b for layer in other.layers]}],
        lr=0.05, momentum=0.9,
    )  # fmt: skip
    for x, y in zip(data[0].split(MB), data[1].split(MB), strict=True):
        optimizer.zero_grad()
        other.cost(x, y).backward()
        optimizer.step()
    for p, e in zip(network.params, other.params, strict=True):
        assert difference(p, e) <= 1e-10


@pytest.mark.parametrize("compiled", [False, True])
def test_a_shuffled_epoch_takes_every_example_once(compiled: bool) -> None:
    seen: list[torch.Tensor] = []
    data = make_data(5 * MB + 3)
    for drop_last, mini_batches in ((False, 6), (True, 5)):
        seen.clear()
        train(
            make_network(), data, compiled, epochs=2, shuffle=True, drop_last=drop_last,
            augment=lambda indices, x: seen.append(indices.clone()),
        )  # fmt: skip
        assert len(seen) == 2 * mini_batches
        epochs = [torch.cat(seen[:mini_batches]), torch.cat(seen[mini_batches:])]
        for order in epochs:
            assert len(order.unique()) == len(order) == (53 if not drop_last else 50)
        assert not torch.equal(*epochs)


@pytest.mark.parametrize("shuffle", [False, True])
def test_augmented_examples(shuffle: bool) -> None:
    """The hook sees the rows at its indices, and what it makes of them is what is trained on; the data stay."""
    data = make_data(8 * MB + 3)
    before = data[0].clone()

    def augment(indices: torch.Tensor, x: torch.Tensor) -> None:
        assert torch.equal(x, data[0][indices])
        x.mul_(1.0 + 0.01 * indices[:, None])

    eager, compiled, by_hand = (make_network(p_dropout=0.5) for _ in range(3))
    for network, native in ((eager, False), (compiled, True)):
        train(network, data, native, shuffle=shuffle, drop_last=False, augment=augment)
    rows = torch.arange(len(data[0]))
    train(by_hand, (data[0] * (1.0 + 0.01 * rows[:, None]), data[1]), True, shuffle=shuffle, drop_last=False)
    for p, e, h in zip(compiled.params, eager.params, by_hand.params, strict=True):
        assert difference(p, e) <= 1e-10
        assert torch.equal(p, h)
    assert torch.equal(data[0], before)


@pytest.mark.parametrize("compiled", [False, True])
def test_augmentation_that_does_not_change_in_place_is_refused(compiled: bool) -> None:
    with pytest.raises(TypeError, match="expected it to change x in place"):
        train(make_network(), make_data(20), compiled, augment=lambda indices, x: 2 * x)


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_of_an_augmentation_is_not_blamed_on_eta(compiled: bool) -> None:
    def augment(indices: torch.Tensor, x: torch.Tensor) -> None:
        if indices[0] == MB:
            x[3] = float("nan")

    with pytest.raises(network3.DivergenceError, match="mini-batch 1 of epoch 0: .* its examples hold NaN"):
        train(make_network(), make_data(50), compiled, augment=augment)


def test_an_error_of_the_hook_is_the_users_to_see() -> None:
    network, other = make_network(), make_network()
    data = make_data(8 * MB)

    def augment(indices: torch.Tensor, x: torch.Tensor) -> None:
        if indices[0] == 3 * MB:
            raise OSError("no more images")

    with pytest.raises(OSError, match="no more images"):
        train(network, data, True, augment=augment)
    train(other, (data[0][: 3 * MB], data[1][: 3 * MB]), True)
    assert all(torch.equal(p, o) for p, o in zip(network.params, other.params, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_mini_batches_that_progress_leaves_out_are_not_trained(compiled: bool) -> None:
    network, other = make_network(), make_network()
    data = make_data(50 * MB)
    train(network, data, compiled, progress=lambda indices: list(indices)[:7])
    train(other, (data[0][: 7 * MB], data[1][: 7 * MB]), True)
    assert all(difference(p, o) < 1e-10 for p, o in zip(network.params, other.params, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be less than 1, but got 1.0"),
        ({"momentum": -0.1}, "momentum must be finite and not negative"),
        ({"eta": lambda epoch: -1.0 if epoch else 0.1}, r"eta\(1\) must be finite and not negative, but got -1.0"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_network(), make_data(20), True, epochs=2, **options)


def test_ctrl_c_leaves_a_network_that_can_go_on() -> None:
    """In a process of its own, which a signal stops in the middle of millions of epochs."""
    script = textwrap.dedent("""
        import os, signal, sys, threading, time, torch
        from pyconv.network3 import FullyConnectedLayer, Network, SoftmaxLayer
        net = Network([FullyConnectedLayer(784, 100), SoftmaxLayer(100, 10)], 10)
        x, y = torch.rand(2000, 784), torch.randint(10, (2000,))
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            net.SGD((x, y), 10_000_000, 10, 0.1, (x, y), None, verbose=False)
        except KeyboardInterrupt:
            assert time.monotonic() - start < 30
            assert all(p.isfinite().all() for p in net.params)
            net.SGD((x, y), 1, 10, 0.1, (x, y), None, verbose=False)
            print("went on")
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "went on\n", done.stderr


def test_other_threads_run_meanwhile() -> None:
    """One native call, far longer than Python's switch interval, and a counter beside it."""
    network = make_network(mb=1024)
    builder = network._builder(lambda p: False)
    for number in range(len(builder.parameters)):
        builder.plan.set_step(number, 0.01, 0.0, 0.0, 0.0, False, False, None)
    x, y = make_data(4096)
    seen = []
    ended = threading.Event()

    def count() -> None:
        while not ended.is_set():
            seen.append(time.monotonic())

    thread = threading.Thread(target=count)
    thread.start()
    begin = time.monotonic()
    builder.plan.run(x, y, None, 4096, 1024, 0, 4, 10.0)
    end = time.monotonic()
    ended.set()
    thread.join()
    assert sum(begin + (end - begin) / 4 < moment < end - (end - begin) / 4 for moment in seen) > 10


def test_a_layer_of_the_users_is_trained_layer_by_layer_after_one_warning() -> None:
    class Scaled(FullyConnectedLayer):
        def forward(self, inpt):
            return 2 * super().forward(inpt)

    network = make_network()
    network.layers[2] = Scaled(36, 21, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"training is not compiled: layer 2 \(Scaled\)") as caught:
        network.SGD(make_data(20), 1, MB, 0.1, make_data(20), None, verbose=False)
    assert len(caught) == 1
    with pytest.raises(pyconv.UnsupportedError, match=r"layer 2 \(Scaled\)"):
        network.compile()


class Smoothed(Network):
    def cost(self, x, y):
        return 2 * super().cost(x, y)


def test_what_a_plan_would_not_run_is_trained_layer_by_layer() -> None:
    def as_a_subclass(network: Network) -> Network:
        return Smoothed(list(network.layers), network.mini_batch_size)

    def with_a_cost_of_its_own(network: Network) -> Network:
        last = network.layers[-1]
        last.cost = lambda x, y: 3 * F.cross_entropy(x.flatten(1) @ last.w + last.b, y)
        return network

    def with_columns(network: Network) -> Network:
        network.layers[2].w = nn.Parameter(network.layers[2].w.detach().t().contiguous().t())
        return network

    for change in (as_a_subclass, with_a_cost_of_its_own, with_columns):
        eager, compiled = (change(make_network()) for _ in range(2))
        data = make_data(5 * MB)
        train(eager, data, False)
        with pytest.warns(UserWarning, match="training is not compiled"):
            compiled.SGD(data, 1, MB, 0.05, data, None, verbose=False)
        assert all(torch.equal(c, e) for c, e in zip(compiled.params, eager.params, strict=True)), change.__name__


def test_callbacks_may_change_layers_and_values() -> None:
    def callback_for(network: Network):
        def callback(record: dict) -> None:
            with torch.no_grad():
                network.layers[0].w.mul_(0.5)
            network.layers[2].p_dropout = 0.5
            network.layers[2].activation_fn = network3.sigmoid

        return callback

    eager, compiled = (make_network(p_dropout=0.25) for _ in range(2))
    data = make_data(5 * MB)
    histories = [
        train(network, data, native, lmbda=0.5, epochs=3, momentum=0.5, callback=callback_for(network))[0]
        for network, native in ((eager, False), (compiled, True))
    ]
    for p, e in zip(compiled.params, eager.params, strict=True):
        assert difference(p, e) <= 1e-10
    assert histories[1]["train_cost"] == pytest.approx(histories[0]["train_cost"], rel=1e-10)


@pytest.mark.parametrize(
    "change", [lambda n: n.half(), lambda n: setattr(n.layers[2].w, "data", torch.zeros(1))], ids=["half", "shape"]
)
def test_callbacks_that_change_shapes_are_an_error(change) -> None:
    network = make_network()
    with pytest.raises((RuntimeError, ValueError)):
        train(network, make_data(5 * MB), True, epochs=2, callback=lambda record: change(network))


def test_mini_batches_that_progress_repeats_are_trained_again() -> None:
    eager, compiled = (make_network() for _ in range(2))
    data = make_data(3 * MB)
    for network, native in ((eager, False), (compiled, True)):
        train(network, data, native, progress=lambda indices: [0, 1, 1, 0])
    assert all(difference(p, e) <= 1e-10 for p, e in zip(compiled.params, eager.params, strict=True))


@pytest.mark.parametrize("augment", [None, lambda indices, x: None], ids=["plain", "augmented"])
def test_data_that_are_not_contiguous(augment) -> None:
    network, other = make_network(), make_network()
    x, y = make_data(3 * MB)
    spread = torch.stack([y, y], 1)[:, 0]
    train(network, (x.t().contiguous().t(), spread), True, augment=augment)
    train(other, (x, y), True)
    assert all(torch.equal(p, o) for p, o in zip(network.params, other.params, strict=True))


def test_an_activation_of_the_users_is_named() -> None:
    network = make_network(activation_fn=torch.nn.functional.softplus)
    with pytest.raises(pyconv.UnsupportedError, match="layer 0 .*softplus"):
        network.compile()


def test_the_plan_as_a_table() -> None:
    table = make_network(p_dropout=0.5).compile()
    kinds = [row["operation"].split()[0] for row in table.rows]
    assert kinds == [
        "conv_max_pool2d", "conv_max_pool2d", "bias_act_dropout", "dense", "bias_act_dropout", "dense",
        "bias_act_dropout", "cross_entropy",
    ]  # fmt: skip
    text = str(table)
    assert "conv_max_pool2d 6x1x5x5, pool 2x2" in text and "10x1x18x18" in text and "10x6x7x7" in text
    # Forward and the gradient of the weights; the first layer's input has none.
    assert table.rows[0]["flops"] == 2 * 2 * MB * 6 * 14 * 14 * 25


def test_a_cost_that_is_not_finite_stops_before_it_does_harm() -> None:
    network = make_network()
    x, y = make_data(10 * MB)
    x[47] = float("nan")
    good = make_network()
    train(good, (x[: 4 * MB], y[: 4 * MB]), True)
    with pytest.raises(network3.DivergenceError, match="mini-batch 4 of epoch 0: the cost is nan") as caught:
        network.SGD((x, y), 2, MB, 0.05, make_data(20), None, verbose=False)
    assert (caught.value.epoch, caught.value.mini_batch) == (0, 4)
    for p, g in zip(network.params, good.params, strict=True):
        assert torch.equal(p, g)


def test_divergence_sets_the_parameters_back() -> None:
    network = make_network(dtype=torch.float32)
    start = [p.detach().clone() for p in network.params]
    with pytest.raises(network3.DivergenceError, match="eta is probably too large"):
        network.SGD(make_data(20 * MB), 2, MB, 1e12, make_data(20), None, verbose=False)
    assert all(torch.equal(p, s) for p, s in zip(network.params, start, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Plain PyTorch
# ------------------------------------------------------------------------------------------------------------


def make_model(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        pyconv.ConvMaxPool2d(8, 4, 2, 1, activation="tanh"),
        nn.Flatten(),
        nn.Identity(),
        pyconv.Dropout(0.25),
        nn.Linear(16, 33),
        nn.SiLU(),
        pyconv.Dropout(0.5),
        pyconv.LinearActDropout(33, 12, activation="sigmoid", p=0.5),
        nn.Linear(12, 5, bias=False),
    ).to(dtype)


def mini_batch(n: int, seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 12, 12, generator=g, dtype=torch.float64).to(dtype), torch.randint(5, (n,), generator=g)


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, x, y) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_of_a_sequential_model(settings: dict) -> None:
    eager = make_model()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), **settings) for m in (eager, compiled)]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 4, 0.5) for o in optimizers]
    step = pyconv.compile_training(compiled, loss="cross_entropy", optimizer=optimizers[1])
    for i, n in enumerate([8] * 10 + [3, 8, 13, 1]):
        x, y = mini_batch(n, i)
        torch.manual_seed(i)
        expected = eager_step(eager, optimizers[0], x, y)
        torch.manual_seed(i)
        loss = step(x, y)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for scheduler in schedulers:
                scheduler.step()
    for p, e in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert difference(p, e) <= 1e-10
    states = [[o.state[p].get("momentum_buffer") for p in o.param_groups[0]["params"]] for o in optimizers]
    for buffer, expected in zip(states[1], states[0], strict=True):
        assert (buffer is None) == (expected is None)
        if buffer is not None:
            assert difference(buffer, expected) <= 1e-9


def test_eager_and_compiled_steps_take_turns() -> None:
    eager = make_model()
    mixed = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (eager, mixed)]
    step = pyconv.compile_training(mixed, optimizer=optimizers[1])
    for i in range(6):
        x, y = mini_batch(8, i)
        torch.manual_seed(i)
        eager_step(eager, optimizers[0], x, y)
        torch.manual_seed(i)
        step(x, y) if i % 2 else eager_step(mixed, optimizers[1], x, y)
    for p, e in zip(mixed.parameters(), eager.parameters(), strict=True):
        assert difference(p, e) <= 1e-10


def test_two_groups_and_parameters_left_out() -> None:
    eager = make_model()
    compiled = copy.deepcopy(eager)

    def optimizer(model):
        linear = model[7]
        return torch.optim.SGD(
            [{"params": [linear.weight], "lr": 0.2}, {"params": [linear.bias, model[11].weight]}], lr=0.05
        )

    optimizers = [optimizer(m) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    for i in range(5):
        x, y = mini_batch(8, i)
        torch.manual_seed(i)
        eager_step(eager, optimizers[0], x, y)
        torch.manual_seed(i)
        step(x, y)
    for p, e in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert difference(p, e) <= 1e-10


def test_the_plan_of_a_step_says_what_took_how_long() -> None:
    model = make_model()
    step = pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="expected a step before its plan is asked for"):
        step.plan()
    for i in range(3):
        step(*mini_batch(8, i))
    table = step.plan()
    assert table.mini_batches == 3
    assert all(0 < row["forward_seconds"] < 1 for row in table.rows)
    assert "forward us" in str(table) and "conv_max_pool2d 6x2x3x3" in str(table)


def test_a_first_loss_that_is_not_finite_leaves_no_momentum() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    step = pyconv.compile_training(model, optimizer=optimizer)
    x, y = mini_batch(8, 0)
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        step(x * float("nan"), y)
    assert not any(optimizer.state[p].get("momentum_buffer") is not None for p in model.parameters())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = make_model()
    step = pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = mini_batch(8, 0)
    step(x, y)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        step(x * float("nan"), y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(6), r"module 1 \(BatchNorm2d"),
        (nn.MaxPool2d(2), r"module 1 \(MaxPool2d"),
        (nn.GELU(approximate="tanh"), r"module 1 \(GELU"),
        (nn.Flatten(2), r"module 1 \(Flatten\)"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Sequential(nn.Identity(), nn.LayerNorm(5)), r"module 1\.1 \(LayerNorm"),
    ],
)
def test_what_is_unsupported_is_named(module: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), module, nn.Flatten(), nn.Linear(600, 5))
    if isinstance(module, nn.MaxPool2d):
        model[0] = nn.Dropout()
    with pytest.raises(pyconv.UnsupportedError, match=message):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_shared_parameters_are_refused() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for model in (nn.Sequential(shared, nn.ReLU(), shared), tied):
        with pytest.raises(pyconv.UnsupportedError, match="is also the weight of module 0 .*shared parameters"):
            pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_same_activation_twice_is_two_modules() -> None:
    relu = nn.ReLU()
    eager = nn.Sequential(nn.Linear(4, 9), relu, nn.Linear(9, 9), relu, nn.Linear(9, 3)).double()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    for _ in range(5):
        eager_step(eager, optimizers[0], x, y)
        step(x, y)
    assert max(difference(p, e) for p, e in zip(compiled.parameters(), eager.parameters(), strict=True)) <= 1e-10


def test_an_own_forward_is_refused_and_a_plain_subclass_is_not() -> None:
    class Twice(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Plain(nn.Sequential):
        pass

    model = Twice(nn.Linear(4, 3))
    with pytest.raises(pyconv.UnsupportedError, match=r"the model \(Twice\) has a forward of its own"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    model = Plain(nn.Linear(4, 3))
    pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_changes_of_the_model_between_steps_are_seen() -> None:
    eager = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.0), nn.Linear(9, 3)).double()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    step(x, y)
    eager_step(eager, optimizers[0], x, y)
    for model in (eager, compiled):
        model[1] = nn.Tanh()
        model[0].bias.requires_grad_(False)
    step(x, y)
    eager_step(eager, optimizers[0], x, y)
    assert max(difference(p, e) for p, e in zip(compiled.parameters(), eager.parameters(), strict=True)) <= 1e-10
    compiled[2].p = 1.0
    assert step(x, y) != eager_step(eager, optimizers[0], x, y)
    compiled[2].eval()
    with pytest.raises(pyconv.UnsupportedError, match=r"module 2 \(Dropout\) is in evaluation mode"):
        step(x, y)
    compiled[2].train()
    compiled[3].weight.register_hook(lambda g: 0 * g)
    with pytest.raises(pyconv.UnsupportedError, match=r"weight of module 3 \(Linear\) has hooks"):
        step(x, y)


def test_optimizers_that_would_do_something_else_are_refused() -> None:
    model, other = nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)
    with pytest.raises(pyconv.UnsupportedError, match="the optimizer has none of the model's parameters"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = pyconv.compile_training(model, optimizer=optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(pyconv.UnsupportedError, match="the optimizer has hooks"):
        step(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


def test_examples_that_do_not_fit_are_described() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = pyconv.compile_training(model, optimizer=optimizer)
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"expected x of dtype torch.float32 .* but got torch.float64"):
        step(torch.zeros(2, 4, dtype=torch.float64), y)
    with pytest.raises(RuntimeError, match="with at least one example, but got"):
        step(torch.zeros(0, 4), y[:0])
    with pytest.raises(TypeError, match="expected x to be a tensor, but got list"):
        step([[0.0] * 4], y)
    mixed = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double())
    with pytest.raises(pyconv.UnsupportedError, match="expected parameters of one dtype and device"):
        pyconv.compile_training(mixed, optimizer=torch.optim.SGD(mixed.parameters(), lr=0.1))


def test_momentum_buffers_follow_their_parameters() -> None:
    """An eager step may leave other strides, and .double() another dtype."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    eager = copy.deepcopy(model).double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (eager, model)]
    x, y = torch.randn(5, 1, 4, 4).contiguous(memory_format=torch.channels_last), torch.arange(5) % 3
    for m, optimizer in zip((eager, model), optimizers, strict=True):
        eager_step(m, optimizer, x.to(m[0].weight.dtype), y)
    step = pyconv.compile_training(model, optimizer=optimizers[1])
    for _ in range(2):
        eager_step(eager, optimizers[0], x.double(), y)
        step(x, y)
        assert max(difference(p, e) for p, e in zip(model.parameters(), eager.parameters(), strict=True)) <= 1e-6
    model.double()
    step(x.double(), y)
    assert all(optimizers[1].state[p]["momentum_buffer"].dtype == torch.float64 for p in model.parameters())


def test_a_first_step_that_raises_leaves_no_momentum() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    step = pyconv.compile_training(model, optimizer=optimizer)
    for labels in (torch.tensor([0, 3]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1, 2])):
        with pytest.raises((ValueError, RuntimeError)):
            step(torch.zeros(2, 4), labels)
        assert not any("momentum_buffer" in optimizer.state[p] for p in model.parameters())


def test_a_step_in_inference_mode_leaves_ordinary_state() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = pyconv.compile_training(model, optimizer=optimizer)
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    with torch.inference_mode():
        assert not step(torch.randn(2, 4), y).is_inference()
    eager_step(model, optimizer, x, y)


def test_steps_from_two_threads_follow_each_other() -> None:
    """Of mini-batches whose size grows, so that each makes a new plan."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    step = pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))
    x, y = torch.randn(900, 64), torch.randint(10, (900,))
    losses: list[torch.Tensor] = []

    def work(n: int) -> None:
        for i in range(100):
            losses.append(step(x[: n + i], y[: n + i]))

    threads = [threading.Thread(target=work, args=(n,)) for n in (5, 700)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 200 and all(loss.isfinite() for loss in losses)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "padding", (0, 0)),
        lambda m: setattr(m[1], "approximate", "tanh"),
        lambda m: setattr(m[0], "dilation", (2, 2)),
    ],
    ids=["padding", "approximate", "dilation"],
)
def test_settings_changed_between_steps_are_seen_or_refused(change) -> None:
    eager = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(75, 4)).double()
    eager[3] = nn.LazyLinear(4, dtype=torch.float64)
    x, y = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.arange(3)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 3 \(LazyLinear\) is not initialised"):
        pyconv.compile_training(eager, optimizer=torch.optim.SGD(eager[0].parameters(), lr=0.1))
    eager[3] = nn.Linear(75, 4).double()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    step(x, y)
    eager_step(eager, optimizers[0], x, y)
    for model in (eager, compiled):
        change(model)
    try:
        expected = eager_step(eager, optimizers[0], x, y)
    except RuntimeError:
        with pytest.raises(pyconv.UnsupportedError):
            step(x, y)
    else:
        try:
            torch.testing.assert_close(step(x, y), expected, rtol=1e-12, atol=0)
        except pyconv.UnsupportedError as error:
            assert "GELU" in str(error)


def test_what_runs_beside_the_modules_is_refused() -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model = nn.Sequential(nn.Linear(4, 3), nn.Identity())
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 1 \(Identity\) has hooks"):
        pyconv.compile_training(model, optimizer=optimizer_of(model))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(pyconv.UnsupportedError, match="shared parameters"):
        pyconv.compile_training(model, optimizer=optimizer_of(model))
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = optimizer_of(model)
    step = pyconv.compile_training(model, optimizer=optimizer)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(pyconv.UnsupportedError, match="maximize"):
        step(torch.zeros(2, 4), torch.tensor([0, 1]))
    optimizer.param_groups[0]["maximize"] = False
    with pytest.raises(pyconv.UnsupportedError, match="expected a fully connected layer before the loss"):
        pyconv.compile_training(nn.Sequential(), optimizer=optimizer)


def test_hooks_and_parametrizations_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 1 \(ReLU\) has hooks"):
        pyconv.compile_training(model, optimizer=optimizer)
    handle.remove()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(pyconv.UnsupportedError, match=r"module 0 .* is parametrized"):
        pyconv.compile_training(model, optimizer=optimizer)


def test_refusals_of_arguments() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="expected a torch.optim.SGD, the only optimizer supported, but got Adam"):
        pyconv.compile_training(model, optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="maximize"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="loss must be 'cross_entropy'.*but got 'mse'"):
        pyconv.compile_training(model, loss="mse", optimizer=optimizer)
    with pytest.raises(pyconv.UnsupportedError, match="expected an nn.Sequential.*but got Linear"):
        pyconv.compile_training(model[0], optimizer=optimizer)
    step = pyconv.compile_training(model, optimizer=optimizer)
    with pytest.raises(pyconv.UnsupportedError, match=r"expected 4 inputs of a fully connected layer, but got \(5,\)"):
        step(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels from 0 to 2, but got 3 at index 1"):
        step(torch.zeros(2, 4), torch.tensor([0, 3]))
    model.eval()
    with pytest.raises(RuntimeError, match="call model.train()"):
        step(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
