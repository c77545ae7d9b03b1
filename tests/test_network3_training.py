"""Network.SGD: what it prints and returns, the scripts of the book, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import pyconv.network3 as network3
from pyconv.network3 import (
    ConvPoolLayer,
    DivergenceError,
    FullyConnectedLayer,
    History,
    Network,
    ReLU,
    SoftmaxLayer,
)
from pyconv.network3.experiments import EXPERIMENTS


def make_data(n, features=6, classes=3, seed=0):
    """Examples that a linear layer can tell apart: feature y is raised."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=generator)
    x = 0.5 * torch.rand(n, features, generator=generator)
    x[torch.arange(n), y] += 0.5
    return x, y


def make_network(mini_batch_size=10, features=6, classes=3):
    hidden = FullyConnectedLayer(features, 5, generator=torch.Generator().manual_seed(0))
    return Network([hidden, SoftmaxLayer(5, classes)], mini_batch_size)


def script_accuracies(monkeypatch, network, validation_data, accuracies):
    """Let the evaluations of `network` give these (validation, test) accuracies, by epoch."""
    epoch = iter(accuracies)
    current = {}

    def count_correct(x, y):
        if len(y) == len(validation_data[1]):
            current["validation"], current["test"] = next(epoch)
            return current["validation"] * len(y)
        return current["test"] * len(y)

    monkeypatch.setattr(network, "_count_correct", count_correct)


# ----------------------------------------------------------------------------------------------------------
# What it prints
# ----------------------------------------------------------------------------------------------------------


def test_printed_lines(monkeypatch, capsys):
    """700 mini-batches an epoch, so that the number 1000 falls into the second of four."""
    network = make_network(mini_batch_size=1)
    training, validation, test = make_data(700), make_data(20), make_data(30)
    script_accuracies(monkeypatch, network, validation, [(0.5, 0.25), (0.75, 2 / 3), (0.7, 0.9), (0.75, 0.8)])
    history = network.SGD(training, 4, 1, 0.1, validation, test)
    assert capsys.readouterr().out == (
        "Training mini-batch number 0\n"
        "Epoch 0: validation accuracy 50.00%\n"
        "This is the best validation accuracy to date.\n"
        "The corresponding test accuracy is 25.00%\n"
        "Training mini-batch number 1000\n"
        "Epoch 1: validation accuracy 75.00%\n"
        "This is the best validation accuracy to date.\n"
        "The corresponding test accuracy is 66.67%\n"
        "Training mini-batch number 2000\n"
        "Epoch 2: validation accuracy 70.00%\n"
        "Epoch 3: validation accuracy 75.00%\n"
        "This is the best validation accuracy to date.\n"
        "The corresponding test accuracy is 80.00%\n"
        "Finished training network.\n"
        "Best validation accuracy of 75.00% obtained at iteration 2799\n"
        "Corresponding test accuracy of 80.00%\n"
    )
    assert history["validation_accuracy"] == [0.5, 0.75, 0.7, 0.75]
    assert history["test_accuracy"] == [0.25, 2 / 3, None, 0.8]
    assert (history.best_epoch, history.best_iteration) == (3, 2799)
    assert (history.best_validation_accuracy, history.best_test_accuracy) == (0.75, 0.8)


def test_without_test_data_no_test_accuracy_is_printed(monkeypatch, capsys):
    network = make_network()
    validation = make_data(20)
    script_accuracies(monkeypatch, network, validation, [(0.5, None)])
    history = network.SGD(make_data(40), 1, 10, 0.1, validation, None)
    assert capsys.readouterr().out == (
        "Training mini-batch number 0\n"
        "Epoch 0: validation accuracy 50.00%\n"
        "This is the best validation accuracy to date.\n"
        "Finished training network.\n"
        "Best validation accuracy of 50.00% obtained at iteration 3\n"
    )
    assert history["test_accuracy"] == [None] and history.best_test_accuracy is None


def test_not_verbose_prints_nothing(capsys):
    make_network().SGD(make_data(40), 1, 10, 0.1, make_data(20), make_data(20), verbose=False)
    assert capsys.readouterr() == ("", "")


BOOK_SCRIPT = """
import pyconv.network3 as network3
from pyconv.network3 import Network
from pyconv.network3 import ConvPoolLayer, FullyConnectedLayer, SoftmaxLayer
from pyconv.network3 import ReLU

training_data, validation_data, test_data = network3.load_data_shared()
mini_batch_size = 10
net = Network([
        FullyConnectedLayer(n_in=784, n_out=100, p_dropout=0.5),
        SoftmaxLayer(n_in=100, n_out=10, p_dropout=0.5)], mini_batch_size)
net.SGD(training_data, 1, mini_batch_size, 0.1,
            validation_data, test_data)
net = Network([
        ConvPoolLayer(image_shape=(mini_batch_size, 1, 28, 28),
                      filter_shape=(20, 1, 5, 5),
                      poolsize=(2, 2),
                      activation_fn=ReLU),
        ConvPoolLayer(image_shape=(mini_batch_size, 20, 12, 12),
                      filter_shape=(40, 20, 5, 5),
                      poolsize=(2, 2),
                      activation_fn=ReLU),
        FullyConnectedLayer(n_in=40*4*4, n_out=100, activation_fn=ReLU),
        SoftmaxLayer(n_in=100, n_out=10)], mini_batch_size)
net.SGD(training_data, 2, mini_batch_size, 0.03,
            validation_data, test_data, lmbda=0.1)
"""


def test_a_script_of_the_book(tmp_path):
    """The calls of chapter 6 as the book writes them, on the embedded digits."""
    script = tmp_path / "script.py"
    script.write_text(BOOK_SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "PYCONV_DATA"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "1197 training, 300 validation, 300 test images" in done.stderr
    epoch = (
        r"Epoch \d: validation accuracy \d+\.\d\d%\n"
        r"(This is the best validation accuracy to date\.\nThe corresponding test accuracy is \d+\.\d\d%\n)?"
    )
    end = (
        r"Finished training network\.\n"
        r"Best validation accuracy of \d+\.\d\d% obtained at iteration \d+\n"
        r"Corresponding test accuracy of \d+\.\d\d%\n"
    )
    start = "Training mini-batch number 0\n"
    assert re.fullmatch(f"{start}{epoch}{end}{start}{epoch}{epoch}{end}", done.stdout), done.stdout
    assert float(re.findall(r"Best validation accuracy of (\S+)%", done.stdout)[-1]) > 50


def test_importing_pyconv_imports_neither_network3_nor_the_extras():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch imports tqdm itself where it is installed
        "import pyconv\n"
        "print({'pyconv.network3', 'safetensors', 'tqdm'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr


# ----------------------------------------------------------------------------------------------------------
# What it does and returns
# ----------------------------------------------------------------------------------------------------------


def test_it_learns():
    network = make_network()
    training, validation, test = make_data(400), make_data(100, seed=1), make_data(100, seed=2)
    history = network.SGD(training, 20, 10, 0.5, validation, test, verbose=False)
    assert history.best_test_accuracy > 0.9
    assert history["train_cost"][-1] < 0.5 * history["train_cost"][0]
    assert not network.training


def test_history():
    history = make_network().SGD(make_data(40), 3, 10, 0.1, make_data(20), make_data(20), verbose=False)
    assert isinstance(history, History)
    assert list(history) == [*History.KEYS]
    assert history["epoch"] == [0, 1, 2]
    assert all(len(values) == 3 for values in history.values())
    assert all(seconds > 0 for seconds in history["seconds"])
    assert json.loads(json.dumps(history)) == history


def test_train_cost_includes_the_l2_term():
    """With a learning rate of 0 every mini-batch has the same weights, so the cost can be written down."""
    network = make_network()
    data = make_data(40)
    lmbda = 3.0
    history = network.SGD(data, 1, 10, 0.0, data, None, lmbda, verbose=False)
    squares = sum((layer.w**2).sum().item() for layer in network.layers)
    expected = network.cost(*data).item() + 0.5 * lmbda * squares / 4
    assert history["train_cost"] == [pytest.approx(expected, rel=1e-5)]


def test_callback_and_progress():
    records, ranges = [], []

    def progress(mini_batches):
        ranges.append(list(mini_batches))
        return iter(ranges[-1])

    history = make_network().SGD(
        make_data(40),
        2,
        10,
        0.1,
        make_data(20),
        make_data(20),
        verbose=False,
        callback=records.append,
        progress=progress,
    )
    assert ranges == [[0, 1, 2, 3]] * 2
    assert records == [{key: values[epoch] for key, values in history.items()} for epoch in range(2)]


def test_restore_best(monkeypatch):
    training, validation = make_data(40), make_data(20)
    accuracies = [(0.5, None), (0.75, None), (0.7, None)]
    snapshots = []
    network = make_network()
    script_accuracies(monkeypatch, network, validation, accuracies)
    network.SGD(
        training,
        3,
        10,
        0.5,
        validation,
        None,
        verbose=False,
        restore_best=True,
        callback=lambda _: snapshots.append([p.detach().clone() for p in network.params]),
    )
    assert all(torch.equal(p, best) for p, best in zip(network.params, snapshots[1], strict=True))
    assert not torch.equal(snapshots[1][0], snapshots[2][0])


def test_remainders_below_a_mini_batch_are_dropped():
    training = make_data(47)
    validation_x, _ = make_data(27)
    ragged, whole = make_network(), make_network()
    whole.SGD((training[0][:40], training[1][:40]), 1, 10, 0.1, make_data(20), None, verbose=False)
    validation_y = whole.predict(validation_x)
    validation_y[20:] = (validation_y[20:] + 1) % 3  # wrong only where nobody looks
    history = ragged.SGD(training, 1, 10, 0.1, (validation_x, validation_y), None, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(ragged.params, whole.params, strict=True))
    assert history["validation_accuracy"] == [1.0]


def test_data_take_the_dtype_of_the_network():
    x, y = make_data(40)
    double = Network(
        [FullyConnectedLayer(6, 5, dtype=torch.float64), SoftmaxLayer(5, 3, dtype=torch.float64)], 10
    )
    double.SGD((x, y.to(torch.int32)), 1, 10, 0.1, (x.double(), y.to(torch.uint8)), None, verbose=False)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in double.params)


def test_a_frozen_layer_stays_and_the_others_train():
    network = make_network()
    frozen, trained = network.layers
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in network.params]
    network.SGD(make_data(40), 1, 10, 0.5, make_data(20), None, 1.0, verbose=False)
    unchanged = [torch.equal(p, b) for p, b in zip(network.params, before, strict=True)]
    assert unchanged == [True, True, False, False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_in_a_block_without_gradients(mode):
    """SGD needs gradients and takes them, whatever mode the caller is in."""
    inside, outside = make_network(), make_network()
    data = make_data(40)
    outside.SGD(data, 1, 10, 0.5, data, None, verbose=False)
    with mode():
        inside.SGD(data, 1, 10, 0.5, data, None, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(inside.params, outside.params, strict=True))


def test_an_activation_function_that_is_not_hashable():
    class Doubling:
        __hash__ = None

        def __call__(self, z):
            return 2 * z

    layer = FullyConnectedLayer(6, 5, Doubling(), dtype=torch.float64)
    x = torch.rand(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), 2 * (x @ layer.w + layer.b))


# ----------------------------------------------------------------------------------------------------------
# Training that diverges
# ----------------------------------------------------------------------------------------------------------


def test_a_mini_batch_with_nan_stops_before_its_update():
    training = make_data(60)
    expected = make_network()
    expected.SGD((training[0][:30], training[1][:30]), 1, 10, 0.1, make_data(20), None, verbose=False)
    training[0][34, 2] = math.nan
    network = make_network()
    with pytest.raises(
        DivergenceError, match=r"mini-batch 3 of epoch 0: the cost is nan; its examples"
    ) as caught:
        network.SGD(training, 2, 10, 0.1, make_data(20), None, verbose=False)
    assert (caught.value.epoch, caught.value.mini_batch) == (0, 3)
    assert all(torch.equal(a, b) for a, b in zip(network.params, expected.params, strict=True))


def test_an_infinite_example_that_spoils_the_parameters():
    """sigmoid(inf) is 1 and the cost finite, but the gradient inf * 0 is NaN."""
    x, y = make_data(20)
    x[13, 2] = math.inf
    network = make_network()
    start = [p.detach().clone() for p in network.params]
    network.layers[-1].w.data.fill_(0.1)
    with pytest.raises(DivergenceError, match="mini-batch 1 of epoch 0: .* set back to their initial values"):
        network.SGD((x, y), 1, 10, 0.1, make_data(20), None, verbose=False)
    assert torch.equal(network.params[0], start[0])


def test_parameters_that_diverge_are_set_back():
    """The weights grow manifold with every mini-batch, until their products overflow."""
    network = Network([FullyConnectedLayer(6, 5, network3.linear), SoftmaxLayer(5, 3)], 10)
    good = []
    with pytest.raises(DivergenceError, match=r"eta is probably too large; .* after epoch \d+") as caught:
        network.SGD(
            make_data(40),
            100,
            10,
            1000.0,
            make_data(20),
            None,
            verbose=False,
            callback=lambda _: good.append([p.detach().clone() for p in network.params]),
        )
    assert caught.value.epoch == len(good) > 0
    assert all(torch.equal(p, value) for p, value in zip(network.params, good[-1], strict=True))


def test_an_update_that_overflows_at_the_end_of_an_epoch_is_noticed():
    network = Network([FullyConnectedLayer(6, 5, network3.linear), SoftmaxLayer(5, 3)], 10)
    start = [p.detach().clone() for p in network.params]
    x, y = make_data(10)
    data = (1e6 * x, y)
    with pytest.raises(
        DivergenceError, match="parameters are not finite; .* set back to their initial values"
    ):
        network.SGD(data, 1, 10, 1e38, data, None, verbose=False)
    assert all(torch.equal(p, value) for p, value in zip(network.params, start, strict=True))


# ----------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------


def with_label(value):
    x, y = make_data(40)
    y[17] = value
    return x, y


BAD_DATA = {
    "too wide": (
        lambda: make_data(40, features=7),
        RuntimeError,
        r"expected x of shape \(n, 6\), but got \(40, 7\)",
    ),
    "images": (lambda: (torch.rand(40, 2, 3), make_data(40)[1]), RuntimeError, r"but got \(40, 2, 3\)"),
    "bytes": (
        lambda: (make_data(40)[0].to(torch.uint8), make_data(40)[1]),
        RuntimeError,
        "expected x of a floating-point dtype, but got torch.uint8",
    ),
    "fractional labels": (
        lambda: (make_data(40)[0], make_data(40)[1].float()),
        RuntimeError,
        "expected y of an integer dtype, but got torch.float32",
    ),
    "too few labels": (
        lambda: (make_data(40)[0], make_data(30)[1]),
        RuntimeError,
        r"expected y of shape \(40,\)",
    ),
    "one-hot labels": (lambda: (make_data(40)[0], torch.ones(40, 3).long()), RuntimeError, r"got \(40, 3\)"),
    "label too large": (
        lambda: with_label(3),
        ValueError,
        "expected labels from 0 to 2, but got 3 at index 17",
    ),
    "negative label": (
        lambda: with_label(-1),
        ValueError,
        "expected labels from 0 to 2, but got -1 at index 17",
    ),
    "too few": (
        lambda: make_data(9),
        ValueError,
        "expected at least one mini-batch of 10, but got 9 examples",
    ),
    "lists": (lambda: ([[0.0] * 6] * 40, [0] * 40), TypeError, "expected x to be a tensor, but got list"),
    "arrays": (
        lambda: tuple(part.numpy() for part in make_data(40)),
        TypeError,
        "expected x to be a tensor, but got ndarray; torch.from_numpy makes it one",
    ),
    "no pair": (lambda: make_data(40)[0], TypeError, "expected a pair"),
}


@pytest.mark.parametrize("name", ["training_data", "validation_data", "test_data"])
@pytest.mark.parametrize("bad", BAD_DATA)
def test_bad_data_are_refused_before_training(name, bad):
    make, error, message = BAD_DATA[bad]
    data = {key: make_data(40) for key in ("training_data", "validation_data", "test_data")}
    data[name] = make()
    network = make_network()
    before = [p.detach().clone() for p in network.params]
    with pytest.raises(error, match=f"{name}: .*{message}"):
        network.SGD(epochs=1, mini_batch_size=10, eta=0.1, verbose=False, **data)
    assert all(torch.equal(a, b) for a, b in zip(network.params, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mini_batch_size": 20}, "expected mini_batch_size 10, which the network was made for, but got 20"),
        ({"epochs": 0}, "epochs must be at least 1, but got 0"),
        ({"eta": math.nan}, "eta must be finite and not negative, but got nan"),
        ({"eta": -0.1}, "eta must be finite and not negative, but got -0.1"),
        ({"lmbda": math.inf}, "lmbda must be finite and not negative, but got inf"),
    ],
)
def test_bad_hyperparameters(arguments, message):
    arguments = {"epochs": 1, "mini_batch_size": 10, "eta": 0.1, **arguments}
    data = make_data(40)
    with pytest.raises(ValueError, match=message):
        make_network().SGD(data, validation_data=data, test_data=data, verbose=False, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 1.5}, "epochs must be an int, but got 1.5"),
        ({"epochs": True}, "epochs must be an int, but got True"),
        ({"eta": "x"}, "eta must be a number, a function of the epoch or a schedule of .*, but got 'x'"),
        ({"callback": 3}, "callback must be a function of an epoch's record, or a list of such, but got 3"),
        ({"callback": [print, 3]}, "callback must be a function .*3"),
        ({"lmbda": None}, "lmbda must be a number, but got None"),
    ],
)
def test_hyperparameters_of_a_wrong_type(arguments, message):
    arguments = {"epochs": 1, "mini_batch_size": 10, "eta": 0.1, **arguments}
    data = make_data(40)
    with pytest.raises(TypeError, match=message):
        make_network().SGD(data, validation_data=data, test_data=data, verbose=False, **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["validation_data", "test_data"])
def test_evaluation_refuses_what_is_not_finite(name, value):
    data = {key: make_data(40) for key in ("training_data", "validation_data", "test_data")}
    data[name][0][17, 2] = value
    with pytest.raises(ValueError, match=f"{name}: expected finite x, but got NaN or infinity at index 17"):
        make_network().SGD(epochs=1, mini_batch_size=10, eta=0.1, verbose=False, **data)
    with pytest.raises(ValueError, match="data: expected finite x"):
        make_network().accuracy(data[name])


def test_a_network_without_a_cost_cannot_be_trained():
    network = Network([FullyConnectedLayer(6, 3)], 10)
    data = make_data(40)
    with pytest.raises(
        TypeError, match="expected a last layer that has a cost .*but got FullyConnectedLayer"
    ):
        network.SGD(data, 1, 10, 0.1, data, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network([], 10), "expected at least one layer"),
        (lambda: Network([SoftmaxLayer(6, 3)], 0), "mini_batch_size must be at least 1, but got 0"),
        (
            lambda: Network([ConvPoolLayer((2, 1, 5, 5), (20, 1, 28, 28)), SoftmaxLayer(288, 10)], 10),
            r"layer 0 \(ConvPoolLayer\) has image_shape \(20, 1, 28, 28\), that is mini-batches of 20, but "
            "mini_batch_size is 10",
        ),
        (
            lambda: Network([FullyConnectedLayer(6, 5), SoftmaxLayer(4, 3)], 10),
            r"layer 1 \(SoftmaxLayer\) takes 4 inputs, but layer 0 \(FullyConnectedLayer\) gives 5",
        ),
        (
            lambda: ConvPoolLayer((2, 3, 5, 5), (10, 1, 28, 28)),
            "is for 3 input maps, but image_shape .* has 1",
        ),
        (
            lambda: ConvPoolLayer((2, 1, 5, 5), (10, 1, 4, 28)),
            "filters of 5x5 .* leave nothing of an image of 4x28",
        ),
        (
            lambda: ConvPoolLayer((2, 1, 5, 5), (10, 1, 8, 8), (5, 1)),
            "window of 5x1 leave nothing of an image of 8x8",
        ),
        (lambda: ConvPoolLayer((2, 1, 5), (10, 1, 8, 8)), "filter_shape must have 4 entries"),
        (
            lambda: ConvPoolLayer((2, 1, 5, 5), (10, 1, 8, 8), (0, 2)),
            r"poolsize\[0\] must be at least 1, but got 0",
        ),
        (lambda: FullyConnectedLayer(0, 3), "n_in must be at least 1, but got 0"),
        (
            lambda: FullyConnectedLayer(6, 3, p_dropout=1.5),
            "dropout probability has to be between 0 and 1, but got 1.5",
        ),
        (lambda: SoftmaxLayer(6, 3, math.nan), "dropout probability has to be between 0 and 1, but got nan"),
        (
            lambda: FullyConnectedLayer(6, 3, init="xavier"),
            "init must be one of 'book', 'lecun', 'he', but got 'xavier'",
        ),
    ],
)
def test_bad_networks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_input_of_a_wrong_shape():
    network = make_network()
    assert network(torch.rand(5, 1, 2, 3)).shape == (5, 3)
    for shape in ((6,), (5, 7), (5, 2, 2)):
        with pytest.raises(RuntimeError, match=re.escape(f"expected x of shape (n, 6), but got {shape}")):
            network(torch.rand(shape))


def test_a_layer_is_in_a_network_once():
    layer = FullyConnectedLayer(6, 6)
    with pytest.raises(ValueError, match=r"layer 1 \(FullyConnectedLayer\) is the same object as layer 0"):
        Network([layer, layer, SoftmaxLayer(6, 3)], 10)


class WithoutWeights(network3.Layer):
    def __init__(self):
        super().__init__(None)
        self.n_in, self.n_out, self.b = 6, 6, torch.nn.Parameter(torch.zeros(6))


class Scale(network3.Layer):
    """x w + b with an element of each for every input; `wrap` makes them parameters."""

    def __init__(self, wrap, initialised=True):
        if initialised:
            super().__init__()
        self.n_in = self.n_out = 6
        self.w, self.b = wrap(torch.ones(6)), wrap(torch.zeros(6))

    def forward(self, x):
        return x * self.w + self.b


def test_a_layer_of_ones_own_is_trained():
    layer = Scale(torch.nn.Parameter)
    data = make_data(40)
    with pytest.warns(UserWarning, match=r"layer 0 \(Scale\) is none of"):
        Network([layer, SoftmaxLayer(6, 3)], 10).SGD(data, 3, 10, 0.5, data, None, verbose=False)
    assert (layer.w != 1.0).any() and (layer.b != 0.0).any()


LAYER_HAS = "; a layer has n_in, n_out, w, b, params and forward"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (WithoutWeights(), f"layer 0 (WithoutWeights) lacks w, forward{LAYER_HAS}"),
        (torch.nn.Linear(6, 6), f"layer 0 (Linear) lacks n_in, n_out, w, b, params{LAYER_HAS}"),
        (Scale(lambda x: x), "layer 0 (Scale): expected params to be torch.nn.Parameter, but got Tensor"),
        (
            Scale(lambda x: x, initialised=False),
            "layer 0 (Scale) is not initialised; its __init__ begins with super().__init__()",
        ),
        ("softmax", "layer 0 (str) is not a torch.nn.Module; derive it from pyconv.network3.Layer"),
    ],
)
def test_what_is_not_a_layer(layer, message):
    with pytest.raises(TypeError) as caught:
        Network([layer, SoftmaxLayer(6, 3)], 10)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullyConnectedLayer(6.0, 3), "n_in must be an int, but got float"),
        (
            lambda: FullyConnectedLayer(6, 3, "relu"),
            "activation_fn must be a function of a tensor, but got 'relu'",
        ),
    ],
)
def test_arguments_of_a_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_wrong_input_to_a_layer_is_named_by_torch():
    conv = ConvPoolLayer((2, 1, 5, 5), (10, 1, 28, 28), activation_fn=ReLU)
    with pytest.raises(RuntimeError, match=r"shape '\[10, 1, 28, 28\]' is invalid for input of size 3920"):
        conv(torch.rand(10, 392))
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(10x7 and 6x5\)"):
        FullyConnectedLayer(6, 5)(torch.rand(10, 7))


# ----------------------------------------------------------------------------------------------------------
# The real MNIST
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.mnist
@pytest.mark.skipif(not os.environ.get("PYCONV_DATA"), reason="PYCONV_DATA is not set")
def test_experiment_6_learns_the_first_images_of_mnist():
    """A fifth of an epoch of the book's network with two convolutional layers and ReLU."""
    training, validation, test = (
        (x[:n], y[:n]) for (x, y), n in zip(network3.load_data_shared(), (10_000, 1000, 1000), strict=True)
    )
    network = EXPERIMENTS["6"].network(10)
    history = network.SGD(training, 1, 10, 0.03, validation, test, 0.1, verbose=False)
    assert history.best_validation_accuracy > 0.9
    assert history.best_test_accuracy > 0.9
