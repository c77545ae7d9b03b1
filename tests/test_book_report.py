"""``python -m pyconv book report`` on made-up runs: what the page says, leaves out and draws, and how it looks."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from pyconv import cli
from pyconv.book import runs
from pyconv.errors import DataError
from pyconv.network3 import History, diagnose, load_data_shared, load_digits
from pyconv.network3.descent import fingerprint
from pyconv.network3.experiments import EXPERIMENTS, VOTES

pytest.importorskip("safetensors")
matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from pyconv.book import figures, report  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = '<script>alert("x")</script> | *bold* `code` & [link](http://example.com)'
MNIST_PATH = os.environ.get("PYCONV_DATA")
LABELS = "0123456789" * 20
MACHINE = {"cpu": "CPU of the test", "cores": 4, "threads": 1, "isa": "avx2", "pyconv": "0.1.0", "torch": "2.13.0"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYCONV_DATA", raising=False)


@pytest.fixture
def results(tmp_path):
    return runs.Results(tmp_path / "book-results")


@pytest.fixture(scope="module")
def test_data():
    images = torch.randint(256, (len(LABELS), 784), generator=torch.Generator().manual_seed(0))
    return images / 256.0, torch.tensor([int(label) for label in LABELS])


def predictions(wrong):
    """The labels, but for {number of a digit: prediction}."""
    return "".join(wrong.get(number, label) for number, label in enumerate(LABELS))


def made_up(experiment, seed, wrong, *, epochs=None, data=report.MNIST, machine=MACHINE):
    """A run whose validation error falls as 10 % / epoch, from seed to seed slower."""
    epochs = epochs or EXPERIMENTS[experiment].epochs
    history = History()
    for epoch in range(epochs):
        error = 0.1 / (1 + epoch) * (1 + 0.2 * seed)
        history._append(
            {
                "epoch": epoch,
                "eta": 0.1,
                "train_cost": 2 * error,
                "train_accuracy": 1 - error / 10,
                "validation_cost": 3 * error,
                "validation_accuracy": 1 - error,
                "test_accuracy": None,
                "seconds": 10.0 + seed + (epoch == 0),
            }
        )
    history.validation_size = 10_000
    history.best_validation_accuracy, history.best_epoch = history["validation_accuracy"][-1], epochs - 1
    settings = {"epochs": epochs, "eta": 0.1}
    return runs.Run(experiment, seed, settings, data, 1234, history, LABELS, predictions(wrong), machine)


def save(results, *made):
    for run in made:
        results.save_run(run)
        torch.manual_seed(run.seed)
        experiment = EXPERIMENTS[run.experiment]
        small = dataclasses.replace(experiment, hidden=()) if experiment.hidden else experiment
        small.network().save(results.directory(run.experiment, run.seed) / "best.safetensors")


@pytest.fixture(scope="module")
def everything(tmp_path_factory, test_data):
    """Two runs of each experiment, five of those that vote, and the votes; and the files of their page."""
    results = runs.Results(tmp_path_factory.mktemp("results"))
    voting = {vote.experiment for vote in VOTES.values()}
    for name in EXPERIMENTS:
        if name != "demo":
            save(results, *(made_up(name, seed, {seed: "9", 12: "7"}) for seed in range(5 if name in voting else 2)))
    voted = {"plurality": predictions({12: "7"}), "average": predictions({12: "7", 13: "8"})}
    for name in VOTES:
        results.save_vote(runs.VoteResult(name, 0, list(range(5)), LABELS, voted))
    return results, report.render(results, test_data)


class Page(HTMLParser):
    """A page that is read, its tables by their labels; every element must be closed where it should be."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.elements, self.text = [], {}, [], []
        self._cell = self._rows = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag in self.VOID:
            return
        self.open.append(tag)
        if tag == "div" and attributes.get("class") == "scroll":
            self._rows = self.tables[attributes["aria-label"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "dt":
            self.text.append(" ")
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def said(self):
        return " ".join("".join(self.text).split())

    def rows(self, title, **filters):
        """Rows of a table as {column: text}; `filters` by column, with "_" for a space."""
        head, *rows = self.tables[title]
        found = [dict(zip(head, row)) for row in rows]
        wanted = {name.replace("_", " "): text for name, text in filters.items()}
        return [row for row in found if all(row[name] == text for name, text in wanted.items())]

    def row(self, title, **filters):
        (found,) = self.rows(title, **filters)
        return found


def markdown_tables(text):
    """The tables of a Markdown page, as lists of rows of cells."""
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables]


def page_of(results, test_data):
    return Page(report.render(results, test_data)["report.html"])


SUMMARY = "Results of all experiments"

# ------------------------------------------------------------------------------------------------------------
# What the page says
# ------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_figures_of_the_runs_beside_the_books(results, test_data):
    save(results, made_up("6", 0, {3: "5"}), made_up("6", 1, {3: "5", 4: "9", 8: "3", 9: "4"}), made_up("6", 4, {}))
    page = page_of(results, test_data)
    row = page.row(SUMMARY, Experiment="6")
    assert row["Status"] == "complete"
    assert (row["Book"], row["Mean"], row["Best"]) == ("99.23%", "99.17%", "100.00%")
    assert (row["Best minus book"], row["Wrong digits, best"]) == ("+0.77", "0 of 200")
    assert (row["Runs"], row["Epochs"], row["Training images"]) == ("3", "60", "50,000")
    # 60 epochs of 10, 11 and 14 seconds, the first of each a second longer.
    assert (row["Time per epoch"], row["Fastest epoch"], row["Training time"]) == ("11.0 s", "10.0 s", "11.0 min")
    single = [
        (row["Seed"], row["Test accuracy"], row["Wrong digits"], row["Validation accuracy"], row["Best epoch"])
        for row in page.rows("Every run")
    ]
    assert single == [
        ("0", "99.50%", "1 of 200", "99.83%", "59"),
        ("1", "98.00%", "4 of 200", "99.80%", "59"),
        ("4", "100.00%", "0 of 200", "99.70%", "59"),
    ]
    assert {row["Parameters"] for row in page.rows("Every run")} == {"1,234"}


def test_a_worse_best_is_below_the_books(results, test_data):
    save(results, made_up("7", 0, {3: "5", 4: "9"}))
    row = page_of(results, test_data).row(SUMMARY, Experiment="7")
    assert (row["Best"], row["Best minus book"]) == ("99.00%", "\N{MINUS SIGN}0.37")
    assert row["Training images"] == "250,000"


def test_runs_unlike_the_books_are_marked_and_not_averaged_with_others(results, test_data):
    save(results, made_up("6", 0, {3: "5", 4: "5"}, epochs=2), made_up("6", 1, {3: "5"}))
    save(results, made_up("1", 0, {3: "5"}, data=report.DIGITS), made_up("2", 0, {}, epochs=2, data=report.DIGITS))
    files = report.render(results, test_data)
    page = Page(files["report.html"])
    full, short = page.rows(SUMMARY, Experiment="6")
    assert (full["Status"], full["Mean"], full["Best minus book"]) == ("complete", "99.50%", "+0.27")
    assert (short["Status"], short["Mean"], short["Best minus book"]) == ("2 of 60 epochs", "99.00%", "")
    assert page.row(SUMMARY, Experiment="1")["Status"] == "not MNIST"
    assert page.row(SUMMARY, Experiment="1")["Training images"] == "1,197"
    assert page.row(SUMMARY, Experiment="2")["Status"] == "2 of 60 epochs not MNIST"
    assert [row["Status"] for row in page.rows("Every run", Experiment="6")] == ["complete", "2 of 60 epochs"]
    assert "experiments 1 and 2. not MNIST 2: 2 of 60 epochs" in page.said(), "in the caption of the curves"
    assert "Experiment 2 (2 of 60 epochs; not MNIST)" in page.said(), "beside the diagnosis"
    assert "**2 of 60 epochs**, **not MNIST**" in files["report.md"]


def test_a_setting_that_an_older_run_lacks_had_its_default(results, test_data):
    older, newer, other = (made_up("6", seed, {}) for seed in range(3))
    newer.settings["p_dropout"], other.settings["p_dropout"] = 0.0, 0.5
    save(results, older, newer, other)
    assert [row["Runs"] for row in page_of(results, test_data).rows(SUMMARY, Experiment="6")] == ["2", "1"]


def test_experiments_beyond_the_book_have_curves_too(results, test_data, monkeypatch):
    for number in range(5):
        monkeypatch.setitem(EXPERIMENTS, f"mine-{number}", EXPERIMENTS["1"])
        save(results, made_up(f"mine-{number}", 0, {}))
    files = report.render(results, test_data)
    assert "experiments mine-0, mine-1, mine-2 and mine-3." in files["report.md"]
    assert texts_in(files["figures/further-0-error.svg"])[-1] == "mine-3: FC 100, sigmoid, 1 run"
    assert texts_in(files["figures/further-4-cost.svg"])[-1] == "mine-4: FC 100, sigmoid, 1 run"


def test_what_was_not_run_is_said(results, test_data):
    save(results, made_up("6", 0, {3: "5"}))
    (results.path / "7" / "0").mkdir(parents=True)
    page = page_of(results, test_data)
    assert page.row(SUMMARY, Experiment="7")["Status"] == "not finished"
    assert page.row(SUMMARY, Experiment="1")["Status"] == "not run"
    assert page.row(SUMMARY, Experiment="11")["Book"] == "99.67%"
    said = page.said()
    missing = [name for name in (*EXPERIMENTS, *VOTES) if name not in ("demo", "6")]
    assert f"Without a result here: {', '.join(missing)}." in said
    assert f"python -m pyconv book run {' '.join(missing)} --data PATH-TO-MNIST" in said
    assert "Without a result; what trains it: python -m pyconv book run 11 --data PATH-TO-MNIST." in said
    command = "python -m pyconv book run 7 8-300 8-1000 --data PATH-TO-MNIST"
    assert f"Not shown, as without a finished run: 7, 8-300 and 8-1000 ({command})." in said
    assert "This comparison needs experiments 5 and 4. Not shown, as without a finished run: 5 and 4" in said


def test_with_everything_run_nothing_is_missing(everything):
    _, files = everything
    page = Page(files["report.html"])
    assert {row["Status"] for row in page.rows(SUMMARY)} == {"complete"}
    assert not re.search("not run|Not shown|Left out|Without a result", page.said())
    assert len([name for name in files if name.startswith("figures/")]) == 13


def test_votes_stand_beside_their_members(results, test_data):
    save(results, *(made_up("10", seed, {seed: "9", 12: "7"}) for seed in range(4)))
    voted = {"plurality": predictions({12: "7"}), "average": predictions({12: "7", 13: "8"})}
    results.save_vote(runs.VoteResult("11", 0, [0, 1, 2, 3, 4], LABELS, voted))
    page = page_of(results, test_data)
    title = "Vote 11: plurality vote of five networks of experiment 10"
    rows = [(row["Classifier"], row["Test accuracy"], row["Wrong digits"]) for row in page.rows(title)]
    assert rows[:2] == [
        ("plurality", "99.50%", "1 of 200"),
        ("average", "99.00%", "2 of 200"),
    ]
    assert rows[2:6] == [(f"seed {seed}", "99.00%", "2 of 200") for seed in range(4)]
    assert rows[6] == ("seed 4", "", "")
    assert page.rows(title)[6]["Status"] == "its run is not there"
    row = page.row(SUMMARY, Experiment="11")
    assert (row["Book"], row["Mean"], row["Wrong digits, best"]) == ("99.67%", "99.50%", "1 of 200")
    assert row["Status"] == page.rows(title)[0]["Status"] == "1 of 5 runs are not there"


def test_tanh_and_sigmoid_after_20_and_60_epochs(results, test_data):
    save(results, made_up("5", 0, {}), made_up("5", 1, {}), made_up("4", 0, {1: "7"}, epochs=30))
    page = page_of(results, test_data)
    tanh, sigmoid = page.rows("tanh against sigmoid")
    # Errors of 0.5 % and 0.6 % after 20 epochs, a third of that after 60.
    assert (tanh["Experiment"], tanh["Runs"]) == ("5: 2 conv, FC 100, tanh", "2")
    assert (tanh["Validation, 20 epochs"], tanh["Validation, 60 epochs"]) == ("99.45%", "99.82%")
    assert (sigmoid["Validation, 20 epochs"], sigmoid["Validation, 60 epochs"]) == ("99.50%", "trained for 30 only")
    assert (tanh["Test, best epoch"], sigmoid["Test, best epoch"]) == ("100.00%", "99.50%")


def test_the_diagnosis_is_that_of_the_best_run(results, test_data):
    made = made_up("6", 0, {3: "5", 4: "5"}), made_up("6", 1, {3: "5"})
    made[0].history["train_accuracy"][-1] = made[0].history["validation_accuracy"][-1]
    made[1].history["validation_accuracy"][-1], made[1].history["train_accuracy"][-1] = 0.98, 1.0
    save(results, *made)
    assert [diagnose(run.history).overfitting for run in made] == [False, True]
    said = page_of(results, test_data).said()
    assert f"{diagnose(made[1].history)} These are the figures of seed 1, the best; overfitting: 1 of 2 runs." in said


def test_the_confusion_matrix_counts_the_errors(results, test_data):
    save(results, made_up("6", 0, {3: "5", 13: "5", 23: "8", 100: "6"}), made_up("6", 1, dict.fromkeys(range(9), "9")))
    page = page_of(results, test_data)
    three = page.row("Confusion matrix", Label="3")
    assert (three["5"], three["8"], three["3"], three["9"]) == ("2", "1", "\N{MIDDLE DOT}", "")
    assert (three["Errors"], three["Of"]) == ("3", "20")
    assert [row["Errors"] for row in page.rows("Confusion matrix")] == ["1", "0", "0", "3", *["0"] * 6]


def test_the_command_that_makes_the_runs_again_and_the_machine(results, test_data):
    save(results, made_up("6", 0, {}), made_up("6", 2, {}), made_up("1", 0, {}, epochs=2, data=report.DIGITS))
    other = MACHINE | {"cpu": "another CPU", "threads": 2}
    save(results, made_up("7", 0, {}), made_up("7", 1, {}, machine=other))
    voted = dict.fromkeys(("plurality", "average"), LABELS)
    results.save_vote(runs.VoteResult("11", 1, [5, 6, 7, 8, 9], LABELS, voted))
    said = page_of(results, test_data).said()
    for command in (
        "python -m pyconv book run 6 --runs 3 --threads 1 --data PATH-TO-MNIST",
        "python -m pyconv book run 1 --runs 1 --epochs 2 --threads 1 --data digits",
        "python -m pyconv book run 7 11 --runs 2 --data PATH-TO-MNIST",  # 7 on two numbers of threads
    ):
        assert command in said
    assert "1 (seed 0); 6 (seeds 0, 2); 7 (seed 0) CPU CPU of the test, 4 cores, 1 thread used" in said
    assert "7 (seed 1) CPU another CPU, 4 cores, 2 threads used" in said
    assert "pyconv 0.1.0 (avx2 kernels), PyTorch 2.13.0" in said


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def image_in(svg):
    """RGBA pixels of the one image in an SVG."""
    from PIL import Image

    (encoded,) = re.findall(r'xlink:href="data:image/png;base64,\s*([^"]+)"', svg)
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))


def texts_in(svg):
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_mistaken_digits_are_drawn_with_label_and_prediction(results, test_data):
    save(results, made_up("6", 0, {17: "5", 103: "8"}), made_up("6", 1, dict.fromkeys(range(5), "9")))
    files = report.render(results, test_data)
    svg = files["figures/mistaken-digits.svg"]
    assert texts_in(svg) == ["7", "5", "3", "8"]
    pixels = image_in(svg)
    drawn = test_data[0][[17, 103]].reshape(2, 28, 28).numpy()
    for left, picture in ((0, drawn[0]), (41, drawn[1])):
        assert np.array_equal(pixels[:, left : left + 28, 3], np.rint(255 * np.maximum(picture, 0.06)))
    assert "2 handwritten digits, label and prediction: 7 as 5, 3 as 8." in files["report.md"]
    said = Page(files["report.html"]).said()
    assert "2 are mistaken by the best single network (experiment 6, seed 0); all of them." in said


def test_the_digits_of_a_vote_are_the_plurality_s(results, test_data):
    save(results, made_up("6", 0, {}))
    voted = {"plurality": predictions({12: "7"}), "average": predictions({13: "8"})}
    results.save_vote(runs.VoteResult("11", 0, list(range(5)), LABELS, voted))
    files = report.render(results, test_data)
    assert texts_in(files["figures/mistaken-digits.svg"]) == ["2", "7"]
    assert "the plurality vote of 5 networks (vote 11, seeds 0 to 4)" in files["report.md"]


def test_of_many_mistaken_digits_the_first_are_drawn(results, test_data):
    save(results, made_up("6", 0, dict.fromkeys(range(150), "0")))
    files = report.render(results, test_data)
    assert len(texts_in(files["figures/mistaken-digits.svg"])) == 2 * 120
    assert "135 are mistaken" in files["report.md"]
    assert "the first 120 in the order of the test data" in files["report.md"]


def test_no_mistaken_digit_is_no_figure(results, test_data):
    save(results, made_up("6", 0, {}))
    files = report.render(results, test_data)
    assert "figures/mistaken-digits.svg" not in files
    assert "Of the 200 test digits none is mistaken by the best single network" in files["report.md"]


@pytest.mark.parametrize("how", ["fewer", "others"])
def test_digits_of_other_data_are_not_drawn(how, results, test_data):
    save(results, made_up("6", 0, {17: "5"}))
    x, y = test_data
    other = (x[:50], y[:50]) if how == "fewer" else (x, y.roll(1))
    files = report.render(results, other)
    assert "figures/mistaken-digits.svg" not in files
    assert "Left out: the test digits at hand are not those of the runs." in files["report.md"]


def test_filters_of_both_layers_are_drawn(results, test_data):
    save(results, made_up("4", 0, {}), made_up("6", 0, {1: "3"}), made_up("6", 1, {}))
    files = report.render(results, test_data)
    layers = results.network("6", 1).layers
    for number, (layer, rows, columns) in enumerate(((layers[0], 4, 5), (layers[1], 40, 20)), 1):
        weights = layer.w.detach()
        limit = float(weights.abs().quantile(0.98))
        pixels = image_in(files[f"figures/filters-{number}.svg"])
        assert pixels.shape == (6 * rows - 1, 6 * columns - 1, 4)
        last = weights.reshape(-1, 5, 5)[-1].numpy()
        expected = np.rint(127.5 * (1 - (last / np.float32(limit)).clip(-1, 1)))
        assert np.abs(pixels[-5:, -5:, 0].astype(float) - expected).max() <= 1  # a tie of rint, in another precision
        assert (pixels[5] == 0).all(), "the space between filters"
        assert f"black is {limit:.2f} or more" in files["report.md"]
    assert "The first convolutional layer of experiment 6, seed 1: 20 filters of 5x5." in files["report.md"]
    assert "The second convolutional layer of experiment 6, seed 1: 40 filters of 20x5x5" in files["report.md"]


def test_without_experiment_6_the_filters_are_those_of_the_best_network_that_is_there(results, test_data):
    save(results, made_up("1", 0, {}), made_up("2", 0, {1: "3"}), made_up("4", 0, {}))
    (results.directory("4", 0) / "best.safetensors").unlink()
    files = report.render(results, test_data)
    assert "The first convolutional layer of experiment 2, seed 0" in files["report.md"]
    assert "figures/filters-2.svg" not in files
    (results.directory("2", 0) / "best.safetensors").unlink()
    files = report.render(results, test_data)
    reason = "the networks (best.safetensors) of all runs with convolutional layers are gone from the results"
    assert f"Left out: {reason}." in files["report.md"]
    assert "figures/filters-1.svg" not in files


def test_without_a_convolutional_layer_no_filters_are_drawn(results, test_data):
    save(results, made_up("1", 0, {}))
    text = report.render(results, test_data)["report.md"]
    assert "Left out: no network with convolutional layers has been trained." in text
    assert "`python -m pyconv book run 6 --data PATH-TO-MNIST`" in text


def test_curves_have_a_thin_line_for_each_run_and_a_bold_mean():
    svg = figures.curves([figures.Series("one", [[4.0, 1.0], [2.0, 3.0]]), figures.Series("two", [[8.0, 4.0]])], "y")
    places = {
        width: [
            [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)]
            for path in re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke-width: {width};', svg)
        ]
        for width in ("0.7", "2.2")
    }
    first, second = places["0.7"]
    mean, alone = places["2.2"]
    # On a logarithmic axis: from 4 to 2, from 8 to 4 and from 2 to 1 it is as far.
    step = mean[0][1] - alone[0][1]
    assert step == pytest.approx((second[0][1] - first[0][1]) * np.log(8 / 3) / np.log(2))
    assert mean[1][1] - first[1][1] == pytest.approx(-(second[0][1] - first[0][1]))
    assert [x for x, _ in first] == [x for x, _ in mean]
    assert [text for text in texts_in(svg) if not text[0].isdecimal()] == ["epochs of training", "y", "one", "two"]


def test_curves_of_a_network_without_errors_are_drawn():
    assert "<svg" in figures.curves([figures.Series("perfect", [[0.0, 0.0]])], "validation error, %")


def test_filters_of_zeros_are_drawn(results, test_data):
    save(results, made_up("6", 0, {}))
    network = results.network("6", 0)
    with torch.no_grad():
        network.layers[0].w.zero_()
    network.save(results.directory("6", 0) / "best.safetensors")
    pixels = image_in(report.render(results, test_data)["figures/filters-1.svg"])
    assert set(pixels[:5, :5, 0].ravel()) == {128}


# ------------------------------------------------------------------------------------------------------------
# The files
# ------------------------------------------------------------------------------------------------------------


def test_the_html_page_needs_nothing_else(everything):
    text = everything[1]["report.html"]
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert ids and len(ids) == len(set(ids))
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {reference[:5] for reference in references if not reference.startswith("#")} == {"data:"}
    assert {reference[1:] for reference in references if reference[0] == "#"} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"https?:|@import|url\((?!#)|<script", text)
    assert len(text) < 3_000_000
    figures = [attributes for tag, attributes in page.elements if attributes.get("role") == "img"]
    tags = [tag for tag, _ in page.elements]
    assert len(figures) == tags.count("figure") == tags.count("figcaption") == tags.count("svg") == 13
    assert all(attributes["aria-label"] for attributes in figures)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    light, dark = (set(re.findall(r"(--[\w-]+):", scheme)) for scheme in style.split("prefers-color-scheme"))
    assert light == dark >= set(re.findall(r"var\((--[\w-]+)\)", text))


def test_the_markdown_page_and_its_figures(everything):
    _, files = everything
    text = files["report.md"]
    assert {f"figures/{name}.svg" for name in re.findall(r"\]\(figures/([\w-]+)\.svg\)", text)} == set(files) - {
        "report.md",
        "report.html",
    }
    tables = markdown_tables(text)
    assert len(tables) == 6
    for table in tables:
        assert len({len(row) for row in table}) == 1
    html = Page(files["report.html"])
    for table, (title, rows) in zip(tables, [entry for entry in html.tables.items() if entry[1]]):
        plain = [[re.sub(r"\\(.)|\*\*", r"\1", cell).strip() for cell in row] for row in table]
        assert [plain[0], *plain[2:]] == rows, title
    assert not re.search(r"[ \t]+$|\n\n\n", text, re.MULTILINE)


def test_what_files_say_is_text(results, test_data):
    save(results, made_up("6", 0, {}, machine=MACHINE | {"cpu": HOSTILE}))
    files = report.render(results, test_data)
    assert "<script" not in files["report.html"] and HOSTILE in Page(files["report.html"]).said()
    expected = (
        r'\<script\>alert("x")\</script\> \| \*bold\* \`code\` \& \[link\](http://example.com), 4 cores, 1 thread used'
    )
    assert expected in files["report.md"]


def test_the_same_runs_give_the_same_bytes(everything, test_data):
    results, first = everything
    with matplotlib.rc_context({"svg.hashsalt": None, "font.size": 30, "xtick.direction": "in"}):
        assert report.render(results, test_data) == first


def test_templates_are_installed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    package = ROOT / "pyconv"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pyconv"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in (package / "book").iterdir() if path.is_file() and path.suffix != ".py"}
    assert others and others <= installed


def test_the_digits_of_pyconv_have_the_fingerprints_of_the_page():
    data = dict(zip(("training", "validation", "test"), load_digits()))
    assert {name: fingerprint(part) for name, part in data.items()} == report.DIGITS


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def test_command_line(results, capsys):
    x, y = load_digits()[2]
    labels = "".join(map(str, y.tolist()))
    wrong = ("1" if labels[0] != "1" else "2") + labels[1:]
    save(results, dataclasses.replace(made_up("6", 0, {}, data=report.DIGITS), labels=labels, predictions=wrong))
    assert cli.main(["book", "report"]) == 0
    assert capsys.readouterr().out == "Wrote book-report/report.html and book-report/report.md\n"
    written = {
        str(path.relative_to("book-report")): path.read_bytes() for path in Path("book-report").rglob("*.*")
    }
    assert written == {name: text.encode() for name, text in report.render(results, (x, y)).items()}
    assert "figures/mistaken-digits.svg" in written
    assert cli.main(["book", "report", "--output", "other/place", "--results", str(results.path)]) == 0
    assert Path("other/place/report.md").read_bytes() == written["report.md"]


def test_places_that_are_not_there(results, capsys):
    def fails(code, *arguments):
        assert cli.main(["book", "report", *arguments]) == code
        return capsys.readouterr().err.splitlines()[-1]

    assert fails(1) == "pyconv: --results: there is no directory book-results"
    results.path.mkdir()
    expected = "expected finished runs, but found none; `python -m pyconv book run 6` makes some"
    assert fails(1) == f"pyconv: book-results: {expected}"
    assert not Path("book-report").exists()
    save(results, made_up("6", 0, {}))
    assert fails(1, "--data", "nowhere") == "pyconv: --data: there is no file or directory nowhere"
    Path("taken").write_text("")
    assert fails(2, "--output", "taken") == "pyconv: --output: expected a directory, but got the file taken"


@pytest.mark.parametrize("name", ["run.json", "vote.json"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"format": ', "expected JSON, found a damaged file"),
        (b"\xff\xfe", "expected JSON, found a damaged file"),
        (b"[]", "found another"),
        (b'{"format": "pyconv.book.run.9"}', "found another"),
        (None, "found a damaged one"),
    ],
)
def test_damaged_files_are_named(name, content, fault, results, test_data):
    path = results.directory("6" if name == "run.json" else "11", 0) / name
    path.parent.mkdir(parents=True)
    form = runs.RUN_FORMAT if name == "run.json" else runs.VOTE_FORMAT
    path.write_bytes(b'{"format": "%s", "history": {}}' % form.encode() if content is None else content)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}.*{fault}"):
        report.render(results, test_data)


@pytest.mark.parametrize("missing", [["matplotlib"], ["jinja2"], ["safetensors", "matplotlib", "jinja2"]])
def test_a_missing_extra_is_named(missing, results, monkeypatch, capsys):
    save(results, made_up("6", 0, {}))
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert cli.main(["book", "report"]) == 2
    named = " and ".join(missing)
    assert capsys.readouterr() == ("", f"pyconv: book report needs {named}: pip install 'pyconv[book]'\n")


@pytest.mark.mnist
@pytest.mark.skipif(not MNIST_PATH, reason="PYCONV_DATA is not set")
def test_mnist_has_the_fingerprints_of_the_page():
    data = dict(zip(("training", "validation", "test"), load_data_shared(MNIST_PATH)))
    assert {name: fingerprint(part) for name, part in data.items()} == report.MNIST


# ------------------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[360, 1280])
def width(request, browser):
    """Of the browser's window, in pixels."""
    metrics = {"width": request.param, "height": 800, "deviceScaleFactor": 2, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield request.param
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_does_not_scroll_sideways(width, browser, everything, tmp_path):
    (tmp_path / "report.html").write_text(everything[1]["report.html"], encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    table = browser.find_element("css selector", "table.summary")
    assert (table.size["width"] > width) == (width == 360), "a wide table scrolls in its frame"
    for picture in browser.find_elements("css selector", "figure svg"):
        assert 0 < picture.size["width"] <= width and picture.size["height"] > 0
    assert browser.get_log("browser") == []
