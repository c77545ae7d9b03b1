"""``python -m pyconv book list``, ``run`` and ``report``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyconv import cli

if TYPE_CHECKING:
    from pyconv.book.runs import Run

_RESULTS_HELP = "directory of the runs (default: book-results)"


def add_to(commands: Any) -> None:
    """Add ``book`` to the commands of argparse."""
    book = commands.add_parser("book", help="the experiments of the book's chapter 6: list, run, report")
    parts = book.add_subparsers(required=True, metavar="COMMAND")

    listing = parts.add_parser("list", help="the experiments, what the book reports, and the finished runs")
    listing.set_defaults(run=_list)
    listing.add_argument("--results", default="book-results", metavar="DIR", help=_RESULTS_HELP)

    run = parts.add_parser(
        "run",
        help="train experiments from several seeds",
        description="Train experiments from several seeds. What is finished is not trained again, and what was "
        "interrupted goes on after its last epoch. Several such commands may work side by side on the same results.",
    )
    run.set_defaults(run=_run)
    run.add_argument(
        "experiments", nargs="+", metavar="NAME", help="as `book list` prints them; 8 and 9 mean all their variants"
    )
    run.add_argument(
        "--runs",
        type=cli.count,
        metavar="N",
        help="of an experiment, from the seeds 0 to N - 1 (default: 3); of a vote, each with networks of its own "
        "(default: 1)",
    )
    run.add_argument("--data", metavar="PATH", help=f"{cli.DATA_HELP} ({cli.DEFAULT_DATA_HELP})")
    run.add_argument("--epochs", type=cli.count, metavar="N", help="default: the experiment's")
    run.add_argument("--results", default="book-results", metavar="DIR", help=_RESULTS_HELP)
    run.add_argument("--threads", type=cli.count, metavar="N", help=cli.THREADS_HELP)

    report = parts.add_parser(
        "report",
        help="make a page of the finished runs",
        description="Make a page of the finished runs: report.html, everything inside, and report.md with figures/.",
    )
    report.set_defaults(run=_report)
    report.add_argument("--results", default="book-results", metavar="DIR", help=_RESULTS_HELP)
    report.add_argument("--output", default="book-report", metavar="DIR", help="default: book-report")
    report.add_argument(
        "--data",
        metavar="PATH",
        help=f"the runs' data, whose mistaken test digits are drawn: {cli.DATA_HELP} ({cli.DEFAULT_DATA_HELP})",
    )


def _names(given: list[str]) -> list[str]:
    """Full names of experiments and votes, each once, votes last."""
    from pyconv.network3.experiments import EXPERIMENTS, VOTES

    known = [name for name in (*EXPERIMENTS, *VOTES) if name != "demo"]
    found: list[str] = []
    for name in given:
        matches = [name] if name in known else [other for other in known if other.partition("-")[0] == name]
        if not matches:
            raise cli.UsageError(f"book run: expected one of {', '.join(known)}, but got {name!r}")
        found += [match for match in matches if match not in found]
    return sorted(found, key=lambda name: name in VOTES)


def _list(options: argparse.Namespace) -> None:
    from pyconv.book.runs import Results
    from pyconv.network3.experiments import EXPERIMENTS, VOTES

    results = Results(options.results)
    rows = [("name", "epochs", "book", "ours: mean (runs)", "network")]
    for name, experiment in EXPERIMENTS.items():
        if name != "demo":
            runs = results.runs(name)
            book, ours = _accuracies(experiment.book_accuracy, [run.test_accuracy for run in runs], runs)
            if begun := results.begun(name):
                ours = f"{ours}{', ' if ours else ''}{begun} begun"
            rows.append((name, str(experiment.epochs), book, ours, experiment.title))
    for name, vote in VOTES.items():
        votes = results.votes(name)
        members = [run for run in results.runs(vote.experiment) if any(run.seed in found.seeds for found in votes)]
        cells = _accuracies(vote.book_accuracy, [found.test_accuracy() for found in votes], members)
        rows.append((name, str(EXPERIMENTS[vote.experiment].epochs), *cells, vote.title))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths)), last]))
    if any("*" in row[3] for row in rows):
        print("* with runs for other epochs than the experiment's or not on MNIST: not to be compared")


def _accuracies(book: float | None, ours: list[float], runs: list[Run]) -> tuple[str, str]:
    """The cells of what the book and `runs` reached, the latter with a mark if they are not the book's experiment."""
    mark = "*" if any(run.notes for run in runs) else ""
    mean = f"{sum(ours) / len(ours):.2%} ({len(ours)}){mark}" if ours else ""
    return "" if book is None else f"{book:.2f}%", mean


def _run(options: argparse.Namespace) -> None:
    try:
        _train(options)
    except KeyboardInterrupt:
        print("pyconv: the same command goes on after the last finished epoch", file=sys.stderr)
        raise


def _train(options: argparse.Namespace) -> None:
    cli.require_extra("book run", ("tqdm", "safetensors"))
    from pyconv.book import runs
    from pyconv.network3.experiments import VOTES

    def count(name: str) -> int:
        return options.runs or (1 if name in VOTES else 3)

    names = _names(options.experiments)
    cli.set_threads(options.threads)
    data = runs.MnistData(*cli.load_data(options.data))
    results = runs.Results(options.results)
    trained: dict[tuple[str, int], None] = {}  # in this order, each once
    for name in names:
        if name in VOTES:
            for number in range(count(name)):
                trained.update({(VOTES[name].experiment, seed): None for seed in runs.vote_seeds(name, number)})
        else:
            trained.update({(name, seed): None for seed in range(count(name))})
    busy = []
    for number, (name, seed) in enumerate(trained, 1):
        try:
            title = f"experiment {name}, seed {seed} (run {number} of {len(trained)})"
            with _progress(title) as (on_start, on_epoch):
                run = runs.train(
                    results, name, seed, data, epochs=options.epochs, on_start=on_start, on_epoch=on_epoch
                )
        except runs.BusyError as error:
            print(f"pyconv: {error}", file=sys.stderr)
            busy.append((name, seed))
            continue
        history = run.history
        print(
            f"experiment {name}, seed {seed}: test {run.test_accuracy:.2%}, validation "
            f"{history.best_validation_accuracy:.2%} in epoch {history.best_epoch} of {len(history['epoch'])}, "
            f"{sum(history['seconds']):.0f} s of training",
            flush=True,
        )
    for name in names:
        if name in VOTES:
            for number in range(count(name)):
                if any((VOTES[name].experiment, seed) in busy for seed in runs.vote_seeds(name, number)):
                    continue
                result = runs.vote(results, name, number, data)
                print(
                    f"experiment {name}, seeds {result.seeds[0]} to {result.seeds[-1]}: plurality vote "
                    f"{result.test_accuracy():.2%}, average {result.test_accuracy('average'):.2%}",
                    flush=True,
                )
    if busy:
        raise runs.BusyError(f"{len(busy)} runs are left to the process that trains them")


def _report(options: argparse.Namespace) -> None:
    cli.require_extra("book report", ("safetensors", "matplotlib", "jinja2"), extra="book")
    from pyconv.book import report
    from pyconv.book.runs import Results

    if not Path(options.results).is_dir():
        raise FileNotFoundError(f"--results: there is no directory {options.results}")
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise cli.UsageError(f"--output: expected a directory, but got the file {output}")
    test = cli.load_data(options.data)[2]
    directory = report.write(Results(options.results), test, output)
    print(f"Wrote {directory / 'report.html'} and {directory / 'report.md'}")


@contextlib.contextmanager
def _progress(title: str) -> Iterator[tuple[Any, Any]]:
    """What `runs.train` calls: a bar with the time left where stderr is a terminal, lines otherwise."""
    from tqdm import tqdm

    bar = None
    started = time.perf_counter()

    def on_start(done: int, epochs: int) -> None:
        nonlocal bar
        if done:
            print(f"pyconv: {title} goes on after epoch {done - 1}", file=sys.stderr)
        if sys.stderr.isatty():
            bar = tqdm(total=epochs, initial=done, desc=title, unit=" epochs", leave=False)

    def on_epoch(record: dict[str, Any]) -> None:
        said = f"cost {record['train_cost']:.4f}, validation {record['validation_accuracy']:.2%}"
        if bar is not None:
            bar.set_postfix_str(said, refresh=False)
            bar.update()
        else:
            print(
                f"pyconv: {title}, epoch {record['epoch']}: {said}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    try:
        yield on_start, on_epoch
    finally:
        if bar is not None:
            bar.close()
