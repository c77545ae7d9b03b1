"""Builds the extension by cmake/native_build.py."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "cmake"))

import build_tools  # noqa: E402
import native_build  # noqa: E402

COMMANDS_THAT_BUILD = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


class CMakeBuild(build_ext):
    """Puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        native_build.build(Path(self.get_ext_fullpath(ext.name)).resolve())


# Asked before setuptools starts, so that the one line is all there is to read, under pip as well.
if COMMANDS_THAT_BUILD.intersection(sys.argv[1:]):
    try:
        native_build.check()
    except build_tools.MissingTool as missing:
        sys.exit(f"pyconv: {missing}")

setup(ext_modules=[Extension("pyconv._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
