"""The table of the book's experiments: networks and how they are trained."""

from __future__ import annotations

import pytest

import pyconv
from pyconv.network3 import ConvLayer, ReLU, experiments


def test_layers_of_the_experiments():
    shapes = {
        name: [tuple(layer.w.shape) for layer in experiment.network(10, "meta").layers]
        for name, experiment in experiments.EXPERIMENTS.items()
    }
    c1, c2 = (20, 1, 5, 5), (40, 20, 5, 5)
    two_layers = [c1, c2, (640, 100), (100, 10)]
    assert shapes == {
        "demo": two_layers,
        "1": [(784, 100), (100, 10)],
        "2": [c1, (2880, 100), (100, 10)],
        "3": [c1, (2880, 10)],
        "4": two_layers,
        "5": two_layers,
        "6": two_layers,
        "7": two_layers,
        "8-300": [c1, c2, (640, 300), (300, 10)],
        "8-1000": [c1, c2, (640, 1000), (1000, 10)],
        "9-100": [c1, c2, (640, 100), (100, 100), (100, 10)],
        "9-300": [c1, c2, (640, 300), (300, 300), (300, 10)],
        "9-1000": [c1, c2, (640, 1000), (1000, 1000), (1000, 10)],
        "10": [c1, c2, (640, 1000), (1000, 1000), (1000, 10)],
        "best": [(32, 1, 5, 5), (64, 32, 3, 3), (64, 64, 3, 3), (2304, 256), (256, 10)],
    }
    last = experiments.EXPERIMENTS["10"].network(10, "meta")
    assert [layer.p_dropout for layer in last.layers] == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert [name for name, experiment in experiments.EXPERIMENTS.items() if experiment.expanded] == [
        "7",
        "8-300",
        "8-1000",
        "9-100",
        "9-300",
        "9-1000",
        "10",
    ]


def test_an_experiment_beyond_the_books_layers():
    recipe = experiments.Experiment(
        (16, experiments.Convolution(24, size=3, padding=1, pool=1), experiments.Convolution(32, size=3, padding=1)),
        (50,), ReLU, 0.2, 0.5, 4, p_dropout=0.5, init="he", momentum=0.9, shuffle=True, falling=True,
        distortion={"shift": 1.0, "elastic": 5.0},
    )  # fmt: skip
    first, second, third, *dense = recipe.network(10).layers
    assert (first.filter_shape, first.image_shape, first.poolsize) == ((16, 1, 5, 5), (10, 1, 28, 28), (2, 2))
    assert isinstance(second, ConvLayer) and second.filter_shape == (24, 16, 3, 3) and second.padding == (1, 1)
    assert (third.filter_shape, third.image_shape, third.poolsize) == ((32, 24, 3, 3), (10, 24, 12, 12), (2, 2))
    assert [(layer.n_in, layer.n_out, layer.p_dropout) for layer in dense] == [(32 * 36, 50, 0.5), (50, 10, 0.5)]
    rate = recipe.rate(4)
    assert [rate(epoch) for epoch in range(4)] == pytest.approx([0.2, 0.1 + 0.1 / 2**0.5, 0.1, 0.1 - 0.1 / 2**0.5])
    options = recipe.options(7)
    assert (options["momentum"], options["shuffle"]) == (0.9, True)
    assert repr(options["augment"]) == repr(pyconv.RandomDistortion(shift=1.0, elastic=5.0, seed=7))
    book = experiments.EXPERIMENTS["6"]
    assert book.rate(60) == 0.03 and book.options(7) == {"momentum": 0.0, "shuffle": False, "augment": None}


def test_experiments_by_name():
    for name in experiments.EXPERIMENTS:
        assert experiments.find_experiment(name) == (name, experiments.EXPERIMENTS[name])
    assert experiments.find_experiment("8")[0] == "8-300"
    assert experiments.find_experiment("9")[0] == "9-300"
