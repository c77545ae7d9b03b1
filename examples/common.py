"""What the example scripts share: command-line options, the digits as images, training epoch by epoch."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import pictures
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyconv
from pyconv import network3
from pyconv.network3 import experiments

Images = tuple[Tensor, Tensor]
"""Images (n, C, H, W) float32 and their labels (n,) int64."""

Step = Callable[[Tensor, Tensor], Tensor]
"""step(x, y) -> loss: an update on the mini-batch x (N, C, H, W), y (N,), and its loss before that."""

_EVALUATION_BATCH = 100


class Distortion(Protocol):
    """What `train` needs of a `pyconv.RandomDistortion`."""

    def set_epoch(self, epoch: int) -> None: ...

    def apply(self, images: Tensor, positions: Tensor) -> Tensor: ...


class Result(NamedTuple):
    """The mean loss of each epoch, and the fraction of the test images that are classified correctly at the end."""

    losses: list[float]
    accuracy: float


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A `type` of argparse: a positive whole number."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, but got {text!r}")
    return value


def positive(text: str) -> float:
    """A `type` of argparse: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0.0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, but got {text!r}")
    return value


def seed(text: str) -> int:
    """A `type` of argparse: a whole number from 0, as every generator takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, but got {text!r}")
    return value


def output_file(text: str) -> Path:
    """A `type` of argparse: a file in a folder that exists, found out before the work is done."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, but got {text!r}")
    return path


def device(text: str) -> torch.device:
    """A `type` of argparse: a device that PyTorch has here."""
    try:
        value = torch.device(text)
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError):  # the latter where PyTorch is built without CUDA
        raise argparse.ArgumentTypeError(f"expected a device that PyTorch finds here, but got {text!r}") from None
    return value


def parser_for(doc: str) -> argparse.ArgumentParser:
    """A parser that describes a script by the first line of its docstring `doc`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of all random numbers (default: 0)")
    parser.add_argument(
        "--threads",
        type=count,
        default=1,
        metavar="N",
        help="of the CPU; networks and mini-batches as small as the defaults gain little from a second (default: 1)",
    )
    return parser


def start(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the `arguments`, or the process's own, and set PyTorch's seed and number of threads by them."""
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    return options


def add_training_options(
    parser: argparse.ArgumentParser, *, epochs: int, mini_batch_size: int, learning_rate: float
) -> None:
    parser.add_argument("--epochs", type=count, default=epochs, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--mini-batch-size", type=count, default=mini_batch_size, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--learning-rate", type=positive, default=learning_rate, metavar="RATE", help="default: %(default)s"
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")


def add_network_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    """For `network_and_test_digits`, and --output with the default `output`."""
    parser.add_argument(
        "--network",
        type=Path,
        metavar="FILE",
        help="saved by `python -m pyconv train`; default: one trained for a few epochs now",
    )
    parser.add_argument("--epochs", type=count, default=5, metavar="N", help="of that training (default: %(default)s)")
    parser.add_argument("--output", type=output_file, default=output, metavar="FILE", help="default: %(default)s")


def save_picture(path: Path, headings: Sequence[str], rows: Sequence[Sequence[pictures.Cell]]) -> None:
    """`pictures.write_table`, and a line that says so; or the end of the script where the file cannot be written."""
    try:
        pictures.write_table(path, headings, rows)
    except OSError as error:
        fail(error)
    print(f"wrote {path}")


def check_width(width: float) -> None:
    """ValueError unless a network can be `width` times as wide as the paper's."""
    if not (width > 0.0 and math.isfinite(width)):
        raise ValueError(f"width must be a positive number, but got {width}")


def fail(error: object) -> NoReturn:
    """End the script with exit code 1 and `error` on stderr."""
    sys.exit(f"{Path(sys.argv[0]).name}: {error}")


# ------------------------------------------------------------------------------------------------------------
# Data and training
# ------------------------------------------------------------------------------------------------------------


def load_digits() -> list[network3.network.Data]:
    """`network3.load_data_shared`, or the end of the script where it fails."""
    try:
        return network3.load_data_shared()
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        fail(f"the data of $PYCONV_DATA={os.environ.get('PYCONV_DATA')} cannot be read: {error}")


def load_images() -> list[Images]:
    """Training, validation and test digits (n, 1, 28, 28)."""
    return [(x.view(-1, 1, 28, 28), y) for x, y in load_digits()]


def network_and_test_digits(options: argparse.Namespace) -> tuple[network3.Network, network3.network.Data]:
    """The network that the options of `add_network_options` ask for, in evaluation mode, and digits it has not seen."""
    training, validation, test = load_digits()
    if options.network is None:
        demo = experiments.EXPERIMENTS["demo"]
        network = demo.network()
        network.SGD(training, options.epochs, 10, demo.eta, validation, None, demo.lmbda, verbose=False)
    else:
        try:
            network = network3.load_network(options.network)
        except (OSError, ValueError, ImportError) as error:
            fail(error)
        n_in, n_out = network.layers[0].n_in, network.layers[-1].n_out
        if (n_in, n_out) != (784, 10):
            fail(f"{options.network}: expected a network of 784 inputs and 10 classes, but got {n_in} and {n_out}")
        network = network.float()
    print(f"the network recognises {network.accuracy(test):.2%} of {len(test[1])} test digits")
    return network.eval(), test


def initialise_for_relu(model: nn.Module) -> None:
    """Weights of mean 0 and variance 2 / inputs, so that ReLU keeps the size of what passes, and biases of zero.

    He, Zhang, Ren, Sun: "Delving deep into rectifiers", 2015.
    """
    for layer in model.modules():
        if isinstance(layer, pyconv.ConvMaxPool2d | pyconv.LinearActDropout | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The step of `pyconv.compile_training` by autograd, for models that it cannot express."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """The fraction of the images that `model` gives their label; leaves it in evaluation mode."""
    model.eval()
    on = next(model.parameters()).device
    batches = zip(*(part.split(_EVALUATION_BATCH) for part in data), strict=True)
    return sum(int((model(x.to(on)).argmax(dim=1) == y.to(on)).sum()) for x, y in batches) / len(data[1])


def train(
    model: nn.Module,
    step: Step,
    data: list[Images],
    *,
    epochs: int,
    mini_batch_size: int,
    seed: int,
    distortion: Distortion | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Result:
    """Train in a new random order in every epoch, and print a line for each.

    Args:
        data: training, validation and test images.
        distortion: of the training images, made anew for every epoch; None for none.
        scheduler: takes a step after every epoch.
    """
    (images, labels), validation, test = data
    on = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        model.train()
        if distortion is not None:
            distortion.set_epoch(epoch)
        total = torch.zeros((), device=on)
        for positions in torch.randperm(len(images), generator=generator).split(mini_batch_size):
            x = images[positions]
            if distortion is not None:
                x = distortion.apply(x, positions)
            total += len(positions) * step(x.to(on), labels[positions].to(on))
        if scheduler is not None:
            scheduler.step()
        losses.append(total.item() / len(images))
        print(f"epoch {epoch}: loss {losses[-1]:.4f}, validation accuracy {accuracy(model, validation):.2%}")
    result = Result(losses, accuracy(model, test))
    print(f"test accuracy {result.accuracy:.2%}")
    return result
