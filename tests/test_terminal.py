"""Standard output with encodings that lack characters."""

from __future__ import annotations

import io
import sys

import pytest

from diffmic_fast.terminal import escaped_output


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "é片\U0001f600 ".encode() + b"\xe9\n"),
        ("ascii", b"\\xe9\\u7247\\U0001f600 \xe9\n"),
        ("cp1252", b"\xe9\\u7247\\U0001f600 \xe9\n"),
        ("utf-16-le", "é片\U0001f600 \\udce9\n".encode("utf-16-le")),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_the_encoding_lacks_is_escaped(monkeypatch, encoding, errors, expected):
    if encoding == "utf-16-le" and errors == "surrogateescape":
        errors = "strict"
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    with escaped_output():
        print("é片\U0001f600 \udce9")
    stream.flush()
    assert raw.getvalue() == expected
    assert stream.errors == errors


def test_streams_that_are_no_files_and_other_rules_are_left_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with escaped_output():
        print("片")
    assert stream.getvalue() == "片\n"
    chosen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", chosen)
    with escaped_output():
        assert sys.stdout.errors == "replace"
