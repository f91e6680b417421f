"""The output file of `predict`, which has its rows while the command runs and can be continued."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from diffmic_fast.inference.output import FORMATS, check_suffix, encode
from diffmic_fast.inference.predict import Heading, Row


class RowFile:
    """Writes predictions as they come.

    The file is made when the first row is written, and each row is handed to the operating system at once: a killed
    process loses none that was written, and leaves at most one incomplete row at the end, which `resume` removes.

    Attributes:
        path: of the file.
        heading: what the rows share.
        files: of the rows that were there already, in their order.
    """

    def __init__(self, path: str | Path, heading: Heading, *, resume: bool = False) -> None:
        """Prepare a file, which is not changed before the first `write` or `finish`.

        Args:
            path: of the file; it ends in .csv or .json.
            heading: what the rows share.
            resume: keep the rows that the file has. Without it `path` is replaced.

        Raises:
            ValueError: another suffix; with `resume`, a file of something else or of rows with another heading, or an
                image that has changed after its row was written.
        """
        self.path, self.heading = Path(path), heading
        self._format = FORMATS[check_suffix(path)]
        self._file: BinaryIO | None = None
        self._end = 0  # of the last complete row
        self.files: list[str] = []
        if resume and self.path.exists():
            self._read()
        self._rows = len(self.files)

    def _read(self) -> None:
        """Find the complete rows."""
        text = self._format.begin(self.heading)
        begin = encode(text)
        records = _csv_records if self.path.suffix.lower() == ".csv" else _json_records
        with open(self.path, "rb") as file:
            found = file.read(len(begin))
            if found != begin:
                if begin.startswith(found):  # interrupted within the heading
                    return
                raise ValueError(
                    f"predict: --resume: {self.path} does not have the heading of this model and these options; use "
                    "another --out, or leave out --resume to replace it"
                )
            self._end = len(begin)
            for name, digest, end in records(file, self.path, text):
                if digest not in (None, self.heading.digest):
                    raise ValueError(
                        f"predict: --resume: the rows of {self.path} are of another model or other options (digest "
                        f"{digest}, now {self.heading.digest}); use another --out, or leave out --resume to replace it"
                    )
                self.files.append(name)
                self._end = end
        self._check_images()

    def _check_images(self) -> None:
        written = os.stat(self.path).st_mtime
        for name in self.files:
            try:
                changed = os.stat(name).st_mtime > written
            except OSError:  # it has its row
                continue
            if changed:
                raise ValueError(
                    f"predict: --resume: {name} has changed after its row in {self.path} was written; use another "
                    "--out, or leave out --resume to replace it"
                )

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        if not rows:
            return
        file = self._open()
        for row in rows:
            file.write(encode(self._format.row(self.heading, row, first=self._rows == 0)))
            self._rows += 1
        file.flush()

    def finish(self, unreadable: Sequence[tuple[str, str]]) -> None:
        """Write what comes after the rows and close the file. Without a row nothing is written."""
        if self._rows:
            file = self._open()
            file.write(encode(self._format.end(unreadable, empty=False)))
            file.flush()
            os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        """Close the file; a later run can continue it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            # Closed by `close`.
            self._file = open(self.path, "r+b" if self._end else "wb")  # noqa: SIM115
            self._file.seek(self._end)
            self._file.truncate()
            if not self._end:
                self._file.write(encode(self._format.begin(self.heading)))
        return self._file


def _csv_records(file: BinaryIO, path: Path, begin: str) -> Iterator[tuple[str, str | None, int]]:
    """File, digest and end (in bytes) of every complete record after the heading `begin`.

    A quoted field may have line breaks: a record ends at the line break before which quotes are balanced.
    """
    columns = len(_fields(begin, path))
    record, quotes = [], 0
    end = file.tell()
    for line in file:
        record.append(line)
        quotes += line.count(b'"')
        if quotes % 2 or not line.endswith(b"\n"):
            continue
        complete = b"".join(record)
        end += len(complete)
        fields = _fields(complete.decode("utf-8", "surrogateescape"), path)
        if len(fields) != columns:
            raise ValueError(
                f"predict: --resume: the rows of {path} must have {columns} fields, got {len(fields)} after "
                f"{end} bytes; leave out --resume to replace it"
            )
        yield fields[0], fields[-1], end
        record, quotes = [], 0


def _fields(record: str, path: Path) -> list[str]:
    """The fields of a CSV record."""
    try:
        return next(csv.reader(io.StringIO(record, newline="")))
    except csv.Error as error:
        raise ValueError(f"predict: --resume: {path} is damaged: {error}") from error


def _json_records(file: BinaryIO, path: Path, begin: str) -> Iterator[tuple[str, str | None, int]]:
    """As `_csv_records`; the digest is in the heading, which was compared."""
    end = file.tell()
    for line in file:
        text = line.rstrip(b"\n")
        content = text.removesuffix(b",")
        if content.startswith(b"    {"):
            try:
                record = json.loads(content.decode("utf-8", "surrogateescape"))
            except ValueError:  # incomplete
                return
            yield record["file"], None, end + len(content)
        elif content.strip():
            return  # what comes after the rows
        end += len(line)
