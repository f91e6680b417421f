"""Whether the confidence of a classification can be relied on.

Reliability tables, accuracy in groups of images, risk against coverage, and prediction sets. Nothing here depends on
the order of the images: equal values are never separated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmic_fast.inference.metrics import ECE_BINS

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Group(NamedTuple):
    """Images whose value of some quantity lies in a range.

    Attributes:
        name: of the range, such as "(0.2, 0.4]".
        images: their number.
        accuracy: share of them that are labelled correctly; NaN if there is none.
        confidence: mean over them of the largest probability; NaN if there is none.
    """

    name: str
    images: int
    accuracy: float
    confidence: float


class RiskCoverage(NamedTuple):
    """Error rate among the most confident images (Geifman and El-Yaniv 2017).

    Attributes:
        coverage: [N], shares k / N of the images, k = 1 ... N.
        risk: [N], error rate of the k most confident images; of images of equal confidence the mean over their
            orders.
        area: mean of `risk` (AURC, Geifman et al. 2018, "Bias-reduced uncertainty estimation").
    """

    coverage: Floats
    risk: Floats
    area: float

    def at(self, coverage: float) -> float:
        """The risk at the smallest coverage that is at least `coverage`, in (0, 1]."""
        if not 0.0 < coverage <= 1.0:
            raise ValueError(f"risk: coverage must be in (0, 1], got {coverage}")
        # k / N is compared with a rounding error's margin: 0.3 * 10 is above 3.
        return float(self.risk[np.searchsorted(self.coverage, coverage - 1e-12)])


class SetStatistics(NamedTuple):
    """Prediction sets of a group of images.

    Attributes:
        images: their number.
        coverage: share of the sets that contain the true class; NaN without images.
        size: mean number of classes in a set; NaN without images.
        empty: number of empty sets.
    """

    images: int
    coverage: float
    size: float
    empty: int


def reliability_table(confidence: Floats, right: Bools, bins: int = ECE_BINS) -> list[Group]:
    """Accuracy and mean confidence in bins of equal width, those of `expected_calibration_error`.

    Args:
        confidence: [N], the largest probability of each image, in [0, 1].
        right: [N], whether its label is correct.
        bins: number of bins.

    Returns:
        One group for each bin (i / bins, (i + 1) / bins], empty ones too.
    """
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    names = [f"({i / bins:.3f}, {(i + 1) / bins:.3f}]" for i in range(bins)]
    return _groups(which, names, confidence, right)


def by_quantile(values: Floats, confidence: Floats, right: Bools, groups: int) -> list[Group]:
    """Accuracy in groups of nearly equal size, by the quantiles of a quantity.

    Equal values are in one group, so groups differ in size, down to none, where values are tied.

    Args:
        values: [N], finite.
        confidence, right: see `reliability_table`.
        groups: number of groups; the first has the smallest values.
    """
    _check_finite(values)
    ends = np.quantile(values, np.arange(groups + 1) / groups)
    which = np.searchsorted(ends[1:-1], values, side="left")
    names = [f"({a:.4g}, {b:.4g}]" for a, b in itertools.pairwise(ends)]
    names[0] = "[" + names[0][1:]
    return _groups(which, names, confidence, right)


def by_edges(
    values: Floats, confidence: Floats, right: Bools, edges: Sequence[float], names: Sequence[str]
) -> list[Group]:
    """Accuracy in groups by fixed limits of a quantity.

    Args:
        values: [N], finite.
        confidence, right: see `reliability_table`.
        edges: n increasing limits; a value equal to a limit is above it.
        names: of the n + 1 groups.
    """
    _check_finite(values)
    return _groups(np.searchsorted(edges, values, side="right"), names, confidence, right)


def risk_coverage(confidence: Floats, right: Bools) -> RiskCoverage:
    """Risk against coverage, and the area below.

    Args:
        confidence: [N] with N >= 1, finite; larger is surer.
        right: [N], whether the label is correct.
    """
    _check_finite(confidence)
    _, which, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(which, weights=~right, minlength=len(sizes))
    # Within a tie each image counts as the mean error of the tie.
    errors = np.cumsum(np.repeat(wrong / sizes, sizes))
    k = np.arange(1, len(confidence) + 1)
    risk = errors / k
    return RiskCoverage(k / len(k), risk, float(risk.mean()))


def set_statistics(sets: Bools, labels: NDArray[np.int64]) -> tuple[SetStatistics, ...]:
    """Coverage and size of prediction sets: of all images, then of the images of each class.

    Args:
        sets: [N, C], whether a class is in the set of an image.
        labels: [N], the true classes.

    Returns:
        1 + C statistics.
    """
    covered = sets[np.arange(len(labels)), labels]
    size = sets.sum(axis=1)
    members = [np.ones(len(labels), dtype=bool)]
    members += [labels == c for c in range(sets.shape[1])]
    return tuple(
        SetStatistics(int(m.sum()), _mean(covered[m]), _mean(size[m]), int((size[m] == 0).sum()))
        for m in members
    )


def _groups(
    which: NDArray[np.int64], names: Sequence[str], confidence: Floats, right: Bools
) -> list[Group]:
    members = [which == i for i in range(len(names))]
    return [
        Group(name, int(m.sum()), _mean(right[m]), _mean(confidence[m]))
        for name, m in zip(names, members, strict=True)
    ]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _check_finite(values: Floats) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"reliability: values must be finite, got {values[bad[0]]} at index {bad[0]}"
        )
