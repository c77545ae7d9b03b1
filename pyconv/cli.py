"""The command line: ``python -m pyconv train``, ``eval`` and ``info``.

Exit codes: 0 success; 1 failure (a file that cannot be read, foreign data, training that diverged); 2 bad
usage (an unknown option or value, a missing extra); 130 interrupted. An error is one line on stderr; only a
closed stdout is not reported (1).

Of the processes that torchrun starts, which share the mini-batches of ``train``, the first alone writes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import pyconv
from pyconv import functional
from pyconv.launch import launch, only_first_prints, process_group, report

EMBEDDED = "digits"

_THREADS_PER_CPU = 4  # more only slow down, and thousands exhaust the process's limits

# Training on so little takes seconds. A second thread saves a fifth of them at best, and costs many times as
# much where other processes use the CPUs: with small mini-batches threads wait for each other all the time.
_SMALL_DATA = 10_000
_SMALL_MINI_BATCH = 32

_Number = TypeVar("_Number", int, float)

_FAILURES = (OSError, ArithmeticError, RuntimeError, ValueError, pickle.UnpicklingError)


class UsageError(Exception):
    pass


@only_first_prints()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()  # not left to the interpreter's exit, which would report a closed pipe
        return 0
    except KeyboardInterrupt as error:
        report(error, "pyconv: interrupted")
        return 130
    except UsageError as error:
        report(error, f"pyconv: {error}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except _FAILURES as error:
        report(error, f"pyconv: {error}")
        return 1


# ----------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------


def _number(
    kind: str, convert: Callable[[str], _Number], is_valid: Callable[[_Number], bool]
) -> Callable[[str], _Number]:
    """A `type` of argparse: `convert`, where it succeeds with a valid number."""

    def parse(text: str) -> _Number:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {kind}, but got {text!r}")
        return value

    return parse


count = _number("a positive whole number", int, lambda value: value >= 1)
_rate = _number("a non-negative number", float, lambda value: math.isfinite(value) and value >= 0.0)
# What torch.manual_seed takes: the numbers of int64 and uint64.
_seed = _number("a whole number from -2**63 to 2**64 - 1", int, lambda value: -(2**63) <= value < 2**64)


# Which of them are too small is torch's to say.
_extent = _number("a whole number below 2**31", int, lambda value: abs(value) < 2**31)


def _sizes(*lengths: int) -> Callable[[str], tuple[int, ...]]:
    """A `type` of argparse: whole numbers between commas, as many as one of `lengths`."""

    def parse(text: str) -> tuple[int, ...]:
        values = tuple(map(_extent, text.split(",")))
        if len(values) not in lengths:
            counts = " or ".join(map(str, lengths))
            raise argparse.ArgumentTypeError(f"must be {counts} whole numbers between commas, but got {text!r}")
        return values

    return parse


def _padding(text: str) -> str | tuple[int, ...]:
    return text if text in ("same", "valid") else _sizes(1, 2)(text)


DATA_HELP = (
    "a directory of MNIST's IDX files, or the book's mnist.pkl.gz or mnist_expanded.pkl.gz, "
    f"or '{EMBEDDED}' for the digits that pyconv carries"
)
DEFAULT_DATA_HELP = f"default: $PYCONV_DATA if set, else {EMBEDDED}"
THREADS_HELP = (
    f"at most {_THREADS_PER_CPU} for each CPU (default: PyTorch's choice, which $OMP_NUM_THREADS sets; without it, "
    f"train takes 1 for fewer than {_SMALL_DATA} images in mini-batches below {_SMALL_MINI_BATCH})"
)


def _parser() -> argparse.ArgumentParser:
    from pyconv.book import command as command_book

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
        "9-1000 tell the variants of two of them apart, 8 and 9 mean those that the book found best; or 'best', a "
        "recipe beyond the book (default: demo)",
    )
    train.add_argument(
        "--data", metavar="PATH", help=f"{DATA_HELP} ({DEFAULT_DATA_HELP}; the demo's default: {EMBEDDED})"
    )
    train.add_argument("--epochs", type=count, metavar="N", help="default: the experiment's")
    train.add_argument("--mini-batch-size", type=count, default=10, metavar="N", help="default: 10")
    train.add_argument("--eta", type=_rate, metavar="RATE", help="learning rate (default: the experiment's)")
    train.add_argument(
        "--lmbda", type=_rate, metavar="L", help="L2 regularisation (default: the experiment's)"
    )
    train.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of initial weights, dropout and expanded data (default: 0)",
    )
    train.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object for each epoch to stdout, and nothing else; test_accuracy is null where "
        "the validation accuracy is below the best so far, train_accuracy and validation_cost are without --diagnose",
    )
    train.add_argument(
        "--output",
        metavar="FILE",
        help="where to save the best epoch's network, at the end (default: network-NAME.safetensors)",
    )
    train.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="after every epoch save there all that the training needs to go on, last.safetensors, and the best "
        "epoch's network, best.safetensors",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last epoch of --checkpoint, to the very bits of a training without interruption",
    )
    train.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="stop when the validation accuracy has not risen above its best for N epochs",
    )
    train.add_argument(
        "--diagnose",
        action="store_true",
        help="also take the accuracy on the training data after every epoch, and say at the end whether it overfits",
    )
    train.add_argument("--csv", metavar="FILE", help="write what every epoch measured to a table, at the end")
    train.add_argument("--tensorboard", metavar="DIR", help="write it there for TensorBoard, after every epoch")

    evaluate = commands.add_parser("eval", help="the accuracy of a saved network")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("file", metavar="FILE", help="a network saved by train")
    evaluate.add_argument("--data", metavar="PATH", help=f"{DATA_HELP} ({DEFAULT_DATA_HELP})")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object to stdout")

    for command in (train, evaluate):
        command.add_argument("--threads", type=count, metavar="N", help=THREADS_HELP)
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")

    command_book.add_to(commands)

    info = commands.add_parser(
        "info",
        help="versions, instruction sets, threads, CUDA, kernels; or the kernels that serve one shape",
        description="Without --shape: versions, instruction sets, threads, CUDA and all kernels. With it: the kernels "
        "of the CPU that conv_max_pool2d takes for one shape, and why it passes over those before them.",
    )
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    shape = info.add_argument_group(
        "one shape", "A pair is one number for both, or HEIGHT,WIDTH. The defaults are those of conv_max_pool2d."
    )
    add = functools.partial(shape.add_argument, default=argparse.SUPPRESS)
    add("--shape", type=_sizes(3, 4), metavar="N,C,H,W", help="of the input; C,H,W is an image without a batch")
    add("--weight", type=_sizes(3), metavar="K,R,S", help="output channels, height and width of the filters")
    for option in ("stride", "dilation", "pool-size", "pool-stride", "pool-padding", "pool-dilation"):
        add(f"--{option}", type=_sizes(1, 2), metavar="PAIR")
    add("--padding", type=_padding, metavar="PAIR", help="or 'same', or 'valid'")
    add("--groups", type=_extent, metavar="N")
    add("--ceil-mode", action="store_true")
    add("--activation", choices=functional.ACTIVATIONS)
    add("--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="default: float32")
    add("--layout", choices=("nchw", "channels_last"), help="of input and weight (default: nchw)")
    add(
        "--threads",
        type=count,
        metavar="N",
        help=f"at most {_THREADS_PER_CPU} for each CPU (default: PyTorch's choice)",
    )
    return parser


def require_extra(command: str, modules: Sequence[str], extra: str = "train") -> None:
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            missing.append(module)
    if missing:
        raise UsageError(f"{command} needs {' and '.join(missing)}: pip install 'pyconv[{extra}]'")


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    most = _THREADS_PER_CPU * (os.cpu_count() or 1)
    if threads > most:
        raise UsageError(
            f"--threads: expected at most {most}, {_THREADS_PER_CPU} for each CPU, but got {threads}"
        )
    torch.set_num_threads(threads)


def _configure(options: argparse.Namespace) -> torch.device:
    """Set the number of threads, and return the device."""
    launched = launch()
    set_threads(options.threads)
    if options.threads is None and "OMP_NUM_THREADS" not in os.environ and launched.count > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // launched.local_count))
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, but got {options.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, but got {options.device!r}")
    if device.type == "cuda":
        if launched.count > 1:
            if device.index is not None:
                raise UsageError(f"--device: expected cuda, of which each process takes its own, but got {device}")
            device = torch.device("cuda", launched.local_rank)
        if not pyconv._C.cuda_built():
            reason = "" if torch.version.cuda else ", and so was PyTorch"
            raise UsageError(f"--device {options.device}: pyconv was built without CUDA{reason}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices"
            )
        if launched.count > 1:
            torch.cuda.set_device(device)  # on which NCCL communicates
    return device


def load_data(name: str | None) -> list[Any]:
    from pyconv.network3 import load_data_shared, load_digits

    if name == EMBEDDED:
        return load_digits()
    source, path = ("--data", name) if name else ("$PYCONV_DATA", os.environ.get("PYCONV_DATA"))
    if path and not os.path.exists(path):
        raise FileNotFoundError(f"{source}: there is no file or directory {path}")
    return load_data_shared(name)


# ----------------------------------------------------------------------------------------------------------
# train
# ----------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    require_extra("train", ("tqdm", "safetensors"))
    from tqdm import tqdm

    from pyconv.network3 import TensorBoard, diagnose, expand_mnist
    from pyconv.network3.checkpoint import finished_epochs
    from pyconv.network3.experiments import find_experiment

    try:
        name, experiment = find_experiment(options.net)
    except ValueError as error:
        raise UsageError(f"--net: {error}") from None
    if options.resume and options.checkpoint is None:
        raise UsageError("--resume needs --checkpoint DIR")
    if options.checkpoint is not None and os.path.exists(options.checkpoint) and not os.path.isdir(options.checkpoint):
        raise UsageError(f"--checkpoint: expected a directory, but got the file {options.checkpoint}")
    if options.tensorboard is not None:
        require_extra("--tensorboard", ("tensorboard",), "logs")
    device = _configure(options)
    output = _check_file("--output", options.output or f"network-{name}.safetensors")
    if options.csv is not None:
        table = _check_file("--csv", options.csv)
        if os.path.realpath(table) == os.path.realpath(output):
            raise UsageError(f"--csv: expected another file than that of the network, but got {options.csv}")
    data_name = options.data or (EMBEDDED if name == "demo" else None)
    training_data, validation_data, test_data = load_data(data_name)
    if experiment.expanded and not _is_expanded(data_name):
        training_data = expand_mnist(training_data, options.seed)
        print(f"pyconv: {len(training_data[0])} training images after expansion", file=sys.stderr)

    is_small = len(training_data[0]) < _SMALL_DATA and options.mini_batch_size < _SMALL_MINI_BATCH
    if is_small and options.threads is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    # Drawn on the CPU, so that a seed gives the same initial network on every device.
    network = experiment.network(options.mini_batch_size).to(device)
    epoch_numbers = itertools.count(finished_epochs(options.checkpoint) if options.resume else 0)

    def progress(mini_batches: Iterable[int]) -> Iterable[int]:
        return tqdm(mini_batches, f"Epoch {next(epoch_numbers)}", leave=False, unit=" mini-batches")

    is_first = launch().rank == 0
    callbacks = [_print_json if options.json else _print_epoch]
    if options.tensorboard is not None and is_first:
        callbacks.append(TensorBoard(options.tensorboard))
    epochs = experiment.epochs if options.epochs is None else options.epochs
    try:
        with process_group(device) as group:
            history = network.SGD(
                training_data,
                epochs,
                options.mini_batch_size,
                experiment.rate(epochs) if options.eta is None else options.eta,
                validation_data,
                test_data,
                experiment.lmbda if options.lmbda is None else options.lmbda,
                **experiment.options(options.seed),
                patience=options.patience,
                diagnose=options.diagnose,
                callback=callbacks,
                progress=progress if sys.stderr.isatty() else None,
                verbose=False,
                restore_best=True,
                checkpoint=options.checkpoint,
                resume=options.resume,
                process_group=group,
            )
    except FileExistsError as error:
        raise UsageError(
            f"--checkpoint: {options.checkpoint} holds a training already; --resume goes on with it"
        ) from error
    except KeyboardInterrupt:
        if options.checkpoint is None:
            print("pyconv: nothing was saved; --checkpoint DIR keeps the finished epochs", file=sys.stderr)
        elif finished_epochs(options.checkpoint):
            kept = f"pyconv: {options.checkpoint} holds the finished epochs; --resume goes on with them"
            print(kept, file=sys.stderr)
        raise
    if not is_first:
        return
    network.save(output)
    if options.csv is not None:
        history.to_csv(options.csv)
    said = [
        f"Best validation accuracy {history.best_validation_accuracy:.2%}, in epoch {history.best_epoch}",
        f"Corresponding test accuracy {history.best_test_accuracy:.2%}",
        f"Saved that epoch's network to {output}",
    ]
    if options.diagnose:
        said.append(str(diagnose(history)))
    print("\n".join(said), file=sys.stderr if options.json else sys.stdout)


def _check_file(option: str, name: str) -> Path:
    """Find out before the training whether its result can be saved."""
    from pyconv.network3.serialization import check_regular_file

    path = Path(name)
    # A symbolic link is followed, as save_network does.
    directory = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not directory.is_dir():
        raise UsageError(f"{option}: there is no directory {directory}")
    try:
        check_regular_file(path)
    except OSError as error:
        raise UsageError(f"{option}: {error}") from None
    if not os.access(directory, os.W_OK):
        raise UsageError(f"{option}: the directory {directory} is not writable")
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
    require_extra("eval", ("safetensors",))
    from pyconv.network3 import load_network, size

    network = load_network(options.file, device=_configure(options))
    results = {}
    for name, data in zip(("training", "validation", "test"), load_data(options.data)):
        accuracy = network.accuracy(data)
        results[name] = {"accuracy": accuracy, "images": size(data)}
        if not options.json:
            print(f"{name} accuracy {accuracy:.2%} of {size(data)}", flush=True)
    if options.json:
        print(json.dumps(results))


# ----------------------------------------------------------------------------------------------------------
# info
# ----------------------------------------------------------------------------------------------------------


_INFO_OPTIONS = ("run", "json")  # the others describe a shape


def _info(options: argparse.Namespace) -> None:
    of_shape = {name: value for name, value in vars(options).items() if name not in _INFO_OPTIONS}
    if of_shape:
        for name in ("shape", "weight"):
            if name not in of_shape:
                raise UsageError(f"info of one shape needs --{name}")
        _info_of_shape(as_json=options.json, **of_shape)
        return
    facts = {
        "pyconv": pyconv.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "isa": pyconv.isa(),
        "exact": pyconv.exact(),
        "compiled_isas": list(pyconv.compiled_isas()),
        "threads": torch.get_num_threads(),
        "cuda_built": pyconv._C.cuda_built(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": [
            {"name": name, "live": live, "reason": reason}
            for name, live, reason in pyconv._C.conv_max_pool2d_kernels()
        ],
    }
    if options.json:
        print(json.dumps(facts))
        return
    built = "built" if facts["cuda_built"] else "not built"
    rows = [
        ("pyconv", facts["pyconv"]),
        ("Python", facts["python"]),
        ("PyTorch", facts["torch"]),
        ("NumPy", facts["numpy"]),
        ("ISA", f"{facts['isa']} (compiled: {', '.join(facts['compiled_isas'])})"),
        ("exact", "on: kernels that are not exact are passed over" if facts["exact"] else "off"),
        ("threads", facts["threads"]),
        ("CUDA", f"{built}; devices visible: {', '.join(facts['cuda_devices']) or 'none'}"),
    ]
    for label, value in rows:
        print(f"{label:<9}{value}")
    print("kernels of conv_max_pool2d, in the order in which they are tried:")
    width = max(len(kernel["name"]) for kernel in facts["kernels"])
    for kernel in facts["kernels"]:
        print(f"  {kernel['name']:<{width}}  {'live' if kernel['live'] else 'off':<4}  {kernel['reason']}")


def _info_of_shape(
    *,
    as_json: bool,
    shape: tuple[int, ...],
    weight: tuple[int, int, int],
    dtype: str = "float32",
    layout: str = "nchw",
    threads: int | None = None,
    **arguments: Any,
) -> None:
    """`arguments`: those of :func:`pyconv.functional.conv_max_pool2d` that the user gave."""
    set_threads(threads)
    arguments = {**functional.conv_max_pool2d.__kwdefaults__, **arguments}
    # Where groups do not divide the channels, torch says so.
    weight_shape = (weight[0], shape[-3] // max(arguments["groups"], 1), *weight[1:])
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    try:
        plan = pyconv._C.conv_max_pool2d_plan(
            shape,
            weight_shape,
            getattr(torch, dtype),
            memory_format,
            *functional._schema_arguments(weight[1:], **arguments),
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from None
    n, k, oh, ow = plan["convolution"]
    ph, pw = plan["output"][2:]
    multiply_adds = math.prod(weight_shape[1:])
    # The backward visits one position of each window and each operand; windows without a gradient cost nothing.
    operations = {
        "forward, inference": 2 * n * k * oh * ow * multiply_adds,
        "forward, training": 2 * n * k * oh * ow * multiply_adds,
        "backward": 4 * n * k * ph * pw * multiply_adds,
        "backward, parameters only": 2 * n * k * ph * pw * multiply_adds,
    }
    convolution, output = (plan[name][-len(shape) :] for name in ("convolution", "output"))
    facts = {
        "isa": pyconv.isa(),
        "shape": shape,
        "weight": weight_shape,
        "convolution": convolution,
        "output": output,
        "dtype": dtype,
        "layout": layout,
        "activation": arguments["activation"],
        "phases": [
            {"name": phase["name"], "flops": operations[phase["name"]], **phase} for phase in plan["phases"]
        ],
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(
        f"input {_times(shape)}, weight {_times(weight_shape)}, {dtype}, {layout}, "
        f"activation {facts['activation']}"
    )
    print(f"convolution {_times(convolution)}, output {_times(output)}")
    for phase in facts["phases"]:
        at_most = "at most " if phase["name"].startswith("backward") else ""
        workers = "1 thread" if phase["threads"] == 1 else f"{phase['threads']} threads"
        written = ", ".join(phase["writes"])
        print(f"{phase['name']}: {at_most}{phase['flops']:,} FLOPs, {workers}, writes {written}")
        if not phase["kernels"]:
            print("  no kernel: the batch is empty")
        for kernel in phase["kernels"]:
            if kernel["runs"]:
                exactness = "exact" if kernel["exact"] else "not exact"
                said = f"runs; {exactness}, workspace {kernel['workspace_bytes']:,} bytes"
            elif pyconv.exact() and not kernel["exact"]:
                said = "passed over; not exact, and exact ones are asked for (set_exact, PYCONV_EXACT)"
            else:
                said = f"passed over; accepts {kernel['accepts']}"
            print(f"  {kernel['name']}  {said}")


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
