"""Dataclasses from YAML: every key known, every value of the declared type, errors in words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice.

    YAML 1.1, which PyYAML follows, wants a dot and a signed exponent in a float (1.0e-3) and
    would hand on 1e-3 as text. A repeated key would silently win over the first one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ValueError(f"the key {key!r} is given twice (line {line})")
                seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = yaml.resolver.Resolver.yaml_implicit_resolvers  # copied below, never changed in place
_Loader.yaml_implicit_resolvers = {first: list(pairs) for first, pairs in _FLOAT.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, what: str) -> Any:
    """The value of YAML `text`; a mistake in it is a ValueError that names `what` (the file)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{what}{where}: not valid YAML: {problem}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that resembles `word` most, None when `known` is empty."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return close[0] if close else None


def unknown_key(key: str, section: str, known: Iterable[str]) -> ValueError:
    """The error for a key that `section` does not have."""
    hint = nearest(key, known)
    where = f"in section '{section}'" if section else "at the top level"
    advice = f"; the nearest known key is '{hint}'" if hint else ""
    return ValueError(f"config: unknown key '{key}' {where}{advice}")


def _name(hint: Any) -> str:
    if hint is type(None):
        return "nothing (null)"
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in typing.get_args(hint))
    if origin in (tuple, list):
        inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
        return "a list of " + (_name(inner[0]) if inner else "values")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names[Path] = "a path"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; raises ValueError naming the key `where` if it is another."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return convert(value, option, where)
            except ValueError as error:
                if len(options) == 1 and typing.get_origin(option) is not None:
                    raise error
    elif origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
    elif origin in (tuple, list):
        inner = args[0] if args else Any
        if inner is int and Ellipsis in args and isinstance(value, int):
            value = [value]  # train_folds: 1 means [1]
        if isinstance(value, (list, tuple)):
            if inner is str:  # YAML reads an unquoted class name 0 as a number
                value = [str(v) if type(v) is int else v for v in value]
            fixed = origin is tuple and len(args) > 0 and Ellipsis not in args
            if fixed and len(value) != len(args):
                raise ValueError(
                    f"config: {where} wants {len(args)} values, got {len(value)}: {value!r}"
                )
            hints = args if fixed else [inner] * len(value)
            items = [
                convert(v, h, f"{where}[{i}]")
                for i, (v, h) in enumerate(zip(value, hints, strict=True))
            ]
            return tuple(items) if origin is tuple else items
    elif origin is dict:
        if isinstance(value, Mapping):
            return {k: convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif hint is Any:
        return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"config: {where} wants a finite number, got {value!r}")
            return float(value)
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"config: {where} wants {_name(hint)}, got {value!r} ({type(value).__name__})")


def build(cls: type[T], values: Any, section: str) -> T:
    """The dataclass `cls` from a mapping; ValueError for unknown, missing or mistyped keys."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config: section '{section}' wants keys with values, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(str(key), section, fields)
    arguments = {}
    for name, field in fields.items():
        where = f"{section}.{name}" if section else name
        if name in values:
            arguments[name] = convert(values[name], hints[name], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"config: {where} is missing and has no default")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        if str(error).startswith("config:"):
            raise
        where = f"section '{section}': " if section else ""
        raise ValueError(f"config: {where}{error}") from error


def plain(value: Any) -> Any:
    """A dataclass tree as plain dicts, lists, numbers and text: what YAML and checkpoints hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `change` on top, sections merged key by key."""
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """'training.batch_size=16' as {'training': {'batch_size': 16}}; the value is read as YAML."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set wants section.key=value, got {text!r}")
    tree: Any = parse_yaml(value, f"--set {text}") if value.strip() else None
    for key in reversed(keys):
        tree = {key: tree}
    return dict(tree)
