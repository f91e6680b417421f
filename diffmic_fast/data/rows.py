"""The rows of a table of images: read, checked by place and name, and made into an `ImageTable`."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffmic_fast.config.data import check_class_names
from diffmic_fast.data.table import ImageEntry, ImageTable

INTEGER = re.compile(r"[+-]?\d+")
_SHOWN = 3


class TableBuilder:
    """Collects the images of one file, and says in words which one is not as it should be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: list[str] = []
        self.rows: list[tuple[str, Path, int | None]] = []
        self._seen: dict[str, str] = {}

    def add(self, place: str, name: str, file: Path, fold: int | None = None) -> None:
        """Note an image; ValueError if its name was there before."""
        key = os.path.normpath(name)
        if key in self._seen:
            raise ValueError(
                f"{self.path}, {place}: {name} is there twice, first in {self._seen[key]}"
            )
        self._seen[key] = place
        self.places.append(place)
        self.rows.append((name, file, fold))

    def table(self, classes: Sequence[str], labels: Sequence[int]) -> ImageTable:
        """The images with a label each; ValueError naming files that are missing."""
        if not self.rows:
            raise ValueError(f"{self.path}: lists no images")
        missing = [str(file) for _, file, _ in self.rows if not file.is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(self.rows)} image files are missing: "
                f"{', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''}"
            )
        return ImageTable(
            tuple(classes),
            tuple(
                ImageEntry(name, label, file, fold)
                for (name, file, fold), label in zip(self.rows, labels, strict=True)
            ),
        )


def number_labels(
    builder: TableBuilder,
    labels: Sequence[str],
    classes: Sequence[str] | None,
    num_classes: int | None,
) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and the number of each label."""
    numeric = bool(labels) and all(INTEGER.fullmatch(label) for label in labels)
    if classes is not None:
        names = tuple(classes)
    elif numeric:
        top = max(int(label) for label in labels)
        names = tuple(str(i) for i in range(num_classes or max(top + 1, 2)))
    else:
        names = tuple(sorted(set(labels)))
    by_name = {name: number for number, name in enumerate(names)}
    numbers = []
    for place, label in zip(builder.places, labels, strict=True):
        number = by_name.get(label)
        if number is None and numeric and 0 <= int(label) < len(names):
            number = int(label)
        if number is None:
            wanted = (
                f"a number from 0 to {len(names) - 1}" if numeric else f"one of {', '.join(names)}"
            )
            raise ValueError(f"{builder.path}, {place}: label must be {wanted}, got {label!r}")
        numbers.append(number)
    if labels:
        check_class_names(names)
    return names, numbers


def csv_rows(table: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and stripped cells by column name."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            missing = [column for column in wanted if column not in header]
            if missing:
                raise ValueError(
                    f"{table}: column {missing[0]!r} is missing; the header must have "
                    f"{', '.join(wanted)}, got {', '.join(header) or 'nothing'}"
                )
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{table}, line {reader.line_num}: must have {len(header)} cells as the "
                        f"header, got {len(cells)}"
                    )
                yield reader.line_num, dict(zip(header, map(str.strip, cells), strict=True))
    except FileNotFoundError:
        raise ValueError(f"data: there is no file {table}") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        raise ValueError(f"{table}: is no CSV file: {error}") from error


def is_number(text: str, value: float) -> bool:
    """Whether the text is a number of this value."""
    try:
        return float(text) == value
    except ValueError:
        return False


def find_file(folders: Sequence[str | Path], name: str) -> Path:
    """The first folder's file of that name; the first folder's if none has it."""
    candidates = [Path(folder) / name for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])
