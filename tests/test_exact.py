"""pyconv.set_exact(): kernels that are not exact are passed over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import BY_NAME
from numerics import DATA, operands

import pyconv
from pyconv import cli
from pyconv.functional import conv_max_pool2d

pytestmark = pytest.mark.cpu_only
L2 = BY_NAME["L2"]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = pyconv.exact()
    yield
    pyconv.set_exact(before)


def forward_kernels() -> list[tuple[str, bool]]:
    """(name, exact) of the kernels asked for the forward of L2, of which the last runs."""
    pair = (0, 0)
    plan = pyconv._C.conv_max_pool2d_plan(
        L2.input_shape, L2.weight_shape, torch.float32, torch.contiguous_format, (1, 1), (0, 0, 0, 0), (1, 1), 1,
        (2, 2), (2, 2), pair, (1, 1), False, "relu",
    )  # fmt: skip
    phase = next(phase for phase in plan["phases"] if phase["name"] == "forward, training")
    return [(kernel["name"], kernel["exact"]) for kernel in phase["kernels"]]


def test_it_is_off_at_first_and_remembered() -> None:
    assert pyconv.exact() is False
    pyconv.set_exact(True)
    assert pyconv.exact() is True


@pytest.mark.skipif(pyconv.isa() == "scalar", reason="no kernel of the scalar instruction set is inexact")
def test_another_kernel_runs_and_gives_the_bits_of_direct_sums() -> None:
    input, weight, bias, _ = operands(L2, torch.float32, DATA["signed"])
    usual = conv_max_pool2d(input, weight, bias)
    assert forward_kernels()[-1][1] is False
    pyconv.set_exact(True)
    names = forward_kernels()
    assert names[-1][1] is True and len(names) > 1
    direct = conv_max_pool2d(input, weight, bias)
    assert not torch.equal(direct, usual)
    torch.testing.assert_close(direct, usual, rtol=1e-4, atol=1e-3)


def test_info_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["info", "--shape", "10,20,12,12", "--weight", "40,5,5"]
    for only_exact, state in ((False, "live"), (True, "off")):
        pyconv.set_exact(only_exact)
        assert cli.main(["info"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("exact    " + ("on" if only_exact else "off")) for line in lines)
        (winograd,) = (line.split() for line in lines if "/winograd " in line)
        assert winograd[1] == state
        assert cli.main(shape) == 0
        assert ("passed over; not exact" in capsys.readouterr().out) is only_exact


@pytest.mark.skipif(pyconv.isa() == "scalar", reason="no kernel of the scalar instruction set is inexact")
def test_integers_near_the_limit_of_float32_need_it() -> None:
    """Sums of up to 2**24 are exact in float32, quarters of such sums are not."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(0, 2**8, L2.input_shape, generator=generator).float()
    weight = torch.randint(0, 2**8, L2.weight_shape, generator=generator).float()
    exact = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(input.double(), weight.double()), 2)
    assert 2**22 < exact.max() < 2**24
    assert not torch.equal(conv_max_pool2d(input, weight).double(), exact)
    pyconv.set_exact(True)
    assert torch.equal(conv_max_pool2d(input, weight).double(), exact)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_value_that_is_no_bool_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        pyconv.set_exact(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "exact"), [("1", "True"), ("0", "False"), ("", "False")])
def test_the_environment_chooses_before_the_import(value: str, exact: str) -> None:
    program = [sys.executable, "-c", "import pyconv; print(pyconv.exact())"]
    child = subprocess.run(program, env={**os.environ, "PYCONV_EXACT": value}, capture_output=True, text=True)
    assert child.stdout.strip() == exact, child.stderr


def test_the_environment_takes_0_or_1() -> None:
    program = [sys.executable, "-c", "import pyconv"]
    child = subprocess.run(program, env={**os.environ, "PYCONV_EXACT": "yes"}, capture_output=True, text=True)
    assert child.returncode != 0
    assert "PYCONV_EXACT: expected 0 or 1, but got 'yes'" in child.stderr
