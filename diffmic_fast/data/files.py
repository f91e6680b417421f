"""Image files in folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
NO_IMAGE = "a file without the suffix of an image"


class FolderContent(NamedTuple):
    """The files of a folder.

    Attributes:
        images: the image files, sorted by path.
        skipped: everything else, as (path, reason), sorted; a folder that was not searched counts once.
    """

    images: list[Path]
    skipped: list[tuple[Path, str]]


def scan_folder(folder: str | Path, recursive: bool = False) -> FolderContent:
    """List the image files of a folder and what was skipped.

    Files are chosen by `IMAGE_SUFFIXES` in either case. Hidden files and folders are skipped, and links to folders are
    not followed, since they could lead in a circle.

    Args:
        folder: where to look.
        recursive: look in the folders inside it too.

    Raises:
        ValueError: `folder` is not a folder.
        OSError: a folder cannot be read.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"data: {folder} is not a folder")
    images, skipped = [], []
    for root, folders, names in os.walk(folder, onerror=_raise):
        for name in folders:
            if name.startswith("."):
                skipped.append((Path(root, name), "a hidden folder"))
            elif not recursive:
                skipped.append((Path(root, name), "a folder"))
            elif os.path.islink(os.path.join(root, name)):
                skipped.append((Path(root, name), "a link to a folder"))
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                skipped.append((Path(root, name), "a hidden file"))
            elif name.lower().endswith(IMAGE_SUFFIXES):
                images.append(Path(root, name))
            else:
                skipped.append((Path(root, name), NO_IMAGE))
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


def _raise(error: OSError) -> None:
    raise error


def find_file(folders: Sequence[str | Path], name: str) -> Path:
    """The first existing file of that name in `folders`; where it would be in the first folder if there is none."""
    candidates = [Path(folder) / name for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])
