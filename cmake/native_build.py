"""Drive CMakeLists.txt, which holds the one list of sources, with the Ninja generator.

setup.py calls build(). Run as a program, it builds the extension into pyconv/ of this checkout for the interpreter that
runs it, with nothing from the network and without setuptools; `native_build.py tests` builds the tests' programs and
the emulated CUDA kernels too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import build_tools
import cuda_facts

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("torch", "cmake", "ninja", "compiler", "headers")


def check() -> None:
    """Everything that a build needs; raises MissingTool."""
    for name in CHECKS:
        build_tools.CHECKS[name]()
    if cuda_facts.wanted():
        cuda_facts.facts(os.environ.get("PYCONV_CUDA_ARCHS", ""), cuda_facts.find_nvcc())


def run_cmake(build_dir: Path, options: dict[str, object], *targets: str) -> None:
    """Configure in `build_dir`, which stays, with -DNAME=VALUE of `options`, and build. Raises CalledProcessError."""
    cmake, ninja = build_tools.find_program("cmake"), build_tools.find_program("ninja")
    defined = {"CMAKE_MAKE_PROGRAM": ninja, "PYCONV_PYTHON": sys.executable, **options}
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
    subprocess.run([*configure, *(f"-D{name}={value}" for name, value in defined.items())], check=True)
    subprocess.run([cmake, "--build", str(build_dir), *(f"--target={target}" for target in targets)], check=True)


def has_own_cxx_runtime(module: Path) -> bool:
    """Whether libstdc++ is inside the module instead of beside it: no entry of the dynamic section names it.

    Some compilers link it so by default. Such a copy next to torch's cannot write a number into a message: errors would
    lack parts, or end the process.
    """
    return sys.platform == "linux" and b"\0libstdc++.so.6\0" not in module.read_bytes()


def torchs_cxx_runtime() -> list[str]:
    """The files of the C++ runtime that torch loads."""
    program = "import torch; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    # Address, permissions, offset, device, inode, and for a file its path.
    files = {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(file for file in files if Path(file).name.startswith(("libstdc++.so", "libgcc_s.so")))


def build(module: Path, *, tests: bool = False) -> None:
    """Build the extension, and what the tests need if `tests`, and put the extension at `module`."""
    build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    options = {
        "PYCONV_MODULE_DIR": build_dir,
        "PYCONV_CUDA": "ON" if cuda_facts.wanted() else "OFF",
        "PYCONV_CUDA_ARCHS": os.environ.get("PYCONV_CUDA_ARCHS", ""),
        "PYCONV_CXX_RUNTIME": "",
    }
    try:
        run_cmake(build_dir, options, *([] if tests else ["_C"]))
        if has_own_cxx_runtime(build_dir / module.name):
            runtime = torchs_cxx_runtime()
            print(f"pyconv: the module does not use libstdc++.so.6, as torch does; linking with {runtime}")
            run_cmake(build_dir, {**options, "PYCONV_CXX_RUNTIME": ";".join(runtime)}, "_C")
            if has_own_cxx_runtime(build_dir / module.name):
                sys.exit(
                    "pyconv: expected a module that uses torch's C++ runtime library, but this compiler's still does "
                    f"not use libstdc++.so.6; delete {build_dir} and set CXX to another compiler, as GCC"
                )
    except subprocess.CalledProcessError as failed:
        sys.exit(f"pyconv: {' '.join(failed.cmd)} failed with status {failed.returncode}; its messages are above")
    module.parent.mkdir(parents=True, exist_ok=True)
    # Beside it and then renamed: overwritten in place, it would crash the processes that have it loaded.
    fresh = module.with_name(module.name + ".new")
    shutil.copyfile(build_dir / module.name, fresh)
    fresh.replace(module)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["tests"]):
        print(f"usage: {Path(__file__).name} [tests]", file=sys.stderr)
        return 2
    try:
        check()
    except build_tools.MissingTool as missing:
        print(f"pyconv: {missing}", file=sys.stderr)
        return 1
    build(ROOT / "pyconv" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", tests=bool(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
