"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for binary writing; when the block ends it replaces `path`.

    The content is on the disk (fsync) before the rename, so that a reader finds either the old file or the new one,
    also after a power failure. If the block raises, `path` is unchanged.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def keep_copy(path: Path, copy: Path) -> None:
    """Keep the present content of `path` as `copy`, atomically and without writing it again.

    A hard link: the next `atomic_file` replaces the name `path`, not the content that the link refers to.
    """
    temporary = copy.with_name(f".{copy.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        with atomic_file(copy) as target, open(path, "rb") as source:
            shutil.copyfileobj(source, target)
        return
    os.replace(temporary, copy)
