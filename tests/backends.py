"""Which kernels the tests of the operators run, chosen by `pytest --backend=NAME`.

    cpu             tensors on the CPU and its kernels. Beside each instruction set the CUDA kernels, compiled for the
                    CPU (see tests/emulation), run in the tests that are parametrised by `EVERY_ISA`.
    cuda_emulation  tensors on the CPU, and every test on the emulated CUDA kernels
    cuda            tensors on the GPU
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import pyconv

_Test = TypeVar("_Test", bound=Callable[..., None])

BACKENDS = ("cpu", "cuda_emulation", "cuda")

EMULATION = "cuda_emulation"
"""The instruction set under which the emulated CUDA kernels are known to `pyconv.set_isa`."""

GPU = "cuda"
"""Stands for an instruction set where the tensors are on the GPU."""

LIBRARY = Path(
    os.environ.get("PYCONV_EMULATION_LIBRARY")
    or Path(__file__).parents[1]
    / f"build/cmake-{sys.implementation.cache_tag}/tests/emulation/libpyconv_emulation.so"
)

NO_LIBRARY = (
    f"the emulated CUDA kernels are not built: no {LIBRARY.name} (`python cmake/native_build.py tests` makes it)"
)


class _Chosen:
    backend = "cpu"


def choose(backend: str) -> None:
    """Set the backend of the process, before any test is collected; UsageError where it cannot run."""
    if LIBRARY.exists():
        pyconv._C._load_kernel_table(str(LIBRARY))
    elif backend == "cuda_emulation":
        raise pytest.UsageError(f"--backend=cuda_emulation: {NO_LIBRARY}")
    if backend == "cuda":
        if not pyconv._C.cuda_built():
            raise pytest.UsageError("--backend=cuda: pyconv is built without CUDA (PYCONV_CUDA=1 says why)")
        if not torch.cuda.is_available():
            raise pytest.UsageError("--backend=cuda: torch finds no GPU")
    _Chosen.backend = backend


def backend() -> str:
    return _Chosen.backend


def device() -> torch.device:
    """Where the tensors of the tests are."""
    return torch.device("cuda" if backend() == "cuda" else "cpu")


def on_cuda_kernels() -> bool:
    """Whether the next operator runs a CUDA kernel, emulated or not."""
    return backend() == "cuda" or pyconv.isa() == EMULATION


def gpu_available() -> bool:
    return pyconv._C.cuda_built() and torch.cuda.is_available()


def supported_isas() -> list[str]:
    """The instruction sets that are compiled in and that this CPU has."""
    current, supported = pyconv.isa(), []
    for name in pyconv.compiled_isas():
        try:
            pyconv.set_isa(name)
        except ValueError:
            continue
        supported.append(name)
    pyconv.set_isa(current)
    return supported


def use_isa(name: str) -> None:
    """`pyconv.set_isa`; the GPU has but one set of kernels."""
    if name != GPU:
        pyconv.set_isa(name)


NEEDS_EMULATION = [
    pytest.mark.cuda_emulation,
    pytest.mark.skipif(not LIBRARY.exists(), reason=NO_LIBRARY),
]


def every_isa() -> list[object]:
    """Parameters of `isa`: all the kernels that the backend can run."""
    if backend() == "cuda":
        return [GPU]
    if backend() == "cuda_emulation":
        return [EMULATION]
    return [*supported_isas(), pytest.param(EMULATION, marks=NEEDS_EMULATION)]


def also_emulated(test: _Test) -> _Test:
    """Decorates a test that runs on the backend's own kernels and, where they are the CPU's, on the emulated ones."""
    if backend() != "cpu":
        return test
    kernels = ["cpu", pytest.param(EMULATION, marks=NEEDS_EMULATION)]
    return pytest.mark.usefixtures("kernels")(pytest.mark.parametrize("kernels", kernels, indirect=True)(test))
