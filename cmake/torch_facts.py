"""Print what CMakeLists.txt must know of the installed torch and Python, as one CMake list.

directory of torch; C++ standard torch was built with; its libstdc++ ABI flag; Python's include directory;
suffix of extension modules.
"""

import re
import sys
import sysconfig
from pathlib import Path

import build_tools

STANDARD_OF_YEAR = {"2017": "17", "2020": "20", "2023": "23"}


def cxx_standard(torch_config: str) -> str:
    """The C++ standard that ``torch.__config__.show()`` names: "C++ Version: 202002" is C++20."""
    stated = re.search(r"C\+\+ Version: (\d{4})", torch_config)
    if stated is None or stated.group(1) not in STANDARD_OF_YEAR:
        raise ValueError(f"torch.__config__.show() names no C++ standard known here:\n{torch_config}")
    return STANDARD_OF_YEAR[stated.group(1)]


def main() -> int:
    try:
        build_tools.check_torch()
    except build_tools.MissingTool as missing:
        print(missing, file=sys.stderr)
        return 1
    import torch

    facts = (
        Path(torch.__file__).parent.as_posix(),
        cxx_standard(torch.__config__.show()),
        str(int(torch._C._GLIBCXX_USE_CXX11_ABI)),
        sysconfig.get_paths()["include"],
        sysconfig.get_config_var("EXT_SUFFIX"),
    )
    print(";".join(facts), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
