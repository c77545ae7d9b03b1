"""What nvcc makes of the CUDA kernels, without a GPU: they compile, fit their budget, and use the instructions meant.

The compiler comes from requirements/cuda-check.txt, which `make test` installs. The first run compiles for minutes.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import cuda_budget
import cuda_tools
import pytest

MISSING = cuda_tools.missing()
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(MISSING is not None, reason=f"what nvcc makes: {MISSING}"),
]

# `Math` of cuda/warp_gemm.cuh, as it stands among a kernel's template arguments -> the matrix instruction meant.
MATRIX_INSTRUCTIONS = {"TF32": "HMMA.1688.F32.TF32", "BF16": "HMMA.16816.F32.BF16", "FP16": "HMMA.16816.F32"}
EXACT = "Float32"
# Tiles whose arguments do not name their format.
TILES = {"PatchTile": "TF32"}
# Kernels that move 16 bytes at a time.
VECTORS = re.compile(r"bias_act_dropout_(forward|backward)_kernel<")
# More fused multiply-adds than an activation has: those of the product of two tiles.
FFMA_OF_A_PRODUCT = 128


def built(target: str) -> None:
    result = cuda_tools.build(target)
    assert result.returncode == 0, f"{target} does not compile:\n{result.stdout}{result.stderr}"


@pytest.fixture(scope="module")
def kernels() -> list[cuda_tools.Kernel]:
    """Every kernel, for every architecture."""
    built("pyconv_cuda")
    return cuda_tools.all_kernels()


# ----------------------------------------------------------------------------------------------------------
# Compiling
# ----------------------------------------------------------------------------------------------------------


def test_every_kernel_compiles_for_every_architecture(kernels: list[cuda_tools.Kernel]) -> None:
    architectures = set(cuda_budget.MULTIPROCESSORS)
    found: dict[str, set[str]] = {}
    for kernel in kernels:
        found.setdefault(kernel.name, set()).add(kernel.architecture)
    assert found
    assert {name: there for name, there in found.items() if there != architectures} == {}


def test_newest_architecture_is_there_as_ptx_too(kernels: list[cuda_tools.Kernel]) -> None:
    newest = max(cuda_budget.MULTIPROCESSORS, key=lambda name: int(name.removeprefix("sm_")))
    tool = cuda_tools.find_tool("cuobjdump")
    for source in cuda_tools.sources():
        file = cuda_tools.OBJECTS_DIR / f"{source.stem}.o"
        listing = subprocess.run([tool, "-lptx", file], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\.(sm_\d+)\.ptx", listing) == [newest]


SPILLS = """
__global__ void __launch_bounds__(1024, 2) planted(float* p) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = x[i] * x[63 - i];
}
"""
INDEXES_LOCAL_MEMORY = """
__global__ void planted(float* p, int n) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = p[i];
  for (int i = 0; i < n; ++i) x[i * n % 16] += p[i];
  for (int i = 0; i < n; ++i) p[i] = x[(i + n) % 16];
}
"""
WARNS = """
__global__ void planted(float* p) {
  int unused = 3;
  *p = 1;
}
"""


@pytest.mark.parametrize(
    "source, complaint",
    [
        pytest.param(SPILLS, "Registers are spilled", id="spills"),
        pytest.param(INDEXES_LOCAL_MEMORY, "Local memory used", id="local-memory"),
        pytest.param(WARNS, "declared but never referenced", id="warning"),
    ],
)
def test_the_builds_flags_refuse(source: str, complaint: str, kernels: list[cuda_tools.Kernel], tmp_path: Path) -> None:
    result = compile_planted(source, tmp_path)
    assert result.returncode != 0
    assert complaint in result.stdout + result.stderr


def compile_planted(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Compile `source` to planted.o as the build compiles kernels, but for sm_80 alone."""
    (directory / "planted.cu").write_text(source)
    command = cuda_tools.nvcc_command()
    command = command[: command.index("-gencode")] + ["-gencode", "arch=compute_80,code=sm_80"]
    files = ["-c", directory / "planted.cu", "-o", directory / "planted.o"]
    return subprocess.run([*command, *files], capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------
# The budget
# ----------------------------------------------------------------------------------------------------------


def test_kernels_take_what_the_budget_says(kernels: list[cuda_tools.Kernel]) -> None:
    if not cuda_budget.RECORD_LAUNCHES.is_file():
        pytest.skip("the emulated CUDA kernels are not built (`python cmake/native_build.py tests` makes them)")
    changed = cuda_budget.differences(cuda_budget.read(), cuda_budget.measure())
    assert not changed, "\n".join(
        ["the kernels take other resources than tests/cuda_budget.json says:", *changed]
        + [f"`{cuda_budget.REWRITE}` writes the file anew"]
    )


def test_budget_has_no_spills_and_each_kernel_fits() -> None:
    for name, row in cuda_budget.read().items():
        assert row.keys() == cuda_budget.MULTIPROCESSORS.keys(), name
        for architecture, figures in row.items():
            assert figures["stack"] == 0, (name, architecture)
            assert figures["blocks_per_sm"] >= 1, (name, architecture)


def test_differences_name_what_changed() -> None:
    before = {"a": {"sm_80": {"registers": 40, "stack": 0}}, "b": {}}
    after = {"a": {"sm_80": {"registers": 48, "stack": 0}}, "c": {}}
    assert cuda_budget.differences(before, before) == []
    assert cuda_budget.differences(before, after) == ["a, sm_80: registers 40 -> 48", "b: gone", "c: new"]


@pytest.mark.parametrize(
    "architecture, threads, registers, shared_bytes, blocks",
    [
        ("sm_80", 256, 32, 0, 8),  # threads
        ("sm_120", 256, 32, 0, 6),
        ("sm_90", 32, 16, 0, 32),  # blocks
        ("sm_120", 32, 16, 0, 24),
        ("sm_90", 256, 128, 0, 2),  # registers
        ("sm_90", 256, 129, 0, 1),
        ("sm_90", 96, 168, 0, 4),  # three warps a block, three warps a partition
        ("sm_80", 128, 32, 40 * 1024, 4),  # 1 KB more for each block
        ("sm_80", 128, 32, 41 * 1024, 3),
        ("sm_120", 128, 32, 99 * 1024, 1),
    ],
)
def test_resident_blocks(architecture: str, threads: int, registers: int, shared_bytes: int, blocks: int) -> None:
    assert cuda_budget.resident_blocks(architecture, threads, registers, shared_bytes) == blocks


# ----------------------------------------------------------------------------------------------------------
# Instructions
# ----------------------------------------------------------------------------------------------------------


def math_of(name: str) -> str | None:
    """Which of the products of cuda/warp_gemm.cuh the kernel called `name` forms, if any."""
    there = {math for math in (*MATRIX_INSTRUCTIONS, EXACT) if re.search(rf"[<,] ?{math}[,>]", name)}
    there |= {math for tile, math in TILES.items() if re.search(rf"[<,] ?{tile}<", name)}
    assert len(there) <= 1, name
    return next(iter(there), None)


def complaints(name: str, instructions: Counter[str]) -> list[str]:
    """What is wrong with the instructions of the kernel called `name`."""

    def count(*prefixes: str) -> int:
        """How many opcodes equal a prefix or go on from it after a dot."""
        return sum(n for code, n in instructions.items() for p in prefixes if code == p or code.startswith(f"{p}."))

    found = [f"{code}: local memory" for code in ("LDL", "STL") if count(code)]
    matrix = {code for code in instructions if re.match(r"[A-Z]MMA\b", code)}
    math = math_of(name)
    if math in MATRIX_INSTRUCTIONS:
        if matrix != {MATRIX_INSTRUCTIONS[math]}:
            found.append(
                f"expected {MATRIX_INSTRUCTIONS[math]} alone, found {sorted(matrix) or 'no matrix instruction'}"
            )
        if not count("LDGSTS"):
            found.append("no LDGSTS: no asynchronous copy to shared memory")
    elif matrix:
        found.append(f"expected no matrix instruction, found {sorted(matrix)}")
    if math == EXACT and count("FFMA") < FFMA_OF_A_PRODUCT:
        found.append(f"{count('FFMA')} FFMA: no product of tiles")
    if VECTORS.match(name):
        found += [f"no {code}: no vectors of 16 bytes" for code in ("LDG.E.128", "STG.E.128") if not count(code)]
    return found


def name_all(kernels: Iterable[cuda_tools.Kernel]) -> list[str]:
    return [
        f"{kernel.name}, {kernel.architecture}: {complaint}"
        for kernel in kernels
        for complaint in complaints(kernel.name, kernel.instructions)
    ]


def test_instructions_are_those_meant(kernels: list[cuda_tools.Kernel]) -> None:
    assert name_all(kernels) == []


@pytest.mark.parametrize("math", [*MATRIX_INSTRUCTIONS, EXACT])
def test_every_format_has_a_forward_and_a_backward_kernel(math: str, kernels: list[cuda_tools.Kernel]) -> None:
    """So that the checks above look at something."""
    names = {kernel.name for kernel in kernels if math_of(kernel.name) == math}
    for prefix in ("conv_max_pool2d_forward", "conv_max_pool2d_backward"):
        assert any(name.startswith(prefix) for name in names), sorted(names)


PLANTED = """
#include "warp_gemm.cuh"
namespace pyconv::cuda {
template <class Math>
struct Tiles {
  typename Math::Storage a[1024], b[1024];
};
template <class Math>
__global__ void planted_kernel(const float4* in, float4* out, int steps) {
  auto& tiles = shared_memory<Tiles<Math>>();
  copy_async<16>(&tiles.a[8 * threadIdx.x], in + threadIdx.x, true);
  copy_async<16>(&tiles.b[8 * threadIdx.x], in + threadIdx.x, true);
  copies_commit();
  copies_wait<0>();
  __syncthreads();
  RowsOfA<Math, 2> a;
  RowsOfB<Math, 2> b;
  a.set([&](int row) -> const void* { return &tiles.a[16 * row]; });
  b.set([&](int row) -> const void* { return &tiles.b[16 * row]; });
  WarpTile<Math, 2, 2> tile;
  tile.clear();
  for (int i = 0; i < steps; ++i) tile.multiply(a, kStepBytes * i, b, kStepBytes * i);
  float4 sums = in[threadIdx.x];
  for (int i = 0; i < 2; ++i) {
    sums.x += tile.sum[0][i][0] + tile.sum[1][i][0];
    sums.y += tile.sum[0][i][1] + tile.sum[1][i][1];
    sums.z += tile.sum[0][i][2] + tile.sum[1][i][2];
    sums.w += tile.sum[0][i][3] + tile.sum[1][i][3];
  }
  out[threadIdx.x] = sums;
}
template __global__ void planted_kernel<TF32>(const float4*, float4*, int);
template __global__ void planted_kernel<BF16>(const float4*, float4*, int);
template __global__ void planted_kernel<FP16>(const float4*, float4*, int);
template __global__ void planted_kernel<Float32>(const float4*, float4*, int);
}  // namespace pyconv::cuda
"""


@pytest.fixture(scope="module")
def planted(kernels: list[cuda_tools.Kernel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """The instructions of a product of each format, by the format's name."""
    directory = tmp_path_factory.mktemp("planted")
    result = compile_planted(PLANTED, directory)
    assert result.returncode == 0, result.stdout + result.stderr
    found = cuda_tools.kernels_in(directory / "planted.o")
    return {math: kernel.instructions for kernel in found if (math := math_of(kernel.name)) is not None}


@pytest.mark.parametrize("promised", [*MATRIX_INSTRUCTIONS, EXACT, "int"])
@pytest.mark.parametrize("done", [*MATRIX_INSTRUCTIONS, EXACT])
def test_a_kernel_with_another_formats_instructions_is_noticed(
    promised: str, done: str, planted: dict[str, Counter[str]]
) -> None:
    found = complaints(f"planted_kernel<{promised}, false>", planted[done])
    innocent = promised == done or (promised, done) == ("int", EXACT)
    assert (found == []) == innocent, found


@pytest.mark.parametrize("missing", ["LDGSTS", "FFMA"])
def test_a_kernel_without_its_copies_or_products_is_noticed(missing: str, planted: dict[str, Counter[str]]) -> None:
    math = EXACT if missing == "FFMA" else "BF16"
    left = Counter({code: n for code, n in planted[math].items() if not code.startswith(missing)})
    assert [missing in complaint for complaint in complaints(f"planted_kernel<{math}>", left)] == [True]


@pytest.mark.parametrize("missing", ["LDG.E.128", "STG.E.128"])
def test_a_kernel_without_its_vectors_is_noticed(missing: str, planted: dict[str, Counter[str]]) -> None:
    name = "bias_act_dropout_forward_kernel<float>"
    there = planted[EXACT]
    assert complaints(name, there) == []
    left = Counter({code: n for code, n in there.items() if not code.startswith(missing)})
    assert complaints(name, left) == [f"no {missing}: no vectors of 16 bytes"]


@pytest.mark.parametrize("code", ["LDL.64", "STL"])
def test_local_memory_is_noticed(code: str, planted: dict[str, Counter[str]]) -> None:
    assert complaints("planted_kernel<BF16>", planted["BF16"] + Counter([code])) != []


# ----------------------------------------------------------------------------------------------------------
# Doors and launchers
# ----------------------------------------------------------------------------------------------------------


def test_doors_compile_with_cuda() -> None:
    """Against the headers of any torch: CUDA's symbols are needed for linking only."""
    built("cuda_door")


# Which of the errors depends on whether a driver is installed.
WITHOUT_GPU = {"35 cudaErrorInsufficientDriver", "100 cudaErrorNoDevice"}
LAUNCHERS = {
    "conv_max_pool2d_forward",
    "conv_max_pool2d_backward",
    "bias_act_dropout_forward",
    "bias_act_dropout_backward",
    "dropout_state",
}


def test_launch_without_gpu_gives_an_error_code() -> None:
    built("launch_without_gpu")
    result = subprocess.run(
        [cuda_tools.BUILD_DIR / "launch_without_gpu"],
        input=cuda_budget.geometry_lines(),
        capture_output=True,
        text=True,
    )
    if result.returncode == 2:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    answers = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert {name.split("/")[0] for name in answers} == LAUNCHERS
    assert set(answers.values()) <= WITHOUT_GPU
