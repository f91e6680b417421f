"""Types of configuration values with their ranges, checked by pydantic where a section is made.

Values are never converted between kinds: `batch_size: "8"`, `batch_size: 8.0` and `tensorboard: 1` are errors. Two
conversions are meant: whole numbers where text is expected (YAML reads an unquoted class name 0 as a number), and a
single whole number where a list of them is expected (`train_folds: 1`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
)

from diffmic_fast.limits import MAX_SAMPLES

# Unknown keys are errors. Sections are mutable, so they are checked again when a RunConfig takes them.
SECTION = ConfigDict(extra="forbid", allow_inf_nan=False, revalidate_instances="always")


def _integer_as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _integer_as_list(value: Any) -> Any:
    return [value] if type(value) is int else value


def one_of(names: Collection[str]) -> AfterValidator:
    """The check that a text is one of `names`."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {name!r}")
        return name

    return AfterValidator(check)


Flag = StrictBool
Integer = StrictInt
Natural = Annotated[int, Strict(), Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]
AtLeastTwo = Annotated[int, Strict(), Field(ge=2, le=2**31 - 1)]
Samples = Annotated[int, Strict(), Field(ge=1, le=MAX_SAMPLES)]
Number = Annotated[float, Strict()]
NonNegative = Annotated[float, Strict(), Field(ge=0)]
Positive = Annotated[float, Strict(), Field(gt=0)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=0.99)]
OpenUnit = Annotated[float, Strict(), Field(gt=0, lt=1)]
Name = Annotated[str, BeforeValidator(_integer_as_text)]
Folds = Annotated[
    tuple[Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)], ...],
    BeforeValidator(_integer_as_list),
]
