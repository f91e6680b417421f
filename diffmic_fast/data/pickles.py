"""Pickle files that hold plain data, read without running anything that they ask for.

A pickle can call whatever `Unpickler.find_class` returns. Here that is never an imported object: the few names that
NumPy numbers and sets are written with get harmless stand-ins of this module, and all others are rejected. Opcodes that
reach objects without `find_class` are searched for before the file is read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# A list of images is small, and reading takes memory in proportion to the file.
MAX_BYTES = 64 * 2**20

_PLAIN = "a plain pickle (dict, list, tuple, set, str, bytes, numbers, bool and None)"
_OUTSIDE = {
    "EXT1": "an object of the extension registry",
    "EXT2": "an object of the extension registry",
    "EXT4": "an object of the extension registry",
    "PERSID": "an object stored outside the file",
    "BINPERSID": "an object stored outside the file",
    "NEXT_BUFFER": "a buffer stored outside the file",
}


class _NotPlain(ValueError):
    """What a pickle holds that is not plain data."""


class _NumberType:
    """Stand-in for `numpy.dtype`: the type of a NumPy number, such as "i8"."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, content: bytes | str) -> int | float | bool:
    """Stand-in for `numpy.core.multiarray.scalar`: a Python number from its bytes."""
    if not isinstance(kind, _NumberType) or kind.code[:1] not in tuple("biuf"):
        raise _NotPlain("NumPy data other than numbers")
    raw = content.encode("latin-1") if isinstance(content, str) else content
    numbers = np.frombuffer(raw, np.dtype(kind.order + kind.code))
    if len(numbers) != 1:
        raise _NotPlain("a damaged NumPy number")
    return numbers[0].item()


def _latin(text: str, codec: str) -> bytes:
    """Stand-in for `_codecs.encode`, which protocols 0 to 2 write bytes with."""
    if codec not in ("latin1", "latin-1"):
        raise _NotPlain(f"bytes in the text codec {codec!r}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """Stand-in for `bytes` as protocols 0 to 2 call it, for empty bytes."""
    return b""


_STAND_INS: dict[str, Callable[..., Any]] = {
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
    "__builtin__.bytes": _no_bytes,
    "_codecs.encode": _latin,
    "numpy.dtype": _NumberType,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        wanted = f"{module}.{name}"
        if wanted not in _STAND_INS:
            raise _NotPlain(f"a reference to {wanted[:200]}, which could run code")
        return _STAND_INS[wanted]


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle file (protocols 0 to 5) that holds plain data only.

    Plain data are dict, list, tuple, set, frozenset, str, bytes, int, float, bool, None, and NumPy numbers, which
    become Python numbers. Nothing that the file asks for is imported or run.

    Raises:
        ValueError: the file is missing, damaged or larger than `MAX_BYTES`, or holds anything else, which is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path}: a list of images must have at most {MAX_BYTES} bytes, got {path.stat().st_size}"
        )
    data = path.read_bytes()
    try:
        _check_opcodes(data)
        content = _PlainUnpickler(io.BytesIO(data)).load()
        _check_types(content)
    except _NotPlain as error:
        raise ValueError(f"{path}: must be {_PLAIN}, got {error}") from None
    except Exception as error:  # damaged pickles raise errors of almost any type
        raise ValueError(
            f"{path}: must be a pickle, got a damaged one or none ({error!s:.200})"
        ) from None
    return content


def _check_opcodes(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
            # The unpickler would allocate room for that many objects.
            raise _NotPlain(f"an object numbered {argument} in a file of {len(data)} bytes")
        if opcode.name in _OUTSIDE:
            raise _NotPlain(f"{_OUTSIDE[opcode.name]} ({opcode.name} {argument!r:.60})")


def _check_types(content: Any) -> None:
    """Reject stand-ins that the pickle holds as values, without calling them."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += value
        elif not isinstance(value, (str, bytes, bytearray, int, float, type(None))):
            raise _NotPlain(f"a {type(value).__name__}")
