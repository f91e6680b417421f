"""Tables of labelled images: what every source is read into, and how it is split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffmic_fast.config.data import check_class_names


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """Image ``index`` of a uint8 array [N, H, W] (gray) or [N, H, W, 3] in memory."""

    images: np.ndarray
    index: int


@dataclass(frozen=True)
class SyntheticImage:
    """A retina-like image that `synthetic_fundus.generate` draws when it is loaded."""

    grade: int
    seed: int
    size: int
    index: int


ImageSource = Path | ArrayImage | SyntheticImage


@dataclass(frozen=True)
class ImageEntry:
    """One labelled image.

    Attributes:
        name: how to show it: the path as written in the table, or split and number in an array.
        label: class number, 0 ... number of classes - 1.
        source: where its pixels are.
        fold: fold of a cross-validation, or None.
    """

    name: str
    label: int
    source: ImageSource
    fold: int | None = None


@dataclass(frozen=True)
class ImageTable:
    """Labelled images and the names of their classes, in the order of the class numbers.

    Raises:
        ValueError: from the constructor, when there is no entry, a class name is empty or there
            twice, or a label is not the number of a class.
    """

    classes: tuple[str, ...]
    entries: tuple[ImageEntry, ...]

    def __post_init__(self) -> None:
        """Check labels against the classes."""
        check_class_names(self.classes)
        if not self.entries:
            raise ValueError("image table: there are no images")
        for entry in self.entries:
            if not 0 <= entry.label < len(self.classes):
                raise ValueError(
                    f"image table: label {entry.label} of {entry.name} is out of range: there are "
                    f"{len(self.classes)} classes, so labels are 0 to {len(self.classes) - 1}"
                )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, int64 [N]."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class, in the order of the classes; 0 is possible."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(n) for name, n in zip(self.classes, numbers, strict=True)}

    def select(self, indices: Iterable[int]) -> ImageTable:
        """The table of these entries, in this order, with the same classes."""
        return replace(self, entries=tuple(self.entries[i] for i in indices))

    def split(self, folds: Sequence[int]) -> ImageTable:
        """The entries of these folds.

        Raises:
            ValueError: when an entry has no fold, or one of ``folds`` has no entry.
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
                f"split by folds: no image is in fold {missing[0]}; folds here: {sorted(known)}"
            )
        return self.select(i for i, entry in enumerate(self.entries) if entry.fold in folds)

    def random_split(self, fraction: float, seed: int) -> tuple[ImageTable, ImageTable]:
        """Entries without, and entries of, a random share of every class.

        A class of n images gives round(n * fraction), but at least one image and at most n - 1;
        a class of a single image gives none. The draw depends on the seed and on the names of
        the images, not on the order of the table.

        Returns:
            (rest, share), both in the order of the table.

        Raises:
            ValueError: for a fraction outside (0, 1), or when no class has two images.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"split by fraction: fraction must be in (0, 1), got {fraction}")
        labels = self.labels
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
