"""Plain pickles are read; a pickle never runs code."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffmic_fast.data.pickles import load_plain_pickle

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(), inner, max_size=4),
        st.sets(st.integers(), max_size=4),
    ),
    max_leaves=12,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "list.pkl"


@pytest.mark.parametrize("protocol", range(6))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=PLAIN)
def test_plain_data_are_read(file, protocol, value):
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    assert load_plain_pickle(file) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "number", [np.int64(-3), np.uint8(200), np.float32(0.5), np.bool_(True), np.array(7, ">i4")[()]]
)
def test_numpy_numbers_become_python_numbers(file, protocol, number):
    file.write_bytes(pickle.dumps([{"img_root": "a.png", "label": number}], protocol=protocol))
    label = load_plain_pickle(file)[0]["label"]
    assert label == number.item() and type(label) in (int, float, bool)


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ran: list[int] = []


def _note(*_):
    ran.append(1)
    return []


def hostile():
    """Name and bytes of pickles that ask for code to run."""
    for protocol in range(6):
        for function in (_note, exec, __import__, getattr, print):
            yield f"{function.__name__}{protocol}", pickle.dumps(Runs(function, "os"), protocol)
        yield f"nested{protocol}", pickle.dumps([{"label": Runs(_note)}], protocol)
        yield f"class{protocol}", pickle.dumps(io.StringIO, protocol)
        yield f"ufunc{protocol}", pickle.dumps(np.add, protocol)
    yield "inst", b"(S'os'\ni__main__\nsystem\n."
    yield "object array", pickle.dumps(np.array([Runs(_note)], dtype=object))
    yield "stack global", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R."
    yield "memory bomb", b"\x80\x02]r\x00\x00\x00\x04."
    yield "persid", b"Pfile\n."
    yield "binpersid", b"\x80\x02X\x01\x00\x00\x00aQ."
    yield "dtype as value", pickle.dumps(np.dtype("f4"))
    yield "set itself", b"c__builtin__\nset\n."
    yield "build", b"c__builtin__\nset\n}S'x'\nI1\nsb."
    yield (
        "object dtype",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRS'12345678'\ntR.",
    )


@pytest.mark.parametrize(
    ("name", "data"), list(hostile()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_code_runs(file, name, data):
    file.write_bytes(data)
    modules = set(sys.modules)
    with pytest.raises(
        ValueError,
        match=r"list\.pkl: must be a (plain pickle \(.*\), got|pickle, got a damaged one)",
    ):
        load_plain_pickle(file)
    assert ran == [] and set(sys.modules) - modules <= {"numpy.dtypes"}


def test_the_function_asked_for_is_named(file):
    file.write_bytes(pickle.dumps(Runs(exec, "1")))
    with pytest.raises(
        ValueError,
        match=r"must be a plain pickle .* got a reference to builtins\.exec, which could run code",
    ):
        load_plain_pickle(file)


@pytest.mark.parametrize("code", [1, 300, 70000])
def test_a_cached_extension_is_rejected(file, code):
    copyreg.add_extension(__name__, "_note", code)
    copyreg._extension_cache[code] = _note
    try:
        opcode = {1: b"\x82", 300: b"\x83", 70000: b"\x84"}[code]
        width = {1: "<B", 300: "<H", 70000: "<i"}[code]
        file.write_bytes(b"\x80\x02" + opcode + struct.pack(width, code) + b")R.")
        with pytest.raises(ValueError, match="extension registry"):
            load_plain_pickle(file)
        assert ran == []
    finally:
        copyreg.clear_extension_cache()
        copyreg.remove_extension(__name__, "_note", code)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=60), cut=st.integers(0, 80))
def test_damaged_files_raise_value_errors(file, data, cut):
    whole = pickle.dumps([{"img_root": "a.png", "label": 1}, ("b.png", 2)])
    for content in (data, whole[: cut % len(whole)], whole[: cut % len(whole)] + data):
        file.write_bytes(content)
        try:
            load_plain_pickle(file)
        except ValueError as error:
            assert "list.pkl" in str(error)


def test_recursive_data_are_read(file):
    value: list = []
    value.append(value)
    file.write_bytes(pickle.dumps(value))
    assert load_plain_pickle(file)[0] is not None


def test_missing_and_oversized_files(file, monkeypatch):
    with pytest.raises(ValueError, match="there is no file"):
        load_plain_pickle(file)
    file.write_bytes(pickle.dumps(list(range(100))))
    monkeypatch.setattr("diffmic_fast.data.pickles.MAX_BYTES", 50)
    with pytest.raises(ValueError, match=r"must have at most 50 bytes, got \d+"):
        load_plain_pickle(file)
