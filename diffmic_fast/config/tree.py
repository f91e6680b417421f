"""`Tree`: conversion of configuration dataclasses to plain dicts and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from diffmic_fast.config.errors import describe

_Self = TypeVar("_Self", bound="Tree")


class Tree:
    """The base of pydantic dataclasses that are written to files with all their sections."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and text, as in a YAML file or a checkpoint."""
        tree: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return tree

    @classmethod
    def from_dict(cls: type[_Self], values: Mapping[str, Any]) -> _Self:
        """The inverse of `to_dict`; entries may be left out where there is a default.

        Raises:
            ValueError: unknown keys with the nearest known one, missing keys, values of another type or out of range.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise ValueError(describe(error, cls)) from error
