"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
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
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which becomes `path` when the block ends.

    All files in it are on the disk (fsync) before the rename. If the block raises, `path` is unchanged.

    Args:
        path: must not exist, or be an empty folder, or with `overwrite` be any folder, which is replaced. A process
            that is killed between the two renames of a replacement leaves the old content beside it, as
            `.NAME.….replaced`.
        overwrite: replace a folder with content.

    Raises:
        FileExistsError: `path` exists.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is not a folder")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    replaced = temporary.with_suffix(".replaced")
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file, os.O_RDONLY)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o777 & ~mask)  # mkdtemp makes folders that only the owner may read
        if path.exists():
            os.rename(path, replaced)
        try:
            os.rename(temporary, path)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if hasattr(os, "O_DIRECTORY"):
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def check_target(operation: str, folder: Path, names: Collection[str], *, overwrite: bool) -> None:
    """Raise ValueError unless `operation` may write a folder.

    Args:
        operation: begins the messages of errors.
        folder: must not exist or be empty, or with `overwrite` have files of `names` alone.
        names: of the files that `operation` writes.
        overwrite: replace a folder with content.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{operation}: {folder} must be a folder, got a file")
    present = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in present if name not in names]
    if present and not overwrite:
        raise ValueError(
            f"{operation}: {folder} must be a new or empty folder, got one with {', '.join(present[:4])}; use another "
            "one, or overwrite it (overwrite=True, --overwrite)"
        )
    if others:
        raise ValueError(
            f"{operation}: {folder} must have files of {operation} alone to be overwritten, got {', '.join(others[:4])}"
        )


def _sync(path: Path, flags: int) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
