"""Convolution, max-pooling, bias and activation as one PyTorch operator, forward and backward."""

import importlib.util

import torch  # loads the libraries that the extension links against  # noqa: F401

if importlib.util.find_spec("pyconv._C") is None:
    raise ImportError(
        f"pyconv is not built in {__path__[0]}: run `make build` there, or start Python in another directory to import "
        "an installed pyconv"
    )

from pyconv import _C, functional, ops  # noqa: F401  (ops registers the fake kernels)
from pyconv._C import compiled_isas, exact, isa, set_exact, set_isa
from pyconv.augmentation import RandomDistortion
from pyconv.errors import DataError
from pyconv.lowering import UnsupportedError
from pyconv.modules import ConvMaxPool2d, Dropout, LinearActDropout
from pyconv.training import compile_training

__version__ = "0.1.0"

__all__ = [
    "ConvMaxPool2d",
    "DataError",
    "Dropout",
    "LinearActDropout",
    "RandomDistortion",
    "UnsupportedError",
    "compile_training",
    "compiled_isas",
    "exact",
    "functional",
    "isa",
    "set_exact",
    "set_isa",
]
