"""What network3's trainings keep, when they stop, which learning rates they take, and what ensembles predict."""

from __future__ import annotations

import csv
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from pyconv import network3
from pyconv.network3 import Diagnosis, Ensemble, FullyConnectedLayer, History, Network, SoftmaxLayer, diagnose
from tests.training_support import make_data, make_network, train

MB = 10


def scripted(monkeypatch, accuracies):
    """Let a training find these validation accuracies."""
    values = iter(accuracies)
    monkeypatch.setattr(Network, "_count_correct", lambda self, x, y: next(values) * len(y))


def history_of(validation, train=None, cost=None, size=1000):
    history = History()
    history.validation_size = size
    for epoch, accuracy in enumerate(validation):
        history._append(
            {
                "epoch": epoch,
                "eta": 0.1,
                "train_cost": 1 / 3,
                "train_accuracy": train and train[epoch],
                "validation_cost": cost and cost[epoch],
                "validation_accuracy": accuracy,
                "test_accuracy": None,
                "seconds": 0.5,
            }
        )
    return history


# ----------------------------------------------------------------------------------------------------------
# History
# ----------------------------------------------------------------------------------------------------------


def test_csv_and_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    history = train(make_network(), make_data(40), True, epochs=3)[0]
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_cost"]) for row in rows] == history["train_cost"]
    assert [row["test_accuracy"] for row in rows] == ["", "", ""]
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == [0, 1, 2]
    assert list(frame.columns) == [key for key in History.KEYS if key != "epoch"]
    assert list(frame["validation_accuracy"]) == history["validation_accuracy"]


def test_json_gives_the_history_back():
    history = train(make_network(), make_data(40), True, epochs=2)[0]
    again = History.from_json(history.to_json())
    assert again == history and vars(again) == vars(history)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"epoch": [0]}'])
def test_json_that_is_no_history(text):
    with pytest.raises(ValueError, match="expected a History as JSON"):
        History.from_json(text)


def test_json_with_lists_of_different_lengths():
    with pytest.raises(ValueError, match="lists of different lengths"):
        History.from_json(history_of([0.5, 0.6]).to_json().replace("[0, 1]", "[0]", 1))


# ----------------------------------------------------------------------------------------------------------
# Early stopping and callbacks
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "patience", "epochs"),
    [
        ([0.5, 0.6, 0.6, 0.6, 0.7], 2, 4),  # as good as the best is no improvement
        ([0.5, 0.6, 0.55, 0.65, 0.6, 0.6], 2, 6),
        ([0.5, 0.4], 1, 2),
        ([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 1, 6),
    ],
)
def test_patience(monkeypatch, accuracies, patience, epochs):
    scripted(monkeypatch, accuracies)
    history = train(make_network(), make_data(20), True, epochs=6, patience=patience)[0]
    assert history["validation_accuracy"] == accuracies[:epochs]


@pytest.mark.parametrize(
    ("patience", "error", "message"),
    [
        (0, ValueError, "patience must be at least 1, but got 0"),
        (1.5, TypeError, "patience must be an int, but got 1.5"),
    ],
)
def test_bad_patience(patience, error, message):
    with pytest.raises(error, match=message):
        train(make_network(), make_data(20), True, patience=patience)


def test_a_callback_ends_the_training_and_all_are_called():
    first, second = [], []
    callbacks = [lambda record: first.append(record) or record["epoch"] == 1, second.append]
    history = train(make_network(), make_data(20), True, epochs=5, callback=callbacks)[0]
    assert history["epoch"] == [0, 1]
    assert [record["epoch"] for record in first] == [record["epoch"] for record in second] == [0, 1]


def test_only_true_ends_the_training():
    assert len(train(make_network(), make_data(20), True, epochs=3, callback=lambda record: 1)[0]["epoch"]) == 3


# ----------------------------------------------------------------------------------------------------------
# Learning rates
# ----------------------------------------------------------------------------------------------------------


def optimizer(lr=0.1, **options):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, **options)


SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[1, 3], gamma=0.1),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, factor=0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_torch(name):
    """The rates are those that a loop of torch's would have, and they reach the training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = optimizer()
        schedule = SCHEDULES[name](theirs)
        expected = []
        for _ in range(5):
            expected.append(theirs.param_groups[0]["lr"])
            theirs.step()
            schedule.step()
    history = train(make_network(), make_data(30), True, eta=SCHEDULES[name](optimizer()), epochs=5)[0]
    assert history["eta"] == expected and len(set(expected)) > 1
    given = train(make_network(), make_data(30), True, eta=lambda epoch: expected[epoch], epochs=5)[0]
    assert history["train_cost"] == given["train_cost"]


def test_a_schedule_by_validation_accuracy(monkeypatch):
    scripted(monkeypatch, [0.5, 0.6, 0.6, 0.55, 0.7])
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer(0.8), mode="max", factor=0.5, patience=0, threshold=0.0
    )
    assert train(make_network(), make_data(20), True, eta=schedule, epochs=5)[0]["eta"] == [0.8, 0.8, 0.8, 0.4, 0.2]


def test_a_schedule_for_a_quantity_to_be_minimised():
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer(0.8))
    with pytest.raises(ValueError, match="expected its mode to be 'max', but got 'min'"):
        train(make_network(), make_data(20), True, eta=schedule)


def test_a_schedule_of_several_rates():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 0.2)]
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(groups), 1)
    with pytest.raises(ValueError, match=r"expected a schedule of one learning rate, but got \[0.1, 0.2\]"):
        train(make_network(), make_data(20), True, eta=schedule)


def test_a_schedule_that_changes_the_momentum():
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer(momentum=0.9), max_lr=0.1, total_steps=5)
    with pytest.raises(ValueError, match="the schedule changes the momentum.*cycle_momentum=False"):
        train(make_network(), make_data(20), True, eta=schedule, epochs=3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer(), max_lr=0.1, total_steps=5, cycle_momentum=False)
    assert len(set(train(make_network(), make_data(20), True, eta=schedule, epochs=3)[0]["eta"])) == 3


# ----------------------------------------------------------------------------------------------------------
# The diagnosis of overfitting
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_fn", [network3.ReLU, network3.sigmoid])
def test_what_a_diagnosis_is_made_of(activation_fn):
    """Accuracy on the training data and cost on the validation data, without dropout, of the parameters after the
    epoch."""
    data, other = make_data(40), make_data(1300, seed=5)
    network = make_network(activation_fn, p_dropout=0.5)
    history = network.SGD(data, 2, MB, 0.05, other, None, 0.5, diagnose=True, verbose=False)
    with torch.no_grad():
        probabilities = network(other[0])
        cost = F.nll_loss(probabilities.log(), other[1]).item()
    assert history["validation_cost"][-1] == pytest.approx(cost, rel=1e-12)
    assert history["train_accuracy"][-1] == network.accuracy(data)
    assert history.validation_size == 1300


def test_a_diagnosis_of_the_first_examples():
    data = make_data(40)
    network = make_network()
    history = network.SGD(data, 1, MB, 0.05, data, None, diagnose=20, verbose=False)
    assert history["train_accuracy"] == [network.accuracy((data[0][:20], data[1][:20]))]


@pytest.mark.parametrize("diagnosed", [-1, 1.5, "yes"])
def test_a_bad_number_to_diagnose(diagnosed):
    with pytest.raises((TypeError, ValueError), match="diagnose must be"):
        train(make_network(), make_data(20), True, diagnose=diagnosed)


def test_a_network_that_overfits():
    history = history_of([0.80, 0.82, 0.81], train=[0.85, 0.95, 1.0], cost=[0.7, 0.6, 0.9])
    diagnosis = diagnose(history)
    assert isinstance(diagnosis, Diagnosis) and diagnosis.overfitting
    assert diagnosis.gap == pytest.approx(0.19)
    assert diagnosis.sampling_error == pytest.approx(2 * math.sqrt(0.81 * 0.19 / 1000), rel=1e-3)
    assert diagnosis.lowest_cost_epoch == 1 and diagnosis.cost_rise == pytest.approx(0.5)
    verdict = str(diagnosis)
    assert "After epoch 2 the network gets 100.00% of the training data right and 81.00%" in verdict
    assert "a gap of 19.00 points" in verdict and "It overfits" in verdict and "risen by 50% since epoch 1" in verdict


def test_a_network_that_does_not():
    diagnosis = diagnose(history_of([0.80, 0.82], train=[0.81, 0.83], cost=[0.7, 0.65]))
    assert not diagnosis.overfitting
    assert "It does not overfit." in diagnosis.verdict and "still improving" in diagnosis.verdict
    stalled = diagnose(history_of([0.82, 0.82], train=[0.81, 0.83], cost=[0.7, 0.65]))
    assert "still improving" not in stalled.verdict and "More parameters" in stalled.verdict


def test_a_network_that_is_always_right():
    diagnosis = diagnose(history_of([1.0], train=[1.0], cost=[0.0], size=50))
    assert not diagnosis.overfitting and diagnosis.cost_rise == 0.0 and diagnosis.sampling_error > 0.0


def test_a_diagnosis_of_a_training_that_was_first_without(tmp_path):
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
    network, data = make_network(), make_data(40)
    for epochs, diagnosed in ((2, False), (4, True)):
        history = network.SGD(data, epochs, 10, 0.01, data, None, verbose=False, diagnose=diagnosed,
                              checkpoint=tmp_path, resume=True)  # fmt: skip
    assert history["validation_cost"][:2] == [None, None]
    assert diagnose(history).lowest_cost_epoch == 2 + history["validation_cost"][2:].index(
        min(history["validation_cost"][2:])
    )


def test_a_history_without_accuracies_on_the_training_data():
    with pytest.raises(ValueError, match="train with diagnose=True"):
        diagnose(history_of([0.5]))
    with pytest.raises(ValueError, match="train with diagnose=True"):
        diagnose(History())


def test_a_training_on_few_examples_is_found_to_overfit():
    """A network of many parameters on 40 images of noise, of which nothing carries over to others."""
    data, other = make_data(40), make_data(400, seed=5)
    network = make_network(network3.tanh)
    history = network.SGD(data, 40, MB, 0.1, other, None, diagnose=True, momentum=0.5, verbose=False)
    assert diagnose(history).overfitting and diagnose(history).train_accuracy > 0.9


# ----------------------------------------------------------------------------------------------------------
# Ensembles
# ----------------------------------------------------------------------------------------------------------


def fixed(probabilities):
    """A network that gives these probabilities for x = 1."""
    network = Network([SoftmaxLayer(1, len(probabilities), dtype=torch.float64)], 1)
    with torch.no_grad():
        network.layers[0].b.copy_(torch.tensor(probabilities, dtype=torch.float64).log())
    return network


ONE = torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("members", "plurality", "average"),
    [
        ([[0.6, 0.4], [0.6, 0.4], [0.01, 0.99]], 0, 1),
        ([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], 1, 1),  # as many votes: the higher mean
        ([[0.4, 0.35, 0.25], [0.3, 0.36, 0.34], [0.3, 0.35, 0.35001]], 1, 1),
        ([[0.2, 0.8]], 1, 1),
    ],
)
def test_votes(members, plurality, average):
    ensemble = Ensemble([fixed(probabilities) for probabilities in members])
    assert ensemble.predict(ONE).tolist() == [plurality]
    assert ensemble.predict(ONE, "average").tolist() == [average]
    mean = torch.tensor(members, dtype=torch.float64).mean(dim=0)
    torch.testing.assert_close(ensemble.probabilities(ONE)[0], mean / mean.sum(), rtol=1e-4, atol=1e-4)
    assert ensemble.accuracy((ONE, torch.tensor([plurality]))) == 1.0


def test_a_tie_does_not_go_to_a_class_with_fewer_votes():
    """Class 2 has the highest mean probability, but only one vote; classes 0 and 1 have two."""
    members = [[0.50, 0.01, 0.49], [0.50, 0.01, 0.49], [0.01, 0.51, 0.48], [0.01, 0.51, 0.48], [0.0, 0.0, 1.0]]
    ensemble = Ensemble([fixed([p + 1e-9 for p in member]) for member in members])
    assert ensemble.predict(ONE).tolist() == [1]
    assert ensemble.predict(ONE, "average").tolist() == [2]


def test_an_ensemble_leaves_dropout_out_and_networks_as_they_were():
    network = make_network(p_dropout=0.5)
    network.train()
    x, y = make_data(30)
    ensemble = Ensemble([network])
    assert torch.equal(ensemble.predict(x), ensemble.predict(x)) and network.training
    assert ensemble.accuracy((x, y)) == network.accuracy((x, y))


def test_an_ensemble_of_several_dtypes():
    members = [make_network(dtype=dtype, seed=seed) for seed, dtype in enumerate((torch.float32, torch.float64))]
    x, y = make_data(30)
    expected = (members[0].probabilities(x.float()).double() + members[1].probabilities(x)) / 2
    for order in (members, members[::-1]):
        torch.testing.assert_close(Ensemble(order).probabilities(x), expected, rtol=1e-15, atol=0.0)
        assert 0.0 <= Ensemble(order).accuracy((x, y)) <= 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ensemble([]), "expected at least one network, but got none"),
        (
            lambda: Ensemble([fixed([0.5, 0.5]), fixed([0.2, 0.3, 0.5])]),
            "expected networks from 1 inputs to 2 classes, as network 0, but network 1 goes from 1 to 3",
        ),
        (lambda: Ensemble([fixed([1.0])]).predict(ONE, "majority"), "vote must be one of 'plurality', 'average'"),
        (lambda: Ensemble([fixed([1.0])]).accuracy((ONE[:0], torch.zeros(0, dtype=torch.int64))), "at least"),
    ],
)
def test_bad_ensembles(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (lambda: fixed([1.0]), "expected a list of networks, but got a Network"),
        (lambda: [fixed([1.0]), "saved.safetensors"], "expected networks, but got str as network 1"),
    ],
)
def test_what_is_not_an_ensemble(networks, message):
    with pytest.raises(TypeError, match=message):
        Ensemble(networks())


def test_accuracy_of_any_data_and_batch_size():
    """Sizes that mini-batches and evaluation batches do not divide."""
    network = Network([FullyConnectedLayer(4, 5), SoftmaxLayer(5, 3)], MB)
    with torch.no_grad():
        network.layers[1].w.normal_()
    x, y = torch.randn(1003, 4), torch.randint(3, (1003,))
    expected = (network.eval()(x).argmax(dim=1) == y).double().mean().item()
    assert network.accuracy((x, y)) == pytest.approx(expected)
    assert network.accuracy((x[:1], y[:1])) in (0.0, 1.0)
