"""Lists of images in files: CSV rows, and the table that is built of them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffmic_fast.data.table import ImageEntry, ImageTable

INTEGER = re.compile(r"[+-]?\d+")
_SHOWN = 3


class _Row(NamedTuple):
    where: str
    name: str
    label: str
    file: Path
    fold: int | None


class TableBuilder:
    """Collects the images that one file lists; errors name the file and the row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, _Row] = {}

    def add(
        self, where: str, name: str, label: object, file: Path, fold: int | None = None
    ) -> None:
        """Add an image whose class has the name or number `label`; errors call its row `where`.

        Raises:
            ValueError: the name was added before.
        """
        first = self._rows.setdefault(
            os.path.normpath(name), row := _Row(where, name, str(label), file, fold)
        )
        if first is not row:
            raise ValueError(
                f"{self.path}, {where}: {name} is listed twice, first in {first.where}"
            )

    def build(
        self, classes: Sequence[str] | None = None, num_classes: int | None = None
    ) -> ImageTable:
        """The table of all images.

        Args:
            classes: names of the classes in the order of their numbers. By default "0", "1", ... if every label is a
                whole number, else the sorted labels.
            num_classes: number of classes, for numbers without names.

        Raises:
            ValueError: there are no images, a label is not a class, or image files are missing.
        """
        rows = list(self._rows.values())
        if not rows:
            raise ValueError(f"{self.path}: lists no images")
        numeric = all(INTEGER.fullmatch(row.label) for row in rows)
        if classes is not None:
            names = tuple(classes)
        elif numeric:
            top = max(int(row.label) for row in rows)
            names = tuple(str(i) for i in range(num_classes or max(top + 1, 2)))
        else:
            names = tuple(sorted({row.label for row in rows}))
        labels = [self._number(row, names, numeric) for row in rows]
        missing = [str(row.file) for row in rows if not row.file.is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(rows)} image files are missing: "
                f"{', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''}"
            )
        entries = zip(rows, labels, strict=True)
        return ImageTable(
            names, tuple(ImageEntry(row.name, label, row.file, row.fold) for row, label in entries)
        )

    def _number(self, row: _Row, names: tuple[str, ...], numeric: bool) -> int:
        """Number of a row's class, given by name or, if all labels are numbers, by number."""
        if row.label in names:
            return names.index(row.label)
        if numeric and 0 <= int(row.label) < len(names):
            return int(row.label)
        known = f"a number from 0 to {len(names) - 1}" if numeric else f"one of {', '.join(names)}"
        raise ValueError(f"{self.path}, {row.where}: label must be {known}, got {row.label!r}")


def csv_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a CSV file in UTF-8, comma separated, with a header.

    Args:
        table: the file.
        columns: columns that the header must have.

    Yields:
        ("line N", cells by column without surrounding blanks) for each row that is not blank.

    Raises:
        ValueError: the file is missing or not such a CSV, or a row has another number of cells than the header.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            missing = [column for column in columns if column not in header]
            if missing:
                raise ValueError(
                    f"{table}: column {missing[0]!r} is missing; the header must have {', '.join(columns)}, got "
                    f"{', '.join(header) or 'nothing'}"
                )
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"line {reader.line_num}"
                if len(cells) != len(header):
                    raise ValueError(
                        f"{table}, {where}: must have {len(header)} cells as the header, got {len(cells)}"
                    )
                yield where, dict(zip(header, map(str.strip, cells), strict=True))
    except FileNotFoundError:
        raise ValueError(f"data: there is no file {table}") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        raise ValueError(f"{table}: must be a CSV file in UTF-8: {error}") from error
