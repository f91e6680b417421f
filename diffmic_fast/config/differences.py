"""Differences between two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Where the weights before training came from.
_INITIAL = ("model.encoder_weights", "model.guidance_weights")
# The preprocessing at evaluation, of the section data.
_PIXELS = tuple(
    f"data.augmentation.{name}" for name in ("centre_square", "bit_depth", "mean", "std")
)


class Difference(NamedTuple):
    """An entry that two configurations have with different values, or one of them has alone.

    Attributes:
        key: as in --set, such as "model.schedule".
        before: its value in the first, None if it has none.
        after: its value in the second.
    """

    key: str
    before: Any
    after: Any


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """The differences of `RunConfig.to_dict()` of two configurations, sorted by their keys."""
    old, new = _flat(before), _flat(after)
    return [
        Difference(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def model_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Those of the model and of its preprocessing, which the weights of a checkpoint were trained for."""
    return [
        difference
        for difference in differences(before, after)
        if (difference.key.startswith("model.") and difference.key not in _INITIAL)
        or difference.key in _PIXELS
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            entries |= _flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries
