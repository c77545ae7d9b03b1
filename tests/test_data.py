"""The data of pyconv.network3: IDX files, pickles and the embedded digits; sound, damaged and hostile."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from pyconv import DataError
from pyconv.network3 import expand_mnist, load_data_shared, load_digits, size
from pyconv.network3.data import read_idx

REPOSITORY = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------------
# IDX files
# ----------------------------------------------------------------------------------------------------------


def idx(array, magic=None, shape=None):
    """The IDX file of a uint8 array; a magic number or shape of its own makes it lie."""
    shape = array.shape if shape is None else shape
    header = struct.pack(f">I{len(shape)}I", 0x0800 + array.ndim if magic is None else magic, *shape)
    return header + array.tobytes()


def images_and_labels(n, seed):
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (n, 28, 28)).astype(np.uint8), random.randint(0, 10, n).astype(np.uint8)


@pytest.fixture
def idx_directory(tmp_path):
    """Four IDX files, two of them compressed: 60 training and 20 test images."""
    files = {}
    for prefix, n, seed in (("train", 60, 0), ("t10k", 20, 1)):
        images, labels = images_and_labels(n, seed)
        files[prefix] = images, labels
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, files


def test_idx_directory(idx_directory, capsys):
    directory, files = idx_directory
    training, validation, test = load_data_shared(directory)
    images, labels = files["train"]
    expected = images.reshape(60, 784) / 256
    for (x, y), rows in ((training, slice(0, 50)), (validation, slice(50, 60))):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        np.testing.assert_array_equal(x.numpy(), expected[rows])
        np.testing.assert_array_equal(y.numpy(), labels[rows])
    np.testing.assert_array_equal(test[0].numpy(), files["t10k"][0].reshape(20, 784) / 256)
    np.testing.assert_array_equal(test[1].numpy(), files["t10k"][1])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"pyconv.network3: data from {directory}: 50 training, 10 validation, 20 test images\n"
    )


def test_environment_names_the_directory(idx_directory, monkeypatch):
    monkeypatch.setenv("PYCONV_DATA", str(idx_directory[0]))
    assert [size(part) for part in load_data_shared()] == [50, 10, 20]


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_environment_the_embedded_digits(value, monkeypatch, capsys):
    if value is None:
        monkeypatch.delenv("PYCONV_DATA", raising=False)
    else:
        monkeypatch.setenv("PYCONV_DATA", value)
    assert [size(part) for part in load_data_shared()] == [1197, 300, 300]
    assert capsys.readouterr().err == (
        "pyconv.network3: data from the digits embedded in pyconv: "
        "1197 training, 300 validation, 300 test images\n"
    )


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_data_shared(tmp_path / "nowhere")
    monkeypatch.setenv("PYCONV_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"expected a file train-images-idx3-ubyte or .*\.gz, found neither"):
        load_data_shared()


IMAGES, LABELS = images_and_labels(3, seed=2)

BAD_IDX = {
    "empty": (
        b"",
        3,
        r"expected an IDX file of bytes with 3 dimensions .*0x00000803\), found .* begins with 0x$",
    ),
    "foreign": (b"\x89PNG\r\n\x1a\n" * 100, 3, "0x89504e47"),
    "labels instead of images": (idx(LABELS), 3, "0x00000801"),
    "floats": (idx(IMAGES, magic=0x0D03), 3, "0x00000d03"),
    "short header": (idx(IMAGES)[:10], 3, "expected a header of 16 bytes, found 10"),
    "truncated": (
        idx(IMAGES)[:-1],
        3,
        "expected 2352 bytes after the header, which claims 3x28x28, found 2351",
    ),
    "too long": (idx(IMAGES) + b"\0", 3, "expected 2352 bytes .* found more"),
    "claims more": (idx(IMAGES, shape=(2**32 - 1, 28, 28)), 3, "which claims 4294967295x28x28, found"),
    "claims 2^96": (idx(IMAGES, shape=(2**32 - 1,) * 3), 3, "found a file that holds at most"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("bad", BAD_IDX)
def test_bad_idx(bad, compressed, tmp_path):
    content, dims, message = BAD_IDX[bad]
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, dims)
    assert str(caught.value).startswith(f"{path}: expected ")


def test_a_claim_is_refused_before_allocation(tmp_path):
    """The header claims 700 MB that a compressed file of its size could hold, and the stream ends at once."""
    path = tmp_path / "file.gz"
    noise = np.random.RandomState(0).bytes(1_000_000)
    # A second, damaged member makes the file large without adding data.
    path.write_bytes(gzip.compress(idx(IMAGES, shape=(900_000, 28, 28))) + noise)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "no trailer"])
def test_damaged_gzip(damage, tmp_path):
    content = bytearray(gzip.compress(idx(IMAGES)))
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "bit flipped":
        content[len(content) // 2] ^= 0x10
    else:
        content = content[:-8]
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected a whole gzip file, found a damaged one|found 1|found 2"):
        read_idx(path, 3)


def replace(directory, name, content):
    (directory / f"{name}.gz").unlink(missing_ok=True)
    (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-labels-idx1-ubyte",
            idx(np.zeros(59, np.uint8)),
            "train-labels-idx1-ubyte: expected 60 labels, one for each image, found 59",
        ),
        (
            "t10k-labels-idx1-ubyte",
            idx(np.full(20, 10, np.uint8)),
            "t10k-labels-idx1-ubyte: expected labels from 0 to 9, found 10",
        ),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((20, 32, 32), np.uint8)),
            "t10k-images-idx3-ubyte: expected images of 28x28, found 32x32",
        ),
    ],
)
def test_files_that_do_not_fit(name, content, message, idx_directory):
    directory, _ = idx_directory
    replace(directory, name, content)
    with pytest.raises(DataError, match=message):
        load_data_shared(directory)


# ----------------------------------------------------------------------------------------------------------
# The book's pickles, as Python 2 wrote them
# ----------------------------------------------------------------------------------------------------------


class Python2Pickle:
    """Writes the instructions that Python 2's pickle wrote for tuples, lists, arrays and numpy's scalars.

    Protocol 0 is text (mnist_expanded.pkl.gz), protocol 2 binary.
    """

    def __init__(self, protocol, module="numpy.core.multiarray"):
        self.protocol = protocol
        self.module = module

    def text(self, value):
        if self.protocol == 0:
            return b"S" + repr(bytes(value))[1:].encode() + b"\n"
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(self, value):
        return b"I%d\n" % value

    def call(self, name, *arguments):
        return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"

    def dtype(self, dtype):
        order = {"<": b"<", "=": b"<", "|": b"|", ">": b">"}[dtype.byteorder]
        made = self.call(b"numpy\ndtype", self.text(dtype.str[1:].encode()), self.number(0), self.number(1))
        state = [self.number(3), self.text(order), b"NNN", self.number(-1), self.number(-1), self.number(0)]
        return made + b"(" + b"".join(state) + b"tb"

    def array(self, array, **wrong):
        shape = wrong.get("shape", array.shape)
        made = self.call(
            self.module.encode() + b"\n_reconstruct",
            wrong.get("subtype", b"cnumpy\nndarray\n"),
            b"(" + self.number(0) + b"t",
            self.text(b"b"),
        )
        state = [
            self.number(1),
            b"(" + b"".join(map(self.number, shape)) + b"t",
            wrong.get("dtype", self.dtype(array.dtype)),
            b"I00\n",
            wrong.get("data", self.text(array.tobytes())),
        ]
        return made + b"(" + b"".join(state) + b"tb"

    def scalar(self, value):
        return self.call(
            self.module.encode() + b"\nscalar", self.dtype(value.dtype), self.text(value.tobytes())
        )

    def tuple(self, *items):
        return b"(" + b"".join(items) + b"t"

    def list(self, items):
        return b"(l" + b"".join(item + b"a" for item in items)

    def file(self, value):
        return (b"" if self.protocol == 0 else b"\x80\x02") + value + b"."


def pickled_parts(seed=0):
    random = np.random.RandomState(seed)
    return [
        ((random.randint(0, 256, (n, 784)) / 256).astype(np.float32), random.randint(0, 10, n))
        for n in (30, 10, 20)
    ]


def write_pickle(path, content):
    path.write_bytes(gzip.compress(content, 1))
    return path


def assert_loads(path, parts):
    loaded = load_data_shared(path)
    for (x, y), (images, labels) in zip(loaded, parts, strict=True):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        np.testing.assert_array_equal(x.numpy(), images)
        np.testing.assert_array_equal(y.numpy(), labels)


@pytest.mark.parametrize("protocol", [0, 2])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_mnist_pickle(protocol, module, tmp_path):
    parts = pickled_parts()
    writer = Python2Pickle(protocol, module)
    value = writer.tuple(*(writer.tuple(writer.array(x), writer.array(y)) for x, y in parts))
    assert_loads(write_pickle(tmp_path / "mnist.pkl.gz", writer.file(value)), parts)


@pytest.mark.parametrize("protocol", [0, 2])
def test_expanded_pickle(protocol, tmp_path):
    """expand_mnist.py of the book writes its training data as two lists, of arrays and of numpy's scalars."""
    parts = pickled_parts()
    writer = Python2Pickle(protocol)
    x, y = parts[0]
    training = writer.list([writer.list(map(writer.array, x)), writer.list(map(writer.scalar, y))])
    others = [writer.tuple(writer.array(x), writer.array(y)) for x, y in parts[1:]]
    content = writer.file(writer.tuple(training, *others))
    assert_loads(write_pickle(tmp_path / "mnist_expanded.pkl.gz", content), parts)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_python_3(protocol, tmp_path):
    parts = pickled_parts()
    assert_loads(write_pickle(tmp_path / "mnist.pkl.gz", pickle.dumps(tuple(parts), protocol)), parts)


def test_fortran_order_and_big_endian(tmp_path):
    parts = pickled_parts()
    stored = tuple((np.asfortranarray(x.astype(">f8")), y.astype(">i2")) for x, y in parts)
    assert_loads(write_pickle(tmp_path / "mnist.pkl.gz", pickle.dumps(stored, 2)), parts)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


TEXT = Python2Pickle(0)
ARRAY = np.zeros((2, 784), np.float32)

REFUSED = {
    "a command": (pickle.dumps(Calls(os.system, "touch PWNED"), 0), r"asks for posix\.system"),
    "eval": (pickle.dumps(Calls(eval, "1"), 4), r"asks for builtins\.eval"),
    "Python 2's eval": (b"c__builtin__\neval\n(S'1'\ntR.", r"asks for __builtin__\.eval"),
    "numpy's own loader": (b"cnumpy\nload\n(S'x'\ntR.", r"asks for numpy\.load"),
    "an attribute of numpy": (
        b"\x80\x04\x8c\x05numpy\x8c\x0bf2py.os.abc\x93.",
        r"asks for numpy\.f2py\.os\.abc",
    ),
    "another reconstruct": (b"ccopy_reg\n_reconstructor\n(tR.", r"asks for copy_reg\._reconstructor"),
    "protocol 5's arrays": (pickle.dumps(ARRAY, 5), r"asks for numpy\.?_?(core)?.*\._frombuffer"),
    "an array of objects": (
        pickle.dumps(np.array([1, "a"], dtype=object), 2),
        "asks for an array of dtype 'O8'; only numbers",
    ),
    "objects by the state": (TEXT.file(TEXT.array(ARRAY, data=b"(lI1\na")), "asks for an array of objects"),
    "a structured dtype": (pickle.dumps(np.zeros(2, "f4,i4"), 2), "asks for an array of dtype 'V8'"),
    "text": (pickle.dumps(np.array(["a"]), 2), "asks for an array of dtype 'U1'"),
    "fields by the state": (
        b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nN(S'a'\ntNI-1\nI-1\nI0\ntb.",
        "asks for a structured dtype",
    ),
    "another array class": (
        TEXT.file(TEXT.array(ARRAY, subtype=b"cnumpy\nmatrix\n")),
        r"asks for numpy\.matrix",
    ),
    "a number as the class": (
        TEXT.file(TEXT.array(ARRAY, subtype=b"I1\n")),
        "asks numpy to reconstruct something other than an empty ndarray",
    ),
    "an array of any size": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntS'd'\ntR.",
        "asks numpy to reconstruct something other than an empty ndarray",
    ),
    "ndarray itself": (b"cnumpy\nndarray\n((I1000000000000\nttR.", "calls something other than the makers"),
    "a number": (b"I1\n(tR.", "calls something other than the makers of arrays"),
    "an array": (TEXT.array(ARRAY) + b"(tR.", "calls something other than the makers of arrays"),
    "foreign arguments": (b"cnumpy.core.multiarray\nscalar\n(tR.", "with foreign arguments"),
    "the state of a list": (b"(l(I1\ntb.", "sets the state of a list, which is no array"),
    "the state of a function": (b"cnumpy.core.multiarray\nscalar\n(I1\ntb.", "the state of a function"),
    "a negative size": (
        TEXT.file(TEXT.array(ARRAY, shape=(-2, -784))),
        "a shape that is not a tuple of sizes",
    ),
    "another encoding": (b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.", "the encoding 'rot13'"),
    "a dictionary": (pickle.dumps({}, 2), "instruction EMPTY_DICT"),
    "a set": (pickle.dumps({1}, 4), "instruction EMPTY_SET"),
    "an object": (pickle.dumps(Path("x"), 4), r"asks for pathlib"),
    "an instance": (b"(i__main__\nA\n.", "instruction INST"),
    "a new object": (b"\x80\x02cnumpy\ndtype\n)\x81.", "instruction NEWOBJ"),
    "a persistent id": (b"Pname\n.", "instruction PERSID"),
    "an extension": (b"\x82\x01.", "instruction EXT1"),
    "a bytearray of any size": (b"\x96" + struct.pack("<Q", 2**62), "instruction BYTEARRAY8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pickles_that_ask_for_more_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[name]
    path = write_pickle(tmp_path / "mnist.pkl.gz", content)
    with pytest.raises(pickle.UnpicklingError, match=message) as caught:
        load_data_shared(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not (tmp_path / "PWNED").exists()


def parts_with(index, part):
    parts = pickled_parts()
    parts[index] = part
    return pickle.dumps(tuple(parts), 2)


X, Y = pickled_parts()[1]
GOOD = pickle.dumps(tuple(pickled_parts()), 2)

DAMAGED = {
    "empty": (b"", "found one that ends early"),
    "truncated": (GOOD[: len(GOOD) // 2], "expected a"),
    "without an end": (GOOD[:-1], "found one that ends early"),
    "text": (b"hello", "found a damaged one|found byte"),
    "no instruction": (b"\xff\xff", "found byte 0xff"),
    "an empty stack": (b"\x80\x02R.", "found a damaged one"),
    "an unknown memo entry": (b"g7\n.", "found a damaged one"),
    "data of another size": (
        TEXT.file(TEXT.array(ARRAY, shape=(3, 784))),
        r"expected 9408 bytes for an array of shape \(3, 784\), found 6272",
    ),
    "a shape of 2^200": (
        TEXT.file(TEXT.array(ARRAY, shape=(2**100, 2**100))),
        r"bytes for an array of shape .* found 6272",
    ),
    "a number": (pickle.dumps(5, 2), "expected three pairs"),
    "two pairs": (pickle.dumps(tuple(pickled_parts()[:2]), 2), "expected three pairs"),
    "not pairs": (pickle.dumps(((1,), (2,), (3,)), 2), "expected three pairs"),
    "numbers in pairs": (
        pickle.dumps(((1, 1),) * 3, 2),
        r"training data: expected images of shape \(n, 784\), found int",
    ),
    "other images": (
        parts_with(1, (X[:, :100], Y)),
        r"validation data: expected images .*, found \(10, 100\)",
    ),
    "images of bytes": (
        parts_with(1, (X.astype(np.uint8), Y)),
        "expected images of floating-point .* found uint8",
    ),
    "labels of floats": (parts_with(2, (X, Y.astype(float))), "test data: .* labels of an integer dtype"),
    "too few labels": (parts_with(1, (X, Y[:9])), r"expected 10 labels, one for each image, found \(9,\)"),
    "a label of 10": (parts_with(1, (X, Y + 10)), "expected labels from 0 to 9, found 10 to 1"),
    "a negative label": (parts_with(1, (X, Y - 10)), "expected labels from 0 to 9, found -10 to"),
    "pixels of 255": (parts_with(1, (X * 256, Y)), "expected pixels from 0 to 1, found"),
    "pixels of NaN": (parts_with(1, (X * np.nan, Y)), "expected pixels from 0 to 1, found nan to nan"),
    "rows of other sizes": (
        parts_with(1, ([X[0], X[1, :5]], Y[:2])),
        "expected a list of arrays of 784 pixels",
    ),
    "labels of a list": (parts_with(1, (X, [1, 2, "3"] + [0] * 7)), "expected whole labels from 0 to 9"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles(name, tmp_path):
    content, message = DAMAGED[name]
    path = write_pickle(tmp_path / "mnist.pkl.gz", content)
    with pytest.raises(DataError, match=message) as caught:
        load_data_shared(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("memo", b"I1\nr\xff\xff\xff\xff."),  # the interpreter in C would make a memo of 2^33 entries
        ("bytes", b"\x8e" + struct.pack("<Q", 2**40)),
        ("text", b"\x8d" + struct.pack("<Q", 2**40)),
        ("frame", b"\x80\x04\x95" + struct.pack("<Q", 2**40)),
    ],
)
def test_a_few_bytes_do_not_allocate_much(name, content, tmp_path):
    path = write_pickle(tmp_path / "mnist.pkl.gz", content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            load_data_shared(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_list_that_names_one_image_many_times(tmp_path):
    """100,000 references of two bytes each to one image of 3 kB would make 314 MB."""
    row = pickle.dumps(np.zeros(784, np.float32), 2)[2:-1]
    rows = b"](" + row + b"q\xf0" + b"h\xf0" * 100_000 + b"e"
    labels = b"](" + b"K\x00" * 100_001 + b"e"
    pair = rows + labels + b"\x86"
    path = write_pickle(tmp_path / "mnist.pkl.gz", b"\x80\x02" + pair + b"q\xf1h\xf1h\xf1\x87.")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expected a file as large as its 100001 images"):
            load_data_shared(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [0, 2])
def test_many_arrays_of_the_same_data(protocol, tmp_path):
    """A text of 5 MB that is kept once would be copied into each of 100 arrays."""
    writer = Python2Pickle(protocol)
    text = writer.text(np.zeros(5_000_000, np.uint8).tobytes()) + b"p0\n"
    first, other = (
        writer.array(np.empty(0, np.uint8), shape=(5_000_000,), data=data) for data in (text, b"g0\n")
    )
    path = write_pickle(tmp_path / "mnist.pkl.gz", writer.file(writer.list([first] + [other] * 100)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="found the same data used again and again"):
            load_data_shared(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["truncated", "bit flipped"])
def test_damaged_gzip_of_a_pickle(damage, tmp_path):
    content = bytearray(gzip.compress(GOOD))
    if damage == "truncated":
        content = content[:-10]
    else:
        content[-6] ^= 0xFF  # the checksum
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="found a damaged one"):
        load_data_shared(path)


def test_a_decompression_bomb_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("pyconv.network3.data._MAX_PICKLE_BYTES", 1_000_000)
    line = b"S'" + b"a" * 50_000_000 + b"'\n."
    path = write_pickle(tmp_path / "mnist.pkl.gz", line)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expected at most 1000000 bytes after decompression, found more"):
            load_data_shared(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"hello")
    with pytest.raises(
        DataError, match="expected a directory of IDX files or a gzip-compressed pickle, found .*0x68656c6c"
    ):
        load_data_shared(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_one_idx_file_instead_of_its_directory(compressed, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(idx(IMAGES)) if compressed else idx(IMAGES))
    with pytest.raises(DataError, match="found one IDX file.*; give its directory") as caught:
        load_data_shared(path)
    assert str(caught.value).startswith(f"{path}: expected a directory")


# ----------------------------------------------------------------------------------------------------------
# The embedded digits
# ----------------------------------------------------------------------------------------------------------


def test_embedded_digits():
    parts = load_digits()
    assert [size(part) for part in parts] == [1197, 300, 300]
    total = torch.bincount(torch.cat([y for _, y in parts]), minlength=10)
    for x, y in parts:
        assert x.dtype == torch.float32 and x.shape == (len(y), 784)
        assert y.dtype == torch.int64 and 0 <= y.min() and y.max() <= 9
        assert x.min() == 0.0 and x.max() == 255 / 256
        assert torch.equal(x * 256, (x * 256).round())
        in_proportion = total * len(y) / total.sum()
        assert (torch.bincount(y, minlength=10) - in_proportion).abs().max() <= 1.5
    images = torch.cat([x for x, _ in parts])
    assert len(images.unique(dim=0)) == len(images), "no digit is in two sets"


def test_embedded_digits_file():
    directory = REPOSITORY / "pyconv" / "network3"
    assert (directory / "digits.npz").stat().st_size < 400_000
    notice = (directory / "digits.LICENSE.txt").read_text()
    assert "BSD 3-Clause License" in notice and "scikit-learn developers" in notice and "UCI" in notice


def test_embedded_digits_are_what_the_script_makes():
    """Each is the scikit-learn digit that it says, enlarged as PyTorch's bilinear interpolation does."""
    datasets = pytest.importorskip("sklearn.datasets")
    source = datasets.load_digits()
    specification = importlib.util.spec_from_file_location(
        "make_digits", REPOSITORY / "scripts" / "make_digits.py"
    )
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    made = script.make()
    with np.load(REPOSITORY / "pyconv" / "network3" / "digits.npz") as file:
        stored = dict(file)
    assert stored.keys() == made.keys()
    for name, array in stored.items():
        assert array.dtype == made[name].dtype
        np.testing.assert_array_equal(array, made[name])
    index = stored["source_index"]
    assert sorted(index) == list(range(1797))
    np.testing.assert_array_equal(stored["labels"], source.target[index])
    images = torch.from_numpy(source.images[index])[:, None]
    enlarged = torch.nn.functional.interpolate(images, size=(24, 24), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.pad((enlarged * 255 / 16 + 1e-9).floor(), (2, 2, 2, 2))
    np.testing.assert_array_equal(stored["images"], expected.reshape(1797, 784).numpy())


# ----------------------------------------------------------------------------------------------------------
# Expanded data
# ----------------------------------------------------------------------------------------------------------


def test_expand_mnist():
    n = 7
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 784, generator=generator), torch.arange(n)
    before = x.clone()
    expanded_x, expanded_y = expand_mnist((x, y), seed=3)
    assert expanded_x.shape == (35, 784) and expanded_x.dtype == torch.float32
    assert torch.equal(x, before)

    expected = []
    for image, label in zip(x.reshape(n, 28, 28).numpy(), y.tolist(), strict=True):
        padded = np.pad(image, 1)
        for row, column in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
            expected.append((label, padded[row : row + 28, column : column + 28].tobytes()))
    actual = [
        (label, row.numpy().tobytes()) for row, label in zip(expanded_x, expanded_y.tolist(), strict=True)
    ]
    assert sorted(actual) == sorted(expected)

    again_x, again_y = expand_mnist((x, y), seed=3)
    assert torch.equal(again_x, expanded_x) and torch.equal(again_y, expanded_y)
    assert not torch.equal(expand_mnist((x, y), seed=4)[1], expanded_y)
    assert expanded_y.tolist() != sorted(expanded_y.tolist())


def test_expand_mnist_refuses_other_shapes():
    with pytest.raises(RuntimeError, match=r"expected x of shape \(n, 784\), but got \(5, 100\)"):
        expand_mnist((torch.rand(5, 100), torch.zeros(5, dtype=torch.int64)))


# ----------------------------------------------------------------------------------------------------------
# The real MNIST
# ----------------------------------------------------------------------------------------------------------

mnist = pytest.mark.skipif(not os.environ.get("PYCONV_DATA"), reason="PYCONV_DATA is not set")


@pytest.fixture(scope="module")
def real_mnist():
    return load_data_shared()


@pytest.mark.mnist
@mnist
def test_mnist_is_what_its_authors_published(real_mnist):
    training, validation, test = real_mnist
    assert [size(part) for part in real_mnist] == [50_000, 10_000, 10_000]
    assert training[1][:5].tolist() == [5, 0, 4, 1, 9]
    assert test[1][:5].tolist() == [7, 2, 1, 0, 4]
    counts = torch.bincount(torch.cat([training[1], validation[1]]))
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    everything = np.concatenate([(part[0] * 256).to(torch.uint8).numpy() for part in (training, validation)])
    assert everything.mean() == pytest.approx(33.3184, abs=1e-4)
    assert training[0].max() == 255 / 256


@pytest.mark.mnist
@mnist
@pytest.mark.parametrize(
    ("name", "md5"),
    [
        ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
        ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
        ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
    ],
)
def test_mnist_is_read_byte_for_byte(name, md5):
    """The checksums are those of the published files, uncompressed."""
    directory = Path(os.environ["PYCONV_DATA"])
    plain = directory / name
    array = read_idx(plain if plain.exists() else directory / f"{name}.gz", 3 if "idx3" in name else 1)
    assert hashlib.md5(idx(array)).hexdigest() == md5
