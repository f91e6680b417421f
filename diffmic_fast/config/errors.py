"""One-line errors for configurations: the key, its section, the value, and the nearest known key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import ValidationError


def nearest(word: str, known: Iterable[str]) -> str:
    """The entry of `known`, which must not be empty, that resembles `word` most."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def describe(error: ValidationError, config: type) -> str:
    """Everything that pydantic found wrong in `config`, a dataclass of sections, on one line."""
    return "config: " + "; ".join(_describe(each, config) for each in error.errors())


def _describe(error: Any, config: Any) -> str:
    path = error["loc"]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)[1:]
    kind, value = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        *sections, key = path
        for name in sections:
            hint = typing.get_type_hints(config)[name]
            # An optional section is a union with None.
            config = next((each for each in typing.get_args(hint) if is_dataclass(each)), hint)
        place = f"in section '{'.'.join(sections)}'" if sections else "at the top level"
        hint = nearest(str(key), [field.name for field in fields(config)])
        return f"unknown key '{key}' {place}; the nearest known key is '{hint}'"
    if kind == "missing":
        return f"{where} is missing and has no default"
    if kind == "value_error":  # raised by a check of ours
        text = str(error["ctx"]["error"])
        colon = "" if text.startswith("must be") or not where else ":"
        return f"{where}{colon} {text}".lstrip()
    what = error["msg"].replace("Input should be", "must be")
    return f"{where} {what}, got {value!r}"
