"""Comparison of two classifiers on the same images, paired by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmic_fast._optional import require
from diffmic_fast.inference.bootstrap import Interval, Replicates
from diffmic_fast.inference.metrics import Metrics

MEASURES = ("accuracy", "macro_f1", "kappa")


class McNemar(NamedTuple):
    """The exact test of McNemar (1947).

    Attributes:
        only_first, only_second: numbers of images that only this classifier labels correctly.
        p_value: two-sided; of the hypothesis that such an image is as likely to be the one's as the other's. 1 where
            there is no such image.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """Test whether two classifiers label equally many images correctly.

    Args:
        first, second: [N], whether each classifier labels the image correctly.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"mcnemar: both classifiers must have the same images [N], got {first.shape} and {second.shape}"
        )
    stats = require("scipy.stats", extra="evaluate", purpose="comparing classifiers")
    a, b = int((first & ~second).sum()), int((second & ~first).sum())
    return McNemar(a, b, float(stats.binomtest(a, a + b, 0.5).pvalue) if a + b else 1.0)


class Difference(NamedTuple):
    """Difference of a measure between two classifiers.

    Attributes:
        value: the first minus the second, NaN if the measure is not defined for one of them.
        interval: its bootstrap interval over the same resamples, or None.
    """

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline.

    Attributes:
        baseline: name of the method that it is compared with.
        mcnemar: the method first.
        differences: of each of `MEASURES`, the method minus the baseline.
    """

    baseline: str
    mcnemar: McNemar
    differences: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text and dicts; NaN is left in."""
        return {
            "baseline": self.baseline,
            "only_method_right": self.mcnemar.only_first,
            "only_baseline_right": self.mcnemar.only_second,
            "p_value": self.mcnemar.p_value,
            "differences": {
                name: {
                    "value": difference.value,
                    "interval": difference.interval and difference.interval._asdict(),
                }
                for name, difference in self.differences.items()
            },
        }


@dataclass(frozen=True)
class Measured:
    """What is compared of a classifier.

    Attributes:
        name: shown in tables.
        right: [N], whether its label is correct.
        metrics: its measures.
        replicates: by `bootstrap`, or None.
    """

    name: str
    right: NDArray[np.bool_]
    metrics: Metrics
    replicates: Replicates | None = None


def compare(method: Measured, baseline: Measured) -> Comparison:
    """Compare two classifiers of the same images, whose replicates are of one call of `bootstrap`."""
    differences = {}
    for name in MEASURES:
        interval = None
        if method.replicates is not None and baseline.replicates is not None:
            paired = method.replicates[name] - baseline.replicates[name]
            interval = Interval.from_replicates(paired)
        value = getattr(method.metrics, name) - getattr(baseline.metrics, name)
        differences[name] = Difference(value, interval)
    return Comparison(baseline.name, mcnemar(method.right, baseline.right), differences)
