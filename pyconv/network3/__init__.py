"""The program network3.py of chapter 6 of "Neural Networks and Deep Learning", on pyconv's operators.

A script written for the book's program runs after changing its print statements and its import lines, to
``import pyconv.network3 as network3`` and ``from pyconv.network3 import ReLU``. Two things differ in the
numbers: where several positions of a pooling window share the maximum, the first gets the gradient (Theano
gave it to all), and the filters are not flipped (the book's formula is a cross-correlation, its program's a
convolution).
"""

from pyconv.network3.callbacks import TensorBoard
from pyconv.network3.data import expand_mnist, load_data_shared, load_digits
from pyconv.network3.ensemble import Ensemble
from pyconv.network3.history import Diagnosis, History, diagnose
from pyconv.network3.layers import (
    ConvLayer,
    ConvPoolLayer,
    FullyConnectedLayer,
    Layer,
    PoolLayer,
    ReLU,
    SoftmaxLayer,
    dropout_layer,
    linear,
    sigmoid,
    tanh,
)
from pyconv.network3.network import DivergenceError, Network, size
from pyconv.network3.serialization import load_network

__all__ = [
    "ConvLayer",
    "ConvPoolLayer",
    "Diagnosis",
    "DivergenceError",
    "Ensemble",
    "FullyConnectedLayer",
    "History",
    "Layer",
    "Network",
    "PoolLayer",
    "ReLU",
    "SoftmaxLayer",
    "TensorBoard",
    "diagnose",
    "dropout_layer",
    "expand_mnist",
    "linear",
    "load_data_shared",
    "load_digits",
    "load_network",
    "sigmoid",
    "size",
    "tanh",
]
