"""Lists of images in files: CSV rows, and the table that is built of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffmic_fast.data.labels import LabelledRow, number_labels
from diffmic_fast.data.table import ImageEntry, ImageTable, Skipped

_SHOWN = 3


class _Row(NamedTuple):
    where: str
    name: str
    label: str | int
    file: Path
    fold: int | None
    group: str | None


class TableBuilder:
    """Collects the images that one file lists; errors name the file and the row.

    Attributes:
        path: The file.
        skipped: Rows that list no image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: list[Skipped] = []
        self._rows: dict[str, _Row] = {}

    def add(
        self,
        where: str,
        name: str,
        label: str | int,
        file: Path,
        *,
        fold: int | None = None,
        group: str | None = None,
    ) -> None:
        """Add an image.

        Args:
            where: The row, as errors name it.
            name: The name of the image.
            label: The name of its class, or a number (`labels.number_labels`).
            file: Where it is.
            fold: Its fold of a cross-validation.
            group: Its group, such as a patient.

        Raises:
            ValueError: The name was added before.
        """
        first = self._rows.setdefault(
            os.path.normpath(name), row := _Row(where, name, label, file, fold, group)
        )
        if first is not row:
            raise ValueError(
                f"{self.path}, {where}: {name} is listed twice, first in {first.where}"
            )

    def build(
        self,
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        *,
        positions: bool = True,
    ) -> ImageTable:
        """The table of all images.

        Args:
            classes: Names of the classes in the order of their numbers. By default "0", "1", ... if every label is a
                whole number, else the sorted labels.
            num_classes: Number of classes, for numbers without names.
            positions: Whether numbers may be positions in `classes` (`labels.number_labels`).

        Raises:
            ValueError: There are no images, a label is not a class, or image files are missing.
        """
        rows = list(self._rows.values())
        if not rows:
            raise ValueError(f"{self.path}: lists no images")
        names, labels = number_labels(
            [LabelledRow(f"{self.path}, {row.where}", row.label) for row in rows],
            classes,
            num_classes=num_classes,
            positions=positions,
        )
        missing = [str(row.file) for row in rows if not os.path.isfile(row.file)]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(rows)} image files are missing: "
                f"{', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''}"
            )
        entries = tuple(
            ImageEntry(row.name, label, row.file, row.fold, row.group)
            for row, label in zip(rows, labels, strict=True)
        )
        return ImageTable(names, entries, tuple(self.skipped))


def csv_rows(
    table: Path, columns: Sequence[str], skipped: list[Skipped] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a CSV file in UTF-8, comma separated, with a header.

    Args:
        table: The file.
        columns: Columns that the header must have.
        skipped: Receives the rows whose cells are all blank. Empty lines are no rows.

    Yields:
        ("line N", cells by column without surrounding blanks) for each row that is not blank.

    Raises:
        ValueError: The file is missing or not such a CSV, a column is in the header or in `columns` twice, or a row has
            another number of cells than the header.
    """
    reader = None
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            _check_header(table, header, columns)
            for cells in reader:
                where = f"line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    if cells and skipped is not None:
                        skipped.append(Skipped(f"{table}, {where}", "a row without content"))
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{table}, {where}: must have {len(header)} cells as the header, got {len(cells)}"
                    )
                yield where, dict(zip(header, map(str.strip, cells), strict=True))
    except FileNotFoundError:
        raise ValueError(f"data: there is no file {table}") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        where = f", line {reader.line_num}" if reader is not None and reader.line_num else ""
        raise ValueError(f"{table}{where}: must be a CSV file in UTF-8: {error}") from error


def csv_header(table: Path) -> list[str]:
    """The columns of a CSV file, or none where `csv_rows` would raise."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return [cell.strip() for cell in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _check_header(table: Path, header: list[str], columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(
            f"{table}: column {missing[0]!r} is missing; the header must have {', '.join(columns)}, got "
            f"{', '.join(header) or 'nothing'}"
        )
    seen: set[str] = set()
    for column in header:
        if column and column in seen:
            raise ValueError(
                f"{table}, line 1: every column must be given once, got {column!r} twice"
            )
        seen.add(column)
    repeated = next((column for column in columns if columns.count(column) > 1), None)
    if repeated is not None:
        raise ValueError(f"{table}: columns must be different ones, got {repeated!r} twice")
