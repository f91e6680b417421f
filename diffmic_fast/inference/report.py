"""What an evaluation reports of one method's confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmic_fast.inference.reliability import (
    Group,
    RiskCoverage,
    SetStatistics,
    by_edges,
    by_quantile,
    reliability_table,
    risk_coverage,
    set_statistics,
)

CONFIDENCE_GROUPS = 5
WIDTH_GROUPS = 4
SIGNIFICANCE = 0.05
AGREEMENTS = (0.5, 0.75, 1.0)
SET_COVERAGE = 0.9  # that prediction sets are made for
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class Uncertainty(NamedTuple):
    """`calibration.Confidence` of N predictions, as arrays; None where a method has no such value.

    Attributes:
        width: [N], interval width of the predicted class's probability over the samples; NaN for a single sample.
        p_value: [N], paired t-test between the two most probable classes; NaN for a single sample.
        agreement: [N], share of samples with the predicted label.
        prediction_set: [N, C] bool.
        novelty: [N], share of the validation images that are at least as far from the training images.
        flagged: [N] bool, whether the image is unlike the training images.
    """

    width: NDArray[np.float64] | None = None
    p_value: NDArray[np.float64] | None = None
    agreement: NDArray[np.float64] | None = None
    prediction_set: NDArray[np.bool_] | None = None
    novelty: NDArray[np.float64] | None = None
    flagged: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Report:
    """Reliability of one method on labelled images.

    Attributes:
        table: accuracy and confidence in the bins of the calibration error.
        risk: error rate among the images of largest probability.
        groups: accuracy by "confidence" (fifths of the images, by the largest probability) and, of a sampler with
            several samples, by "interval_width" (quarters), "t_test" (p below 0.05 or not) and "agreement".
        sets: of the prediction sets, for all images and for each class, or None.
        flagged: share of images that are flagged as unlike the training images, or None.
    """

    table: list[Group]
    risk: RiskCoverage
    groups: dict[str, list[Group]]
    sets: tuple[SetStatistics, ...] | None = None
    flagged: float | None = None

    def to_dict(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """Numbers, text, lists and dicts; NaN is left in."""
        value: dict[str, Any] = {
            "reliability": [group._asdict() for group in self.table],
            "risk_coverage": {f"{c:g}": self.risk.at(c) for c in COVERAGES},
            "aurc": self.risk.area,
            "accuracy_by": {
                name: [group._asdict() for group in groups] for name, groups in self.groups.items()
            },
            "prediction_sets": None,
            "flagged": self.flagged,
        }
        if self.sets is not None:
            overall, *each = self.sets
            value["prediction_sets"] = overall._asdict() | {
                "by_class": {name: s._asdict() for name, s in zip(classes, each, strict=True)}
            }
        return value


def make_report(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    uncertainty: Uncertainty | None = None,
) -> Report:
    """Measure how far the confidence of a method can be relied on.

    Args:
        probabilities: [N, C], checked by `compute_metrics`.
        labels: [N].
        uncertainty: of the images.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    groups = {"confidence": by_quantile(confidence, confidence, right, CONFIDENCE_GROUPS)}
    sets = flagged = None
    if uncertainty is not None:
        groups |= _sample_groups(uncertainty, confidence, right)
        if uncertainty.prediction_set is not None:
            sets = set_statistics(uncertainty.prediction_set, labels)
        if uncertainty.flagged is not None:
            flagged = float(uncertainty.flagged.mean())
    return Report(
        reliability_table(confidence, right),
        risk_coverage(confidence, right),
        groups,
        sets,
        flagged,
    )


def _sample_groups(
    uncertainty: Uncertainty, confidence: NDArray[np.float64], right: NDArray[np.bool_]
) -> dict[str, list[Group]]:
    """Accuracy by what several samples of an image have in common; nothing for a single sample."""
    width, p_value, agreement = uncertainty.width, uncertainty.p_value, uncertainty.agreement
    if width is None or p_value is None or agreement is None or np.isnan(width).any():
        return {}
    low, middle, full = AGREEMENTS
    names = [f"< {low}", f"[{low}, {middle})", f"[{middle}, {full:g})", f"{full:g}"]
    tests = [f"p < {SIGNIFICANCE}", f"p >= {SIGNIFICANCE}"]
    return {
        "interval_width": by_quantile(width, confidence, right, WIDTH_GROUPS),
        "t_test": by_edges(p_value, confidence, right, [SIGNIFICANCE], tests),
        "agreement": by_edges(agreement, confidence, right, AGREEMENTS, names),
    }
