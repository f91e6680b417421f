"""Image files in folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".jp2", ".j2k", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm",
    ".dcm", ".dicom",
)  # fmt: skip
# Left by operating systems, like hidden files (".DS_Store", "._image.png"); in lower case.
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini")
# How files of these formats begin: PNG, JPEG, GIF, BMP, TIFF, WebP, JPEG 2000 (a file and a bare codestream).
_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)  # fmt: skip

# Why a file or folder is skipped.
NO_IMAGE = "not an image"
HIDDEN_FILE = "a hidden file"
HIDDEN_FOLDER = "a hidden folder"
LITTER_FILE = "a file of the operating system"
FOLDER = "a folder"
FOLDER_LINK = "a link to a folder"


class FolderContent(NamedTuple):
    """The files of a folder.

    Attributes:
        images: sorted by path; by suffix, in either case, and without such a suffix by their first bytes.
        skipped: everything else, as (path, reason), sorted; a folder that was not searched counts once.
    """

    images: list[Path]
    skipped: list[tuple[Path, str]]

    @property
    def others(self) -> list[Path]:
        """What was skipped and is neither hidden nor a file of the operating system nor a folder not asked for."""
        return [path for path, reason in self.skipped if reason in (NO_IMAGE, FOLDER_LINK)]


def file_version(path: str | Path) -> str:
    """Size in bytes and time of modification in nanoseconds, as "size-time", which change with the content.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def scan_folder(folder: str | Path, recursive: bool = False) -> FolderContent:
    """List the image files of a folder and what was skipped.

    Links to files are followed; links to folders are not, since they could lead in a circle.

    Args:
        folder: where to look.
        recursive: look in the folders inside it too.

    Raises:
        ValueError: `folder` is not a folder.
        OSError: a folder cannot be read.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"data: {folder} is not a folder")
    images: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        for name in folders:
            if name.startswith("."):
                skipped.append((Path(root, name), HIDDEN_FOLDER))
            elif os.path.islink(os.path.join(root, name)):
                skipped.append((Path(root, name), FOLDER_LINK))
            elif not recursive:
                skipped.append((Path(root, name), FOLDER))
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if name.startswith("."):
                skipped.append((path, HIDDEN_FILE))
            elif name.lower() in LITTER:
                skipped.append((path, LITTER_FILE))
            elif is_image(path):
                images.append(path)
            else:
                skipped.append((path, NO_IMAGE))
    return FolderContent(sorted(images), sorted(skipped))


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """List the image files of a folder, sorted by path (`scan_folder`).

    Args:
        folder: where to look.
        recursive: look in the folders inside it too.

    Raises:
        ValueError: `folder` is not a folder or has no image.
        OSError: a folder cannot be read.
    """
    found = scan_folder(folder, recursive).images
    if not found:
        hint = "" if recursive else " (folders inside it were not searched)"
        raise ValueError(f"data: there is no image file in {folder}{hint}")
    return found


def is_image(path: Path) -> bool:
    """Whether a file is an image by its suffix or, without such a suffix, by its first bytes."""
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    try:
        if not path.is_file():  # reading a named pipe could block
            return False
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head.startswith(_SIGNATURES) or head[128:] == b"DICM"


def _raise(error: OSError) -> None:
    raise error


def find_file(folders: Sequence[str | Path], name: str) -> Path:
    """The first existing file of that name in `folders`; where it would be in the first folder if there is none."""
    candidates = [Path(folder) / name for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])
