"""Tables of the documentation are those that the committed results give."""

from __future__ import annotations

import re

import pytest

from benchmarks.doc_tables import DOCS, TABLES, with_tables

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="docs is not beside the tests")


def test_tables_are_those_of_the_results() -> None:
    names = []
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert with_tables(text) == text, f"{path.name}: python -m benchmarks.doc_tables --write"
        names += re.findall(r"<!-- table: (.*?) -->", text)
    assert sorted(names) == sorted(TABLES)


def test_a_changed_number_is_replaced() -> None:
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    changed = text.replace("| 1 | 0.18 s |", "| 1 | 0.17 s |")
    assert changed != text and with_tables(changed) == text


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="no such"):
        with_tables("<!-- table: no such -->\n<!-- end of table -->")
