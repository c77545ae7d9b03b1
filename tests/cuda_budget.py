"""What each CUDA kernel takes of a multiprocessor: registers, shared memory, resident blocks, for every architecture.

tests/cuda_budget.json holds the figures that were agreed to; tests/test_cuda_build.py compares. `make cuda-budget`
writes the file anew, so that a change of the figures is a difference to review.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import cuda_tools

BUDGET = Path(__file__).with_name("cuda_budget.json")
REWRITE = "make cuda-budget"
RECORD_LAUNCHES = cuda_tools.ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "record_launches"


@dataclass(frozen=True)
class Multiprocessor:
    shared_bytes: int
    threads: int
    blocks: int
    registers: int = 65536


# "Technical specifications per compute capability" of the CUDA C++ programming guide, 13.0.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 * 1024, threads=2048, blocks=32),
    "sm_90": Multiprocessor(shared_bytes=228 * 1024, threads=2048, blocks=32),
    "sm_100": Multiprocessor(shared_bytes=228 * 1024, threads=2048, blocks=32),
    "sm_120": Multiprocessor(shared_bytes=100 * 1024, threads=1536, blocks=24),
}
# The granularities are those of cuda_occupancy.h, which comes with the toolkit.
WARP = 32
PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers
REGISTERS_OF_A_WARP = 256
SHARED_OF_A_BLOCK = 128


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def resident_blocks(architecture: str, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    sm = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    warps_by_registers = sm.registers // PARTITIONS // round_up(registers * WARP, REGISTERS_OF_A_WARP) * PARTITIONS
    by_shared = sm.shared_bytes // round_up(shared_bytes + cuda_tools.RESERVED_SHARED, SHARED_OF_A_BLOCK)
    return min(sm.blocks, sm.threads // WARP // warps, warps_by_registers // warps, by_shared)


# ---- Launches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The largest block and the most dynamic shared memory that a kernel was launched with."""

    threads: int
    dynamic_shared: int


def geometry_lines() -> str:
    """Shapes for tests/cuda/every_launch.h: those of tests/cases.py, and a grid of sizes, by which tiles are chosen."""
    shapes = [case for case in cases.CASES if case.N > 0]
    sizes = itertools.product((1, 10, 128), (1, 3, 16, 64, 256), (4, 8, 16, 48, 96, 256), (1, 3, 5), (1, 2, 3))
    for N, C, K, kernel, pool in sizes:
        shapes.append(cases.Case("", N, C, 15, 15, K, (kernel, kernel), pool_size=(pool, pool)))
        shapes.append(replace(shapes[-1], pool_size=(3, 3), pool_stride=(2, 2)))
    return "".join(" ".join(map(str, _geometry(case))) + "\n" for case in shapes)


def _geometry(case: cases.Case) -> tuple[int, ...]:
    pad = case.padding
    if isinstance(pad, str):  # "same"; what is left over goes to the far side
        pad = tuple(d * (k - 1) // 2 for d, k in zip(case.dilation, case.kernel, strict=True))
    pool_stride = case.pool_stride or case.pool_size
    return (
        *(case.N, case.C, case.H, case.W, case.K, *case.kernel, case.groups, *case.stride, *pad, *case.dilation),
        *(*case.conv_shape[2:], *case.pool_size, *pool_stride, *case.pool_padding, *case.pool_dilation),
        *case.output_shape[2:],
    )


def launches() -> dict[str, Launch]:
    """By kernel symbol, how the launchers launch each kernel."""
    result = subprocess.run([RECORD_LAUNCHES], input=geometry_lines(), capture_output=True, text=True)
    assert result.returncode == 0, f"{RECORD_LAUNCHES} failed with status {result.returncode}:\n{result.stderr}"
    rows = [line.split() for line in result.stdout.splitlines()]
    return {symbol: Launch(int(threads), int(shared)) for symbol, threads, shared in rows}


# ---- The budget ---------------------------------------------------------------------------------------------

Budget = dict[str, dict[str, dict[str, float]]]  # kernel -> architecture -> figure


def figures(kernel: cuda_tools.Kernel, launch: Launch) -> dict[str, float]:
    shared = kernel.static_shared + launch.dynamic_shared
    blocks = resident_blocks(kernel.architecture, launch.threads, kernel.registers, shared)
    return {
        "threads": launch.threads,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared": shared,
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * launch.threads / MULTIPROCESSORS[kernel.architecture].threads, 3),
    }


def measure() -> Budget:
    """The budget of what is compiled now."""
    launched = launches()
    measured: Budget = {}
    for kernel in cuda_tools.all_kernels():
        assert kernel.symbol in launched, (
            f"{kernel.name} is compiled, but nothing in tests/cuda/every_launch.h launches it"
        )
        row = measured.setdefault(kernel.name, {})
        assert kernel.architecture not in row, f"two kernels are called {kernel.name}"
        row[kernel.architecture] = figures(kernel, launched[kernel.symbol])
    return measured


def differences(agreed: Budget, measured: Budget) -> list[str]:
    """What a reviewer is to read: a line for each figure that is not as agreed."""
    lines = []
    for name in sorted(agreed.keys() | measured.keys()):
        if name not in measured:
            lines.append(f"{name}: gone")
            continue
        if name not in agreed:
            lines.append(f"{name}: new")
            continue
        for architecture, now in measured[name].items():
            before = agreed[name].get(architecture, {})
            changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
            if changed:
                lines.append(f"{name}, {architecture}: {', '.join(changed)}")
    return lines


def read() -> Budget:
    return json.loads(BUDGET.read_text())["kernels"]


def text(budget: Budget) -> str:
    """The file's content: one line for each kernel and architecture, so that differences are read easily."""
    rows = []
    for name in sorted(budget):
        lines = [
            f"      {json.dumps(key)}: {json.dumps(budget[name][key])}"
            for key in MULTIPROCESSORS
            if key in budget[name]
        ]
        rows.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n    }")
    return f'{{\n  "compiler": "{cuda_tools.RELEASE}",\n  "kernels": {{\n' + ",\n".join(rows) + "\n  }\n}\n"


def main() -> int:
    if (reason := cuda_tools.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    built = cuda_tools.build("pyconv_cuda")
    if built.returncode != 0:
        print(built.stdout + built.stderr, file=sys.stderr)
        return 1
    measured = measure()
    changes = differences(read() if BUDGET.is_file() else {}, measured)
    BUDGET.write_text(text(measured))
    print("\n".join(changes) or "no change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
