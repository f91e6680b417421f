"""Checksums of files of `torch.save`, which are zip archives; `torch.load` does not compare them."""

from __future__ import annotations

import functools
import zipfile
import zlib
from pathlib import Path

_BLOCK = 2**20


def check_archive(path: Path) -> None:
    """Compare the content of a file of `torch.save` with its checksums.

    Each entry, the pickle or the bytes of a tensor, has a CRC-32. Nothing is compared if all of them are 0, as
    `torch.serialization.set_crc32_options(False)` writes them. A file that has not changed is read once per process.

    Args:
        path: of a zip archive.

    Raises:
        ValueError: an entry is damaged or occurs twice, or the archive is not complete; says which.
    """
    status = path.stat()
    _check(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=64)
def _check(path: Path, size: int, modified: int, inode: int) -> None:
    """Check a file, identified by size, modification time and inode, so that it is checked once."""
    entry = None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            has_checksums = any(each.CRC for each in entries)
            names: set[str] = set()
            for entry in entries:
                # Readers differ in which of two entries they take.
                if entry.filename in names:
                    raise ValueError("it occurs twice")
                names.add(entry.filename)
                if has_checksums:
                    _check_entry(archive, entry)
    # Damaged headers name compression methods that do not exist, encryption, and places outside the file.
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:
        where = "" if entry is None else f", entry {entry.filename}"
        raise ValueError(f"is damaged or truncated ({size} bytes{where}): {error}") from error


def _check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Read an entry to its end, where `zipfile` compares the checksum."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed, which torch.save does not do")
    with archive.open(entry) as content:
        while content.read(_BLOCK):
            pass
