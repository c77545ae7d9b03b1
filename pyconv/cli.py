"""The command line: ``python -m pyconv train``, ``eval`` and ``info``.

Exit codes: 0 success; 1 failure (a file that cannot be read, foreign data, training that diverged); 2 bad
usage (an unknown option or value, a missing extra); 130 interrupted. An error is one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import pickle
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyconv

EMBEDDED = "digits"

_FAILURES = (OSError, ArithmeticError, RuntimeError, ValueError, pickle.UnpicklingError)


class _UsageError(Exception):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except KeyboardInterrupt:
        print("pyconv: interrupted", file=sys.stderr)
        return 130
    except _UsageError as error:
        print(f"pyconv: {error}", file=sys.stderr)
        return 2
    except _FAILURES as error:
        print(f"pyconv: {error}", file=sys.stderr)
        return 1


# ----------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError
    return value


_count.__name__ = "positive whole number"  # argparse says "invalid positive whole number value: '0'"
_rate.__name__ = "non-negative number"

_DATA_HELP = (
    "a directory of MNIST's IDX files, or the book's mnist.pkl.gz or mnist_expanded.pkl.gz, "
    f"or '{EMBEDDED}' for the digits that pyconv carries"
)
_DEFAULT_DATA_HELP = f"default: $PYCONV_DATA if set, else {EMBEDDED}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyconv", description=pyconv.__doc__)
    parser.add_argument("--version", action="version", version=f"pyconv {pyconv.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a network of the book and save it")
    train.set_defaults(run=_train)
    train.add_argument(
        "--net",
        default="demo",
        metavar="NAME",
        help="'demo', or the number of an experiment of the book, 1 to 10; 8-300, 8-1000, 9-100, 9-300 and "
        "9-1000 tell the variants of two of them apart, 8 and 9 mean the best (default: demo)",
    )
    train.add_argument(
        "--data", metavar="PATH", help=f"{_DATA_HELP} ({_DEFAULT_DATA_HELP}; the demo's default: {EMBEDDED})"
    )
    train.add_argument("--epochs", type=_count, metavar="N", help="default: the experiment's")
    train.add_argument("--mini-batch-size", type=_count, default=10, metavar="N", help="default: 10")
    train.add_argument("--eta", type=_rate, metavar="RATE", help="learning rate (default: the experiment's)")
    train.add_argument(
        "--lmbda", type=_rate, metavar="L", help="L2 regularisation (default: the experiment's)"
    )
    train.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of initial weights, dropout and expanded data (default: 0)",
    )
    train.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object for each epoch to stdout, and nothing else; test_accuracy is null where "
        "the validation accuracy is below the best so far",
    )
    train.add_argument(
        "--output",
        metavar="FILE",
        help="where to save the best epoch's network (default: network-NAME.safetensors)",
    )

    evaluate = commands.add_parser("eval", help="the accuracy of a saved network")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("file", metavar="FILE", help="a network saved by train")
    evaluate.add_argument("--data", metavar="PATH", help=f"{_DATA_HELP} ({_DEFAULT_DATA_HELP})")

    for command in (train, evaluate):
        command.add_argument("--threads", type=_count, metavar="N", help="default: PyTorch's choice")
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")

    info = commands.add_parser("info", help="versions, instruction sets, threads, CUDA, kernels")
    info.set_defaults(run=_info)
    return parser


def _require_extra(command: str, modules: Sequence[str]) -> None:
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            missing.append(module)
    if missing:
        raise _UsageError(f"{command} needs {' and '.join(missing)}: pip install 'pyconv[train]'")


def _configure(options: argparse.Namespace) -> torch.device:
    """Set the number of threads, and return the device."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise _UsageError(f"--device: expected cpu, cuda or cuda:N, but got {options.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise _UsageError(f"--device: expected cpu, cuda or cuda:N, but got {options.device!r}")
    if device.type == "cuda":
        if not pyconv._C.cuda_built():
            raise _UsageError(f"--device {options.device}: pyconv was built without CUDA")
        if (device.index or 0) >= torch.cuda.device_count():
            raise _UsageError(
                f"--device {options.device}: PyTorch sees {torch.cuda.device_count()} CUDA devices"
            )
    return device


def _load_data(name: str | None) -> list[Any]:
    from pyconv.network3 import load_data_shared, load_digits

    return load_digits() if name == EMBEDDED else load_data_shared(name)


# ----------------------------------------------------------------------------------------------------------
# train
# ----------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    _require_extra("train", ("tqdm", "safetensors"))
    from tqdm import tqdm

    from pyconv.network3 import expand_mnist
    from pyconv.network3.experiments import find_experiment

    try:
        name, experiment = find_experiment(options.net)
    except ValueError as error:
        raise _UsageError(f"--net: {error}") from None
    device = _configure(options)
    output = _check_output(options.output or f"network-{name}.safetensors")
    data_name = options.data or (EMBEDDED if name == "demo" else None)
    training_data, validation_data, test_data = _load_data(data_name)
    if experiment.expanded and not _is_expanded(data_name):
        training_data = expand_mnist(training_data, options.seed)
        print(f"pyconv: {len(training_data[0])} training images after expansion", file=sys.stderr)

    torch.manual_seed(options.seed)
    network = experiment.network(options.mini_batch_size, device)
    epoch_numbers = itertools.count()

    def progress(mini_batches: Iterable[int]) -> Iterable[int]:
        # disable=None: no bar where stderr is not a terminal
        return tqdm(
            mini_batches, f"Epoch {next(epoch_numbers)}", leave=False, unit=" mini-batches", disable=None
        )

    history = network.SGD(
        training_data,
        experiment.epochs if options.epochs is None else options.epochs,
        options.mini_batch_size,
        experiment.eta if options.eta is None else options.eta,
        validation_data,
        test_data,
        experiment.lmbda if options.lmbda is None else options.lmbda,
        callback=_print_json if options.json else _print_epoch,
        progress=progress,
        verbose=False,
        restore_best=True,
    )
    network.save(output)
    print(
        f"Best validation accuracy {history.best_validation_accuracy:.2%}, in epoch {history.best_epoch}\n"
        f"Corresponding test accuracy {history.best_test_accuracy:.2%}\n"
        f"Saved that epoch's network to {output}",
        file=sys.stderr if options.json else sys.stdout,
    )


def _check_output(name: str) -> Path:
    """Find out before the training whether its result can be saved."""
    path = Path(name)
    if path.is_dir():
        raise _UsageError(f"--output: expected a file, but {path} is a directory")
    if not path.parent.is_dir():
        raise _UsageError(f"--output: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise _UsageError(f"--output: the directory {path.parent} is not writable")
    return path


def _is_expanded(data_name: str | None) -> bool:
    """Whether these are the book's expanded data, by the name that its program gives the file."""
    name = data_name or os.environ.get("PYCONV_DATA", "")
    return Path(name).name.startswith("mnist_expanded")


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def _print_epoch(record: dict[str, Any]) -> None:
    test_accuracy = record["test_accuracy"]
    print(
        f"Epoch {record['epoch']}: cost {record['train_cost']:.4f}, "
        f"validation accuracy {record['validation_accuracy']:.2%}, "
        + ("" if test_accuracy is None else f"test accuracy {test_accuracy:.2%}, ")
        + f"{record['seconds']:.2f} s",
        flush=True,
    )


# ----------------------------------------------------------------------------------------------------------
# eval
# ----------------------------------------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace) -> None:
    _require_extra("eval", ("safetensors",))
    from pyconv.network3 import load_network, size

    network = load_network(options.file, device=_configure(options))
    for name, data in zip(("training", "validation", "test"), _load_data(options.data)):
        print(f"{name} accuracy {network.accuracy(data):.2%} of {size(data)}", flush=True)


# ----------------------------------------------------------------------------------------------------------
# info
# ----------------------------------------------------------------------------------------------------------


def _info(_options: argparse.Namespace) -> None:
    built = "built" if pyconv._C.cuda_built() else "not built"
    visible = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("pyconv", pyconv.__version__),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("NumPy", np.__version__),
        ("ISA", f"{pyconv.isa()} (compiled: {', '.join(pyconv.compiled_isas())})"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", f"{built}; devices visible: {', '.join(visible) or 'none'}"),
    ]
    for label, value in rows:
        print(f"{label:<9}{value}")
    print("kernels of conv_max_pool2d, in the order in which they are tried:")
    kernels = pyconv._C.conv_max_pool2d_kernels()
    width = max(len(name) for name, _, _ in kernels)
    for name, live, why in kernels:
        print(f"  {name:<{width}}  {'live' if live else 'off':<4}  {why}")
