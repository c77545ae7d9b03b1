"""Find what the build needs; where something is missing, say in one line what to install.

Used by setup.py and, before the virtual environment exists, by the Makefile. ``build_tools.py NAME...``
checks the parts named and exits with the first message. Only the standard library is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

OLDEST_PYTHON_OF_THE_PINS = (3, 11)
OLDEST_TORCH = (2, 11)
COMPILERS = ("c++", "g++", "clang++")  # as CMake looks for them where CXX is unset


class MissingTool(Exception):
    """Something the build needs is missing; the text is one line that says what to install."""


def find_program(name: str) -> str:
    """Path of `cmake` or `ninja`: beside the interpreter (its environment need not be active) or on PATH."""
    scripts = Path(sys.executable).parent
    found = shutil.which(name, path=f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if found is None:
        raise MissingTool(f"{name} is missing; install it (pip install {name})")
    return found


def check_compiler() -> None:
    """A C++ compiler: the first word of CXX, or one of the names that CMake tries."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if not any(map(shutil.which, chosen[:1] or COMPILERS)):
        name = f"CXX={chosen[0]} is not found" if chosen else "no C++ compiler is found"
        raise MissingTool(f"{name}; install one (Debian, Ubuntu: apt-get install g++)")


def check_headers() -> None:
    """Python's own headers, which Debian packages apart from the interpreter."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        raise MissingTool(
            f"{header} is missing; install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
        )


def check_torch() -> None:
    """A torch with the interfaces that the extension is written for."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingTool(
            "PyTorch is missing; install it (pip install torch) and build with pip's --no-build-isolation"
        ) from None
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise MissingTool(
            f"PyTorch {version} is too old; install {wanted} or newer (pip install 'torch>={wanted}')"
        )


def check_python() -> None:
    """An interpreter that the pinned requirements have releases for; pyconv itself asks for less."""
    if sys.version_info < OLDEST_PYTHON_OF_THE_PINS:
        wanted = ".".join(map(str, OLDEST_PYTHON_OF_THE_PINS))
        raise MissingTool(
            f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}; "
            f"the pinned requirements need {wanted} or newer (make PYTHON=python{wanted} ...)"
        )


def check_venv() -> None:
    """The modules behind ``python -m venv``, which Debian packages apart from the interpreter."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise MissingTool(
            f"{sys.executable} cannot make virtual environments; install its venv module "
            "(Debian, Ubuntu: apt-get install python3-venv)"
        )


CHECKS = {
    "python": check_python,
    "venv": check_venv,
    "headers": check_headers,
    "compiler": check_compiler,
    "torch": check_torch,
    "cmake": lambda: find_program("cmake"),
    "ninja": lambda: find_program("ninja"),
}


def main(names: list[str]) -> int:
    try:
        for name in names:
            CHECKS[name]()
    except MissingTool as missing:
        print(f"pyconv: {missing}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
