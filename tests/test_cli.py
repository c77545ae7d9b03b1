"""The command line ``python -m pyconv``: what it prints and writes, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import pyconv
from pyconv import cli
from pyconv.network3 import History, experiments, load_digits, load_network
from pyconv.network3.checkpoint import finished_epochs

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty directory, on the embedded digits unless it says otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYCONV_DATA", raising=False)


def run(*arguments):
    """Run in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pyconv", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def small_data(tmp_path):
    """A directory of IDX files: 60 training and 20 test images."""
    directory = tmp_path / "data"
    directory.mkdir()
    random = np.random.RandomState(0)
    for prefix, n in (("train", 60), ("t10k", 20)):
        images = random.randint(0, 256, n * 784).astype(np.uint8).tobytes()
        labels = random.randint(0, 10, n).astype(np.uint8).tobytes()
        header = struct.pack(">4I", 0x0803, n, 28, 28)
        (directory / f"{prefix}-images-idx3-ubyte").write_bytes(header + images)
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x0801, n) + labels)
    return str(directory)


# ----------------------------------------------------------------------------------------------------------
# train and eval
# ----------------------------------------------------------------------------------------------------------


def test_train_and_eval_as_processes(tmp_path):
    trained = run("train", "--epochs", "2")
    assert trained.returncode == 0, trained.stderr
    percentage = r"\d+\.\d\d%%"
    epoch = (
        rf"Epoch %d: cost \d\.\d{{4}}, validation accuracy {percentage}, "
        rf"(test accuracy {percentage}, )?\d+\.\d\d s\n"
    )
    pattern = (
        epoch % 0
        + epoch % 1
        + r"Best validation accuracy \d+\.\d\d%, in epoch [01]\n"
        + r"Corresponding test accuracy (?P<test>\d+\.\d\d)%\n"
        + r"Saved that epoch's network to network-demo\.safetensors\n"
    )
    match = re.fullmatch(pattern, trained.stdout)
    assert match, trained.stdout
    assert os.listdir(tmp_path) == ["network-demo.safetensors"]

    evaluated = run("eval", "network-demo.safetensors", "--data", "digits")
    assert evaluated.returncode == 0, evaluated.stderr
    lines = evaluated.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["training", "validation", "test"]
    assert lines[2] == f"test accuracy {match['test']}% of 300", "the saved network is that of the best epoch"


def test_json(tmp_path, capsys):
    assert cli.main(["train", "--net", "1", "--epochs", "3", "--json", "--output", "network"]) == 0
    output = capsys.readouterr()
    records = [json.loads(line) for line in output.out.splitlines()]
    assert [list(record) for record in records] == [[*History.KEYS]] * 3
    assert [record["epoch"] for record in records] == [0, 1, 2]
    best = max(record["validation_accuracy"] for record in records)
    last_best = [record for record in records if record["validation_accuracy"] == best][-1]
    assert load_network("network").accuracy(load_digits()[2]) == last_best["test_accuracy"]
    assert "Corresponding test accuracy" in output.err

    assert cli.main(["eval", "network", "--data", "digits", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["training", "validation", "test"]
    assert results["test"] == {"accuracy": last_best["test_accuracy"], "images": 300}


def test_options_reach_the_training(small_data, monkeypatch, capsys):
    calls = {}

    def sgd(self, training_data, epochs, mini_batch_size, eta, validation_data, test_data, lmbda, **_):
        calls.update(epochs=epochs, mini_batch_size=mini_batch_size, eta=eta, lmbda=lmbda)
        calls.update(sizes=[len(part[1]) for part in (training_data, validation_data, test_data)])
        calls.update(threads=torch.get_num_threads(), network=self)
        raise ArithmeticError("far enough")

    monkeypatch.setattr("pyconv.network3.Network.SGD", sgd)
    arguments = ["train", "--net", "4", "--data", small_data, "--epochs", "3", "--mini-batch-size", "5"]
    arguments += ["--eta", "0.7", "--lmbda", "0.2", "--threads", "1", "--device", "cpu", "--seed", "3"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.endswith("pyconv: far enough\n")
    network = calls.pop("network")
    assert calls == {
        "epochs": 3,
        "mini_batch_size": 5,
        "eta": 0.7,
        "lmbda": 0.2,
        "sizes": [50, 10, 20],
        "threads": 1,
    }
    torch.manual_seed(3)
    expected = experiments.EXPERIMENTS["4"].network(5)
    assert repr(network) == repr(expected)
    assert all(torch.equal(a, b) for a, b in zip(network.params, expected.params, strict=True))

    assert cli.main(["train", "--net", "6", "--data", small_data]) == 1
    assert (calls["epochs"], calls["mini_batch_size"], calls["eta"], calls["lmbda"]) == (60, 10, 0.03, 0.1)
    assert cli.main(["train", "--net", "7", "--data", small_data]) == 1
    assert calls["sizes"] == [250, 10, 20], "the training images and their shifts"
    assert "250 training images after expansion" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_network(small_data):
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        arguments = ["train", "--net", "1", "--data", small_data, "--epochs", "1", "--output", name]
        assert cli.main([*arguments, "--seed", str(seed)]) == 0
    first, second, third = (load_network(name).params for name in ("first", "second", "third"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])


def test_default_data(small_data, monkeypatch, capsys):
    """The demo takes the digits in any case; the experiments and eval take $PYCONV_DATA."""
    monkeypatch.setenv("PYCONV_DATA", small_data)
    assert cli.main(["train", "--epochs", "1"]) == 0
    assert "1197 training" in capsys.readouterr().err
    assert cli.main(["train", "--net", "1", "--epochs", "1"]) == 0
    assert "50 training" in capsys.readouterr().err
    assert cli.main(["eval", "network-1.safetensors"]) == 0
    assert capsys.readouterr().out.endswith(" of 20\n")
    assert cli.main(["eval", "network-1.safetensors", "--data", "digits"]) == 0
    assert capsys.readouterr().out.endswith(" of 300\n")


def test_progress_bar_on_a_terminal(small_data):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # 24 lines of 100 characters
    process = subprocess.Popen(
        [sys.executable, "-m", "pyconv", "train", "--net", "1", "--data", small_data, "--epochs", "1"],
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert b"Epoch 0: " in shown and b"/5 [" in shown
    assert b"\r" not in output and output.startswith(b"Epoch 0: cost ")


# ----------------------------------------------------------------------------------------------------------
# Exit codes
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train", "--epochs", "0"], "argument --epochs: must be a positive whole number, but got '0'"),
        (
            ["train", "--mini-batch-size", "ten"],
            "argument --mini-batch-size: must be a positive whole number, but got 'ten'",
        ),
        (["train", "--eta", "nan"], "argument --eta: must be a non-negative number, but got 'nan'"),
        (["train", "--lmbda", "-1"], "argument --lmbda: "),
        (["train", "--seed", "x"], "argument --seed: must be a whole number"),
        (["train", "--seed", str(2**64)], "argument --seed: must be a whole number from -2**63 to 2**64 - 1"),
        (["train", "--seed", str(-(2**63) - 1)], "argument --seed: must be a whole number from -2**63"),
        (["eval"], "required: FILE"),
    ],
)
def test_usage_errors_of_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and message in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--net", "12"], "--net: expected one of demo, 1, .*, 8-300, .*, 10, best, 8, 9, but got '12'"),
        (["--net", "11"], "--net: experiment 11 is a plurality vote of five .* `python -m pyconv book run 11`"),
        (["--resume"], "--resume needs --checkpoint DIR"),
        (["--csv", "nowhere/file"], "--csv: there is no directory nowhere"),
        (["--csv", "same", "--output", "./same"], "--csv: expected another file than that of the network, but"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, but got 'tpu'"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, but got 'meta'"),
        (["--output", "nowhere/file"], "--output: there is no directory nowhere"),
        (["--output", "."], r"--output: \.: expected a regular file, found a directory"),
        (["--threads", "100000"], r"--threads: expected at most \d+, 4 for each CPU, but got 100000"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    assert cli.main(["train", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(f"pyconv: {message}.*\n", output.err), output.err


def test_seeds_at_the_ends_of_the_range(small_data):
    for seed in (-(2**63), 2**64 - 1):
        arguments = ["train", "--net", "1", "--data", small_data, "--epochs", "1", "--seed", str(seed)]
        assert cli.main(arguments) == 0


def test_data_of_the_environment_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setenv("PYCONV_DATA", "nowhere")
    assert cli.main(["train", "--net", "1"]) == 1
    assert capsys.readouterr() == ("", "pyconv: $PYCONV_DATA: there is no file or directory nowhere\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_output_that_is_no_regular_file_is_refused_before_training(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    assert cli.main(["train", "--output", "fifo"]) == 2
    message = "pyconv: --output: fifo: expected a regular file, found a named pipe\n"
    assert capsys.readouterr() == ("", message)
    assert os.listdir(tmp_path) == ["fifo"] and (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [([], None, 1), (["--threads", "2"], None, 2), ([], "2", 2), (["--mini-batch-size", "32"], None, 2)],
)
def test_threads_for_small_data(arguments, environment, expected, small_data, monkeypatch):
    """One, unless the user or the environment says otherwise or the mini-batches are large."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    torch.set_num_threads(2)
    assert cli.main(["train", "--net", "1", "--data", small_data, "--epochs", "1", *arguments]) in (0, 1)
    assert torch.get_num_threads() == expected


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_a_reader_who_left_is_not_reported():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyconv", "info"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("built", "toolkit", "device", "message"),
    [
        (False, None, "cuda", "pyconv was built without CUDA, and so was PyTorch"),
        (False, "13.0", "cuda", "pyconv was built without CUDA"),
        (True, "13.0", "cuda", "PyTorch sees 0 CUDA devices"),
        (True, "13.0", "cuda:1", "PyTorch sees 0 CUDA devices"),
    ],
)
def test_cuda_that_is_not_there(built, toolkit, device, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(pyconv._C, "cuda_built", lambda: built)
    for command in (["train"], ["eval", "network-demo.safetensors"]):
        assert cli.main([*command, "--device", device]) == 2
        assert capsys.readouterr().err == f"pyconv: --device {device}: {message}\n"


def test_the_device_reaches_the_network(small_data, monkeypatch, capsys):
    """Two GPUs that are not there: the network is made on the CPU, by the seed, and then moved."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pyconv._C, "cuda_built", lambda: True)
    moved = []

    def to(self, device):
        moved.append((device, [p.detach().clone() for p in self.params]))
        raise ArithmeticError("far enough")

    monkeypatch.setattr("pyconv.network3.Network.to", to)
    arguments = ["train", "--net", "4", "--data", small_data, "--seed", "3", "--device", "cuda:1"]
    assert cli.main(arguments) == 1
    ((device, params),) = moved
    torch.manual_seed(3)
    expected = experiments.EXPERIMENTS["4"].network(10)
    assert device == torch.device("cuda:1")
    assert all(torch.equal(a, b) for a, b in zip(params, expected.params, strict=True))

    moved.clear()
    expected.save("saved.safetensors")
    assert cli.main(["eval", "saved.safetensors", "--data", small_data, "--device", "cuda"]) == 1
    assert [device for device, _ in moved] == [torch.device("cuda")]


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        (["tqdm"], ["train"], "train needs tqdm"),
        (["safetensors"], ["train"], "train needs safetensors"),
        (["tqdm", "safetensors"], ["train"], "train needs tqdm and safetensors"),
        (["safetensors"], ["eval", "network-demo.safetensors"], "eval needs safetensors"),
        (["tqdm"], ["book", "run", "1"], "book run needs tqdm"),
    ],
)
def test_a_missing_extra_is_named(missing, arguments, message, monkeypatch, capsys):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", f"pyconv: {message}: pip install 'pyconv[train]'\n")


def test_tensorboard_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert cli.main(["train", "--tensorboard", "events"]) == 2
    assert capsys.readouterr().err == "pyconv: --tensorboard needs tensorboard: pip install 'pyconv[logs]'\n"


def test_a_missing_extra_in_a_process_of_its_own():
    code = (
        "import importlib.abc, sys\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] in ('tqdm', 'safetensors'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from pyconv.cli import main\n"
        "sys.exit(main(['train']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == (
        "",
        "pyconv: train needs tqdm and safetensors: pip install 'pyconv[train]'\n",
    )


def test_failures(small_data, tmp_path, capsys):
    (tmp_path / "foreign").write_bytes(b"hello")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["eval", "nowhere"], "nowhere"),
        (["eval", "foreign"], r"foreign: expected a saved network \(safetensors\), found another file"),
        (["train", "--data", "nowhere"], "--data: there is no file or directory nowhere$"),
        (
            ["train", "--data", "foreign"],
            "foreign: expected a directory of IDX files or a gzip-compressed pickle",
        ),
        (["train", "--data", "empty"], "empty: expected a file train-images-idx3-ubyte"),
        (
            ["train", "--data", small_data, "--mini-batch-size", "51"],
            "expected at least one mini-batch of 51",
        ),
        (["train", "--eta", "1e30", "--epochs", "3"], "training stopped at mini-batch 1 of epoch 0: "),
    ):
        assert cli.main(arguments) == 1
        output = capsys.readouterr()
        assert output.out == ""
        last_line = output.err.splitlines()[-1]
        assert re.search(f"^pyconv: .*{message}", last_line), output.err
    assert not (tmp_path / "network-demo.safetensors").exists()


def start_endless(*arguments):
    """A training in a process of its own, of which one epoch has been finished."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pyconv", "train", "--net", "1", "--epochs", "100000", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().startswith("Epoch 0: ")
    return process


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupted_with_a_checkpoint_and_resumed(tmp_path):
    process = start_endless("--checkpoint", "state")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[1:] == [
        "pyconv: state holds the finished epochs; --resume goes on with them",
        "pyconv: interrupted",
    ]
    assert sorted(os.listdir("state")) == ["best.safetensors", "last.safetensors"]
    done = finished_epochs("state")
    common = ["train", "--net", "1", "--epochs", str(done + 2)]
    resumed = run(*common, "--checkpoint", "state", "--resume", "--output", "resumed")
    assert resumed.returncode == 0, resumed.stderr
    assert [line.split(":")[0] for line in resumed.stdout.splitlines()[:2]] == [f"Epoch {done}", f"Epoch {done + 1}"]
    assert run(*common, "--output", "whole").returncode == 0
    networks = [load_network(name) for name in ("resumed", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*(network.params for network in networks), strict=True))

    again = run(*common, "--checkpoint", "state")
    assert again.returncode == 2
    assert again.stderr.endswith("--checkpoint: state holds a training already; --resume goes on with it\n")

    for more in ([], ["--resume"]):
        to_file = run(*common, "--checkpoint", "whole", *more)
        assert to_file.returncode == 2
        assert to_file.stderr == "pyconv: --checkpoint: expected a directory, but got the file whole\n"


def test_csv_tensorboard_and_diagnosis(small_data, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["train", "--net", "1", "--epochs", "3", "--data", small_data, "--json", "--diagnose"]
    assert cli.main([*arguments, "--csv", "table.csv", "--tensorboard", "events"]) == 0
    output = capsys.readouterr()
    records = [json.loads(line) for line in output.out.splitlines()]
    with open("table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    written = [{key: "" if value is None else str(value) for key, value in record.items()} for record in records]
    assert rows == written and all(0.0 < record["train_accuracy"] < 1.0 for record in records)
    events = EventAccumulator("events").Reload()
    costs = [(event.step, event.value) for event in events.Scalars("train_cost")]
    assert costs == [(r["epoch"], pytest.approx(r["train_cost"], rel=1e-6)) for r in records]  # float32
    assert set(events.Tags()["scalars"]) == {key for key in History.KEYS if key != "epoch"}
    assert "After epoch 2 the network gets" in output.err


def test_patience_ends_the_training(small_data, capsys):
    arguments = ["train", "--net", "1", "--data", small_data, "--eta", "0", "--epochs", "9"]
    assert cli.main([*arguments, "--patience", "2"]) == 0
    assert capsys.readouterr().out.count("Epoch ") == 3


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupt(tmp_path):
    """Ctrl-C in the middle of training leaves the file of an earlier run as it was."""
    output = tmp_path / "network-1.safetensors"
    output.write_bytes(b"before")
    process = start_endless()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[1:] == [
        "pyconv: nothing was saved; --checkpoint DIR keeps the finished epochs",
        "pyconv: interrupted",
    ], errors
    assert output.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["network-1.safetensors"]
