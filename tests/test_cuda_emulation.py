"""The emulated CUDA device itself: what it computes, and that it finds each kind of mistake.

The kernels of tests/emulation/arithmetic.cu have no mistake, those of tests/emulation/planted/mistakes.cu one each.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pyconv import _C

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests/emulation"
RUNTIME = [EMULATION / f"{name}.cpp" for name in ("block", "fibers", "launches", "matrices", "races", "runtime")]
FLAGS = ["-std=c++17", "-O1", "-DPYCONV_EMULATION", "-Wall", "-Wextra", "-Wno-unknown-pragmas"] + [
    f"-I{directory}" for directory in (EMULATION, ROOT / "csrc", ROOT / "cuda")
]
SEEDS = range(8)


def run(*command: str | Path) -> None:
    process = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def compile_objects(directory: Path, sources: list[Path], *flags: str) -> list[Path]:
    compiler = os.environ.get("CXX", "g++").split()
    objects = [directory / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, *compiler, *FLAGS, *flags, "-c", "-x", "c++", source, "-o", target)
            for source, target in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    return objects


def link(target: Path, objects: list[Path], *flags: str) -> Path:
    compiler = os.environ.get("CXX", "g++").split()
    run(*compiler, *objects, *flags, "-ldl", "-o", target)
    return target


# What it computes


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Objects of the emulation, without checks of memory or races."""
    return compile_objects(tmp_path_factory.mktemp("runtime"), RUNTIME, "-fPIC")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, runtime: list[Path]) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("arithmetic")
    objects = compile_objects(directory, [EMULATION / "arithmetic.cu"], "-fPIC")
    return ctypes.CDLL(str(link(directory / "arithmetic.so", [*runtime, *objects], "-shared")))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


FORMATS = {"float32": 0, "tf32": 1, "bfloat16": 2, "float16": 3}
DTYPES = {
    "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To the 11 bits of TF32, ties away from zero: arithmetic that shares nothing with bit patterns."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2**11
    return torch.ldexp(torch.sign(scaled) * torch.floor(scaled.abs() + 0.5), exponent - 11)


def truncated_to_tf32(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.trunc(mantissa * 2**11), exponent - 11)


def multiply(library: ctypes.CDLL, name: str, transposed: bool, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product = torch.full((a.shape[0], b.shape[0]), float("nan"))
    assert library.multiply(FORMATS[name], ctypes.c_bool(transposed), pointer(a), pointer(b), pointer(product)) == 0
    return product


def matrices(library: ctypes.CDLL, name: str, draw: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    depth = library.matrix_depth(FORMATS[name])
    a, b = draw((library.matrix_rows(), depth)), draw((library.matrix_columns(), depth))
    return a.to(DTYPES[name]), b.to(DTYPES[name])


@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "reduction-major"])
@pytest.mark.parametrize("name", FORMATS)
def test_matrix_product_of_integers_is_exact(library: ctypes.CDLL, name: str, transposed: bool) -> None:
    a, b = matrices(library, name, lambda size: torch.randint(-100, 101, size))
    assert torch.equal(multiply(library, name, transposed, a, b).double(), a.double() @ b.double().T)


@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "reduction-major"])
@pytest.mark.parametrize("name", FORMATS)
def test_matrix_product_is_that_of_the_rounded_operands(library: ctypes.CDLL, name: str, transposed: bool) -> None:
    a, b = matrices(library, name, torch.randn)
    product = multiply(library, name, transposed, a, b).double()
    if name == "tf32":
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    a, b = a.double(), b.double()
    bound = a.shape[1] * torch.finfo(torch.float32).eps * (a.abs() @ b.abs().T)
    assert (product - a @ b.T).abs().le(bound).all()


def test_tensor_cores_truncate_what_was_not_rounded_to_tf32(library: ctypes.CDLL) -> None:
    a, b, product = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    assert library.multiply_unrounded(pointer(a), pointer(b), pointer(product)) == 0
    expected = truncated_to_tf32(a) @ truncated_to_tf32(b)
    bound = 8 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs()).double()
    assert (product - expected).abs().le(bound).all()
    assert not (product - a.double() @ b.double()).abs().le(bound).all()


def narrow(library: ctypes.CDLL, name: str, x: torch.Tensor) -> torch.Tensor:
    bits = torch.empty(x.shape, dtype=torch.int16)
    library.narrow(FORMATS[name], pointer(x), pointer(bits), ctypes.c_int64(x.numel()))
    return bits


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_16_bit_number_survives_widening_and_narrowing(library: ctypes.CDLL, name: str) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = torch.empty(bits.shape)
    library.widen(FORMATS[name], pointer(bits), pointer(wide), ctypes.c_int64(bits.numel()))
    torch.testing.assert_close(wide, bits.view(DTYPES[name]).float(), rtol=0, atol=0, equal_nan=True)
    back = narrow(library, name, wide)
    is_nan = wide.isnan()
    assert torch.equal(back[~is_nan], bits[~is_nan])
    assert back[is_nan].view(DTYPES[name]).isnan().all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrowing_is_to_nearest_with_ties_to_even(library: ctypes.CDLL, name: str) -> None:
    dtype = DTYPES[name]
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    random_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    largest = torch.finfo(dtype).max * torch.tensor([1.0, 1.0005, 1.002, 1.004, 2.0])
    x = torch.cat([
        ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity), random_bits, largest, -largest,
    ])  # fmt: skip
    expected = x.to(dtype)
    actual = narrow(library, name, x).view(dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit()[~x.isnan()], expected.signbit()[~x.isnan()])


def test_rounding_to_tf32(library: ctypes.CDLL) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    step = 1 << 13
    base = (bits[:10_000] // step) * step
    ties = torch.cat([base + step // 2 + offset for offset in (-1, 0, 1)])
    x = torch.cat([bits, ties]).to(torch.int32)
    # Beyond TF32's normal numbers frexp() is no guide.
    x = x[(x.view(torch.float32).abs() > 2.0**-120) & (x.view(torch.float32).abs() < 2.0**127)].contiguous()
    actual = torch.empty_like(x)
    library.round_to_tf32(pointer(x), pointer(actual), ctypes.c_int64(x.numel()))
    assert torch.equal(actual.view(torch.float32).double(), rounded_to_tf32(x.view(torch.float32)))

    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3.4028234e38])
    actual = torch.empty_like(special)
    library.round_to_tf32(pointer(special), pointer(actual), ctypes.c_int64(special.numel()))
    expected = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, float("inf")])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def triple(values: tuple[int, int, int]) -> ctypes.Array[ctypes.c_uint]:
    return (ctypes.c_uint * 3)(*values)


@pytest.mark.parametrize(
    "grid, block",
    [((1, 1, 1), (1, 1, 1)), ((7, 1, 1), (64, 1, 1)), ((3, 4, 5), (5, 6, 7)), ((2, 1, 3), (1024, 1, 1)),
     ((1000, 1, 1), (33, 1, 1))],
)  # fmt: skip
def test_each_thread_of_each_block_runs_once(
    library: ctypes.CDLL, grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    counters = torch.zeros(*grid, *block, dtype=torch.int32)
    assert library.count_threads(triple(grid), triple(block), pointer(counters)) == 0
    assert counters.eq(1).all()


INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.mark.parametrize(
    "grid, block, shared_bytes, error",
    [
        ((1, 1, 1), (1024, 1, 1), 99 * 1024, 0),
        ((1, 1, 1), (1, 1, 1), 99 * 1024 + 1, INVALID_VALUE),
        ((0, 1, 1), (1, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 0, 1), 0, INVALID_CONFIGURATION),
        ((1, 65536, 1), (1, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 65536), (1, 1, 1), 0, INVALID_CONFIGURATION),
        ((2**31, 1, 1), (1, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (33, 32, 1), 0, INVALID_CONFIGURATION),
    ],
)
def test_limits_of_a_launch(
    library: ctypes.CDLL, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, error: int
) -> None:
    assert library.launch_nothing(triple(grid), triple(block), ctypes.c_size_t(shared_bytes)) == error


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("operand", [0, 1, 3, 7])
def test_shuffles_and_votes(library: ctypes.CDLL, operand: int, width: int) -> None:
    values = torch.randint(0, 10, (32,)).to(torch.int32)
    results = torch.empty(7, 32, dtype=torch.int32)
    assert library.shuffles(pointer(values), operand, width, pointer(results)) == 0

    def segment(lane: int) -> range:
        return range(lane // width * width, lane // width * width + width)

    for lane in range(32):
        inside = segment(lane)
        sources = [inside[operand % width], lane - operand, lane + operand, lane ^ operand]
        # xor may read from an earlier segment, but no other operation leaves its own.
        sources[1:3] = [source if source in inside else lane for source in sources[1:3]]
        sources[3] = sources[3] if sources[3] <= inside[-1] else lane
        assert results[:4, lane].tolist() == [values[source].item() for source in sources]
    odd = sum((int(value) & 1) << lane for lane, value in enumerate(values))
    assert (results[4].to(torch.int64) & 0xFFFFFFFF).eq(odd).all()
    assert results[5].eq(int((values > operand).any()) + 2 * int((values > operand).all())).all()
    assert torch.equal(results[6], values.view(16, 2).flip(1).flatten())


class Launches(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("count", ctypes.c_int64),
        ("max_threads", ctypes.c_int64),
        ("max_shared_bytes", ctypes.c_int64),
    ]


def test_launches_are_recorded_by_kernel(library: ctypes.CDLL) -> None:
    library.pyconv_emulation_reset_launches()
    for threads, shared_bytes in ((32, 100), (96, 50), (64, 0)):
        assert library.launch_nothing(triple((1, 1, 1)), triple((threads, 1, 1)), ctypes.c_size_t(shared_bytes)) == 0
    a, b, product = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    assert library.multiply_unrounded(pointer(a), pointer(b), pointer(product)) == 0

    assert library.pyconv_emulation_launches(None, ctypes.c_int64(0)) == 2
    records = (Launches * 2)()
    library.pyconv_emulation_launches(records, ctypes.c_int64(2))
    found = {r.kernel.decode(): (r.count, r.max_threads, r.max_shared_bytes) for r in records}
    assert found == {
        "_ZN6pyconv4cuda7nothingEv": (3, 96, 100),
        "_ZN6pyconv4cuda18multiply_unroundedEPKfS2_Pf": (1, 32, 0),
    }
    library.pyconv_emulation_reset_launches()
    assert library.pyconv_emulation_launches(None, ctypes.c_int64(0)) == 0


def test_threads_of_the_operating_system_launch_at_once(library: ctypes.CDLL) -> None:
    def solve(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        a, b = matrices(library, "float16", lambda size: torch.randint(-9, 10, size, generator=generator))
        return torch.equal(multiply(library, "float16", False, a, b).double(), a.double() @ b.double().T)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(solve, range(100)))


# Loading a table of kernels


def test_a_library_that_is_not_there_is_an_error_with_its_path() -> None:
    with pytest.raises(RuntimeError, match=re.escape("'/nowhere/kernels.so'")):
        _C._load_kernel_table("/nowhere/kernels.so")


def test_a_library_without_a_table_is_an_error_that_names_the_symbol(library: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match=f"{re.escape(library._name)}.*pyconv_kernel_table"):
        _C._load_kernel_table(library._name)


# Mistakes


Mistakes = Callable[..., subprocess.CompletedProcess[str]]


def mistakes(directory: Path, runtime: list[Path], *flags: str) -> Mistakes:
    objects = compile_objects(directory, [EMULATION / "planted/mistakes.cu"], *flags)
    # ThreadSanitizer's runtime is not linked: the race checker stands in for it.
    link_flags = [flag for flag in flags if flag != "-fsanitize=thread"]
    program = link(directory / "mistakes", [*runtime, *objects], "-rdynamic", *link_flags)

    def run_kernel(name: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
        # Each kernel releases what it takes, but one that the emulation ends cannot.
        environment = {**os.environ, "PYCONV_EMULATION_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([program, name], env=environment, capture_output=True, text=True, check=False)

    return run_kernel


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, runtime: list[Path]) -> Mistakes:
    return mistakes(tmp_path_factory.mktemp("plain"), runtime)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Mistakes:
    directory = tmp_path_factory.mktemp("sanitized")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    return mistakes(directory, compile_objects(directory, RUNTIME, *flags), *flags)


@pytest.fixture(scope="module")
def checked_for_races(tmp_path_factory: pytest.TempPathFactory) -> Mistakes:
    directory = tmp_path_factory.mktemp("races")
    flags = ("-g", "-DPYCONV_EMULATION_RACES")
    return mistakes(directory, compile_objects(directory, RUNTIME, *flags), *flags, "-fsanitize=thread")


RIGHT = (
    "reverse", "two_rounds", "early_exit", "reverse_in_warps", "reverse_by_shuffles", "reverse_by_copies", "refill",
)  # fmt: skip


@pytest.mark.parametrize("build", ["plain", "sanitized", "checked_for_races"])
@pytest.mark.parametrize("name", RIGHT)
def test_no_mistake_no_alarm(request: pytest.FixtureRequest, build: str, name: str) -> None:
    for seed in SEEDS:
        process = request.getfixturevalue(build)(name, seed)
        assert (process.returncode, process.stdout, process.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(
    "name",
    ["missing_barrier", "missing_second_barrier", "missing_warp_barrier", "missing_wait", "wait_for_too_few_groups",
     "refill_too_early"],
)  # fmt: skip
def test_order_of_threads_or_late_copies_show_in_the_result(plain: Mistakes, name: str) -> None:
    outputs = {plain(name, seed).stdout for seed in SEEDS}
    assert "wrong\n" in outputs


def line_of(kernel: str) -> range:
    """The lines of a kernel in mistakes.cu, counted from 1."""
    lines = (EMULATION / "planted/mistakes.cu").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if re.search(rf"__global__ void {kernel}\(", line))
    return range(first + 1, lines.index("}", first) + 2)


def assert_in_kernel(message: str, kernel: str) -> None:
    """Some line that the message names is the kernel's."""
    named = {int(line) for line in re.findall(r"mistakes\.cu:(\d+)", message)}
    assert named & set(line_of(kernel)), message


@pytest.mark.parametrize(
    "name, message",
    [
        ("divergent_barrier", "divergent __syncthreads"),
        ("barrier_of_half_a_warp", "__syncthreads"),
        ("mask_without_the_caller", "mask 0x0000ffff does not name the calling lane"),
        ("masks_that_differ", "which it names, waits at"),
        ("shuffle_in_a_branch", "which it names, waits at"),
        ("shuffle_from_a_lane_outside", "lane 15 reads from lane 16, which does not take part"),
        ("matrices_of_half_a_warp", "an operation of the whole warp"),
        ("unaligned_matrix_row", "expected a row at a multiple of 16 bytes"),
        ("unaligned_copy", "expected both sides at a multiple of 16 bytes"),
    ],
)
def test_misuse_ends_the_process_and_names_the_line(plain: Mistakes, name: str, message: str) -> None:
    for seed in SEEDS:
        process = plain(name, seed)
        assert process.returncode < 0 and process.stdout == ""
        assert message in process.stderr
        assert f"pyconv::cuda::{name}" in process.stderr
        assert_in_kernel(process.stderr, name)


@pytest.mark.parametrize(
    "name, kernel, message",
    [
        ("never_waited", "reverse_by_copies", "2 asynchronous copies that it had not waited for"),
        ("more_shared_memory_than_asked_for", "more_shared_memory_than_asked_for", "1024 bytes"),
    ],
)
def test_misuse_of_no_one_line_names_the_kernel(plain: Mistakes, name: str, kernel: str, message: str) -> None:
    process = plain(name)
    assert process.returncode < 0
    assert message in process.stderr and f"pyconv::cuda::{kernel}" in process.stderr


@pytest.mark.parametrize(
    "name, message",
    [
        ("global_overrun", "heap-buffer-overflow"),
        ("global_read_overrun", "heap-buffer-overflow"),
        ("copy_overrun", "heap-buffer-overflow"),
        ("shared_overrun", "AddressSanitizer"),
        ("shared_underrun", "use-after-poison"),
        ("unaligned_vector", "misaligned address"),
    ],
)
def test_sanitizers_find_wrong_addresses(sanitized: Mistakes, name: str, message: str) -> None:
    process = sanitized(name)
    assert process.returncode != 0 and process.stdout == ""
    assert message in process.stderr
    assert_in_kernel(process.stderr, name)


@pytest.mark.parametrize(
    "name, kernel, message",
    [
        ("missing_barrier", "reverse", "race|uninitialised"),
        ("missing_second_barrier", "two_rounds", "race"),
        ("missing_warp_barrier", "reverse_in_warps", "race|uninitialised"),
        ("missing_wait", "reverse_by_copies", "race.*no wait between"),
        ("wait_for_too_few_groups", "reverse_by_copies", "race.*no wait between"),
        ("refill_too_early", "refill", "race"),
        ("uninitialised_read", "uninitialised_read", "read of uninitialised shared memory"),
    ],
)
def test_race_checker(checked_for_races: Mistakes, name: str, kernel: str, message: str) -> None:
    """Whatever the order of the threads: the checker needs no wrong result."""
    for seed in SEEDS:
        process = checked_for_races(name, seed)
        assert process.returncode < 0 and process.stdout == ""
        assert re.search(message, process.stderr), process.stderr
        assert_in_kernel(process.stderr, kernel)
