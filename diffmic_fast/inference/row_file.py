"""The output file of `predict`, which has its rows while the command runs and can be continued."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from diffmic_fast.data.files import file_version
from diffmic_fast.inference.output import FORMATS, check_suffix, encode
from diffmic_fast.inference.predict import Heading, Row

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class _Record(NamedTuple):
    """A row of a file: the image, its version, the digest or None if that is in the heading, and the end in bytes."""

    file: str
    version: str
    digest: str | None
    end: int


class RowFile:
    """Writes predictions as they come.

    The file is made when the first row is written, and each row is handed to the operating system at once: a killed
    process loses none that was written, and leaves at most one incomplete row at the end, which `resume` removes. The
    file is locked (flock) from the first access on, so that no other process writes it.

    Attributes:
        path: of the file.
        heading: the fields that all rows have in common.
        files: of the rows that were there already, in their order.
    """

    def __init__(self, path: str | Path, heading: Heading, *, resume: bool = False) -> None:
        """Prepare a file, which is not changed before the first `write` or `finish`.

        Args:
            path: of the file; it ends in .csv or .json.
            heading: the fields that all rows have in common.
            resume: keep the rows that the file has. Without it `path` is replaced.

        Raises:
            ValueError: another suffix; with `resume`, a file of something else or of rows with another heading, an
                image that is not the one that was classified, or another process that writes the file.
        """
        self.path, self.heading = Path(path), heading
        self._format = FORMATS[check_suffix(path)]
        self._file: BinaryIO | None = None
        self._end = 0  # of the last complete row
        self._begun = False  # whether anything was written
        self.files: list[str] = []
        if resume and self.path.exists():
            with contextlib.ExitStack() as stack:
                self._file = open(self.path, "r+b")  # noqa: SIM115 (closed by `close`)
                stack.callback(self.close)
                lock_file(self._file, self.path)
                self._read(self._file)
                stack.pop_all()
        self._rows = len(self.files)

    def _read(self, file: BinaryIO) -> None:
        """Find the complete rows."""
        text = self._format.begin(self.heading)
        begin = encode(text)
        records = _csv_records if self.path.suffix.lower() == ".csv" else _json_records
        found = file.read(len(begin))
        if found != begin:
            if begin.startswith(found):  # interrupted within the heading
                return
            raise ValueError(
                f"predict: --resume: {self.path} does not have the heading of this model and these options; use "
                "another --out, or leave out --resume to replace it"
            )
        self._end = len(begin)
        for record in records(file, self.path, text):
            if record.digest not in (None, self.heading.digest):
                raise ValueError(
                    f"predict: --resume: the rows of {self.path} are of another model or other options (digest "
                    f"{record.digest}, now {self.heading.digest}); use another --out, or leave out --resume to replace "
                    "it"
                )
            self._check_image(record)
            self.files.append(record.file)
            self._end = record.end

    def _check_image(self, record: _Record) -> None:
        """Raise ValueError if an image is not the one that was classified; a removed one has its row."""
        if "\0" in record.file:
            raise ValueError(f"predict: --resume: {self.path} is damaged: a row has null bytes")
        try:
            version = file_version(record.file)
        except OSError:
            return
        if version != record.version:
            raise ValueError(
                f"predict: --resume: {record.file} is not the file whose row is in {self.path}: its size and time of "
                f"modification must be {record.version}, got {version}; use another --out, or leave out --resume to "
                "replace it"
            )

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        if not rows:
            return
        with self._writing() as file:
            for row in rows:
                file.write(encode(self._format.row(self.heading, row, first=self._rows == 0)))
                self._rows += 1

    def finish(self, unreadable: Sequence[tuple[str, str]]) -> None:
        """Write the footer and close the file. Without a row nothing is written."""
        if self._rows:
            with self._writing() as file:
                file.write(encode(self._format.end(unreadable, empty=False)))
                file.flush()
                os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        """Close the file; a later run can continue it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[BinaryIO]:
        """A block that appends; its OSErrors name the file."""
        try:
            if self._file is None:
                # Not truncated before it is locked.
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                self._file = open(descriptor, "r+b")  # noqa: SIM115 (closed by `close`)
                lock_file(self._file, self.path)
            if not self._begun:
                self._file.seek(self._end)
                self._file.truncate()
                if not self._end:
                    self._file.write(encode(self._format.begin(self.heading)))
                self._begun = True
            yield self._file
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def lock_file(file: BinaryIO, path: Path) -> None:
    """Lock an output of `predict`, where the file system can, against other processes.

    Raises:
        ValueError: another process has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"predict: {path} is being written by another process; wait for it, or name another output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _csv_records(file: BinaryIO, path: Path, begin: str) -> Iterator[_Record]:
    """Every complete record after the heading `begin`.

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
        yield _Record(fields[0], fields[-2], fields[-1], end)
        record, quotes = [], 0


def _fields(record: str, path: Path) -> list[str]:
    """The fields of a CSV record."""
    try:
        return next(csv.reader(io.StringIO(record, newline="")))
    except csv.Error as error:
        raise ValueError(f"predict: --resume: {path} is damaged: {error}") from error


def _json_records(file: BinaryIO, path: Path, begin: str) -> Iterator[_Record]:
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
            try:
                found = _Record(record["file"], record["version"], None, end + len(content))
            except KeyError as error:
                raise ValueError(
                    f"predict: --resume: {path} is damaged: a row has no {error.args[0]!r}"
                ) from error
            yield found
        elif content.strip():
            return  # the footer
        end += len(line)
