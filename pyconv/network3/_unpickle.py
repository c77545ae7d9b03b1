"""Reads the book's Python 2 pickles without running anything that they ask for.

A pickle is a program, and a foreign one may call any function. The machine here knows only the instructions
that
build tuples, lists, strings and numbers, and six names, none of which leads to the object of that name: they
build descriptions of arrays, which are checked before an array is made of them.

It is a subclass of the interpreter that the standard library keeps in Python, since the one in C lets a few
bytes of a file allocate any amount of memory (LONG_BINPUT, BINBYTES8) before it reads on.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from typing import Any, BinaryIO

import numpy as np

from pyconv.errors import DataError

_READ_CHUNK = 1 << 20

_INSTRUCTIONS = frozenset(
    """
    PROTO FRAME STOP MARK
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT NONE NEWTRUE NEWFALSE
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS PUT BINPUT LONG_BINPUT
    MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()
)


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that is not allowed; damaged ones raise DataError."""


class BoundedReader:
    """A stream that reads `limit` bytes at most, and allocates no more than the stream really holds."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self.limit = limit
        self.count = 0

    def _add(self, data: bytes) -> bytes:
        self.count += len(data)
        if self.count > self.limit:
            raise DataError(f"expected at most {self.limit} bytes after decompression, found more")
        return data

    def read(self, length: int) -> bytes:
        if length <= _READ_CHUNK:
            return self._add(self._stream.read(length))
        parts = []
        while length > 0:
            part = self._add(self._stream.read(min(length, _READ_CHUNK)))
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def readline(self) -> bytes:
        return self._add(self._stream.readline(self.limit - self.count + 1))


# ----------------------------------------------------------------------------------------------------------
# What the six allowed names stand for
# ----------------------------------------------------------------------------------------------------------


class _Dtype:
    """numpy.dtype: a plain number type."""

    def __init__(self, code: object, *_align_and_copy: object) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not (isinstance(code, str) and re.fullmatch(r"[<>=|]?(f[248]|[iu][1248]|b1)", code)):
            raise Refused(f"the pickle asks for an array of dtype {code!r}; only numbers are allowed")
        self.value = np.dtype(code)

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and state[2] is state[3] is state[4] is None):
            raise Refused("the pickle asks for a structured dtype; only numbers are allowed")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise Refused(f"the pickle asks for a dtype of byte order {order!r}")
        self.value = self.value.newbyteorder(order)


class Array:
    """numpy.ndarray, as `_reconstruct` and its state describe it."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise Refused("the pickle gives an array a state that numpy does not write")
        _version, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, (str, bytes)):
            raise Refused("the pickle asks for an array of objects; only numbers are allowed")
        if not (
            isinstance(shape, tuple) and all(isinstance(extent, int) and extent >= 0 for extent in shape)
        ):
            raise Refused("the pickle gives an array a shape that is not a tuple of sizes")
        expected = math.prod(shape) * dtype.value.itemsize
        if len(data) != expected:
            raise DataError(f"expected {expected} bytes for an array of shape {shape}, found {len(data)}")
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if is_fortran else "C")


_NDARRAY = object()


def _reconstruct(subtype: object, shape: object, code: object) -> Array:
    if subtype is not _NDARRAY or shape != (0,) or code not in ("b", b"b"):
        raise Refused("the pickle asks numpy to reconstruct something other than an empty ndarray")
    return Array()


def _scalar(dtype: object, data: object) -> int | float:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (str, bytes)):
        raise Refused("the pickle asks for a scalar that is not a number")
    if len(data) != dtype.value.itemsize:
        raise DataError(f"expected {dtype.value.itemsize} bytes for a number, found {len(data)}")
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.value)[0].item()


def _encode(text: object, encoding: object) -> bytes:
    """_codecs.encode, through which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"the pickle asks for the encoding {encoding!r}; only 'latin1' is allowed")
    return text.encode("latin1")


_NAMES = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # the same module in numpy 2
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}

# ----------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------


class _Dispatch(dict):
    """Instruction byte -> method."""

    def __missing__(self, code: int) -> None:
        for instruction in pickletools.opcodes:
            if instruction.code == chr(code):
                raise Refused(
                    f"the pickle asks for the instruction {instruction.name}; "
                    f"only arrays, tuples, lists and numbers are allowed"
                )
        raise DataError(f"expected a pickle instruction, found byte {code:#04x}")


class _ArrayUnpickler(pickle._Unpickler):
    def __init__(self, reader: BoundedReader) -> None:
        super().__init__(reader, fix_imports=False, encoding="latin1")
        self._reader = reader
        self._copied = {"arrays": 0, "texts": 0}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise Refused(f"the pickle asks for {module}.{name}; only arrays are allowed") from None

    def _account(self, kind: str, length: int) -> None:
        """Refuse to copy more than the file has held so far, which one text used many times would ask for."""
        self._copied[kind] += length
        if self._copied[kind] > self._reader.count:
            raise DataError(f"expected {kind} that the file holds, found the same data used again and again")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if function not in (_Dtype, _reconstruct, _scalar, _encode) or not isinstance(arguments, tuple):
            raise Refused("the pickle calls something other than the makers of arrays")
        if function is _encode and arguments and isinstance(arguments[0], str):
            self._account("texts", len(arguments[0]))
        try:
            self.stack[-1] = function(*arguments)
        except TypeError:
            raise Refused("the pickle calls a maker of arrays with foreign arguments") from None

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (Array, _Dtype)):
            raise Refused(f"the pickle sets the state of a {type(target).__name__}, which is no array")
        if isinstance(state, tuple) and state and isinstance(state[-1], (str, bytes)):
            self._account("arrays", len(state[-1]))
        target.set_state(state)

    dispatch = _Dispatch(
        {
            ord(instruction.code): pickle._Unpickler.dispatch[ord(instruction.code)]
            for instruction in pickletools.opcodes
            if instruction.name in _INSTRUCTIONS
        }
    )
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def load_arrays(reader: BoundedReader) -> object:
    """The value of the pickle: tuples, lists, strings, bytes, numbers, None, and `Array` for each array.

    Raises:
        Refused: it asks for anything else, which is named.
        DataError: it is not a pickle, or a damaged one.
        EOFError: the compressed stream below it ends early.
    """
    try:
        return _ArrayUnpickler(reader).load()
    except (Refused, DataError, OSError):
        raise
    except EOFError as error:
        if error.args:  # gzip says why; the interpreter does not
            raise
        raise DataError("expected a whole pickle, found one that ends early") from None
    except Exception as error:
        # The interpreter meets a damaged pickle with whatever error its stack runs into.
        raise DataError(f"expected a pickle, found a damaged one ({type(error).__name__}: {error})") from None
