"""network3's training over several processes, against one process with the whole mini-batches."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as distributed

import pyconv
from pyconv import cli
from pyconv.launch import Launch, launch
from pyconv.network3 import DivergenceError, FullyConnectedLayer, load_network
from pyconv.network3.data_parallel import Processes
from pyconv.network3.layers import rows_of_mini_batch
from tests.training_support import MB, difference, make_data, make_network

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed"),
]

TRAINING, VALIDATION, TEST = make_data(78), make_data(43, seed=2), make_data(31, seed=4)
MOST = 3
TIMEOUT = 120.0  # seconds; what takes so long hangs

# The processes add up a mini-batch's 10 rows in another order: relative differences of 1e-16, a few of which remain
# after 24 mini-batches. A wrong mask, share or factor makes one of 1e-3 and more.
BOUND = 1e-12

ALL = {
    "eta": lambda epoch: 0.02 * 0.5**epoch,
    "lmbda": 1.0,
    "momentum": 0.9,
    "shuffle": True,
    "drop_last": False,
}


# ----------------------------------------------------------------------------------------------------------
# Processes that wait for work
# ----------------------------------------------------------------------------------------------------------


def serve(rank, file, connection):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{file}", rank=rank, world_size=MOST, timeout=timedelta(seconds=TIMEOUT)
    )
    groups = {MOST: distributed.group.WORLD}
    for count in range(1, MOST):
        groups[count] = distributed.new_group(list(range(count)))
    while True:
        function, count, arguments, keywords = connection.recv()
        try:
            connection.send((function(groups[count], *arguments, **keywords), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class Workers:
    """`MOST` processes, started when they are needed and again after some have been lost."""

    def __init__(self, directory):
        self._directory = directory
        self._workers = []
        self._starts = 0

    def __call__(self, function, count, *arguments, **keywords):
        """function(group of the first `count` processes, ...) in each of them; the results."""
        if not self._workers:
            self._start()
        members = self._workers[:count]
        for _, connection in members:
            connection.send((function, count, arguments, keywords))
        answers = [self._receive(rank, connection) for rank, (_, connection) in enumerate(members)]
        for rank, (_, failure) in enumerate(answers):
            assert failure is None, f"process {rank}:\n{failure}"
        return [result for result, _ in answers]

    def _receive(self, rank, connection):
        try:
            if connection.poll(TIMEOUT):
                return connection.recv()
        except EOFError:
            return None, "it ended"
        self.stop()
        pytest.fail(f"process {rank} does not answer")

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            arguments = (rank, self._directory / f"rendezvous{self._starts}", theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self):
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


# ----------------------------------------------------------------------------------------------------------
# What they run
# ----------------------------------------------------------------------------------------------------------


def train(group, *, epochs=3, data=TRAINING, eta=0.05, lmbda=0.0, p_dropout=0.5, mb=MB, network=None, **options):
    """What a training does to a network; with `group` None in one process, layer by layer. Processes but the first
    begin with other parameters and other random numbers, which the training is to make equal."""
    rank = 0 if group is None else group.rank()
    torch.manual_seed(7 + rank)
    if network is None:
        network = make_network(p_dropout=p_dropout, seed=rank, mb=mb)
    arguments = {"compiled": group is not None, "diagnose": 50, **options, "process_group": group}
    printed, error, history = io.StringIO(), None, None
    with contextlib.redirect_stdout(printed):
        try:
            history = network.SGD(data, epochs, mb, eta, VALIDATION, TEST, lmbda, **arguments)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    if history is not None:
        history = {key: values for key, values in json.loads(history.to_json()).items() if key != "seconds"}
    return {
        "history": history,
        "params": [param.detach().clone() for param in network.params],
        "random": torch.get_rng_state(),
        "printed": printed.getvalue(),
        "error": error,
    }


def everything(group, **more):
    return train(group, **{**ALL, **more})


def own_generators(group):
    rank = 0 if group is None else group.rank()
    orders, masks = (torch.Generator().manual_seed(20 + i + 10 * rank) for i in range(2))
    network = make_network(p_dropout=0.3, seed=rank)
    network.layers[2].generator = masks
    result = train(group, network=network, shuffle=True, generator=orders)
    return {**result, "states": [orders.get_state(), masks.get_state()]}


def meddling_callbacks(group):
    """A callback draws random numbers, changes and freezes parameters, and sets the rate of the next epoch."""
    network = make_network(p_dropout=0.5)
    rate, calls = [0.05], []

    def callback(record):
        calls.append(record["epoch"])
        rate[0] *= float(torch.rand(()))
        with torch.no_grad():
            network.layers[0].w.mul_(0.9)
        network.layers[1].b.requires_grad_(record["epoch"] == 1)

    def progress(indices):
        calls.append("progress")
        return indices

    result = train(group, network=network, eta=lambda epoch: rate[0], shuffle=True, callback=callback,
                   progress=progress, momentum=0.5)  # fmt: skip
    return {**result, "calls": calls}


def stopping_callback(group):
    return train(group, epochs=5, callback=lambda record: record["epoch"] == 1)


def augmented(group):
    return train(group, augment=lambda indices, x: x.mul_(torch.rand(len(x), 1, dtype=x.dtype)), shuffle=True)


def distorted(group):
    """Which is a function of the position in the training data and of the epoch."""
    return train(group, augment=pyconv.RandomDistortion((1, 18, 18), rotation=15.0), shuffle=True)


def frozen(group, which):
    network = make_network(p_dropout=0.5)
    for layer in network.layers[:which]:
        layer.requires_grad_(False)
    return train(group, network=network, momentum=0.5, lmbda=1.0)


def with_nan_in_last_row(group):
    x, y = TRAINING
    x = x.clone()
    x[4 * MB + MB - 1, 5] = torch.nan  # mini-batch 4, of the last process's share
    return train(group, data=(x, y), lmbda=0.5)


def other_in_process_1(group, name):
    rank = 0 if group is None else group.rank()
    if name == "training_data":
        x, y = TRAINING
        return train(group, data=(x + 0.001 * rank, y))
    return train(group, **{name: 2 + rank})


def in_own_directory(group, directory, resume=False, stop_after=None):
    """With a checkpoint in another directory for each process."""

    def callback(record):
        if record["epoch"] == stop_after:
            raise ArithmeticError("far enough")

    rank = 0 if group is None else group.rank()
    return everything(group, checkpoint=directory / str(rank), resume=resume, callback=callback)


def in_foreign_group(group):
    with mock.patch("torch.distributed.get_backend", lambda group: "nccl"):
        return train(group)


def losing_process_1(group):
    def augment(indices, x):
        if group.rank() == 1 and indices[0] >= 3 * MB:
            os._exit(1)

    assert train(group, augment=augment)["error"].startswith("RuntimeError"), "the other connection is closed"


def assert_same(results, expected=None, bound=BOUND):
    """The processes agree in every bit, and with one process (`expected`) up to rounding."""
    first = results[0]
    for other in results[1:]:
        assert other["error"] == first["error"] and other["history"] == first["history"]
        assert torch.equal(other["random"], first["random"])
        assert all(torch.equal(a, b) for a, b in zip(other["params"], first["params"], strict=True))
    if expected is None:
        return
    assert first["error"] == expected["error"]
    assert torch.equal(first["random"], expected["random"])
    for ours, theirs in zip(first["params"], expected["params"], strict=True):
        assert difference(ours, theirs) <= bound
    if expected["history"] is None:
        return
    costs = ("train_cost", "validation_cost")
    assert {k: v for k, v in first["history"].items() if k not in costs} == {
        k: v for k, v in expected["history"].items() if k not in costs
    }, "accuracies are counts and agree exactly"
    for key in costs:
        assert first["history"][key] == pytest.approx(expected["history"][key], rel=bound)


# ----------------------------------------------------------------------------------------------------------
# The same training
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_trajectory_is_that_of_one_process(workers, count):
    expected = everything(None)
    results = workers(everything, count)
    assert_same(results, expected)
    assert expected["history"]["train_cost"][0] > expected["history"]["train_cost"][-1] > 0.0
    assert results[0]["printed"] == expected["printed"] != ""
    assert [result["printed"] for result in results[1:]] == [""] * (count - 1)


def test_frozen_layers(workers):
    for which in (2, 4):
        assert_same(workers(frozen, 2, which), frozen(None, which))


def test_generators_of_ones_own(workers):
    expected = own_generators(None)
    results = workers(own_generators, 2)
    assert_same(results, expected)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result["states"], expected["states"], strict=True))


@pytest.mark.parametrize("function", [augmented, distorted])
def test_augmented(workers, function):
    assert_same(workers(function, 2), function(None))


def test_what_callbacks_of_the_first_process_do_reaches_all(workers):
    expected = meddling_callbacks(None)
    results = workers(meddling_callbacks, 2)
    assert_same(results, expected)
    assert expected["history"]["eta"][2] < expected["history"]["eta"][1]
    assert [result["calls"] for result in results] == [expected["calls"], []]


def test_callback_ends_the_training_of_all(workers):
    results = workers(stopping_callback, 2)
    assert_same(results, stopping_callback(None))
    assert results[0]["history"]["epoch"] == [0, 1]


def test_patience(workers):
    settings = {"eta": 0.0, "epochs": 5, "patience": 2}
    results = workers(everything, 2, **settings)
    assert_same(results, everything(None, **settings))
    assert results[1]["history"]["epoch"] == [0, 1, 2]


def test_group_of_one_process_is_no_group(workers):
    """Compiled, too, and to the bit."""
    (result,) = workers(everything, 1)
    assert_same([result, everything(None, compiled=True)])


def test_masks_are_those_of_the_whole_mini_batch():
    layer = FullyConnectedLayer(7, 3, p_dropout=0.5, dtype=torch.float64)
    x = torch.ones(MB, 7, dtype=torch.float64, requires_grad=True)

    def drop(rows=slice(None)):
        torch.manual_seed(5)
        context = contextlib.nullcontext() if rows == slice(None) else rows_of_mini_batch([layer], rows.start, MB)
        with context:
            dropped = layer._drop(x[rows])
        (gradient,) = torch.autograd.grad(dropped.sum(), x)
        return dropped.detach(), gradient, torch.get_rng_state()

    whole, gradient, state = drop()
    assert 0.0 < whole.mean() < 1.0
    for rows in (slice(0, 4), slice(4, 7), slice(7, 10)):
        part, part_gradient, part_state = drop(rows)
        assert torch.equal(part, whole[rows]) and torch.equal(part_state, state)
        assert torch.equal(part_gradient[rows], gradient[rows])
    assert torch.equal(drop()[0], whole), "outside the context nothing is left of it"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_are_contiguous_and_even(count):
    processes = Processes(None, torch.device("cpu"))
    processes.count = count
    for examples in range(12):
        shares = []
        for processes.rank in range(count):
            shares.append(processes.share(examples))
        lengths = [share.stop - share.start for share in shares]
        assert [i for share in shares for i in range(examples)[share]] == list(range(examples))
        assert sorted(lengths, reverse=True) == lengths and lengths[0] - lengths[-1] <= 1


# ----------------------------------------------------------------------------------------------------------
# Divergence, checkpoints, errors
# ----------------------------------------------------------------------------------------------------------


def test_divergence_is_raised_in_all(workers):
    settings = {"eta": 1e200, "epochs": 2}
    results = workers(everything, 2, **settings)
    assert_same(results, everything(None, **settings))
    assert results[1]["error"].startswith(DivergenceError.__name__)


def test_examples_of_one_process_that_are_not_finite(workers):
    results = workers(with_nan_in_last_row, 2)
    assert_same(results, with_nan_in_last_row(None))
    assert "at mini-batch 4 of epoch 0" in results[0]["error"] and "hold NaN" in results[0]["error"]


@pytest.mark.parametrize("count", [2, None], ids=["two", "one"])
def test_resumed(workers, tmp_path, count):
    """By as many processes to the bit, by one up to rounding; the first one's files are enough."""
    pytest.importorskip("safetensors")
    whole = workers(everything, 2)
    first, other = workers(in_own_directory, 2, tmp_path, False, 1)
    assert first["error"] == "ArithmeticError: far enough"
    assert other["error"] == "RuntimeError: the first process of the group failed: ArithmeticError: far enough"
    assert os.listdir(tmp_path) == ["0"]
    if count is None:
        assert_same(whole, in_own_directory(None, tmp_path, True))
    else:
        assert_same([*whole, *workers(in_own_directory, 2, tmp_path, True)])


def test_a_checkpoint_that_is_there_is_an_error_in_all(workers, tmp_path):
    pytest.importorskip("safetensors")
    workers(in_own_directory, 2, tmp_path)
    first, other = workers(in_own_directory, 2, tmp_path)
    assert first["error"].startswith("FileExistsError")
    assert "FileExistsError" in other["error"] and "holds a training already" in other["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mb": 2}, "expected mini-batches of at least 3 examples, one for each process of the process_group, but got "
         "one of 2"),
        ({"mb": 19, "drop_last": False}, "but got one of 2; drop_last=True leaves out the last one"),
    ],
    ids=["all", "last"],
)  # fmt: skip
def test_fewer_examples_than_processes(workers, settings, message):
    results = workers(everything, 3, **settings)
    assert all(result["error"].startswith("ValueError") for result in results)
    assert all(result["error"].endswith(message) for result in results)


@pytest.mark.parametrize("name", ["training_data", "epochs", "patience"])
def test_processes_with_other_arguments_are_refused(workers, name):
    results = workers(other_in_process_1, 2, name)
    for result in results:
        assert result["error"].startswith(f"ValueError: expected the same {name} in every process, but got ")


@pytest.mark.parametrize("group", [object(), distributed.GroupMember.NON_GROUP_MEMBER], ids=["object", "not a member"])
def test_what_is_no_group_of_this_process_is_refused(group):
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup with this process in"):
        make_network().SGD(TRAINING, 1, MB, 0.1, VALIDATION, TEST, process_group=group)


def test_backend_for_other_devices_is_refused(workers):
    for result in workers(in_foreign_group, 2):
        assert result["error"] == (
            "ValueError: expected the network on the current CUDA device, for a process_group of NCCL, but got it on "
            "cpu"
        )


def test_progress_must_give_all_mini_batches_in_order():
    processes = Processes(None, torch.device("cpu"))
    assert list(processes.mini_batches(3, lambda indices: [2])) == [2], "one process may leave some out"
    processes.count = 2
    assert list(processes.mini_batches(3, iter)) == [0, 1, 2]
    for given in ([0, 2], [0, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="progress: expected all 3 mini-batches in order with a process_group"):
            list(processes.mini_batches(3, lambda indices, given=given: given))


def test_a_process_that_dies_does_not_leave_the_other_waiting(workers):
    with pytest.raises(AssertionError, match="process 1:\n *it ended"):
        workers(losing_process_1, 2)
    workers.stop()


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


def torchrun(directory, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "pyconv", "train", "--net", "1", "--data", "digits", *arguments],
        capture_output=True, text=True, timeout=2 * TIMEOUT, cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


@pytest.fixture
def extras():
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")


def test_torchrun(extras, tmp_path, monkeypatch, capsys):
    """Sigmoid units: no maximum or kink makes the trajectories of float32 part."""
    options = ["--epochs", "2", "--json", "--diagnose", "--csv", "table.csv", "--checkpoint", "kept"]
    two = tmp_path / "two"
    two.mkdir()
    done = torchrun(two, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("data from the digits") == done.stderr.count("Saved that epoch's network") == 1
    assert sorted(os.listdir(two)) == ["kept", "network-1.safetensors", "table.csv"]

    one = tmp_path / "one"
    one.mkdir()
    monkeypatch.chdir(one)
    assert cli.main(["train", "--net", "1", "--data", "digits", *options]) == 0
    records, expected = (
        [json.loads(line) for line in output.splitlines()] for output in (done.stdout, capsys.readouterr().out)
    )
    assert len(records) == len(expected) == 2
    for ours, theirs in zip(records, expected):
        del ours["seconds"], theirs["seconds"]
        # 119 mini-batches an epoch, each adding rounding errors of float32 (6e-8); an example at the border between two
        # classes may go over.
        costs = ("train_cost", "validation_cost")
        assert [ours.pop(key) for key in costs] == pytest.approx([theirs.pop(key) for key in costs], rel=1e-4)
        assert ours == pytest.approx(theirs, abs=2 / 300)
    networks = [load_network(directory / "network-1.safetensors") for directory in (two, one)]
    for ours, theirs in zip(networks[0].params, networks[1].params, strict=True):
        assert difference(ours, theirs) <= 1e-4


def launched(directory, *arguments):
    """(exit code, stdout, stderr) of two processes without torchrun, whose own exit code is another; each has a
    directory of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TORCHELASTIC_ERROR_FILE", None)
    command = [sys.executable, "-m", "pyconv", "train", "--data", "digits", "--net", "1", *arguments]
    processes = []
    try:
        for rank in range(2):
            (directory / str(rank)).mkdir()
            processes.append(
                subprocess.Popen(
                    command, env={**environment, "RANK": str(rank)}, cwd=directory / str(rank), text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_the_first_process_alone_prints_and_writes(extras, tmp_path):
    (code0, out0, err0), other = launched(tmp_path, "--epochs", "1", "--checkpoint", "kept", "--csv", "table.csv")
    assert code0 == 0 and out0.startswith("Epoch 0: cost ") and "Saved that epoch's network" in out0
    assert other == (0, "", "")
    assert sorted(os.listdir(tmp_path / "0")) == ["kept", "network-1.safetensors", "table.csv"]
    assert os.listdir(tmp_path / "1") == []


def test_a_failure_of_processes(extras, tmp_path):
    results = launched(tmp_path, "--mini-batch-size", "1")
    line = (
        "pyconv: expected mini-batches of at least 2 examples, one for each process of the process_group, but got one "
        "of 1"
    )
    (code0, out0, err0), other = results
    assert (code0, out0, err0.splitlines()[-1]) == (1, "", line)
    assert other == (1, "", f"process 1: {line}\n")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Launch()),
        ({"WORLD_SIZE": "4"}, Launch()),
        ({"WORLD_SIZE": "4", "RANK": "x"}, Launch()),
        ({"WORLD_SIZE": "4", "RANK": "3"}, Launch(4, 3, 4, 3)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Launch(4, 3, 2, 1)),
    ],
)
def test_launch(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch() == expected
