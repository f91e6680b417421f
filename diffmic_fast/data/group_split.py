"""Random splits that keep groups of images, such as those of a patient or a lesion, whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose_groups(
    labels: np.ndarray, groups: Sequence[str], fraction: float, seed: int
) -> np.ndarray:
    """Choose whole groups with about a share of every class.

    The groups are visited in random order. One is taken if that brings the numbers of its classes closer to n *
    `fraction` of each class of n images, by the sum of squared differences relative to n. At least one group of every
    class stays. Of a class with images in two groups or more, at least one is taken where no other class would lose its
    last group by it. The choice depends on the seed and the names of the groups, not on the order of the images.

    Args:
        labels: [N] int64, the classes of the images.
        groups: The names of the groups of the N images.
        fraction: The share, in (0, 1).
        seed: Of the order.

    Returns:
        [N] bool, whether an image is taken.
    """
    sizes = _class_sizes(labels, groups)
    totals = np.bincount(labels)
    in_groups = np.zeros(len(totals), dtype=np.int64)  # groups with images of a class
    for members in sizes.values():
        in_groups[list(members)] += 1
    left, wanted = in_groups.copy(), totals * fraction
    counts = np.zeros(len(totals))
    names = sorted(sizes)
    order = np.random.Generator(np.random.PCG64([seed])).permutation(len(names))
    chosen: set[str] = set()

    def can_take(members: dict[int, int]) -> bool:
        return all(left[c] > 1 for c in members)

    def take(name: str) -> None:
        chosen.add(name)
        for c, n in sizes[name].items():
            counts[c] += n
            left[c] -= 1

    for name in (names[i] for i in order):
        members = sizes[name]
        change = sum(
            ((counts[c] + n - wanted[c]) ** 2 - (counts[c] - wanted[c]) ** 2) / totals[c]
            for c, n in members.items()
        )
        if change < 0 and can_take(members):
            take(name)
    for c in np.flatnonzero((left == in_groups) & (in_groups > 1)):
        # No group of this class is as small as twice its share: take the smallest.
        candidates = [n for n in (names[i] for i in order) if c in sizes[n] and n not in chosen]
        candidates = [n for n in candidates if can_take(sizes[n])]
        if counts[c] == 0 and candidates:
            take(min(candidates, key=lambda name: sum(sizes[name].values())))
    return np.array([group in chosen for group in groups], dtype=bool)


def _class_sizes(labels: np.ndarray, groups: Sequence[str]) -> dict[str, dict[int, int]]:
    """The number of images of each class in each group."""
    sizes: dict[str, dict[int, int]] = {}
    for label, group in zip(labels.tolist(), groups, strict=True):
        members = sizes.setdefault(group, {})
        members[label] = members.get(label, 0) + 1
    return sizes
