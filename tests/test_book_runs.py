"""``python -m pyconv book run`` and ``list``: what is trained, what is kept, and what goes on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

import pyconv
from pyconv import cli
from pyconv.book import command, runs
from pyconv.network3 import Ensemble, ReLU, experiments, load_digits
from pyconv.network3.experiments import Experiment, Vote

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

SMALL = Experiment((4,), (10,), ReLU, 0.1, 0.1, 3, p_dropout=0.5, init="he", book_accuracy=90.0, title="small")
EXPANDED = dataclasses.replace(SMALL, filters=(), expanded=True, epochs=1, title="expanded")


@pytest.fixture(autouse=True)
def small_experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYCONV_DATA", raising=False)
    small = {"1": SMALL, "2-a": EXPANDED, "2-b": EXPANDED}, {"3": Vote("vote", "1", 2, book_accuracy=91.0)}
    tables = experiments.EXPERIMENTS, experiments.VOTES
    saved = [dict(table) for table in tables]
    for table, entries in zip(tables, small):
        table.clear()
        table.update(entries)
    yield
    for table, entries in zip(tables, saved):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def data():
    def few(part, count):
        return part[0][:count], part[1][:count]

    return runs.MnistData(*(few(part, count) for part, count in zip(load_digits(), (200, 100, 100))))


def comparable(run):
    """Without times."""
    values = {**vars(run), "history": json.loads(run.history.to_json())}
    del values["history"]["seconds"]
    return values


def test_a_run_is_kept(data, tmp_path):
    results = runs.Results(tmp_path / "results")
    told = []
    run = runs.train(results, "1", 4, data, on_start=lambda *counts: told.append(counts), on_epoch=told.append)
    assert told[0] == (0, 3) and [record["epoch"] for record in told[1:]] == [0, 1, 2]
    again = results.run("1", 4)
    assert comparable(again) == comparable(run) and again.history == run.history
    assert sorted(path.name for path in results.directory("1", 4).iterdir()) == ["best.safetensors", "lock", "run.json"]

    network = results.network("1", 4)
    assert network.accuracy(data.validation) == run.history.best_validation_accuracy
    assert network.accuracy(data.test) == pytest.approx(run.test_accuracy)
    assert run.predictions == "".join(map(str, network.predict(data.test[0]).tolist()))
    assert run.labels == "".join(map(str, data.test[1].tolist()))
    assert run.parameters == sum(p.numel() for p in network.params)
    assert run.settings["activation_fn"] == "ReLU" and run.settings["epochs"] == 3
    assert run.history["train_accuracy"][0] is not None, "the diagnosis needs them"


def test_the_test_data_play_no_part_in_the_choice_of_the_epoch(data, tmp_path):
    other = dataclasses.replace(data, test=(data.test[0].flip(1), data.test[1]))
    first = runs.train(runs.Results(tmp_path / "a"), "1", 0, data)
    second = runs.train(runs.Results(tmp_path / "b"), "1", 0, other)
    assert first.history["validation_accuracy"] == second.history["validation_accuracy"]
    assert first.history.best_epoch == second.history.best_epoch
    assert first.predictions != second.predictions


def test_a_finished_run_is_not_trained_again(data, tmp_path, monkeypatch):
    results = runs.Results(tmp_path)
    run = runs.train(results, "1", 0, data)
    monkeypatch.setattr("pyconv.network3.Network.SGD", None)
    assert comparable(runs.train(results, "1", 0, data)) == comparable(run)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupted_run_goes_on(data, tmp_path, epoch):
    whole = runs.train(runs.Results(tmp_path / "whole"), "1", 2, data)

    def interrupt(record):
        if record["epoch"] == epoch:
            raise KeyboardInterrupt

    results = runs.Results(tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        runs.train(results, "1", 2, data, on_epoch=interrupt)
    assert results.run("1", 2) is None
    started = []
    run = runs.train(results, "1", 2, data, on_start=lambda *counts: started.append(counts))
    assert started == [(epoch + 1, 3)]
    assert comparable(run) == comparable(whole)


def test_seeds_differ_and_expanded_data_are_shuffled_by_them(data, tmp_path):
    results = runs.Results(tmp_path)
    a, b = (runs.train(results, "2-a", seed, data) for seed in (0, 1))
    assert a.history["train_cost"] != b.history["train_cost"]
    assert len(data.training_of(EXPANDED, 0)[0]) == 5 * len(data.training[0])
    assert not torch.equal(data.training_of(EXPANDED, 0)[0], data.training_of(EXPANDED, 1)[0])


def test_other_settings_and_data_are_refused(data, tmp_path):
    results = runs.Results(tmp_path)
    runs.train(results, "1", 0, data)
    with pytest.raises(ValueError, match="holds a run with other settings: expected epochs 2, found 3; take"):
        runs.train(results, "1", 0, data, epochs=2)
    with pytest.raises(ValueError, match="holds a run with other data: expected validation '.*', found '.*'; take"):
        runs.train(results, "1", 0, dataclasses.replace(data, validation=data.test))


def test_a_run_in_another_process_is_left_to_it(data, tmp_path):
    results = runs.Results(tmp_path)
    code = (
        "import sys\n"
        "from pyconv.book.runs import Results\n"
        "with Results(sys.argv[1]).locked('1', 0):\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(runs.BusyError, match="experiment 1, seed 0: another process trains it"):
        runs.train(results, "1", 0, data)
    other.communicate()
    assert runs.train(results, "1", 0, data).seed == 0


def test_a_vote(data, tmp_path):
    results = runs.Results(tmp_path)
    for seed in (2, 3):
        runs.train(results, "1", seed, data)
    result = runs.vote(results, "3", 1, data)
    assert result.seeds == [2, 3] and results.vote("3", 1) == result and results.votes("3") == [result]
    ensemble = Ensemble([results.network("1", seed) for seed in (2, 3)])
    for way in ("plurality", "average"):
        assert result.test_accuracy(way) == pytest.approx(ensemble.accuracy(data.test, way))


@pytest.mark.parametrize("content", ["", "[]", '{"format": "another"}'])
def test_damaged_and_foreign_results(data, tmp_path, content):
    results = runs.Results(tmp_path)
    results.directory("1", 0).mkdir(parents=True)
    (results.directory("1", 0) / "run.json").write_text(content)
    with pytest.raises(pyconv.DataError, match="run.json: expected"):
        results.run("1", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "2-a"}, "other experiment"),
        ({"seed": 1}, "other seed"),
        ({"settings": {"epochs": 9}}, "other settings"),
        ({"settings": {}}, "damaged"),
        ({"data": {"training": "?"}}, "other data"),
        ({"labels": ""}, "other labels"),
        ({"predictions": "1"}, "other predictions"),
        ({"predictions": [1]}, "other predictions"),
        ({"machine": {}}, "other machine"),
        ({"seed": None, "machine": None}, "damaged"),
    ],
    ids=str,
)
def test_runs_that_do_not_belong_there(data, tmp_path, change, message):
    results = runs.Results(tmp_path)
    runs.train(results, "1", 0, data, epochs=1)
    path = results.directory("1", 0) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(pyconv.DataError, match=f"run.json: expected .* found a .*{message}"):
        results.runs("1")


@pytest.mark.parametrize(
    "change",
    [{"experiment": "1"}, {"number": 2}, {"seeds": [2]}, {"labels": 3}, {"predictions": {"plurality": "1"}}],
    ids=str,
)
def test_votes_that_do_not_belong_there(data, tmp_path, change):
    results = runs.Results(tmp_path)
    for seed in (0, 1):
        runs.train(results, "1", seed, data, epochs=1)
    runs.vote(results, "3", 0, data)
    path = results.directory("3", 0) / "vote.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(pyconv.DataError, match="vote.json: expected "):
        results.votes("3")


def test_directories_of_other_names_are_no_runs(data, tmp_path):
    results = runs.Results(tmp_path)
    run = runs.train(results, "1", 0, data, epochs=1)
    for name in ("00", "\N{ARABIC-INDIC DIGIT ZERO}", "0x", "."):
        shutil.copytree(results.directory("1", 0), tmp_path / "1" / name, dirs_exist_ok=True)
    assert results.runs("1") == [run]


def test_a_run_of_more_epochs_than_asked_for_is_refused(data, tmp_path):
    def interrupt(record):
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    results = runs.Results(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        runs.train(results, "1", 0, data, epochs=3, on_epoch=interrupt)
    with pytest.raises(ValueError, match="expected epochs to be at least 2, which .* holds, but got 1"):
        runs.train(results, "1", 0, data, epochs=1)


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


def test_run_and_list(capsys, tmp_path):
    assert cli.main(["book", "run", "3", "2", "--runs", "1", "--epochs", "1", "--results", "r", "--threads", "1"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.partition(": test")[0] for line in lines[:-1]] == [
        "experiment 2-a, seed 0",
        "experiment 2-b, seed 0",
        "experiment 1, seed 0",
        "experiment 1, seed 1",
    ]
    assert lines[-1].startswith("experiment 3, seeds 0 to 1: plurality vote ")
    assert output.err.count("epoch 0: cost") == 4
    assert cli.main(["book", "list", "--results", "r"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["name", "1", "2-a", "2-b", "3", "*"]
    accuracies = [run.test_accuracy for run in runs.Results("r").runs("1")]
    assert "90.00%" in rows["1"] and f"{sum(accuracies) / 2:.2%} (2)" in rows["1"]
    assert "91.00%" in rows["3"]


def test_without_runs_an_experiment_takes_three_and_a_vote_one(capsys):
    assert cli.main(["book", "run", "2-a", "3", "--epochs", "1", "--results", "r"]) == 0
    results = runs.Results("r")
    assert [run.seed for run in results.runs("2-a")] == [0, 1, 2]
    assert [run.seed for run in results.runs("1")] == [0, 1]
    assert [vote.number for vote in results.votes("3")] == [0]


def test_list_marks_what_does_not_compare_with_the_book(data, tmp_path, capsys, monkeypatch):
    results = runs.Results(tmp_path)
    pair = [runs.train(results, "1", seed, data) for seed in (0, 1)]
    runs.vote(results, "3", 0, data)

    def listed():
        assert cli.main(["book", "list", "--results", str(tmp_path)]) == 0
        return capsys.readouterr().out.splitlines()

    mean = f"{sum(run.test_accuracy for run in pair) / 2:.2%} (2)"
    lines = listed()
    assert f"{mean}*" in lines[1] and "(1)*" in lines[4] and lines[-1].startswith("* with runs")
    monkeypatch.setattr(runs, "MNIST", pair[0].data)
    lines = listed()
    assert mean in lines[1] and len(lines) == 5 and "*" not in "".join(lines)
    runs.train(results, "1", 2, data, epochs=1)
    assert "(3)*" in listed()[1]


def test_an_interrupted_command(capsys, monkeypatch):
    train = runs.train

    def interrupted(*arguments, on_epoch, **options):
        def stop(record):
            on_epoch(record)
            raise KeyboardInterrupt

        return train(*arguments, on_epoch=stop, **options)

    command_line = ["book", "run", "1", "--runs", "1", "--results", "r"]
    monkeypatch.setattr(runs, "train", interrupted)
    assert cli.main(command_line) == 130
    assert "pyconv: the same command goes on after the last finished epoch\n" in capsys.readouterr().err
    assert cli.main(["book", "list", "--results", "r"]) == 0
    assert "1 begun" in capsys.readouterr().out.splitlines()[1]
    monkeypatch.setattr(runs, "train", train)
    assert cli.main(command_line) == 0
    assert "begun" not in (output := capsys.readouterr()).out
    assert "pyconv: experiment 1, seed 0 (run 1 of 1) goes on after epoch 0" in output.err
    assert output.out.startswith("experiment 1, seed 0: test ")
    (runs.Results("r").directory("1", 0) / "last.safetensors").touch()  # killed before it was removed
    assert runs.Results("r").begun("1") == 0


def test_a_busy_run_is_reported(capsys):
    with runs.Results("r").locked("1", 1):
        # Within one process a second descriptor of the file is refused just as another process is.
        assert cli.main(["book", "run", "1", "3", "--runs", "2", "--epochs", "1", "--results", "r"]) == 1
    output = capsys.readouterr()
    assert "experiment 1, seed 1: another process trains it" in output.err
    assert "experiment 3, seeds 0 to 1" not in output.out, "a vote lacks a network"
    assert "experiment 3, seeds 2 to 3" in output.out


def test_unknown_names(capsys):
    assert cli.main(["book", "run", "7"]) == 2
    assert "book run: expected one of 1, 2-a, 2-b, 3, but got '7'" in capsys.readouterr().err


def test_names():
    assert command._names(["3", "2", "1", "2-a"]) == ["2-a", "2-b", "1", "3"]
