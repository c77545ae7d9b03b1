"""network3's training in native code against its training layer by layer."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_support import (
    IMAGE_LAYERS,
    MB,
    OPTIONS,
    assert_same_parameters,
    difference,
    make_data,
    make_network,
    make_network_of,
    train,
)

import pyconv
from pyconv import network3
from pyconv.network3 import ConvLayer, ConvPoolLayer, FullyConnectedLayer, Network, PoolLayer, SoftmaxLayer


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


@pytest.mark.parametrize("image_layers", IMAGE_LAYERS)
@pytest.mark.parametrize(
    "activation_fn", [network3.ReLU, network3.sigmoid, network3.tanh, network3.linear], ids=lambda f: f.__name__
)
def test_layers_beyond_the_books(activation_fn, image_layers: str) -> None:
    """Fifty mini-batches with the L2 term; a PoolLayer is one operation with the ConvLayer before it."""
    eager, compiled = (make_network_of(image_layers, activation_fn) for _ in range(2))
    start = [p.detach().clone() for p in eager.params]
    data = make_data(50 * MB)
    expected, _ = train(eager, data, False, lmbda=2.0)
    history, _ = train(compiled, data, True, lmbda=2.0)
    for p, e, s in zip(compiled.params, eager.params, start, strict=True):
        assert difference(p, e) <= 1e-10
        assert difference(e, s) > 1e-4, "a parameter that does not move proves nothing"
    assert history["train_cost"][0] == pytest.approx(expected["train_cost"][0], rel=1e-12)
    kinds = [row["operation"].split()[0] for row in compiled.compile().rows]
    assert kinds == ["conv_max_pool2d", "conv_max_pool2d", "dense", "bias_act_dropout", "cross_entropy"]


def one_layer(*layers) -> Network:
    return Network([*layers, SoftmaxLayer(layers[-1].n_out, 10)], MB)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: one_layer(ConvPoolLayer((2, 1, 3, 3), (MB, 1, 18, 18), pooling="l2")),
            r"layer 0 \(ConvPoolLayer\): L2 pooling is not among",
        ),
        (
            lambda: one_layer(ConvLayer((2, 1, 3, 3), (MB, 1, 18, 18)), PoolLayer((MB, 2, 16, 16), pooling="l2")),
            r"layer 1 \(PoolLayer\): L2 pooling is not among",
        ),
        (
            lambda: one_layer(PoolLayer((MB, 1, 18, 18))),
            r"layer 0 \(PoolLayer\): is the first layer; expected it behind a ConvLayer",
        ),
        (
            lambda: one_layer(ConvPoolLayer((2, 1, 3, 3), (MB, 1, 18, 18)), PoolLayer((MB, 2, 8, 8))),
            r"layer 1 \(PoolLayer\): stands behind ConvPoolLayer; expected it behind a ConvLayer",
        ),
        (
            lambda: one_layer(
                ConvLayer((2, 1, 3, 3), (MB, 1, 18, 18)), PoolLayer((MB, 2, 16, 16)), PoolLayer((MB, 2, 8, 8))
            ),
            r"layer 2 \(PoolLayer\): stands behind PoolLayer; expected it behind a ConvLayer",
        ),
        (
            lambda: one_layer(ConvLayer((2, 1, 3, 3), (MB, 1, 18, 18)), PoolLayer((MB, 8, 8, 8))),
            r"layer 1 \(PoolLayer\): image_shape \(10, 8, 8, 8\) is for maps \(8, 8, 8\), but the ConvLayer in front "
            r"of it gives \(2, 16, 16\)",
        ),
        (
            lambda: one_layer(ConvLayer((2, 1, 3, 3), (MB, 1, 18, 18), F.softplus), PoolLayer((MB, 2, 16, 16))),
            r"layer 0 \(ConvLayer\): the activation function softplus",
        ),
    ],
)
def test_layers_beyond_the_books_that_are_trained_layer_by_layer(network, message: str) -> None:
    eager, compiled = network(), network()
    compiled.load_state_dict(eager.state_dict())
    data = make_data(3 * MB, torch.float32)
    train(eager, data, False)
    with pytest.warns(UserWarning, match=f"training is not compiled: {message}") as caught:
        compiled.SGD(data, 1, MB, 0.05, data, None, verbose=False)
    assert len(caught) == 1
    assert all(torch.equal(c, e) for c, e in zip(compiled.params, eager.params, strict=True))
    with pytest.raises(pyconv.UnsupportedError, match=message):
        compiled.compile()


def test_images_that_do_not_fit_any_more_are_refused() -> None:
    """Before the plan reads what is not there: the arguments of a layer may change after the network checked them."""
    network = make_network_of("arguments")
    network.layers[0].pool_stride = (3, 3)
    with pytest.raises(pyconv.UnsupportedError, match=r"expected images \(6, 8, 3\) .*, but got \(6, 6, 2\)"):
        network.compile()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_fifty_single_steps_from_common_weights(dtype: torch.dtype, bound: float) -> None:
    eager, compiled = (make_network(dtype=dtype, p_dropout=0.5) for _ in range(2))
    x, y = make_data(50 * MB, dtype)
    for i in range(50):
        compiled.load_state_dict(eager.state_dict())
        batch = x[i * MB : (i + 1) * MB], y[i * MB : (i + 1) * MB]
        train(eager, batch, False, lmbda=0.1, seed=i)
        train(compiled, batch, True, lmbda=0.1, seed=i)
        assert_same_parameters(compiled, eager, bound)


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
    assert_same_parameters(compiled, eager, bound)


@pytest.mark.parametrize("mb", [1, 3, 32, 1024])
def test_mini_batch_sizes(mb: int) -> None:
    eager, compiled = (make_network(mb=mb, p_dropout=0.5) for _ in range(2))
    data = make_data(3 * mb + mb // 2)
    train(eager, data, False)
    train(compiled, data, True)
    assert_same_parameters(compiled, eager)


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
    assert_same_parameters(compiled, eager)


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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_training(options: dict) -> None:
    """Three epochs, 8 of 10 examples left over by the last whole mini-batch."""
    eager, compiled, plain = (make_network(p_dropout=0.25) for _ in range(3))
    data = make_data(7 * MB + 8)
    expected, rng = train(eager, data, False, epochs=3, **options)
    history, compiled_rng = train(compiled, data, True, epochs=3, **options)
    assert_same_parameters(compiled, eager)
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
    assert_same_parameters(network, other)


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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
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
            network.layers[0].b.requires_grad_(False)
            network.layers[1].b.requires_grad_(record["epoch"] > 0)

        return callback

    eager, compiled = (make_network(p_dropout=0.25) for _ in range(2))
    data = make_data(5 * MB)
    histories = [
        train(network, data, native, lmbda=0.5, epochs=3, momentum=0.5, callback=callback_for(network))[0]
        for network, native in ((eager, False), (compiled, True))
    ]
    assert_same_parameters(compiled, eager)
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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("index", [-1, 3])
def test_mini_batches_that_there_are_not(index: int, compiled: bool) -> None:
    with pytest.raises(IndexError, match=f"expected mini-batches from 0 to 2, but got {index}"):
        train(make_network(), make_data(3 * MB), compiled, progress=lambda indices: [0, index])


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
