"""YAML as configurations need it, and command-line overrides on top of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and rejects duplicate keys.

    YAML 1.1, which PyYAML implements, requires a dot and a signed exponent in a float (1.0e-3) and reads 1e-3 as text.
    Of duplicate keys PyYAML keeps the last one silently.
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


# A copy: add_implicit_resolver would change the lists that SafeLoader shares.
_Loader.yaml_implicit_resolvers = {
    first: list(pairs) for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text; raises ValueError, naming the file `what` and the line, for invalid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{what}{where}: not valid YAML: {problem}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def with_overrides(
    values: Mapping[str, Any], overrides: Iterable[str | Mapping[str, Any]]
) -> Mapping[str, Any]:
    """`values` with overrides on top: texts "section.key=value" (the value read as YAML) or nested mappings."""
    for change in overrides:
        values = _merged(values, _parsed(change) if isinstance(change, str) else change)
    return values


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `change` on top, sections merged key by key."""
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = _merged(merged[key], value)
        merged[key] = value
    return merged


def _parsed(text: str) -> dict[str, Any]:
    """'training.batch_size=16' as {'training': {'batch_size': 16}}; the value is read as YAML."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set must be section.key=value, got {text!r}")
    tree: Any = parse_yaml(value, f"--set {text}") if value.strip() else None
    for key in reversed(keys):
        tree = {key: tree}
    return dict(tree)
