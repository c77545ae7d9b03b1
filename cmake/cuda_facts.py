"""What a build with CUDA must know: the compiler, its toolkit, the architectures. And whether to build with it.

Run by cmake/cuda.cmake with the values of PYCONV_CUDA_ARCHS and PYCONV_NVCC, it prints one CMake list: nvcc;
libcudart_static.a; the architectures, separated by commas; the directories with the CUDA headers. With the word "gpu"
it says whether there is one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from build_tools import MissingTool

OLDEST_ARCHITECTURE = 80  # cuda/kernel_table.h says so too
# Code for a major version runs on its later minor versions; the PTX is for those to come.
DEFAULT_ARCHITECTURES = "80;90;100;120+PTX"
USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")
# Where the CUDA packages on PyPI put their files. A compiler there is not looked for: that the tests installed one must
# not change what is built.
PACKAGED_TOOLKIT = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13")


def candidates() -> Iterator[Path]:
    """Where nvcc may be, the explicit choices first."""
    if chosen := os.environ.get("CUDACXX"):
        yield Path(shutil.which(chosen) or chosen)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home, "bin", "nvcc")
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield USUAL_PLACE


def find_nvcc() -> Path | None:
    """The CUDA compiler that a build uses, or None."""
    return next((nvcc for nvcc in candidates() if os.access(nvcc, os.X_OK)), None)


def torch_cuda_version() -> str | None:
    """The CUDA release that the installed torch was built with; None for a CPU build. torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise MissingTool("PyTorch is missing; install it (pip install torch)")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")


def wanted() -> bool:
    """Whether to build with CUDA: PYCONV_CUDA says so, or both nvcc and a CUDA build of torch are there.

    A GPU is not asked for: what is built on a machine without one must run on a machine with one.
    """
    chosen = os.environ.get("PYCONV_CUDA", "")
    if chosen not in ("", "0", "1"):
        raise MissingTool(f"PYCONV_CUDA={chosen} is neither 0 nor 1")
    if chosen == "0":
        return False
    nvcc, torch_cuda = find_nvcc(), torch_cuda_version()
    if chosen == "1" and nvcc is None:
        raise MissingTool(
            "PYCONV_CUDA=1, but nvcc is not found; install the CUDA toolkit, or set CUDA_HOME to where it is"
        )
    if chosen == "1" and torch_cuda is None:
        raise MissingTool(
            "PYCONV_CUDA=1, but the installed PyTorch is a CPU build, without the libraries to link with; "
            "install a CUDA build of PyTorch"
        )
    return nvcc is not None and torch_cuda is not None


def ask(nvcc: Path, *arguments: str) -> str:
    """What `nvcc` prints, on either stream."""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise MissingTool(f"{nvcc} {' '.join(arguments)} fails: {(result.stderr or result.stdout).strip()}")
    return result.stdout + result.stderr


@functools.cache
def nvcc_release(nvcc: Path) -> str:
    """ "13.0", for example."""
    stated = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    if stated is None:
        raise MissingTool(f"{nvcc} --version states no release")
    return stated.group(1)


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's prefix as nvcc itself resolves it, for nvcc may be a link or a script that calls the real one."""
    stated = re.search(r"^#\$ TOP=(.*)$", ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    if stated is None:
        raise MissingTool(f"{nvcc} --dryrun does not say where its toolkit is; set CUDA_HOME")
    return Path(stated.group(1)).resolve()


def static_runtime(toolkit: Path) -> Path:
    """libcudart_static.a: it is linked into the module, so that no release of the shared one is asked for."""
    machine = os.uname().machine
    for directory in ("lib64", "lib", f"targets/{machine}-linux/lib", "targets/sbsa-linux/lib"):
        library = toolkit / directory / "libcudart_static.a"
        if library.is_file():
            return library
    raise MissingTool(f"libcudart_static.a is not in {toolkit}; install the whole CUDA toolkit (cuda-cudart-dev)")


def include_directories(toolkit: Path) -> list[Path]:
    """The toolkit's headers; then those of torch's own CUDA packages, for a toolkit that is installed in part."""
    machine = os.uname().machine
    possible = (toolkit / "include", toolkit / f"targets/{machine}-linux/include", PACKAGED_TOOLKIT / "include")
    return [directory for directory in dict.fromkeys(path.resolve() for path in possible) if directory.is_dir()]


def gpu_capabilities() -> list[tuple[int, int]]:
    """The compute capability of each GPU that the driver shows; none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []

    def attribute(device: int, number: int) -> int:
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    return [(attribute(device, major), attribute(device, minor)) for device in range(count.value)]


def check_gpu() -> None:
    """A GPU that the kernels can run on."""
    capabilities = gpu_capabilities()
    if not capabilities:
        raise MissingTool("no NVIDIA GPU is found")
    if all(10 * major + minor < OLDEST_ARCHITECTURE for major, minor in capabilities):
        found, oldest = (".".join(map(str, x)) for x in (max(capabilities), divmod(OLDEST_ARCHITECTURE, 10)))
        raise MissingTool(f"the GPU's compute capability is {found}; the kernels need {oldest} or newer")


def native_architectures() -> list[str]:
    """The architectures of the GPUs of this machine, "90" for example."""
    capabilities = sorted(set(gpu_capabilities()))
    if not capabilities:
        raise MissingTool(
            "PYCONV_CUDA_ARCHS=native, but no NVIDIA GPU is found; name the architectures, 90 for example"
        )
    return [f"{major}{minor}" for major, minor in capabilities]


def architectures(chosen: str) -> list[str]:
    """The list that PYCONV_CUDA_ARCHS stands for: "80;90+PTX", "90", "native", "" for the default."""
    listed = [entry for entry in re.split(r"[;,\s]+", chosen) if entry] or DEFAULT_ARCHITECTURES.split(";")
    if listed == ["native"]:
        listed = native_architectures()
    for entry in listed:
        number = re.fullmatch(r"(\d{2,3})(\+PTX)?", entry)
        if number is None:
            raise MissingTool(
                f"PYCONV_CUDA_ARCHS={chosen}: {entry!r} is no architecture; expected numbers as in "
                f"'{DEFAULT_ARCHITECTURES}', or 'native'"
            )
        if int(number.group(1)) < OLDEST_ARCHITECTURE:
            raise MissingTool(
                f"architecture {number.group(1)} is too old: the kernels need {OLDEST_ARCHITECTURE} or newer "
                f"(an Ampere GPU, for example an A100)"
            )
    return listed


def check_supported(nvcc: Path, listed: list[str]) -> None:
    """That `nvcc` knows every architecture listed."""
    known = set(re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch")))
    if unknown := [entry for entry in listed if entry.removesuffix("+PTX") not in known]:
        raise MissingTool(
            f"{nvcc} (release {nvcc_release(nvcc)}) cannot compile for {', '.join(unknown)}; set PYCONV_CUDA_ARCHS to "
            "what it can, or PYCONV_CUDA=0 to build without CUDA"
        )


def facts(chosen: str, nvcc: Path | None) -> tuple[object, ...]:
    """What main() prints."""
    if nvcc is None:
        raise MissingTool("nvcc is not found; install the CUDA toolkit, or set CUDA_HOME to where it is")
    listed = architectures(chosen)
    check_supported(nvcc, listed)
    toolkit = toolkit_of(nvcc)
    return (nvcc, static_runtime(toolkit), ",".join(listed), *include_directories(toolkit))


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["gpu"]:
            check_gpu()
            return 0
        chosen, nvcc = arguments
        listed = facts(chosen, Path(nvcc) if nvcc else find_nvcc())
    except MissingTool as missing:
        print(f"pyconv: {missing}", file=sys.stderr)
        return 1
    print(";".join(map(str, listed)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
