"""The results of one method: what it says of labelled images, and everything measured of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmic_fast.inference.bootstrap import Interval, Replicates, bootstrap
from diffmic_fast.inference.comparison import Comparison, Measured, compare
from diffmic_fast.inference.metrics import Metrics, compute_metrics
from diffmic_fast.inference.report import Report, Uncertainty, make_report

GUIDANCE = "guidance alone"
CALIBRATED = ", calibrated"


class Output(NamedTuple):
    """What a method says of N images.

    Attributes:
        method: `GUIDANCE` or `SamplingOptions.method`, followed by `CALIBRATED` for calibrated probabilities.
        probabilities: [N, C].
        seconds: time of the model alone.
        calibrated: whether the probabilities are the calibrated ones.
        uncertainty: of each image, or None.
        labels_by_samples: [N, S], the label by the first 1 ... S samples alone, of the published probabilities of a
            sampler; otherwise None.
    """

    method: str
    probabilities: NDArray[np.float64]
    seconds: float
    calibrated: bool = False
    uncertainty: Uncertainty | None = None
    labels_by_samples: NDArray[np.int64] | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[Output]) -> Output:
        """The output for the images of all parts, which are of one method; seconds are added."""
        uncertainties = [part.uncertainty for part in parts if part.uncertainty is not None]
        together = None
        if uncertainties:
            columns = zip(*uncertainties, strict=True)
            together = Uncertainty(*(None if c[0] is None else np.concatenate(c) for c in columns))
        labels = [p.labels_by_samples for p in parts if p.labels_by_samples is not None]
        return parts[0]._replace(
            probabilities=np.concatenate([part.probabilities for part in parts]),
            seconds=sum(part.seconds for part in parts),
            uncertainty=together,
            labels_by_samples=np.concatenate(labels) if labels else None,
        )


@dataclass(frozen=True)
class Result:
    """Results of one method.

    Attributes:
        method: as in `Output`.
        metrics: against the labels.
        seconds_per_image: time of the model alone.
        probabilities: [N, C].
        calibrated: whether the probabilities are the calibrated ones.
        report: reliability of the confidence.
        intervals: bootstrap interval of each of `bootstrap.MEASURES`; empty without a bootstrap.
        comparison: with the guidance alone, by the same kind of probabilities; None for the guidance itself.
        uncertainty: of each image, or None.
        labels_by_samples: as in `Output`.
    """

    method: str
    metrics: Metrics
    seconds_per_image: float
    probabilities: NDArray[np.float64]
    calibrated: bool
    report: Report
    intervals: dict[str, Interval]
    comparison: Comparison | None = None
    uncertainty: Uncertainty | None = None
    labels_by_samples: NDArray[np.int64] | None = None


def make_results(
    outputs: Sequence[Output],
    labels: NDArray[np.int64],
    ids: NDArray[np.int64],
    resamples: int,
) -> tuple[Result, ...]:
    """Measure what methods say of the same N images.

    Args:
        outputs: of the guidance alone, published and calibrated where another one is calibrated, and of samplers.
        labels: [N].
        ids: [N], of the images. The bootstrap draws images in the order of (id, label), so that intervals do not
            depend on the order of the images.
        resamples: of the bootstrap, 0 for none.

    Raises:
        ValueError: probabilities or labels are invalid (see `compute_metrics`), or `resamples` is negative.
    """
    replicates: Sequence[Replicates | None] = [None] * len(outputs)
    if resamples != 0:
        order = np.lexsort((labels, ids))
        ordered = [output.probabilities[order] for output in outputs]
        replicates = bootstrap(ordered, labels[order], resamples)
    measured = [
        Measured(
            output.method,
            output.probabilities.argmax(axis=1) == labels,
            compute_metrics(output.probabilities, labels),
            own,
        )
        for output, own in zip(outputs, replicates, strict=True)
    ]
    baselines = {
        output.calibrated: own
        for output, own in zip(outputs, measured, strict=True)
        if output.method in (GUIDANCE, GUIDANCE + CALIBRATED)
    }
    return tuple(
        _result(output, own, baselines[output.calibrated], labels)
        for output, own in zip(outputs, measured, strict=True)
    )


def _result(
    output: Output, measured: Measured, baseline: Measured, labels: NDArray[np.int64]
) -> Result:
    replicates = measured.replicates or {}
    return Result(
        output.method,
        measured.metrics,
        output.seconds / len(labels),
        output.probabilities,
        output.calibrated,
        make_report(output.probabilities, labels, output.uncertainty),
        {name: Interval.from_replicates(values) for name, values in replicates.items()},
        None if measured is baseline else compare(measured, baseline),
        output.uncertainty,
        output.labels_by_samples,
    )
