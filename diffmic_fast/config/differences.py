"""Differences between two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from diffmic_fast.config.preprocessing import Preprocessing

# Keys of the initial weights.
_INITIAL = ("model.encoder_weights", "model.guidance_weights")
# The preprocessing at evaluation, of the section data.
_PIXELS = tuple(f"data.augmentation.{item.name}" for item in fields(Preprocessing))


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
    """The differences in the model and its preprocessing, which the weights of a checkpoint were trained for."""
    return [each for each in differences(before, after) if _decides(each.key)]


def deciding_values(model: Mapping[str, Any], augmentation: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `model_differences` compares, by their keys.

    Args:
        model: The section `model` of a configuration.
        augmentation: The section `data.augmentation`.
    """
    values = _flat({"model": model, "data": {"augmentation": augmentation}})
    return {key: value for key, value in values.items() if _decides(key)}


def _decides(key: str) -> bool:
    """Whether an entry decides what a trained model computes."""
    return (key.startswith("model.") and key not in _INITIAL) or key in _PIXELS


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            entries |= _flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries
