"""Finished runs as one page: Markdown with its figures beside it, and HTML with everything inside.

Data flow: run.json, vote.json, saved networks, test images -> `_sections`, the page as headings, texts, tables and
figures -> `page.render`, its files. They depend on what is read alone: no clock, no path, no network.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pyconv.book import figures, page
from pyconv.book.page import Block, Cell, Commands, Facts, Picture, Pictures, Section, Table, Text
from pyconv.book.runs import MNIST, Results, Run, VoteResult
from pyconv.errors import DataError
from pyconv.network3 import ConvPoolLayer, Diagnosis, diagnose
from pyconv.network3.descent import Data
from pyconv.network3.ensemble import VOTES as WAYS
from pyconv.network3.experiments import EXPERIMENTS, VOTES, Experiment

DIGITS = {
    "training": "1197x784:fbadbf66 1197:9cd0e4ac",
    "validation": "300x784:89f1d965 300:ef6fed18",
    "test": "300x784:e424c5df 300:92ac4d88",
}
"""Fingerprints of the digits that pyconv carries."""

_CURVES = (
    ("Sigmoid: from a fully connected layer to two convolutional ones", "sigmoid", ("1", "2", "3", "4")),
    ("ReLU: expanded data, wider layers", "relu", ("6", "7", "8-300", "8-1000")),
    ("A second fully connected layer, dropout", "second-layer", ("9-100", "9-300", "9-1000", "10")),
)
"""Title, name of the figures, experiments; tanh has figures of its own."""
_CURVES_TOGETHER = 4
_TANH, _SIGMOID, _COMPARED_EPOCHS = "5", "4", (20, 60)
_FILTERS_OF = "6"
_FILTER_QUANTILE = 0.98  # a few weights beyond it would leave all others grey
_MOST_DIGITS = 120
_MINUS = "\N{MINUS SIGN}"


# ------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one experiment with the same settings and data, which may be averaged."""

    name: str
    runs: Sequence[Run]

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]

    @property
    def epochs(self) -> int:
        return int(self.runs[0].settings["epochs"])

    @property
    def training_images(self) -> int:
        images = int(self.runs[0].data["training"].partition("x")[0])
        return 5 * images if self.experiment.expanded else images

    @property
    def notes(self) -> list[str]:
        return self.runs[0].notes

    @property
    def best(self) -> Run:
        """Of the highest test accuracy; of several the first."""
        return max(self.runs, key=lambda run: run.test_accuracy)


@dataclasses.dataclass(frozen=True)
class Ballot:
    """A vote, with those of its members whose runs are there."""

    result: VoteResult
    members: Sequence[Run]

    @property
    def notes(self) -> list[str]:
        of_members = (Group(run.experiment, [run]).notes for run in self.members)
        notes = list(dict.fromkeys(note for notes in of_members for note in notes))
        lost = len(self.result.seeds) - len(self.members)
        return notes + ([f"{lost} of {len(self.result.seeds)} runs are not there"] if lost else [])


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Whose mistakes are shown."""

    title: str
    labels: str
    predictions: str
    notes: Sequence[str]

    @property
    def wrong(self) -> list[int]:
        """Numbers of the test digits."""
        return [i for i, (p, label) in enumerate(zip(self.predictions, self.labels)) if p != label]


def _names() -> list[str]:
    """Of the experiments, without the demo."""
    return [name for name in EXPERIMENTS if name != "demo"]


def _groups(results: Results) -> dict[str, list[Group]]:
    """Of each experiment with finished runs, the ones like the book's first."""
    # A run from before there was a setting had its default.
    fields = dataclasses.fields(Experiment)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    found: dict[str, list[Group]] = {}
    for name in _names():
        alike: dict[str, list[Run]] = {}
        for run in results.runs(name):
            key = json.dumps([{**defaults, **run.settings}, run.data], sort_keys=True)
            alike.setdefault(key, []).append(run)
        if alike:
            groups = [Group(name, runs) for runs in alike.values()]
            found[name] = sorted(groups, key=lambda group: (len(group.notes), -group.epochs, -len(group.runs)))
    return found


def _ballots(results: Results) -> dict[str, list[Ballot]]:
    found = {}
    for name, vote in VOTES.items():
        ballots = []
        for result in results.votes(name):
            members = (results.run(vote.experiment, seed) for seed in result.seeds)
            ballots.append(Ballot(result, [run for run in members if run is not None]))
        if ballots:
            found[name] = ballots
    return found


def _classifier(groups: dict[str, list[Group]], ballots: dict[str, list[Ballot]]) -> Classifier:
    """The best vote, or where there is none the best run; those like the book's before all others."""
    if ballots:
        best = max(
            (ballot for found in ballots.values() for ballot in found),
            key=lambda ballot: (not ballot.notes, ballot.result.test_accuracy()),
        )
        result = best.result
        seeds = f"seeds {result.seeds[0]} to {result.seeds[-1]}"
        title = f"the plurality vote of {len(result.seeds)} networks (vote {result.experiment}, {seeds})"
        return Classifier(title, result.labels, result.predictions["plurality"], best.notes)
    group = max(
        (group for found in groups.values() for group in found),
        key=lambda group: (not group.notes, group.best.test_accuracy),
    )
    return Classifier(
        f"the best single network (experiment {group.name}, seed {group.best.seed})",
        group.best.labels,
        group.best.predictions,
        group.notes,
    )


# ------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------


def _sections(results: Results, test: Data) -> list[Section]:
    groups, ballots = _groups(results), _ballots(results)
    if not groups:
        raise DataError(
            f"{results.path}: expected finished runs, but found none; `python -m pyconv book run 6` makes some"
        )
    classifier = _classifier(groups, ballots)
    return [
        _summary(results, groups, ballots),
        _every_run(groups),
        *_votes(ballots),
        *_learning_curves(groups),
        _activations(groups),
        _overfitting(groups),
        _mistakes(classifier, test),
        _confusion(classifier),
        _filters(results, groups),
        _reproduction(groups, ballots),
    ]


def _summary(
    results: Results, groups: dict[str, list[Group]], ballots: dict[str, list[Ballot]]
) -> Section:
    columns = (
        "Experiment", "Status", ">Book", ">Mean", ">Best", ">Best minus book", ">Wrong digits, best", ">Runs",
        ">Epochs", ">Training images", ">Time per epoch", ">Fastest epoch", ">Training time", "Network",
    )  # fmt: skip
    rows = []
    missing = []
    for name in _names():
        experiment = EXPERIMENTS[name]
        if name not in groups:
            missing.append(name)
            rows.append(_missing_row(results, name, experiment.book_accuracy, experiment.title, len(columns)))
        for group in groups.get(name, []):
            accuracies = [run.test_accuracy for run in group.runs]
            seconds = [second for run in group.runs for second in run.history["seconds"]]
            of_run = [sum(run.history["seconds"]) for run in group.runs]
            rows.append(
                [
                    Cell(name), _status(group.notes),
                    *_accuracy_cells(experiment.book_accuracy, accuracies, group.notes),
                    Cell(_wrong(group.best.labels, group.best.predictions)), Cell(f"{len(group.runs)}"),
                    Cell(f"{group.epochs}"), Cell(f"{group.training_images:,}"),
                    Cell(_duration(statistics.median(seconds))), Cell(_duration(min(seconds))),
                    Cell(_duration(statistics.median(of_run))),
                    Cell(experiment.title),
                ]
            )  # fmt: skip
    for name, vote in VOTES.items():
        found = ballots.get(name, [])
        if not found:
            missing.append(name)
            rows.append(_missing_row(results, name, vote.book_accuracy, vote.title, len(columns)))
            continue
        notes = list(dict.fromkeys(note for ballot in found for note in ballot.notes))
        best = max((ballot.result for ballot in found), key=VoteResult.test_accuracy)
        rows.append(
            [
                Cell(name), _status(notes),
                *_accuracy_cells(vote.book_accuracy, [ballot.result.test_accuracy() for ballot in found], notes),
                Cell(_wrong(best.labels, best.predictions["plurality"])), Cell(f"{len(found)}"), *[Cell("")] * 5,
                Cell(vote.title),
            ]
        )  # fmt: skip
    blocks: list[Block] = [
        Text(
            "Accuracies are fractions of the test digits, by the network of the epoch that did best on the validation "
            "data; the test data are not looked at before. The book reports the best of three runs, so what to "
            "compare with it is the best; the mean says more. Time per epoch is the median over all epochs, training "
            "time the median over the runs, both without the evaluation after each epoch; where other programs slowed "
            "the machine down, the fastest epoch says what it can do. Complete are runs over all epochs on MNIST. The "
            "book has no experiments best and best-vote: they are our best recipe."
        )
    ]
    size = max(len(run.labels) for found in groups.values() for group in found for run in group.runs)
    error = 200.0 * (0.99 * 0.01 / size) ** 0.5
    blocks.append(
        Text(
            f"Two standard errors of an accuracy of 99% on {size:,} test digits are {error:.2f} points: smaller "
            f"differences between two networks say little."
        )
    )
    blocks.append(Table("Results of all experiments", columns, rows, "summary"))
    if missing:
        blocks += [
            Text(f"Without a result here: {', '.join(missing)}. What trains them:"),
            Commands([_command(missing)]),
        ]
    return Section("Results", blocks)


def _missing_row(
    results: Results, name: str, book_accuracy: float | None, title: str, columns: int
) -> list[Cell]:
    begun = any((results.path / name).glob("[0-9]*"))
    cells = [Cell(name), Cell("", ["not finished" if begun else "not run"]), Cell(_book(book_accuracy))]
    return [*cells, *[Cell("")] * (columns - len(cells) - 1), Cell(title)]


def _status(notes: Sequence[str]) -> Cell:
    return Cell("", notes) if notes else Cell("complete")


def _book(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2f}%"


def _accuracy_cells(book: float | None, accuracies: Sequence[float], notes: Sequence[str]) -> list[Cell]:
    """Book, mean, best, and by how much the best is above the book's where the two may be compared."""
    best = max(accuracies)
    difference = "" if book is None or notes else _signed(100.0 * best - book)
    return [Cell(_book(book)), Cell(_percent(statistics.mean(accuracies))), Cell(_percent(best)), Cell(difference)]


def _every_run(groups: dict[str, list[Group]]) -> Section:
    columns = (
        "Experiment", ">Seed", "Status", ">Test accuracy", ">Wrong digits", ">Validation accuracy", ">Best epoch",
        ">Parameters", ">Time per epoch", ">Fastest epoch", ">Training time",
    )  # fmt: skip
    rows = []
    for found in groups.values():
        for group in found:
            for run in group.runs:
                seconds = run.history["seconds"]
                rows.append(
                    [
                        Cell(run.experiment), Cell(f"{run.seed}"), _status(group.notes),
                        Cell(_percent(run.test_accuracy)), Cell(_wrong(run.labels, run.predictions)),
                        Cell(_percent(run.history.best_validation_accuracy)), Cell(f"{run.history.best_epoch}"),
                        Cell(f"{run.parameters:,}"), Cell(_duration(statistics.median(seconds))),
                        Cell(_duration(min(seconds))), Cell(_duration(sum(seconds))),
                    ]
                )  # fmt: skip
    text = Text("Epochs count from 0, as the book's program prints them.")
    return Section("Every run", [text, Table("Every run", columns, rows)], level=3)


def _votes(ballots: dict[str, list[Ballot]]) -> list[Section]:
    sections = []
    for name, vote in VOTES.items():
        title = f"Vote {name}: {vote.title}"
        if name not in ballots:
            sections.append(Section(title, [Text(f"Without a result; what trains it: `{_command([name])}`.")], level=3))
            continue
        rows = []
        for ballot in ballots[name]:
            result = ballot.result
            group = f"{result.number}"
            for way in WAYS:
                rows.append(
                    [
                        Cell(group), Cell(way), _status(ballot.notes), Cell(_percent(result.test_accuracy(way))),
                        Cell(_wrong(result.labels, result.predictions[way])),
                    ]
                )  # fmt: skip
            members = {run.seed: run for run in ballot.members}
            for seed in result.seeds:
                run = members.get(seed)
                cells = [Cell(group), Cell(f"seed {seed}")]
                if run is None:
                    cells += [Cell("", ["its run is not there"]), Cell(""), Cell("")]
                else:
                    cells += [
                        _status(Group(run.experiment, [run]).notes), Cell(_percent(run.test_accuracy)),
                        Cell(_wrong(run.labels, run.predictions)),
                    ]  # fmt: skip
                rows.append(cells)
        columns = ("Group", "Classifier", "Status", ">Test accuracy", ">Wrong digits")
        text = (
            "In the plurality vote each network has one voice; of several digits with as many voices, and in the "
            "average, the highest mean probability decides. The networks stand below them, by their seeds."
        )
        if vote.book_accuracy is not None:
            text += f" The book's vote gets {_book(vote.book_accuracy)} right."
        sections.append(Section(title, [Text(text), Table(title, columns, rows)], level=3))
    return sections


def _learning_curves(groups: dict[str, list[Group]]) -> list[Section]:
    text = (
        "Each run is a thin line, the mean of an experiment's runs a thick one; the values' axes are logarithmic. "
        "The training cost is the mean over the mini-batches of an epoch, with the L2 term."
    )
    sections = [Section("Learning curves", [Text(text)])]
    known = {_TANH, *(experiment for *_, experiments in _CURVES for experiment in experiments)}
    others = [experiment for experiment in groups if experiment not in known]
    further = [
        ("Further experiments", f"further-{start}", others[start : start + _CURVES_TOGETHER])
        for start in range(0, len(others), _CURVES_TOGETHER)
    ]
    for title, name, experiments in (*_CURVES, *further):
        shown = [groups[experiment][0] for experiment in experiments if experiment in groups]
        blocks: list[Block] = [_curves(name, shown)] if shown else []
        missing = [experiment for experiment in experiments if experiment not in groups]
        if missing:
            blocks.append(Text(_not_shown(missing)))
        sections.append(Section(title, blocks, level=3))
    return sections


def _curves(name: str, shown: Sequence[Group]) -> Pictures:
    """The validation error and the training cost of some groups."""
    pictures = []
    what: tuple[tuple[str, str, str, Callable[[Run], list[float]]], ...] = (
        ("error", "Validation error", "validation error, %", _errors),
        ("cost", "Training cost", "training cost", lambda run: run.history["train_cost"]),
    )
    for kind, title, axis, values in what:
        series = []
        said = []
        for group in shown:
            runs = [values(run) for run in group.runs]
            series.append(figures.Series(f"{group.name}: {_short(group.experiment)}, {_count(len(runs), 'run')}", runs))
            first, last = (statistics.mean(run[epoch] for run in runs) for epoch in (0, -1))
            said.append(f"experiment {group.name} goes from {first:.3g} to {last:.3g}")
        experiments = "experiment" if len(shown) == 1 else "experiments"
        caption = f"{title} after each epoch, {experiments} {_listed([group.name for group in shown])}."
        pictures.append(
            Picture(
                f"{name}-{kind}",
                figures.curves(series, axis),
                f"Line chart of the {axis}, over the epochs: {'; '.join(said)}.",
                caption,
                _marks(shown),
            )
        )
    return Pictures(pictures)


def _errors(run: Run) -> list[float]:
    return [100.0 * (1.0 - accuracy) for accuracy in run.history["validation_accuracy"]]


def _activations(groups: dict[str, list[Group]]) -> Section:
    title = "tanh against sigmoid"
    names = (_TANH, _SIGMOID)
    missing = [name for name in names if name not in groups]
    if missing:
        needed = f"This comparison needs experiments {_TANH} and {_SIGMOID}."
        return Section(title, [Text(f"{needed} {_not_shown(missing)}")])
    shown = [groups[name][0] for name in names]
    rows = []
    for group in shown:
        cells = [Cell(f"{group.name}: {_short(group.experiment)}"), Cell(f"{len(group.runs)}")]
        for epochs in _COMPARED_EPOCHS:
            if group.epochs < epochs:
                cells.append(Cell("", [f"trained for {group.epochs} only"]))
            else:
                accuracies = [run.history["validation_accuracy"][epochs - 1] for run in group.runs]
                cells.append(Cell(_percent(statistics.mean(accuracies))))
        rows.append([*cells, Cell(_percent(statistics.mean(run.test_accuracy for run in group.runs)))])
    columns = (
        "Experiment", ">Runs", *(f">Validation, {epochs} epochs" for epochs in _COMPARED_EPOCHS), ">Test, best epoch"
    )  # fmt: skip
    text = (
        "The same network with the two activation functions: the problem of the chapter that asks for the accuracies "
        "after 20 and after 60 epochs. Accuracies are means over the runs."
    )
    table = Table(title, columns, rows)
    return Section(title, [Text(text, _marks(shown)), table, _curves("tanh-sigmoid", shown)])


def _overfitting(groups: dict[str, list[Group]]) -> Section:
    said = []
    for found in groups.values():
        for group in found:
            diagnoses: dict[int, Diagnosis] = {run.seed: diagnose(run.history) for run in group.runs}
            overfit = sum(diagnosis.overfitting for diagnosis in diagnoses.values())
            notes = f" ({'; '.join(group.notes)})" if group.notes else ""
            said.append(
                (
                    f"Experiment {group.name}{notes}",
                    f"{diagnoses[group.best.seed]} These are the figures of seed {group.best.seed}, the best; "
                    f"overfitting: {overfit} of {_count(len(group.runs), 'run')}.",
                )
            )
    text = (
        "From the curves of each experiment (`pyconv.network3.diagnose`): the accuracy on what the network was trained "
        "on beside that on the validation data."
    )
    return Section("Overfitting", [Text(text), Facts(said)])


def _mistakes(classifier: Classifier, test: Data) -> Section:
    title = "The digits that are mistaken"
    wrong = classifier.wrong
    if not wrong:
        none = f"Of the {len(classifier.labels):,} test digits none is mistaken by {classifier.title}."
        return Section(title, [Text(none)])
    images, labels = test
    if "".join(map(str, labels.tolist())) != classifier.labels:
        return Section(
            title,
            [
                Text(
                    "Left out: the test digits at hand are not those of the runs. "
                    "`python -m pyconv book report --data PATH`, with the data of the runs, draws them."
                )
            ],
        )
    drawn = wrong[:_MOST_DIGITS]
    pairs = [(classifier.labels[i], classifier.predictions[i]) for i in drawn]
    side = round(images.shape[1] ** 0.5)
    svg = figures.digits(images[drawn].reshape(-1, side, side), *zip(*pairs))
    some = "all of them" if len(drawn) == len(wrong) else f"the first {len(drawn)} in the order of the test data"
    caption = (
        f"Of the {len(classifier.labels):,} test digits {len(wrong)} are mistaken by {classifier.title}; {some}. The "
        f"label stands top right, the prediction bottom right."
    )
    alt = f"{len(drawn)} handwritten digits, label and prediction: {', '.join(map(' as '.join, pairs))}."
    return Section(title, [Pictures([Picture("mistaken-digits", svg, alt, caption, classifier.notes)])])


def _confusion(classifier: Classifier) -> Section:
    counts = [[0] * 10 for _ in range(10)]
    for i in classifier.wrong:
        counts[int(classifier.labels[i])][int(classifier.predictions[i])] += 1
    most = max(max(row) for row in counts)
    rows = []
    for label, row in enumerate(counts):
        cells = [Cell(f"{count or ''}", shade=-(-4 * count // most) if count else 0) for count in row]
        cells[label] = Cell("\N{MIDDLE DOT}")
        rows.append([Cell(f"{label}"), *cells, Cell(f"{sum(row)}"), Cell(f"{classifier.labels.count(str(label)):,}")])
    columns = ("Label", *(f">{digit}" for digit in range(10)), ">Errors", ">Of")
    text = Text(
        f"Errors of {classifier.title}: labels in rows, predictions in columns, and at the end how many of the digits "
        f"with this label are mistaken.",
        classifier.notes,
    )
    return Section("Confusion matrix", [text, Table("Confusion matrix", columns, rows, "confusion")])


def _filters(results: Results, groups: dict[str, list[Group]]) -> Section:
    title = "What the filters have learned"
    found = [group for name in groups if EXPERIMENTS[name].filters for group in groups[name]]
    best_first = sorted(
        ((group, run) for group in found for run in group.runs),
        key=lambda pair: (pair[0].name == _FILTERS_OF, not pair[0].notes, pair[1].test_accuracy),
        reverse=True,
    )
    for group, run in best_first:
        try:
            network = results.network(run.experiment, run.seed)
        except FileNotFoundError:
            continue
        whose = f"of experiment {run.experiment}, seed {run.seed}"
        layers = [layer for layer in network.layers if isinstance(layer, ConvPoolLayer)]
        return Section(title, [Pictures([_filter_picture(i, layer, whose, group) for i, layer in enumerate(layers)])])
    if found:
        reason = "the networks (best.safetensors) of all runs with convolutional layers are gone from the results"
    else:
        reason = "no network with convolutional layers has been trained"
    return Section(title, [Text(f"Left out: {reason}. What trains one: `{_command([_FILTERS_OF])}`.")])


def _filter_picture(number: int, layer: ConvPoolLayer, whose: str, group: Group) -> Picture:
    weights: Tensor = layer.w.detach().float()
    count, maps, height, width = weights.shape
    ordinal = ("first", "second")[number] if number < 2 else f"{number + 1}th"
    size = f"{count} filters of {height}x{width}" if maps == 1 else f"{count} filters of {maps}x{height}x{width}"
    arrangement = "" if maps == 1 else f", a row for each filter and a column for each of the {maps} maps below"
    limit = float(weights.abs().quantile(_FILTER_QUANTILE)) or 1.0
    return Picture(
        f"filters-{number + 1}",
        figures.filters(weights, limit),
        f"{size} as grey squares.",
        f"The {ordinal} convolutional layer {whose}: {size}{arrangement}. The darker, the larger the weight: black is "
        f"{limit:.2f} or more, white {_MINUS}{limit:.2f} or less.",
        group.notes,
    )


def _reproduction(groups: dict[str, list[Group]], ballots: dict[str, list[Ballot]]) -> Section:
    alike: dict[_Options, list[str]] = {}
    machines: dict[str, list[Run]] = {}
    for name, found in groups.items():
        for group in found:
            runs = max(run.seed for run in group.runs) + 1
            alike.setdefault(_Options.of(runs, group.runs), []).append(name)
            for run in group.runs:
                machines.setdefault(json.dumps(run.machine, sort_keys=True), []).append(run)
    for name, votes in ballots.items():
        members = [run for ballot in votes for run in ballot.members]
        runs = max(ballot.result.number for ballot in votes) + 1
        alike.setdefault(_Options.of(runs, members), []).append(name)
    commands = [_command(names, options) for options, names in alike.items()]
    facts = []
    for described, runs_there in machines.items():
        by_experiment: dict[str, list[str]] = {}
        for run in runs_there:
            by_experiment.setdefault(run.experiment, []).append(str(run.seed))
        whose = "; ".join(
            f"{name} ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)})"
            for name, seeds in by_experiment.items()
        )
        machine = json.loads(described)
        cores, threads = _count(machine["cores"], "core"), _count(machine["threads"], "thread")
        facts += [
            ("Experiments", whose),
            ("CPU", f"{machine['cpu']}, {cores}, {threads} used"),
            ("Versions", f"pyconv {machine['pyconv']} ({machine['isa']} kernels), PyTorch {machine['torch']}"),
        ]
    text = (
        "The same seed gives the same network again, with the same versions and the same instruction set, for any "
        "number of threads and through interruptions; finished runs are not trained again."
    )
    blocks = [
        Text(text),
        Commands([*commands, f"python -m pyconv book report --data {next(iter(alike)).data}"]),
        Text("Where the runs were trained:"),
        Facts(facts),
    ]
    return Section("Reproduce it", blocks)


# ------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    """Of ``book run``; None is its default."""

    runs: int | None = None
    epochs: int | None = None
    threads: int | None = None
    data: str = "PATH-TO-MNIST"

    @classmethod
    def of(cls, number: int, runs: Sequence[Run]) -> _Options:
        """Those that gave the runs of one experiment."""
        if not runs:
            return cls(number)
        epochs, planned = runs[0].settings["epochs"], EXPERIMENTS[runs[0].experiment].epochs
        threads = {run.machine["threads"] for run in runs}
        data = runs[0].data
        return cls(
            number,
            None if epochs == planned else epochs,
            threads.pop() if len(threads) == 1 else None,
            cls.data if data == MNIST else "digits" if data == DIGITS else "PATH-TO-THESE-DATA",
        )


def _command(names: Sequence[str], options: _Options = _Options()) -> str:
    given = [f"--{name} {value}" for name, value in vars(options).items() if value is not None]
    return " ".join(["python -m pyconv book run", *names, *given])


def _not_shown(names: Sequence[str]) -> str:
    return f"Not shown, as without a finished run: {_listed(names)} (`{_command(names)}`)."


def _short(experiment: Experiment) -> str:
    """For example "2 conv, FC 100, ReLU, expanded"."""
    parts = [f"{len(experiment.filters)} conv"] if experiment.filters else []
    parts += [f"FC {'-'.join(map(str, experiment.hidden))}"] if experiment.hidden else []
    parts.append(experiment.activation_fn.__name__)
    parts += ["dropout"] if experiment.p_dropout else []
    parts += ["expanded"] if experiment.expanded else []
    return ", ".join(parts)


def _marks(groups: Sequence[Group]) -> list[str]:
    """The notes of the groups, with their names where a note is not all groups'."""
    by_note: dict[str, list[str]] = {}
    for group in groups:
        for note in group.notes:
            by_note.setdefault(note, []).append(group.name)
    return [note if len(names) == len(groups) else f"{_listed(names)}: {note}" for note, names in by_note.items()]


def _listed(names: Sequence[str]) -> str:
    """For example "1, 2 and 4"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _wrong(labels: str, predictions: str) -> str:
    return f"{sum(p != label for p, label in zip(predictions, labels))} of {len(labels):,}"


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}"


def _signed(points: float) -> str:
    text = f"{abs(points):.2f}"
    return text if text == "0.00" else f"{_MINUS if points < 0 else '+'}{text}"


def _duration(seconds: float) -> str:
    """Three digits or so, in the largest unit of which there are two."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def render(results: Results, test: Data) -> dict[str, str]:
    """The files of the page by their paths, with "/", below its directory; the same for the same results.

    Args:
        test: (x, y), for the drawings of digits, where they are those of the runs.

    Raises:
        DataError: there is no finished run, or a file that is not one of a run.
    """
    return page.render(_sections(results, test))


def write(results: Results, test: Data, output: str | os.PathLike[str]) -> Path:
    """Write the files of `render` below the directory `output`, which is made where it is missing, and return it.

    Raises:
        DataError: as `render`; nothing is written then.
        OSError: a file cannot be written.
    """
    files = render(results, test)
    directory = Path(output)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
    return directory
