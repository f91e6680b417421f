"""Bootstrap intervals of the measures of a classification.

Images are resampled with replacement; the model and its predictions are fixed. An interval therefore states the
uncertainty that comes from the choice of test images, not that from training. Every classifier is measured on the same
resamples, so that differences of two of them are paired by image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmic_fast.inference.metrics import check_predictions, normalised

LEVEL = 0.95
RESAMPLES = 1000
MEASURES = ("accuracy", "macro_f1", "kappa", "balanced_accuracy", "auc_ovo")

_BLOCK_ELEMENTS = 1 << 21  # of [resamples, images] counts at a time: 16 MiB

Floats = NDArray[np.float64]
# Values [R] of each measure, NaN for a resample on which it is not defined.
Replicates = dict[str, Floats]


class Interval(NamedTuple):
    """A percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Attributes:
        low, high: its ends; NaN if the measure is not defined on any resample.
        resamples: number of resamples that it rests on, those on which the measure is defined.
    """

    low: float
    high: float
    resamples: int

    @classmethod
    def from_replicates(cls, replicates: Floats, level: float = LEVEL) -> Interval:
        """The interval between two quantiles of the replicates.

        Args:
            replicates: [R]; NaN is left out.
            level: share of the replicates within the interval, in (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"bootstrap: level must be in (0, 1), got {level}")
        defined = replicates[~np.isnan(replicates)]
        if len(defined) == 0:
            return cls(math.nan, math.nan, 0)
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        return cls(float(low), float(high), len(defined))


def bootstrap(
    probabilities: Sequence[Floats],
    labels: NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Replicates]:
    """Measure classifiers on resamples of the images, the same for all classifiers.

    A resample draws N of the N images with replacement, without stratification. Its measures are those of
    `compute_metrics`. A resample without any image of some class has no AUC, and one whose labels and predictions are
    all of one class no kappa: such replicates are NaN and are left out of the interval, which counts the others.

    Args:
        probabilities: for each classifier [N, C].
        labels: [N].
        resamples: R >= 1.
        seed: of the draws. They address images by position: sort images by a key of their own for results that do not
            depend on their order.

    Returns:
        For each classifier, the R values of each of `MEASURES`.

    Raises:
        ValueError: `resamples` is below 1, or probabilities or labels are invalid (see `compute_metrics`).
    """
    if resamples < 1:
        raise ValueError(f"bootstrap: resamples must be at least 1, got {resamples}")
    checked = [check_predictions(p, labels) for p in probabilities]
    found: list[list[Replicates]] = [[] for _ in checked]
    for counts in _resample_counts(len(labels), resamples, seed):
        for (p, y), blocks in zip(checked, found, strict=True):
            blocks.append(_measure(p, y, counts))
    return [
        {name: np.concatenate([block[name] for block in blocks]) for name in MEASURES}
        for blocks in found
    ]


def _resample_counts(images: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks [r, N] of how often each image is in each resample."""
    generator = np.random.Generator(np.random.PCG64(seed % 2**64))
    rows = max(1, _BLOCK_ELEMENTS // images)
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = generator.integers(0, images, (r, images))
        drawn += images * np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=r * images).reshape(r, images).astype(np.float64)


def _measure(p: Floats, y: NDArray[np.int64], counts: Floats) -> Replicates:
    """The measures [r] of a classifier on images counted by each row of `counts` [r, N]."""
    classes = p.shape[1]
    cells = np.zeros((len(y), classes * classes))
    cells[np.arange(len(y)), y * classes + p.argmax(axis=1)] = 1.0
    confusion = (counts @ cells).reshape(-1, classes, classes)
    return _confusion_measures(confusion) | {"auc_ovo": auc_one_vs_one(p, y, counts)}


def _confusion_measures(confusion: Floats) -> Replicates:
    """Measures [r] of confusion matrices [r, C, C], rows true classes, columns predicted ones."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    true, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    count = true.sum(axis=1)
    grades = np.arange(confusion.shape[1], dtype=np.float64)
    weights = (grades[:, None] - grades) ** 2
    observed = (confusion * weights).sum(axis=(1, 2))
    expected = np.einsum("ri,ij,rj->r", true, weights, predicted) / count
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "accuracy": right.sum(axis=1) / count,
            "macro_f1": np.nanmean(2 * right / (true + predicted), axis=1),
            "kappa": np.where(expected > 0, 1 - observed / expected, np.nan),
            "balanced_accuracy": np.nanmean(right / true, axis=1),
        }


def auc_one_vs_one(p: Floats, y: NDArray[np.int64], counts: Floats) -> Floats:
    """Area under the ROC curve, one-vs-one, macro average (Hand and Till 2001), of weighted images.

    The area of class a against class b is the share of pairs, an image of a and one of b, of which the first has the
    larger probability of a; equal probabilities count half. With whole weights the sums are exact, so
    `sklearn.metrics.roc_auc_score` agrees up to the rounding of the last divisions.

    Args:
        p: [N, C] probabilities.
        y: [N] labels.
        counts: [r, N] weights, at least 0.

    Returns:
        [r], NaN where the images of a class weigh 0.
    """
    p = normalised(p)
    classes = p.shape[1]
    # Of two classes the probability of the second alone, as in `compute_metrics`.
    pairs = [(1, 0)] if classes == 2 else list(itertools.permutations(range(classes), 2))
    total = np.zeros(len(counts))
    for a, b in pairs:
        either = np.flatnonzero((y == a) | (y == b))
        total += _auc(p[either, a], y[either] == a, counts[:, either])
    return total / len(pairs)


def _auc(scores: Floats, positive: NDArray[np.bool_], counts: Floats) -> Floats:
    """Area under the ROC curve [r] of scores [n] with weights [r, n]; NaN where one of the classes weighs 0."""
    order = np.argsort(scores, kind="stable")
    scores, positive, counts = scores[order], positive[order], counts[:, order]
    # Weight of the negatives before position i, for i = 0 ... n.
    negatives = np.zeros((len(counts), len(scores) + 1))
    np.cumsum(np.where(positive, 0.0, counts), axis=1, out=negatives[:, 1:])
    lower = np.searchsorted(scores, scores[positive], side="left")
    not_higher = np.searchsorted(scores, scores[positive], side="right")
    weights = counts[:, positive]
    wins = (weights * (negatives[:, lower] + negatives[:, not_higher])).sum(axis=1) / 2
    pairs = weights.sum(axis=1) * negatives[:, -1]
    with np.errstate(invalid="ignore"):
        return np.where(pairs > 0, wins / pairs, np.nan)
