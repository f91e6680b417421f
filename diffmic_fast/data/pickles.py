"""Reading pickle files that hold plain data, without running anything they ask for.

Python's reader lets a pickle call whatever `find_class` hands it. Here that is never an imported object: a handful of
names, which NumPy numbers and sets are written with, get harmless stand-ins of this module, every other one is refused.
Three kinds of instruction reach objects without `find_class`; the file is searched for them before it is read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# A list of images is small, and memory taken while reading grows with the file.
MAX_BYTES = 64 * 2**20

_PLAIN = "a plain pickle holds only dict, list, tuple, set, str, bytes, numbers, bool and None"
_OUTSIDE = {
    "EXT1": "an object of the extension registry",
    "EXT2": "an object of the extension registry",
    "EXT4": "an object of the extension registry",
    "PERSID": "an object stored outside the file",
    "BINPERSID": "an object stored outside the file",
    "NEXT_BUFFER": "a buffer stored outside the file",
}


class _Refused(ValueError):
    """Why a pickle is not read."""


class _NumberType:
    """Stands in for `numpy.dtype`: the type of a NumPy number, such as "i8"."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, content: bytes | str) -> int | float | bool:
    """Stands in for `numpy.core.multiarray.scalar`: a Python number from its bytes."""
    if not isinstance(kind, _NumberType) or kind.code[:1] not in tuple("biuf"):
        raise _Refused(f"it holds NumPy data that are no numbers; {_PLAIN}")
    raw = content.encode("latin-1") if isinstance(content, str) else content
    numbers = np.frombuffer(raw, np.dtype(kind.order + kind.code))
    if len(numbers) != 1:
        raise _Refused("it holds a damaged NumPy number")
    return numbers[0].item()


def _latin(text: str, codec: str) -> bytes:
    """Stands in for `_codecs.encode`, which old protocols write bytes with."""
    if codec not in ("latin1", "latin-1"):
        raise _Refused(f"it asks for the text codec {codec!r}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """Stands in for `bytes` as protocols 0 to 2 call it, to write empty ones."""
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
            raise _Refused(f"it asks for {wanted[:200]}, which could run code; {_PLAIN}")
        return _STAND_INS[wanted]


def load_plain_pickle(path: str | Path) -> Any:
    """Content of a pickle file (protocols 0 to 5) that holds plain data only.

    Plain are dict, list, tuple, set, frozenset, str, bytes, int, float, bool, None, and NumPy numbers, which are
    returned as Python's.

    Raises:
        ValueError: no such file, a damaged one, one larger than `MAX_BYTES`, or one that asks for anything else, which
            is named. Nothing that the file asks for is imported or run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path}: has {path.stat().st_size} bytes; a list of images has at most {MAX_BYTES}"
        )
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
                # The reader would make room for as many objects as the number says.
                raise _Refused(f"it numbers an object {argument} in a file of {len(data)} bytes")
            if opcode.name in _OUTSIDE:
                raise _Refused(
                    f"it asks for {_OUTSIDE[opcode.name]} ({opcode.name} {argument!r:.60}); {_PLAIN}"
                )
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except _Refused as error:
        raise ValueError(f"{path}: this pickle is not read: {error}") from None
    except Exception as error:
        # Damaged pickles raise errors of almost any type.
        raise ValueError(f"{path}: is no pickle or is damaged ({error!s:.200})") from None
    _check_plain(path, content)
    return content


def _check_plain(path: Path, content: Any) -> None:
    """A name that is not called is left in the data as it is; nothing but data may be."""
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
            raise ValueError(
                f"{path}: this pickle is not read: it holds a {type(value).__name__}; {_PLAIN}"
            )
