"""Labels: the classes that the labels of a table define, and the class of each label."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

INTEGER = re.compile(r"[+-]?\d+")
# A class number as it must be written: "7", not "07", "+7" or "7.0". 18 digits fit in 64 bits.
_CLASS_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_DECIMAL = re.compile(
    r"[+-]?(\d+[.,]\d*|[.,]\d+|\d+([.,]\d*)?e[+-]?\d+|nan)", re.IGNORECASE | re.ASCII
)
_DATE = re.compile(
    r"\d{4}([-/.])\d{1,2}(\1\d{1,2})?([T ].*)?|\d{1,2}([-/.])\d{1,2}\4(\d{4}|\d{2})([T ].*)?"
)
# Up to this many classes, a table may have fewer than two images per class, or classes without an image.
_FEW_CLASSES = 10
# Largest num_classes of a table with fewer images.
_MAX_EMPTY_CLASSES = 1000
_SHOWN = 10


class LabelledRow(NamedTuple):
    """The label of one row of a file.

    Attributes:
        where: The row as errors name it, such as "labels.csv, line 7".
        label: A text, or the class number where the file stores numbers (pickles).
    """

    where: str
    label: str | int


def shown(names: Sequence[str]) -> str:
    """The first few names, comma separated, and how many there are if some are left out."""
    text = ", ".join(names[:_SHOWN])
    return text if len(names) <= _SHOWN else f"{text}, … ({len(names)} in all)"


def number_labels(
    rows: Sequence[LabelledRow],
    classes: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    positions: bool = True,
) -> tuple[tuple[str, ...], list[int]]:
    """Determine the classes of a table and the class of each row, in linear time.

    A text is the class of that name. A text that is a whole number is the position of a class in `classes`, from 0,
    only if `positions` is true, every label of the table is a whole number, no class name is a number, and no class
    names are numbered otherwise (such as "grade 1", "grade 2"). A label that is stored as a number is a position.

    Without `classes`, labels that are all whole numbers define the classes "0", "1", ... up to the largest label or to
    `num_classes`; other labels are the names, sorted. `check_derived_names` says which labels cannot be names.

    Args:
        rows: The labels of the N images.
        classes: The names of the classes, in the order of their numbers.
        num_classes: The number of classes, for number labels without names.
        positions: Whether numbers may be positions in `classes`. False where the names are labels of another table,
            whose order is alphabetical.

    Returns:
        The names of the C classes, and the N class numbers.

    Raises:
        ValueError: A label is empty, cannot be a name or is not a class, by row.
    """
    first: dict[str | int, str] = {}
    for where, label in rows:
        first.setdefault(label, where)
    for label, where in first.items():
        if isinstance(label, str) and not _is_visible(label):
            raise ValueError(f"{where}: the label is empty")
    if classes is None:
        names, positions = _derived_names(first, len(rows), num_classes), False
    else:
        names = tuple(classes)
    numbers = _class_numbers(first, names, positions)
    return names, [numbers[label] for _, label in rows]


def check_derived_names(names: Mapping[str, str], images: int) -> None:
    """Check that texts which define the classes can be names of classes.

    Args:
        names: The distinct texts, and where each of them is found first.
        images: The number of images.

    Raises:
        ValueError: A text is a decimal number, a date or several lines; two texts differ only in case, spaces or
            invisible characters; or there are more than 10 texts and fewer than two images for each, as there are for
            identifiers.
    """
    if len(names) > max(_FEW_CLASSES, images // 2):
        text, where = next(iter(names.items()))
        raise ValueError(
            f"{where}: labels must be classes with two images each or more, got {len(names)} different labels for "
            f"{images} images, such as {text!r}; if they are not identifiers, name the classes in data.class_names"
        )
    folded: dict[str, str] = {}
    for name, where in names.items():
        for kind, pattern in (("decimal number", _DECIMAL), ("date", _DATE)):
            if pattern.fullmatch(name):
                raise ValueError(
                    f"{where}: the label must be the name of a class, got the {kind} {name!r}; if it is a name, give "
                    "data.class_names"
                )
        if any(unicodedata.category(character) == "Cc" for character in name):
            raise ValueError(f"{where}: the label must be one line of text, got {name!r}")
        other = folded.setdefault(_folded(name), name)
        if other is not name:
            raise ValueError(
                f"{where}: labels must differ in more than case, spaces and invisible characters, got {name!r} and "
                f"{other!r} (first in {names[other]}); if they are two classes, give data.class_names"
            )


def _derived_names(
    first: Mapping[str | int, str], images: int, num_classes: int | None
) -> tuple[str, ...]:
    """The names of the classes that the labels define; `first` has the first row of every label."""
    if num_classes is not None and num_classes > max(_MAX_EMPTY_CLASSES, images):
        where = next(iter(first.values()))
        raise ValueError(
            f"{where}: num_classes must be at most {max(_MAX_EMPTY_CLASSES, images)} for {images} images, got "
            f"{num_classes}"
        )
    texts = {label: where for label, where in first.items() if isinstance(label, str)}
    if not all(INTEGER.fullmatch(text) for text in texts):
        if len(texts) < len(first):
            label, where = next(item for item in first.items() if isinstance(item[0], int))
            raise ValueError(
                f"{where}: labels must be all numbers or all names, got the number {label} beside "
                f"{next(iter(texts))!r}"
            )
        check_derived_names(texts, images)
        return tuple(sorted(texts))
    top = max(first, key=lambda label: -1 if (n := _whole(label)) is None else n)
    count = num_classes or max((_whole(top) or 0) + 1, 2)
    if num_classes is None and count > max(_FEW_CLASSES, 2 * len(first)):
        raise ValueError(
            f"{first[top]}: number labels must be classes counted from 0, got {top}, which makes {count} classes, "
            f"and {len(first)} different labels; if they are not dates or identifiers, name the classes in "
            "data.class_names"
        )
    names = tuple(map(str, range(count)))
    if num_classes is None:
        check_derived_names({str(label): where for label, where in first.items()}, images)
    return names


def _class_numbers(
    first: Mapping[str | int, str], names: tuple[str, ...], positions: bool
) -> dict[str | int, int]:
    """The class of every label."""
    by_name = {name: number for number, name in enumerate(names)}
    counted = names == tuple(map(str, range(len(names))))
    read_positions = counted or (
        positions
        and not _are_numbered(names)
        and all(isinstance(label, int) or INTEGER.fullmatch(label) for label in first)
    )
    numbers: dict[str | int, int] = {}
    for label, where in first.items():
        is_position = read_positions or (positions and isinstance(label, int))
        number = by_name.get(label) if isinstance(label, str) else None
        if number is None and is_position:
            number = _whole(label)
        if number is None or not 0 <= number < len(names):
            known = (
                f"a number from 0 to {len(names) - 1}" if is_position else f"one of {shown(names)}"
            )
            hint = ""
            if not is_position and INTEGER.fullmatch(str(label)):
                hint = " (a number is a position only in data.class_names, and where these are not numbered)"
            raise ValueError(f"{where}: label must be {known}, got {str(label)!r}{hint}")
        numbers[label] = number
    return numbers


def _are_numbered(names: tuple[str, ...]) -> bool:
    """Whether a number could be meant as a part of a class name, and not as the position of the class.

    This is so if a name is a number, or if names differ only in their numbers and these are not their positions.
    """
    series: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        if INTEGER.fullmatch(name) or _DECIMAL.fullmatch(name):
            return True
        series.setdefault(re.sub(r"\d+", "#", name), []).append(position)
    return any(
        [re.findall(r"\d+", names[i]) for i in members] != [[str(i)] for i in members]
        for members in series.values()
        if len(members) > 1
    )


def _whole(label: str | int) -> int | None:
    """The number of a number label, or None if it is written in another way than class numbers are."""
    if isinstance(label, int):
        return label
    return int(label) if _CLASS_NUMBER.fullmatch(label) else None


def _is_visible(text: str) -> bool:
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text)


def _folded(name: str) -> str:
    """A name without the differences that a reader does not see."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return "".join(
        c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf")
    )
