"""The machine: its model, without names or paths, and its peaks, measured in the run that they are for."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from pyconv.machine import cpu_model

_FMA_SOURCE = Path(__file__).resolve().parent / "fma_peak.c"
_FMA_ITERATIONS = 1_000_000
"""2 to 10 ms: far longer than starting a thread takes, short enough to run undisturbed at times."""
_FMA_SECONDS = 0.4
"""How long such loops are repeated; the fastest counts."""
_REPEATS = 5
_CALLS_ON_A_GPU = 5
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Beyond every private cache, and beyond the share of the last level that a virtual machine can count on."""
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}

TORCH_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names of precisions. "tf32" is float32 data with TF32 tensor cores allowed; "float32" forbids them."""


def set_precision(name: str) -> torch.dtype:
    """Allow or forbid TF32 as `name` says, for pyconv and every peer alike; return the dtype of the data."""
    if name not in TORCH_DTYPES:
        raise ValueError(f"precision must be one of {', '.join(TORCH_DTYPES)}, but got {name!r}")
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return TORCH_DTYPES[name]


def describe() -> dict[str, Any]:
    """Models, counts and versions. No host name, kernel release, path or branch."""
    info: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": {
            name: v for name in ("jax", "numpy", "pytest-benchmark") if (v := _version(name)) is not None
        },
    }
    try:
        import pyconv

        info["pyconv"] = {"version": pyconv.__version__, "isa": pyconv.isa()}
    except ImportError:
        info["pyconv"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def peaks(device_type: str, precision: str, threads: int) -> dict[str, Any]:
    """Peak GFLOP/s and copy bandwidth in GB/s (bytes read plus bytes written) for `threads` threads.

    On the CPU the arithmetic peak of float32 and float64 is the FMA loop of fma_peak.c. Everywhere else, or
    without a C compiler, it is a large square matmul of the library in that precision: a proxy, which
    "method" then says. The short types of the CPU take the better of that and the float32 loop, since they
    may always be converted.
    """
    rate, method = None, "FMA loop"
    if device_type == "cpu":
        rate = _fma_rate("float64" if precision == "float64" else "float32", threads)
    if rate is None or precision not in ("float32", "float64"):
        proxy = _matmul_rate(device_type, precision, threads)
        if rate is None or proxy > rate:
            rate, method = proxy, "torch matmul"
    return {
        "gflops": round(rate / 1e9, 1),
        "method": method,
        "copy_gb_per_second": round(_copy_rate(device_type, threads) / 1e9, 1),
    }


@functools.cache
def _fma_library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(
            [compiler, *flags, "-o", str(library), str(_FMA_SOURCE)], check=True, capture_output=True
        )
        return ctypes.CDLL(str(library))


def _fma_rate(precision: str, threads: int) -> float | None:
    library = _fma_library()
    if library is None:
        return None
    scalar, name = (ctypes.c_float, "float") if precision == "float32" else (ctypes.c_double, "double")
    loop = getattr(library, f"fma_loop_{name}")
    loop.argtypes, loop.restype = [ctypes.c_long, ctypes.POINTER(scalar)], ctypes.c_double

    def flops_per_second() -> float:
        done = [0.0] * threads

        def work(index: int) -> None:
            done[index] = loop(_FMA_ITERATIONS, scalar())

        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) / (time.perf_counter() - start)

    best, deadline = 0.0, time.perf_counter() + _FMA_SECONDS
    while best == 0.0 or time.perf_counter() < deadline:
        best = max(best, flops_per_second())
    return best


def _matmul_rate(device_type: str, precision: str, threads: int) -> float:
    size = _MATMUL_SIZE[device_type]
    dtype = set_precision(precision)
    a = torch.randn(size, size, device=device_type).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, a, out=out), device_type, threads)


@functools.cache
def _copy_rate(device_type: str, threads: int) -> float:
    size = _COPY_BYTES[device_type]
    source = torch.ones(size, dtype=torch.uint8, device=device_type)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device_type, threads)


def _best_seconds(run: Callable[[], object], device_type: str, threads: int) -> float:
    if device_type == "cuda":
        return min(gpu.block_seconds(run, None, _CALLS_ON_A_GPU, warm_up=True)[0] for _ in range(_REPEATS))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run()
        seconds = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)
    finally:
        torch.set_num_threads(before)
