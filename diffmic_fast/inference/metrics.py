"""Measures of a classification (spec 7), by scikit-learn wherever it has them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

ECE_BINS = 15
NAMES = ("accuracy", "macro_f1", "kappa", "balanced_accuracy", "auc_ovo", "ece")
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "kappa": "kappa (quadratic)",
    "balanced_accuracy": "balanced accuracy",
    "auc_ovo": "AUC (one-vs-one)",
    "ece": "calibration error",
}


@dataclass(frozen=True)
class Metrics:
    """Measures of N classified images; a measure that is not defined for them is NaN.

    accuracy: share of right labels.
    macro_f1: F1 of each class that occurs among labels or predictions, averaged without weights.
    kappa: Cohen's kappa with quadratic weights, for ordered grades.
    balanced_accuracy: recall of each class that occurs among the labels, averaged.
    auc_ovo: area under the ROC curve, one-vs-one, macro average (Hand and Till 2001).
    ece: expected calibration error of the largest probability, 15 bins of equal width.
    confusion: int64 [C, C], rows true classes, columns predicted ones.
    notes: for a measure that is NaN, why.
    """

    accuracy: float
    macro_f1: float
    kappa: float
    balanced_accuracy: float
    auc_ovo: float
    ece: float
    confusion: NDArray[np.int64]
    count: int
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON; NaN becomes None, the reason stands in `notes`."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float):
                value = None if math.isnan(value) else value
            values[item.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return values


def check_probabilities(
    probabilities: Any, labels: Any
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities [N, C] as float64 and labels [N] as int64; ValueError if they are not that."""
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"metrics: probabilities must be [N, C] with C >= 2, got {p.shape}")
    if y.shape != p.shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(
            f"metrics: labels must be whole numbers [N={p.shape[0]}], got {y.dtype} {y.shape}"
        )
    if len(y) == 0:
        raise ValueError("metrics: there are no images to measure")
    bad = np.flatnonzero(~np.isfinite(p).all(axis=1))
    if len(bad):
        raise ValueError(
            f"metrics: probabilities hold not-a-number or infinity in {len(bad)} of {len(y)} rows "
            f"(first row {bad[0]}); the model's weights or images are broken"
        )
    wrong = np.flatnonzero((p.min(axis=1) < 0) | (np.abs(p.sum(axis=1) - 1.0) > 1e-3))
    if len(wrong):
        raise ValueError(
            f"metrics: rows of probabilities must be at least 0 and add up to 1, row {wrong[0]} is "
            f"{p[wrong[0]].tolist()}"
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(
            f"metrics: labels must be in 0..{p.shape[1] - 1}, got {y.min()}..{y.max()}"
        )
    return p, y.astype(np.int64)


def expected_calibration_error(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], bins: int = ECE_BINS
) -> float:
    """Mean gap between confidence and accuracy over `bins` equal-width bins, weighted by size.

    Bins are (i/bins, (i+1)/bins] of the largest probability, as in Guo et al. 2017.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    size = np.bincount(which, minlength=bins)
    gap = np.bincount(which, weights=right.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / size.sum())


def compute_metrics(probabilities: Any, labels: Any) -> Metrics:
    """All measures of probabilities [N, C] against labels [N] (anything NumPy can read).

    Raises ValueError for NaN, for rows that are no distributions, and for labels out of range.
    """
    from sklearn import metrics as sk

    p, y = check_probabilities(probabilities, labels)
    classes = np.arange(p.shape[1])
    predicted = p.argmax(axis=1)
    notes: dict[str, str] = {}

    with warnings.catch_warnings():
        # scikit-learn warns where a class is absent; the notes say so in our words.
        warnings.simplefilter("ignore")
        kappa = float(sk.cohen_kappa_score(y, predicted, labels=classes, weights="quadratic"))
        balanced = float(sk.balanced_accuracy_score(y, predicted))
        macro_f1 = float(sk.f1_score(y, predicted, average="macro", zero_division=0))
    if math.isnan(kappa):
        notes["kappa"] = "labels and predictions are all of one class"

    missing = [int(c) for c in classes if not (y == c).any()]
    if missing:
        auc = math.nan
        notes["auc_ovo"] = f"no image of class {', '.join(map(str, missing))}"
    else:
        rows = p / p.sum(axis=1, keepdims=True)  # float32 rows miss 1 by a rounding
        score = rows[:, 1] if len(classes) == 2 else rows
        auc = float(sk.roc_auc_score(y, score, multi_class="ovo", average="macro", labels=classes))
    return Metrics(
        accuracy=float(sk.accuracy_score(y, predicted)),
        macro_f1=macro_f1,
        kappa=kappa,
        balanced_accuracy=balanced,
        auc_ovo=auc,
        ece=expected_calibration_error(p, y),
        confusion=sk.confusion_matrix(y, predicted, labels=classes).astype(np.int64),
        count=len(y),
        notes=notes,
    )
