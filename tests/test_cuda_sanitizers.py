"""The emulated CUDA kernels under AddressSanitizer, UBSan and the race checker, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import backends
import pytest

pytestmark = [pytest.mark.cpu_only, *backends.NEEDS_EMULATION]

BUILD_DIR = Path(__file__).parents[1] / f"build/cmake-{sys.implementation.cache_tag}"

RANDOM_SHAPES = "test_random_shapes_are_exact_on_integers"
THREAD_ORDERS = "test_order_of_threads_does_not_change_a_bit"
TILES = "test_tile_is_exact_on_integers and (rows-64 or shared-32 or small-direct)"


def build(target: str) -> Path:
    """The emulation's library of this name, built with the checks."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "--build", str(BUILD_DIR), "--target", target]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return backends.LIBRARY.with_name(f"lib{target}.so")


def run_operators(library: Path, selection: str, environment: dict[str, str]) -> None:
    """The selected tests of test_cuda_operators.py on the kernels of `library`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda_operators.py"]
    process = subprocess.run(
        [*command, "-k", selection],
        cwd=BUILD_DIR.parents[1],
        env={**os.environ, "PYCONV_EMULATION_LIBRARY": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert " passed" in process.stdout


@pytest.mark.long
def test_address_sanitizer_finds_nothing() -> None:
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = ["g++", f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"g++ has no {name}")
        runtimes.append(path)
    run_operators(
        build("pyconv_emulation_asan"),
        f"{RANDOM_SHAPES} or {THREAD_ORDERS} or ({TILES})",
        {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"},
    )


@pytest.mark.long
def test_race_checker_finds_nothing() -> None:
    run_operators(build("pyconv_emulation_race"), f"{RANDOM_SHAPES} or ({TILES})", {})
