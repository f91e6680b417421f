"""Image files in folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """List the image files of a folder, sorted by path.

    Files are chosen by `IMAGE_SUFFIXES` in either case. Hidden files and folders are skipped, and links to folders are
    not followed, since they could lead in a circle.

    Args:
        folder: where to look.
        recursive: look in the folders inside it too.

    Raises:
        ValueError: `folder` is not a folder or has no image.
        OSError: a folder cannot be read.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"data: {folder} is not a folder")
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [
            Path(root, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    if not found:
        hint = "" if recursive else " (folders inside it were not searched)"
        raise ValueError(f"data: there is no image file in {folder}{hint}")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def find_file(folders: Sequence[str | Path], name: str) -> Path:
    """The first existing file of that name in `folders`; where it would be in the first folder if there is none."""
    candidates = [Path(folder) / name for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])
