"""Duplicates: images of data sets with identical bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffmic_fast.data.decode import check_regular, unreadable_files_named
from diffmic_fast.data.table import ArrayImage, ImageSource, ImageTable

_BLOCK = 2**20
_SAMPLE = 4096
_SHOWN = 3


class Member(NamedTuple):
    """An image of a group of duplicates.

    Attributes:
        split: The name of its split.
        name: Its name in the table.
        label: The name of its class.
        source: Its pixels.
    """

    split: str
    name: str
    label: str
    source: ImageSource


class Duplicates(NamedTuple):
    """Groups of images with identical bytes.

    Attributes:
        groups: Two or more images each; groups with different labels first, then those across splits, each in the
            order of the tables.
        compared: The number of images that were compared.
    """

    groups: tuple[tuple[Member, ...], ...]
    compared: int

    @property
    def across_splits(self) -> int:
        """The number of groups with images of more than one split."""
        return sum(len({member.split for member in group}) > 1 for group in self.groups)

    @property
    def with_different_labels(self) -> int:
        """The number of groups with more than one label."""
        return sum(len({member.label for member in group}) > 1 for group in self.groups)

    def describe(self) -> str:
        """The counts and the first few groups, on one line."""
        if not self.groups:
            return f"none among {self.compared} images, byte by byte"
        extra = sum(len(group) - 1 for group in self.groups)
        groups = "; ".join(
            " = ".join(f"{m.split} {m.name} ({m.label})" for m in group[:_SHOWN])
            + (f" = … ({len(group)} images)" if len(group) > _SHOWN else "")
            for group in self.groups[:_SHOWN]
        )
        more = "; …" if len(self.groups) > _SHOWN else ""
        return (
            f"{extra} of {self.compared} images have the bytes of another one; of {len(self.groups)} groups, "
            f"{self.across_splits} are across splits and {self.with_different_labels} have different labels: "
            f"{groups}{more}"
        )


def find_duplicates(tables: Mapping[str, ImageTable]) -> Duplicates:
    """Find images with identical bytes, within and across splits.

    Files of equal size are compared by a hash of three samples, and those with equal samples by the SHA-256 of all
    bytes, so that most files are not read. Images of arrays are compared by their pixels. Synthetic images are left
    out.

    Args:
        tables: The images by the names of their splits.

    Raises:
        UnreadableImageError: A file cannot be read.
    """
    members = [
        Member(split, entry.name, table.classes[entry.label], entry.source)
        for split, table in tables.items()
        for entry in table.entries
        if isinstance(entry.source, (Path, ArrayImage))
    ]
    groups: Iterable[list[Member]] = [members]
    for key in (_size, _sample, _digest):
        groups = [part for group in groups for part in _parts(group, key)]
    ordered = sorted(
        groups, key=lambda g: (len({m.label for m in g}) == 1, len({m.split for m in g}) == 1)
    )
    return Duplicates(tuple(map(tuple, ordered)), len(members))


def _parts(
    members: Iterable[Member], key: Callable[[ImageSource], Hashable]
) -> Iterable[list[Member]]:
    """The members with equal keys, where there are two or more."""
    parts: dict[Hashable, list[Member]] = {}
    for member in members:
        parts.setdefault(key(member.source), []).append(member)
    return (part for part in parts.values() if len(part) > 1)


def content_sample(source: ImageSource) -> bytes:
    """A hash of the size and of the first, the middle and the last bytes of an image of a file or an array.

    Raises:
        UnreadableImageError: The file cannot be read.
    """
    return hashlib.sha256(repr((_size(source), _sample(source))).encode()).digest()


def _size(source: ImageSource) -> Hashable:
    if isinstance(source, Path):
        with unreadable_files_named(source):
            return os.stat(source).st_size
    return _pixels(source).shape


def _sample(source: ImageSource) -> Hashable:
    """A hash of the first, the middle and the last bytes."""
    hashed = hashlib.sha256()
    if isinstance(source, Path):
        with _opened(source) as file:
            size = os.fstat(file.fileno()).st_size
            for start in sorted({0, max(size // 2 - _SAMPLE // 2, 0), max(size - _SAMPLE, 0)}):
                file.seek(start)
                hashed.update(file.read(_SAMPLE))
    else:
        pixels = _pixels(source)
        hashed.update(pixels[:: max(len(pixels) // 8, 1)].tobytes())
    return hashed.digest()


def _digest(source: ImageSource) -> Hashable:
    hashed = hashlib.sha256()
    if isinstance(source, Path):
        with _opened(source) as file:
            while block := file.read(_BLOCK):
                hashed.update(block)
    else:
        hashed.update(_pixels(source).tobytes())
    return hashed.digest()


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """An opened regular file, without a buffer; errors are raised as an `UnreadableImageError`."""
    with unreadable_files_named(path):
        check_regular(path)
        with path.open("rb", buffering=0) as file:
            yield file


def _pixels(source: ImageSource) -> np.ndarray:
    if not isinstance(source, ArrayImage):
        raise TypeError(f"duplicates: a source must be a file or an array, got {source!r}")
    return source.images[source.index]
