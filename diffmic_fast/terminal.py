"""Standard output that takes every text, whatever the encoding of the terminal is."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLER = "diffmic_fast.escape"


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""Bytes of a file name that are not text stay as they are; other characters become \xNN, \uNNNN, \UNNNNNNNN."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF and not error.encoding.lower().startswith(("utf-16", "utf-32")):
        return bytes([code - 0xDC00]), error.start + 1
    digits = (
        f"x{code:02x}" if code < 0x100 else f"u{code:04x}" if code < 0x10000 else f"U{code:08x}"
    )
    return f"\\{digits}", error.start + 1


codecs.register_error(_HANDLER, _escape)


@contextmanager
def escaped_output() -> Iterator[None]:
    r"""A block in which writing to standard output never raises UnicodeEncodeError.

    A character that the encoding lacks is written as its escape sequence, \xNN, \uNNNN or \UNNNNNNNN. Bytes of file
    names that are not text in the encoding of the file system are written as they are, as to a file. (Standard error
    has such a rule from Python.)
    """
    stream = sys.stdout
    errors = getattr(stream, "errors", None)
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None or errors not in ("strict", "surrogateescape"):
        yield
        return
    reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        if not stream.closed:
            reconfigure(errors=errors)
