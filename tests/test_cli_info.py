"""``python -m pyconv info`` and ``--version``."""

from __future__ import annotations

import json
import re

import pytest
import torch

import pyconv
from pyconv import cli


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = dict(line.split(maxsplit=1) for line in lines[:8])
    assert list(values) == ["pyconv", "Python", "PyTorch", "NumPy", "ISA", "exact", "threads", "CUDA"]
    assert values["pyconv"] == pyconv.__version__
    assert values["PyTorch"] == torch.__version__
    assert values["ISA"] == f"{pyconv.isa()} (compiled: {', '.join(pyconv.compiled_isas())})"
    assert values["threads"] == str(torch.get_num_threads())
    assert values["CUDA"].startswith("built" if pyconv._C.cuda_built() else "not built")
    kernels = pyconv._C.conv_max_pool2d_kernels()
    assert kernels and len(lines) == 9 + len(kernels)
    for line, (name, live, why) in zip(lines[9:], kernels, strict=True):
        assert re.fullmatch(rf"  {re.escape(name)} +{'live' if live else 'off'} +{re.escape(why)}", line), (
            line
        )


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pyconv"] == pyconv.__version__ and facts["isa"] == pyconv.isa()
    assert facts["threads"] == torch.get_num_threads()
    assert [tuple(kernel.values()) for kernel in facts["kernels"]] == [
        tuple(kernel) for kernel in pyconv._C.conv_max_pool2d_kernels()
    ]


L1 = ["--shape", "10,1,28,28", "--weight", "20,5,5"]


def info_of_shape(capsys, *arguments):
    assert cli.main(["info", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def kernels_in_list(phase):
    prefix = f"cpu/{pyconv.isa()}/{phase.split(',')[0]}/"
    rows = pyconv._C.conv_max_pool2d_kernels()
    return [(name, accepts) for name, _, accepts in rows if name.startswith(prefix)]


@pytest.mark.parametrize(
    "arguments",
    [
        L1,
        [*L1, "--pool-size", "3", "--pool-stride", "2", "--ceil-mode"],
        [*L1, "--padding", "same", "--dilation", "1,2", "--layout", "channels_last", "--dtype", "bfloat16"],
        ["--shape", "2,32,18,18", "--weight", "64,3,3", "--groups", "2", "--activation", "gelu"],
        ["--shape", "1,5,5", "--weight", "1,5,5", "--pool-size", "1", "--pool-padding", "0", "--stride", "1"],
    ],
    ids=" ".join,
)
def test_info_of_a_shape_names_the_first_entry_that_accepts(arguments, capsys):
    facts = info_of_shape(capsys, *arguments)
    assert [phase["name"] for phase in facts["phases"]] == [
        "forward, inference",
        "forward, training",
        "backward",
        "backward, parameters only",
    ]
    for phase in facts["phases"]:
        kernels = phase["kernels"]
        entries = kernels_in_list(phase["name"])
        assert [(kernel["name"], kernel["accepts"]) for kernel in kernels] == entries[: len(kernels)]
        assert [kernel["runs"] for kernel in kernels] == [False] * (len(kernels) - 1) + [True]
        assert kernels[-1]["workspace_bytes"] >= 0
        assert all(kernel["workspace_bytes"] is None for kernel in kernels[:-1])
        assert all(isinstance(kernel["exact"], bool) for kernel in kernels)


def test_info_of_a_shape_passes_over_what_does_not_accept(capsys):
    """2x2 windows have an entry of their own; overlapping ones do not."""
    for pool_size, expected in (("2", "direct_pool2x2"), ("3", "generic")):
        for phase in info_of_shape(capsys, *L1, "--pool-size", pool_size, "--pool-stride", "2")["phases"][:2]:
            assert phase["kernels"][-1]["name"] == f"cpu/{pyconv.isa()}/forward/{expected}"


def test_info_of_a_shape_gives_sizes_and_operations(capsys):
    facts = info_of_shape(capsys, *L1, "--padding", "3,1", "--stride", "2,1", "--threads", "2")
    input, weight = torch.empty(10, 1, 28, 28), torch.empty(20, 1, 5, 5)
    conv = torch.nn.functional.conv2d(input, weight, padding=(3, 1), stride=(2, 1))
    output = pyconv.functional.conv_max_pool2d(input, weight, padding=(3, 1), stride=(2, 1))
    assert facts["shape"] == list(input.shape) and facts["weight"] == list(weight.shape)
    assert facts["convolution"] == list(conv.shape) and facts["output"] == list(output.shape)
    assert [phase["flops"] for phase in facts["phases"]] == [
        2 * conv.numel() * 25,
        2 * conv.numel() * 25,
        4 * output.numel() * 25,
        2 * output.numel() * 25,
    ]
    assert [phase["threads"] for phase in facts["phases"]][:3] == [2, 2, 2]
    assert torch.get_num_threads() == 2


def test_info_of_small_and_of_empty_shapes(capsys):
    facts = info_of_shape(capsys, "--shape", "1,5,5", "--weight", "1,5,5", "--pool-size", "1", "--threads", "2")
    assert facts["output"] == [1, 1, 1]
    assert [phase["threads"] for phase in facts["phases"]] == [1, 1, 1, 1]
    assert cli.main(["info", "--shape", "0,1,28,28", "--weight", "20,5,5"]) == 0
    assert capsys.readouterr().out.count("  no kernel: the batch is empty\n") == 4


def test_info_of_a_shape_names_what_is_written(capsys):
    for activation, pre_activation in (("relu", []), ("tanh", []), ("gelu", ["pre_activation"])):
        phases = info_of_shape(capsys, *L1, "--activation", activation)["phases"]
        assert [phase["writes"] for phase in phases] == [
            ["output"],
            ["output", "argmax", *pre_activation],
            ["grad_input", "grad_weight", "grad_bias"],
            ["grad_weight", "grad_bias"],
        ]


def test_info_of_a_shape_tells_types_apart(capsys):
    """The workspace holds accumulators, which are wider in float64."""
    single, double = (
        [phase["kernels"][-1]["workspace_bytes"] for phase in info_of_shape(capsys, *L1, "--dtype", dtype)["phases"]]
        for dtype in ("float32", "float64")
    )
    assert all(d > s for s, d in zip(single, double, strict=True))


def test_info_of_a_shape_hands_every_argument_on(capsys, monkeypatch):
    calls = []
    plan = pyconv._C.conv_max_pool2d_plan

    def recording(*arguments):
        calls.append(arguments)
        return plan(*arguments)

    monkeypatch.setattr(pyconv._C, "conv_max_pool2d_plan", recording)
    arguments = (
        "--shape 2,4,30,28 --weight 6,3,5 --stride 1,2 --padding 1,2 --dilation 2,1 --groups 2 --pool-size 3,4 "
        "--pool-stride 2,3 --pool-padding 1,2 --pool-dilation 1,2 --ceil-mode --dtype float16 --layout channels_last "
        "--activation silu"
    )
    facts = info_of_shape(capsys, *arguments.split())
    assert (facts["layout"], facts["dtype"], facts["activation"]) == ("channels_last", "float16", "silu")
    info_of_shape(capsys, *L1)
    assert calls == [
        (
            (2, 4, 30, 28), (6, 2, 3, 5), torch.float16, torch.channels_last, (1, 2), (1, 1, 2, 2), (2, 1), 2, (3, 4),
            (2, 3), (1, 2), (1, 2), True, "silu",
        ),
        (
            (10, 1, 28, 28), (20, 1, 5, 5), torch.float32, torch.contiguous_format, (1, 1), (0, 0, 0, 0), (1, 1), 1,
            (2, 2), (2, 2), (0, 0), (1, 1), False, "none",
        ),
    ]  # fmt: skip


def test_info_of_a_shape_in_words(capsys):
    arguments = [*L1, "--pool-size", "3", "--activation", "relu"]
    facts = info_of_shape(capsys, *arguments)
    assert cli.main(["info", *arguments]) == 0
    lines = iter(capsys.readouterr().out.splitlines())
    assert next(lines) == "input 10x1x28x28, weight 20x1x5x5, float32, nchw, activation relu"
    assert next(lines) == "convolution 10x20x24x24, output 10x20x8x8"
    for phase in facts["phases"]:
        at_most = "at most " if phase["name"].startswith("backward") else ""
        workers = "1 thread" if phase["threads"] == 1 else f"{phase['threads']} threads"
        written = ", ".join(phase["writes"])
        assert next(lines) == f"{phase['name']}: {at_most}{phase['flops']:,} FLOPs, {workers}, writes {written}"
        *passed, chosen = phase["kernels"]
        for kernel in passed:
            assert next(lines) == f"  {kernel['name']}  passed over; accepts {kernel['accepts']}"
        exactness = "exact" if chosen["exact"] else "not exact"
        bytes_ = f"{chosen['workspace_bytes']:,}"
        assert next(lines) == f"  {chosen['name']}  runs; {exactness}, workspace {bytes_} bytes"
    assert next(lines, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3,4"], "info of one shape needs --weight"),
        (["--stride", "2"], "info of one shape needs --shape"),
        (["--shape", "10,3,28,28", "--weight", "4,3,3", "--groups", "2"], "to have 2 channels, but got 3 channels"),
        (["--shape", "1,1,4,4", "--weight", "1,5,5"], "Kernel size can't be greater than actual input size"),
        ([*L1, "--stride", "0"], "non-positive stride is not supported"),
        ([*L1, "--padding", "-1"], "negative padding is not supported"),
        ([*L1, "--groups", "-1"], "non-positive groups is not supported"),
        ([*L1, "--padding", "same", "--stride", "2"], "padding='same' is not supported for strided convolutions"),
        ([*L1, "--pool-size", "3", "--pool-padding", "2"], "pad should be at most half of effective kernel size"),
        ([*L1, "--pool-size", "99"], "Output size is too small"),
        (["--shape=10,1,-28,28", "--weight", "20,5,5"], "negative dimension -28"),
        (["--shape", "2147483647,2147483647,2147483647,28", "--weight", "20,5,5"], "overflow"),
        ([*L1, "--threads", "100000"], "--threads: expected at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_info_of_nonsense(arguments, message, capsys):
    assert cli.main(["info", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(f"pyconv: .*{re.escape(message)}.*\n", output.err), output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2"], "argument --shape: must be 3 or 4 whole numbers between commas, but got '1,2'"),
        (["--weight", "1,2,3,4"], "argument --weight: must be 3 whole numbers between commas"),
        (["--stride", "two"], "argument --stride: must be a whole number below 2**31, but got 'two'"),
        (["--padding", "full"], "argument --padding: must be a whole number below 2**31, but got 'full'"),
        (["--groups", str(2**31)], "argument --groups: must be a whole number below 2**31"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--layout", "nhwc"], "argument --layout: invalid choice: 'nhwc'"),
        (["--activation", "softmax"], "argument --activation: invalid choice: 'softmax'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_info_of_what_is_no_shape(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", *arguments])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and message in output.err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"pyconv {pyconv.__version__}\n"
