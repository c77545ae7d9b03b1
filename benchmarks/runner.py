"""The command line of the benchmarks: run a suite, print its goal table, show it, train on MNIST."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BUSY_LOAD = 0.25
"""Of each core: above this the load of the last minute was more than background noise."""
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 ok, 1 failed, 2 bad usage or a missing requirement."""
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure a suite, then print its report and the goal table")
    run.add_argument("--suite", choices=("quick", "full", "all", "gpu"), default="quick")
    run.add_argument("--json", type=Path, metavar="FILE", help="where the result goes; default: printed only")
    run.add_argument(
        "-k", dest="keyword", metavar="EXPRESSION", help="only matching benchmarks, as in pytest"
    )
    run.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of rounds per benchmark; default: the suite's"
    )
    run.set_defaults(command=_run)

    goals = commands.add_parser("goals", help="print the goal table of a result")
    goals.add_argument("file", type=Path)
    goals.set_defaults(command=_goals)

    show = commands.add_parser("show", help="print a result")
    show.add_argument("file", type=Path)
    show.add_argument("--all", action="store_true", help="with every implementation")
    show.set_defaults(command=_show)

    mnist = commands.add_parser(
        "mnist", help="experiment 6 on the real MNIST beside a torch loop, epoch by epoch"
    )
    mnist.add_argument("--data", type=Path, help="folder of the four IDX files; default: $PYCONV_DATA")
    mnist.add_argument("--epochs", type=int, default=3)
    mnist.add_argument("--threads", type=int, default=2)
    mnist.add_argument("--device", default="cpu")
    mnist.add_argument("--seed", type=int, default=0)
    mnist.add_argument("--json", type=Path, metavar="FILE")
    mnist.set_defaults(command=_mnist)
    return parser


def _missing(*modules: str) -> int | None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            print(f"benchmarks need {module}: install pyconv with its [bench] extra", file=sys.stderr)
            return EXIT_USAGE
    return None


def _run(options: argparse.Namespace) -> int:
    if (code := _missing("torch", "pytest", "pytest_benchmark", "pyconv")) is not None:
        return code
    import tempfile

    import pytest
    import torch

    from benchmarks import goals, report_terminal, results
    from benchmarks.suites import SUITES

    suite = SUITES[options.suite]
    if suite.device == "cuda" and not torch.cuda.is_available():
        print(f"the suite {suite.name!r} needs a GPU that torch can use", file=sys.stderr)
        return EXIT_USAGE
    if (load := os.getloadavg()[0]) > BUSY_LOAD * len(os.sched_getaffinity(0)):
        print(
            f"the machine is busy (load {load:.1f}): the intervals will be wide, those of 2 threads above all"
        )
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "result.json"
        arguments = [*(str(FOLDER / file) for file in suite.files), "-c", str(FOLDER / "pytest.ini"), "-q"]
        arguments += ["--suite", suite.name, "--benchmark-quiet", f"--benchmark-json={raw}"]
        arguments += ["-k", options.keyword] if options.keyword else []
        arguments += ["--budget", str(options.budget)] if options.budget else []
        code = pytest.main(arguments)
        if not raw.exists() or raw.stat().st_size == 0:
            print("no benchmark was measured", file=sys.stderr)
            return EXIT_FAILED
        result = results.load(raw)
    if options.json:
        results.save(result, options.json)
        print(f"wrote {options.json}")
    print(report_terminal.format_result(result))
    print()
    print(goals.format_table(result))
    return EXIT_OK if code == pytest.ExitCode.OK else EXIT_FAILED


def _with_result(options: argparse.Namespace, text: Callable[[dict], str]) -> int:
    from benchmarks import results

    try:
        print(text(results.load(options.file)))
    except results.ResultError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _goals(options: argparse.Namespace) -> int:
    from benchmarks import goals

    return _with_result(options, goals.format_table)


def _show(options: argparse.Namespace) -> int:
    from benchmarks import report_terminal

    return _with_result(
        options, lambda result: report_terminal.format_result(result, every_implementation=options.all)
    )  # fmt: skip


def _mnist(options: argparse.Namespace) -> int:
    if (code := _missing("torch", "pyconv")) is not None:
        return code
    from benchmarks import mnist
    from pyconv import DataError

    settings = {"epochs": options.epochs, "threads": options.threads, "device": options.device}
    try:
        report = mnist.run(options.data, **settings, seed=options.seed)
    except (OSError, DataError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    print(mnist.format_report(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return EXIT_OK
