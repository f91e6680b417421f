"""Tables of labelled images, and how they are split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffmic_fast.config.data import check_class_names
from diffmic_fast.data.group_split import choose_groups


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """Image `index` of a uint8 array [N, H, W] (grey) or [N, H, W, 3] in memory."""

    images: np.ndarray
    index: int


@dataclass(frozen=True)
class SyntheticImage:
    """A synthetic image, drawn by `synthetic_fundus.generate` when it is loaded."""

    grade: int
    seed: int
    size: int
    index: int


ImageSource = Path | ArrayImage | SyntheticImage


@dataclass(frozen=True)
class ImageEntry:
    """One labelled image.

    Attributes:
        name: the path as written in the table, or split and number in an array.
        label: number of its class.
        source: where its pixels are.
        fold: fold of a cross-validation, or None.
        group: group whose images no random split separates, such as a patient, or None.
    """

    name: str
    label: int
    source: ImageSource
    fold: int | None = None
    group: str | None = None


class Skipped(NamedTuple):
    """A file or row that was not taken as an image.

    Attributes:
        name: the path, or the file and row.
        reason: why it was not taken.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ImageTable:
    """Labelled images.

    Attributes:
        classes: names of the C classes, in the order of their numbers.
        entries: the N images.
        skipped: what was found where the images are, and is none; the same for all splits of a table.

    Raises:
        ValueError: from the constructor: there are no entries, a class name is empty or repeated, or a label is not in
            [0, C).
    """

    classes: tuple[str, ...]
    entries: tuple[ImageEntry, ...]
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        check_class_names(self.classes)
        if not self.entries:
            raise ValueError("image table: there are no images")
        for entry in self.entries:
            if not 0 <= entry.label < len(self.classes):
                raise ValueError(
                    f"image table: labels must be in [0, {len(self.classes) - 1}] for {len(self.classes)} classes, "
                    f"got {entry.label} for {entry.name}"
                )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray:
        """[N] int64, the labels."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class, in the order of the classes."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(n) for name, n in zip(self.classes, numbers, strict=True)}

    def select(self, indices: Iterable[int]) -> ImageTable:
        """A table of these entries, in this order, with the same classes."""
        return replace(self, entries=tuple(self.entries[i] for i in indices))

    def split(self, folds: Sequence[int]) -> ImageTable:
        """A table of the entries of these folds.

        Raises:
            ValueError: an entry has no fold, or a fold has no entry.
        """
        known = set()
        for entry in self.entries:
            if entry.fold is None:
                raise ValueError(
                    f"split by folds: {entry.name} has no fold; add the column fold to the table "
                    "or split by a fraction"
                )
            known.add(entry.fold)
        missing = [fold for fold in folds if fold not in known]
        if missing:
            raise ValueError(
                f"split by folds: folds must be among {sorted(known)}, got {missing[0]}"
            )
        return self.select(i for i, entry in enumerate(self.entries) if entry.fold in folds)

    def random_split(self, fraction: float, seed: int) -> tuple[ImageTable, ImageTable]:
        """Split off a random share of every class.

        Of a class of n images, n * fraction are taken, rounded, but at least 1 and at most n - 1; none if n is 1. The
        choice depends on the seed and on the names of the images, not on the order of the table. Groups stay whole
        (`group_split.choose_groups`): they are taken where the share of every class is approximated best.

        Args:
            fraction: the share, in (0, 1).
            seed: of the choice.

        Returns:
            (rest, share), both in the order of the table.

        Raises:
            ValueError: `fraction` is out of range, no class has two images, or two groups where there are groups.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"split by fraction: fraction must be in (0, 1), got {fraction}")
        labels = self.labels
        groups = [entry.group for entry in self.entries if entry.group is not None]
        if groups:
            if len(groups) < len(self):
                raise ValueError("split by fraction: every image must have a group, or none")
            taken = choose_groups(labels, groups, fraction, seed)
            if not taken.any() or taken.all():
                raise ValueError("split by fraction: every class has fewer than two groups")
            return self.select(np.flatnonzero(~taken)), self.select(np.flatnonzero(taken))
        taken = np.zeros(len(self), dtype=bool)
        for label in range(len(self.classes)):
            members = np.flatnonzero(labels == label).tolist()
            if len(members) < 2:
                continue
            members.sort(key=lambda i: self.entries[i].name)
            count = min(max(int(len(members) * fraction + 0.5), 1), len(members) - 1)
            order = np.random.Generator(np.random.PCG64([seed, label])).permutation(len(members))
            taken[[members[i] for i in order[:count]]] = True
        if not taken.any():
            raise ValueError("split by fraction: every class has fewer than two images")
        return self.select(np.flatnonzero(~taken)), self.select(np.flatnonzero(taken))
