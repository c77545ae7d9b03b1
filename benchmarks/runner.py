"""The command line of the benchmarks: run a suite, show and report its result, guard its ratios, train on MNIST."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks import gate, goals, report_terminal, results
from benchmarks.comparison import comparisons, sentence

if TYPE_CHECKING:
    from benchmarks.journal import Journal
    from benchmarks.suites import Suite

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
REPORT = FOLDER.parent / "build" / "report.html"
BUSY_LOAD = 0.25
"""Of each core: above this the load of the last minute was more than background noise."""
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

_NOTHING_LEFT = 5
_ORDINARY_FAILURES = (1, 2, 4)
"""Exit codes of pytest: no test was left to run; tests failed, a usage error, an interruption."""
_GRACE_SECONDS = 25.0
"""After the deadline: a benchmark that started before it may end, and the suite with it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 ok, 1 failed, 2 bad usage or a missing requirement."""
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure a suite, then print its report and the goal table")
    run.add_argument("--suite", choices=("quick", "full", "all", "gpu"), default="quick")
    run.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the result goes; default: results/gpu-NAME.json on a GPU, else printed only",
    )
    _add_measuring_arguments(run)
    run.set_defaults(command=_run)

    goals = commands.add_parser("goals", help="print the goal table of a result, or of several runs of a suite")
    goals.add_argument("files", type=Path, nargs="+", metavar="file")
    goals.set_defaults(command=_goals)

    show = commands.add_parser("show", help="print a result")
    show.add_argument("file", type=Path)
    show.add_argument("--all", action="store_true", help="with every implementation")
    show.set_defaults(command=_show)

    report = commands.add_parser("report", help="write results as one HTML page")
    report.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[RESULTS],
        metavar="PATH",
        help="result files, or folders of them; default: the committed results",
    )
    report.add_argument("--output", type=Path, default=REPORT, metavar="FILE", help="default: build/report.html")
    report.set_defaults(command=_report)

    guard = commands.add_parser(
        "gate", help="compare speed-ups with a committed result; exit code 1 where one has fallen"
    )
    guard.add_argument(
        "file", type=Path, nargs="?", metavar="RESULT", help=f"default: the suite {gate.SUITE}, measured now"
    )
    guard.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="default: the newest committed result of the suite quick, of the same CPU model if there is one",
    )
    guard.add_argument(
        "--margin",
        type=_fraction,
        default=gate.DEFAULT_MARGIN,
        help="what a speed-up may lose, as a fraction of the committed one (default: %(default)s)",
    )
    _add_measuring_arguments(guard)
    guard.set_defaults(command=_gate, suite=gate.SUITE)

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

    profile = commands.add_parser("profile", help="where the time of a compiled training step goes")
    profile.add_argument("experiment", type=int, choices=(1, 2, 4, 6, 10), help="of the book")
    profile.add_argument("--batch", type=int, default=10)
    profile.add_argument("--threads", type=int, default=1)
    profile.set_defaults(command=_profile)

    recipe = commands.add_parser(
        "recipe", help="a recipe that reaches 99.6 %% on the real MNIST beside the same in plain torch"
    )
    recipe.add_argument("--data", type=Path, help="folder of the four IDX files; default: $PYCONV_DATA")
    recipe.add_argument("--seeds", type=int, default=5, help="whole trainings of ours (default: %(default)s)")
    recipe.add_argument("--first-seed", type=int, default=0)
    recipe.add_argument("--peer-seeds", type=int, default=1, help="of the best peer (default: %(default)s)")
    recipe.add_argument("--rounds", type=int, default=3, help="of timing everyone in turn (default: %(default)s)")
    recipe.add_argument("--threads", type=int, default=2)
    recipe.add_argument("--json", type=Path, metavar="FILE")
    recipe.set_defaults(command=_recipe)
    return parser


def _add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-k", dest="keyword", metavar="EXPRESSION", help="only matching benchmarks, as in pytest"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of rounds per benchmark; default: the suite's"
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="when the suite ends with what it has; default: the suite's",
    )


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, but got {text}")
    return value


def _missing(*modules: str) -> str | None:
    """What to say of the first module that is not installed; None if all are."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"benchmarks need {module}: install pyconv with its [bench] extra"
    return None


def _run(options: argparse.Namespace) -> int:
    if options.json is not None and not options.json.parent.is_dir():
        print(f"--json {options.json}: there is no folder {options.json.parent}", file=sys.stderr)
        return EXIT_USAGE
    if (fault := _cannot_measure(options.suite)) is not None:
        print(fault, file=sys.stderr)
        return EXIT_USAGE
    result, ended_well = _measure_suite(options)
    if result["benchmarks"]:
        print(report_terminal.format_result(result))
        on_gpu = result["device"] == "cuda"
        path = options.json or (_default_path(result["machine_info"]) if on_gpu else None)
        ended_well &= path is None or _save(result, path)
    print()
    print(goals.format_table(result), flush=True)
    return EXIT_OK if ended_well else EXIT_FAILED


def _cannot_measure(suite_name: str) -> str | None:
    """What the machine lacks for the suite; None if it can be measured."""
    if (fault := _missing("torch", "pytest", "pytest_benchmark", "pyconv")) is not None:
        return fault
    from benchmarks.suites import SUITES

    if SUITES[suite_name].device == "cuda" and (fault := _no_gpu()) is not None:
        return f"the suite {suite_name!r} needs a GPU: {fault}"
    return None


def _measure_suite(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The result of the suite that the options name, and whether nothing went wrong."""
    from benchmarks.journal import Journal
    from benchmarks.suites import SUITES

    suite = SUITES[options.suite]
    load = os.getloadavg()[0]
    if load > BUSY_LOAD * len(os.sched_getaffinity(0)):
        print(
            f"the machine is busy (load {load:.1f}): the intervals will be wide, those of 2 threads above all"
        )
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        ended_well = _measure(suite, options, journal)
        progress = journal.read()
    if not progress.benchmarks:
        print("no benchmark was measured", file=sys.stderr)
        for name, reason in progress.not_measured.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    result = results.assemble(progress, suite.name, suite.device, load)
    return result, ended_well and bool(progress.benchmarks)


def _save(result: dict[str, Any], path: Path) -> bool:
    faults = list(results.validate(result))
    try:
        results.save(result, path)
    except OSError as error:
        faults.append(f"it could not be written: {error.strerror}")
    for fault in faults[:5]:
        print(f"{path}: {fault}", file=sys.stderr)
    if not faults:
        print(f"\nwrote {path}")
    return not faults


def _no_gpu() -> str | None:
    """Why pyconv cannot be measured on a GPU here; None if it can."""
    import torch

    import pyconv

    if not torch.cuda.is_available():
        return "PyTorch sees none"
    return None if pyconv._C.cuda_built() else "pyconv was built without CUDA"


def _default_path(machine_info: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", machine_info.get("gpu", {}).get("name", "unknown").lower()).strip("-")
    return RESULTS / f"gpu-{name}.json"


def _measure(suite: Suite, options: argparse.Namespace, journal: Journal) -> bool:
    """Run the suite in a process, and what is left of it in further ones where one dies; whether all went well.

    A kernel's fault takes the GPU from its whole process. The journal says what was measured, and what was being tried
    when the process ended, which is not tried again.
    """
    command = [sys.executable, "-m", "pytest", *(str(FOLDER / file) for file in suite.files)]
    command += ["-c", str(FOLDER / "pytest.ini"), "-q", "--suite", suite.name]
    command += ["--benchmark-quiet", "--journal", str(journal.path)]
    command += ["-k", options.keyword] if options.keyword else []
    command += ["--budget", str(options.budget)] if options.budget else []
    limit = options.limit or suite.limit_seconds
    deadline = None if limit is None else time.time() + limit
    command += [] if deadline is None else ["--deadline", str(deadline)]
    ended_well = True
    while True:
        known = _known(journal)
        code = _run_child(command, None if deadline is None else deadline - time.time() + _GRACE_SECONDS)
        if code in (0, _NOTHING_LEFT):
            return ended_well
        ended_well = False
        over = code is None or (deadline is not None and time.time() > deadline)
        if code in _ORDINARY_FAILURES or over or _known(journal) == known:
            return False
        print(f"the measuring process ended with {code}; another takes up the rest", flush=True)


def _known(journal: Journal) -> tuple[int, int]:
    progress = journal.read()
    return len(progress.done()), sum(map(len, progress.fatal.values()))


def _run_child(command: Sequence[str], seconds: float | None) -> int | None:
    """The exit code, or None where the process was ended: after `seconds`, by Ctrl-C or by a signal to terminate."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    # A session of its own, so that a compiler's worker processes end with it.
    with subprocess.Popen(command, cwd=FOLDER.parent, start_new_session=True) as child:
        try:
            return child.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            print(f"ended the measuring process: {type(error).__name__}", file=sys.stderr)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            signal.signal(signal.SIGTERM, before)


def _with_result(options: argparse.Namespace, text: Callable[[dict], str]) -> int:
    try:
        print(text(results.load(options.file)))
    except results.ResultError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _goals(options: argparse.Namespace) -> int:
    try:
        print(goals.format_runs([results.load(file) for file in options.files]))
    except ValueError as error:  # of the files, or of runs that cannot be put together
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _show(options: argparse.Namespace) -> int:
    return _with_result(
        options, lambda result: report_terminal.format_result(result, every_implementation=options.all)
    )  # fmt: skip


def _report(options: argparse.Namespace) -> int:
    if (fault := _missing("jinja2")) is not None:
        print(fault, file=sys.stderr)
        return EXIT_USAGE
    from benchmarks import report_html

    try:
        found = report_html.load_all(options.results)
        if options.output == REPORT:
            REPORT.parent.mkdir(exist_ok=True)
        options.output.write_text(report_html.render(found), encoding="utf-8")
    except results.ResultError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        print(f"{options.output} could not be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    for name, result in found:
        print(f"{name}: {sentence(comparisons(result))}")
    print(f"wrote {options.output}")
    return EXIT_OK


def _gate(options: argparse.Namespace) -> int:
    ended_well = True
    try:
        _baseline(options)  # fails before anything is measured
        if options.file is not None:
            result = results.load(options.file)
        elif (fault := _cannot_measure(options.suite)) is not None:
            print(fault, file=sys.stderr)
            return EXIT_USAGE
        else:
            result, ended_well = _measure_suite(options)
            if not result["benchmarks"]:
                return EXIT_FAILED
        path, baseline = _baseline(options, result["machine_info"]["cpu"])
        rows = gate.compare(baseline, result, options.margin)
    except results.ResultError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    print(f"\ncompared with {path}")
    print(gate.format_report(rows, baseline, result, options.margin))
    if not ended_well:
        print("the suite did not end well: see above", file=sys.stderr)
    return EXIT_OK if ended_well and not gate.has_regressed(rows) else EXIT_FAILED


def _baseline(options: argparse.Namespace, cpu: str | None = None) -> tuple[Path, dict[str, Any]]:
    if options.baseline is not None:
        return options.baseline, results.load(options.baseline)
    return gate.find_baseline(RESULTS, cpu)


def _mnist(options: argparse.Namespace) -> int:
    if (fault := _missing("torch", "pyconv")) is not None:
        print(fault, file=sys.stderr)
        return EXIT_USAGE
    import torch

    from benchmarks import mnist

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {options.device} needs a GPU: PyTorch sees none", file=sys.stderr)
        return EXIT_USAGE
    settings = {"epochs": options.epochs, "threads": options.threads, "device": options.device}
    return _on_mnist(options, mnist, **settings, seed=options.seed)


def _profile(options: argparse.Namespace) -> int:
    if (fault := _missing("torch", "pyconv")) is not None:
        print(fault, file=sys.stderr)
        return EXIT_USAGE
    from benchmarks import step_profile

    print(step_profile.run(options.experiment, batch=options.batch, threads=options.threads))
    return EXIT_OK


def _recipe(options: argparse.Namespace) -> int:
    if (fault := _missing("torch", "pyconv")) is not None:
        print(fault, file=sys.stderr)
        return EXIT_USAGE
    from benchmarks import recipe

    return _on_mnist(
        options, recipe, first_seed=options.first_seed, seeds=options.seeds, peer_seeds=options.peer_seeds,
        rounds=options.rounds, threads=options.threads,
    )  # fmt: skip


def _on_mnist(options: argparse.Namespace, module: ModuleType, **settings: Any) -> int:
    """Run the module's benchmark on `options.data`, print what it found, and write it to `options.json`."""
    from pyconv import DataError

    try:
        report = module.run(options.data, **settings)
    except (OSError, DataError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    print(module.format_report(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return EXIT_OK
