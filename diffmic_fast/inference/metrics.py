"""Measures of a classification, by scikit-learn but for calibration error, log-likelihood and Brier score."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffmic_fast._optional import require

ECE_BINS = 15
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "kappa": "kappa (quadratic)",
    "balanced_accuracy": "balanced accuracy",
    "auc_ovo": "AUC (one-vs-one)",
    "ece": "calibration error",
}
NAMES = tuple(TITLES)
# Predictions are float32: a probability of 0 is one that float32 rounds to 0.
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Metrics:
    """Measures of N classified images; a measure that is not defined for them is NaN.

    Attributes:
        accuracy: share of right labels.
        macro_f1: F1, averaged over the classes that occur among labels or predictions.
        kappa: Cohen's kappa with quadratic weights, for ordered grades.
        balanced_accuracy: recall, averaged over the classes that occur among the labels.
        auc_ovo: area under the ROC curve, one-vs-one, macro average (Hand and Till 2001).
        ece: `expected_calibration_error`.
        nll: `negative_log_likelihood`.
        brier: `brier_score`.
        confusion: [C, C], rows true classes, columns predicted ones.
        count: N.
        notes: the reason for each measure that is NaN, by its name.
    """

    accuracy: float
    macro_f1: float
    kappa: float
    balanced_accuracy: float
    auc_ovo: float
    ece: float
    nll: float
    brier: float
    confusion: NDArray[np.int64]
    count: int
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts for JSON; NaN becomes None."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float):
                value = None if math.isnan(value) else value
            values[item.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return values


def expected_calibration_error(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], bins: int = ECE_BINS
) -> float:
    """Expected calibration error of the largest probability (Guo et al. 2017).

    The difference between mean confidence and accuracy in bins (i / bins, (i + 1) / bins] of the confidence, averaged
    with the sizes of the bins as weights, in float64 (torchmetrics computes it in float32).

    Args:
        probabilities: [N, C].
        labels: [N].
        bins: number of bins.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=right.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def negative_log_likelihood(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean negative natural logarithm of the probability of the true class.

    Probabilities are clipped at the smallest normal float32, 1.2e-38, so one image adds at most 87.3 / N
    (`sklearn.metrics.log_loss` clips at the machine epsilon).

    Args:
        probabilities: [N, C].
        labels: [N].
    """
    of_truth = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(of_truth, SMALLEST_PROBABILITY)).mean())


def brier_score(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean over the images of the squared distance to the one-hot label, summed over the classes (Brier 1950).

    In [0, 2], for two classes too: `sklearn.metrics.brier_score_loss(..., scale_by_half=False)`, of which releases
    before 1.7 have the binary form only.

    Args:
        probabilities: [N, C].
        labels: [N].
    """
    one_hot = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - one_hot) ** 2).sum(axis=1).mean())


def compute_metrics(probabilities: Any, labels: Any) -> Metrics:
    """Compute all measures.

    Args:
        probabilities: [N, C], array or nested list; rows at least 0 that sum to 1.
        labels: [N] whole numbers in [0, C).

    Raises:
        ValueError: the arguments do not fit this description, or N is 0.
    """
    require("sklearn", extra="evaluate", purpose="measuring predictions")
    from sklearn import metrics as sk

    p, y = check_predictions(probabilities, labels)
    classes = np.arange(p.shape[1])
    predicted = p.argmax(axis=1)
    notes: dict[str, str] = {}

    with warnings.catch_warnings():
        # scikit-learn warns where a class is absent; the notes say so instead.
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
        rows = normalised(p)
        score = rows[:, 1] if len(classes) == 2 else rows
        auc = float(sk.roc_auc_score(y, score, multi_class="ovo", average="macro", labels=classes))
    return Metrics(
        accuracy=float(sk.accuracy_score(y, predicted)),
        macro_f1=macro_f1,
        kappa=kappa,
        balanced_accuracy=balanced,
        auc_ovo=auc,
        ece=expected_calibration_error(p, y),
        nll=negative_log_likelihood(p, y),
        brier=brier_score(p, y),
        confusion=sk.confusion_matrix(y, predicted, labels=classes).astype(np.int64),
        count=len(y),
        notes=notes,
    )


def normalised(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows divided by their sums: float32 probabilities sum to 1 only up to rounding, which scikit-learn rejects."""
    rows: NDArray[np.float64] = probabilities / probabilities.sum(axis=1, keepdims=True)
    return rows


def check_predictions(
    probabilities: Any, labels: Any
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Validate the arguments of `compute_metrics`.

    Returns:
        Probabilities [N, C] float64 and labels [N] int64.

    Raises:
        ValueError: see `compute_metrics`.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"metrics: probabilities must be [N, C] with C >= 2, got {p.shape}")
    if y.shape != p.shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(
            f"metrics: labels must be whole numbers [N={p.shape[0]}], got {y.dtype} {y.shape}"
        )
    if len(y) == 0:
        raise ValueError("metrics: there must be at least one image, got none")
    bad = np.flatnonzero(~np.isfinite(p).all(axis=1))
    if len(bad):
        raise ValueError(
            f"metrics: probabilities must be finite, got NaN or infinity in {len(bad)} of {len(y)} rows (first row "
            f"{bad[0]})"
        )
    wrong = np.flatnonzero((p.min(axis=1) < 0) | (np.abs(p.sum(axis=1) - 1.0) > 1e-3))
    if len(wrong):
        raise ValueError(
            f"metrics: rows of probabilities must be at least 0 and add up to 1, got {p[wrong[0]].tolist()} in row "
            f"{wrong[0]}"
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(
            f"metrics: labels must be in 0..{p.shape[1] - 1}, got {y.min()}..{y.max()}"
        )
    return p, y.astype(np.int64)
