"""Compile the CUDA kernels as a build does, and read what came out: the resources and the instructions of each kernel.

The compiler and the disassemblers are NVIDIA's packages of requirements/cuda-check.txt; a toolkit of the same release
serves as well. Everything lies in build/cuda-check and is made again only where a source changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_DIR = ROOT / "build" / "cuda-check"
OBJECTS_DIR = BUILD_DIR / "cuda"
RELEASE = "13.0"  # of the compiler that the budget is made with; requirements/cuda-check.txt pins it

if str(ROOT / "cmake") not in sys.path:
    sys.path.append(str(ROOT / "cmake"))

import build_tools  # noqa: E402
import cuda_facts  # noqa: E402

RESERVED_SHARED = 1024

INSTALL = "pip install -r requirements/cuda-check.txt"


def sources() -> list[Path]:
    """The CUDA sources, as CMakeLists.txt lists them."""
    listed = re.search(r"set\(CUDA_SOURCES\s([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert listed is not None
    return [ROOT / name for name in listed.group(1).split()]


@functools.cache
def find_nvcc() -> Path | None:
    """A CUDA compiler of the release that the budget is made with: the package's, or an installed toolkit's."""
    packaged = cuda_facts.PACKAGED_TOOLKIT / "bin" / "nvcc"
    for nvcc in (packaged, *cuda_facts.candidates()):
        with contextlib.suppress(build_tools.MissingTool, OSError):
            if cuda_facts.nvcc_release(nvcc) == RELEASE:
                return nvcc
    return None


def find_tool(name: str) -> Path | None:
    """`cuobjdump` or `nvdisasm`."""
    packaged = cuda_facts.PACKAGED_TOOLKIT / "bin" / name
    found = packaged if packaged.is_file() else shutil.which(name)
    return Path(found) if found else None


def missing() -> str | None:
    """What is missing, in a sentence; None if nothing is."""
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no CUDA compiler of release {RELEASE} ({INSTALL})"
    try:
        cuda_facts.facts("", nvcc)
    except build_tools.MissingTool as part:
        return str(part)
    for name in ("cuobjdump", "nvdisasm"):
        if find_tool(name) is None:
            return f"{name} is missing ({INSTALL})"
    return None


# ---- Compiling ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _only_one_build() -> Iterator[None]:
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with (BUILD_DIR / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(*targets: str) -> subprocess.CompletedProcess[str]:
    """Configure, and build the targets of CMakeLists.txt that PYCONV_CUDA_CHECK adds."""
    options = {
        "CMAKE_MAKE_PROGRAM": build_tools.find_program("ninja"),
        "PYCONV_PYTHON": sys.executable,
        "PYCONV_BUILD_TESTS": "OFF",
        "PYCONV_CUDA": "OFF",
        "PYCONV_CUDA_CHECK": "ON",
        "PYCONV_CUDA_ARCHS": "",
        "PYCONV_NVCC": find_nvcc(),
    }
    cmake = build_tools.find_program("cmake")
    configure = [cmake, "-S", ROOT, "-B", BUILD_DIR, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    # Every file is compiled even where one fails, so that one run shows all errors.
    make = [cmake, "--build", BUILD_DIR, *(f"--target={target}" for target in targets), "--", "-k", "0"]
    with _only_one_build():
        result = subprocess.run(configure, capture_output=True, text=True)
        return result if result.returncode != 0 else subprocess.run(make, capture_output=True, text=True)


def nvcc_command() -> list[str]:
    """How the build compiles, but for the files: what tests compile others with. A target is built already."""
    return (OBJECTS_DIR / "nvcc_command").read_text().splitlines()


# ---- Reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel's code for one architecture."""

    name: str  # demangled, without namespace and parameters
    symbol: str
    architecture: str  # "sm_90"
    registers: int  # a thread's
    stack: int  # bytes of local memory that a thread has
    static_shared: int  # bytes
    instructions: Counter[str]  # how often each opcode occurs, with its modifiers: "HMMA.16816.F32.BF16"


def demangle(symbols: list[str]) -> dict[str, str]:
    """The short name of each: "pack_kernel<float, 4>" for `void pyconv::cuda::pack_kernel<float, 4>(Params)`."""
    program = shutil.which("c++filt")
    assert program is not None, "c++filt is missing (Debian, Ubuntu: apt-get install binutils)"
    names = subprocess.run([program], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return dict(zip(symbols, map(short_name, names.splitlines()), strict=True))


def short_name(declaration: str) -> str:
    name = declaration.removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            name = name[:i]
            break
    return name.replace("pyconv::cuda::", "").replace("pyconv::", "").replace("> >", ">>")


def _cuobjdump(flag: str, file: Path) -> Iterator[str]:
    """The lines that cuobjdump writes; it finds nvdisasm beside itself."""
    with subprocess.Popen([str(find_tool("cuobjdump")), flag, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"cuobjdump {flag} {file} failed with status {process.returncode}"


def _resources(file: Path) -> dict[tuple[str, str], dict[str, int]]:
    """What each (architecture, symbol) uses: REG, STACK, SHARED, LOCAL."""
    found = {}
    architecture = symbol = ""
    for line in _cuobjdump("-res-usage", file):
        if started := re.match(r"arch = (\w+)", line):
            architecture = started.group(1)
        elif started := re.match(r" Function (\S+):", line):
            symbol = started.group(1)
        elif line.startswith("  REG:"):
            found[architecture, symbol] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def _reserved(architecture: str, shared: int) -> int:
    """Bytes of shared memory that the system has in each block: from sm_90 on, counted wherever any is used."""
    return RESERVED_SHARED if shared > 0 and int(architecture.removeprefix("sm_")) >= 90 else 0


def _instructions(file: Path) -> dict[tuple[str, str], Counter[str]]:
    """The opcodes of each (architecture, symbol)."""
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    found: dict[tuple[str, str], Counter[str]] = {}
    architecture, opcodes = "", Counter[str]()
    for line in _cuobjdump("-sass", file):
        if there := instruction.match(line):
            opcodes[there.group(1)] += 1
        elif started := re.match(r"arch = (\w+)", line):
            architecture = started.group(1)
        elif started := re.match(r"\s+Function : (\S+)", line):
            opcodes = found.setdefault((architecture, started.group(1)), Counter())
    return found


def kernels_in(file: Path) -> list[Kernel]:
    """Every kernel in an object file or cubin. Reading takes seconds, so it is remembered for each content."""
    digest = hashlib.sha256(file.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:32]
    remembered = BUILD_DIR / "kernels" / f"{digest}.json"
    if remembered.is_file():
        return [
            Kernel(**{**row, "instructions": Counter(row["instructions"])})
            for row in json.loads(remembered.read_text())
        ]
    resources, instructions = _resources(file), _instructions(file)
    assert resources.keys() == instructions.keys(), f"{file}: -res-usage and -sass name different kernels"
    names = demangle(sorted({symbol for _, symbol in resources}))
    kernels = [
        Kernel(
            name=names[symbol],
            symbol=symbol,
            architecture=architecture,
            registers=used["REG"],
            stack=used["STACK"] + used["LOCAL"],
            static_shared=used["SHARED"] - _reserved(architecture, used["SHARED"]),
            instructions=instructions[architecture, symbol],
        )
        for (architecture, symbol), used in resources.items()
    ]
    remembered.parent.mkdir(parents=True, exist_ok=True)
    fresh = remembered.with_suffix(".new")
    fresh.write_text(json.dumps([vars(kernel) for kernel in kernels]))
    fresh.replace(remembered)
    return kernels


def all_kernels() -> list[Kernel]:
    """Every kernel of the build, for every architecture; the target pyconv_cuda is built already."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = [OBJECTS_DIR / f"{source.stem}.o" for source in sources()]
        return [kernel for kernels in pool.map(kernels_in, files) for kernel in kernels]
