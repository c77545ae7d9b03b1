"""Drives CMakeLists.txt, which holds the one list of sources, with the Ninja generator."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))

import build_tools  # noqa: E402

COMMANDS_THAT_BUILD = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


class CMakeBuild(build_ext):
    """Configures and builds in a directory that stays, and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = build_tools.find_program("cmake"), build_tools.find_program("ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPYCONV_PYTHON={sys.executable}",
            f"-DPYCONV_MODULE_DIR={build_dir}",
        ]  # fmt: skip
        for command in (configure, [cmake, "--build", str(build_dir)]):
            status = subprocess.run(command).returncode
            if status != 0:
                sys.exit(f"pyconv: {' '.join(command)} failed with status {status}; its messages are above")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and then renamed: overwritten in place, it would crash the processes that have it loaded.
        fresh = target.with_name(target.name + ".new")
        shutil.copyfile(build_dir / target.name, fresh)
        fresh.replace(target)


# Asked before setuptools starts, so that the one line is all there is to read, under pip as well.
if COMMANDS_THAT_BUILD.intersection(sys.argv[1:]):
    try:
        for check in ("torch", "cmake", "ninja", "compiler", "headers"):
            build_tools.CHECKS[check]()
    except build_tools.MissingTool as missing:
        sys.exit(f"pyconv: {missing}")

setup(ext_modules=[Extension("pyconv._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
