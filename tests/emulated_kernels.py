"""The emulated CUDA kernels beside the operators: which were launched, and which the library holds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator

from backends import LIBRARY


class _Launches(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("count", ctypes.c_int64),
        ("max_threads", ctypes.c_int64),
        ("max_shared_bytes", ctypes.c_int64),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.pyconv_emulation_launches.argtypes = (ctypes.POINTER(_Launches), ctypes.c_int64)
    library.pyconv_emulation_launches.restype = ctypes.c_int64
    library.pyconv_emulation_prefer.argtypes = (ctypes.c_char_p,)
    library.pyconv_emulation_record_only.argtypes = (ctypes.c_bool,)
    return library


@contextlib.contextmanager
def preferred(entry: str) -> Iterator[None]:
    """Of each dispatch list only the entry of this name accepts; the last one takes what it refuses."""
    _library().pyconv_emulation_prefer(entry.encode())
    try:
        yield
    finally:
        _library().pyconv_emulation_prefer(b"")


@contextlib.contextmanager
def launches_without_running() -> Iterator[None]:
    """Launchers choose and record their kernels, which do not run: results are not written."""
    _library().pyconv_emulation_reset_launches()
    _library().pyconv_emulation_record_only(True)
    try:
        yield
    finally:
        _library().pyconv_emulation_record_only(False)


def launched() -> set[str]:
    """The symbols of the kernels that were launched since the last reset."""
    count = _library().pyconv_emulation_launches(None, 0)
    records = (_Launches * count)()
    _library().pyconv_emulation_launches(records, count)
    return {record.kernel.decode() for record in records}


def compiled() -> set[str]:
    """The symbols of all kernels in the library."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    symbols = (line.split()[-1] for line in listed.splitlines())
    return {symbol for symbol in symbols if re.match(r"_ZN6pyconv4cuda\d+\w*?_kernel[IE]", symbol)}
