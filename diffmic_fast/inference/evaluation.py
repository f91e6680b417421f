"""`Evaluation`: the results of `evaluate`, and how they are written."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.inference.bootstrap import LEVEL
from diffmic_fast.inference.evaluation_tables import print_evaluation
from diffmic_fast.inference.metrics import ECE_BINS
from diffmic_fast.inference.report import SET_COVERAGE, Uncertainty
from diffmic_fast.inference.results import CALIBRATED, Result

# Columns of `Uncertainty`, with the names that `predict` gives them.
_UNCERTAINTY = (
    "interval_width", "t_test_p", "agreement", "prediction_set", "novelty", "flagged",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Results of all methods on the same N images.

    Attributes:
        classes: names of the C classes.
        labels: [N].
        results: one for each method, the guidance model alone first; then the same methods with calibrated
            probabilities, if the model is calibrated.
        samples, seed: of all samplers.
        names: of the N images, as in their table.
        bootstrap: number of resamples, 0 for none.
        calibration: `Calibration.summary` of the model's, or None.
        not_calibrated: reasons why methods have no calibrated probabilities.
        notes: remarks for the JSON file.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    results: tuple[Result, ...]
    samples: int
    seed: int
    names: tuple[str, ...] = ()
    bootstrap: int = 0
    calibration: str | None = None
    not_calibrated: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def primary(self) -> Result:
        """The first sampler, or else the guidance; with calibrated probabilities where there are any."""
        published = [r for r in self.results if not r.calibrated]
        first = published[min(1, len(published) - 1)]
        calibrated = [r for r in self.results if r.method == first.method + CALIBRATED]
        return calibrated[0] if calibrated else first

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text, lists and dicts for JSON; without the values of single images. NaN becomes None."""
        value = {
            "images": len(self.labels),
            "classes": list(self.classes),
            "samples": self.samples,
            "seed": self.seed,
            "calibration_bins": ECE_BINS,
            "bootstrap": {"resamples": self.bootstrap, "level": LEVEL} if self.bootstrap else None,
            "set_coverage": SET_COVERAGE,
            "calibration": self.calibration,
            "not_calibrated": list(self.not_calibrated),
            "notes": self.notes,
            "results": [self._result_dict(r) for r in self.results],
        }
        plain: dict[str, Any] = _without_nan(value)
        return plain

    def _result_dict(self, r: Result) -> dict[str, Any]:
        named = {
            "method": r.method,
            "calibrated": r.calibrated,
            "seconds_per_image": r.seconds_per_image,
        }
        uncertain = {
            "intervals": {name: interval._asdict() for name, interval in r.intervals.items()},
            "comparison": r.comparison and r.comparison.to_dict(),
        }
        return named | r.metrics.to_dict() | uncertain | r.report.to_dict(self.classes)

    def save(self, path: str | Path) -> None:
        """Write the results as JSON; an interrupted write leaves no file."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with atomic_file(path) as file:
            file.write((text + "\n").encode())

    def to_csv(self) -> str:
        """A row for each image by `primary`; needs `names`.

        The columns are file, truth and class (names of the true and of the predicted class), probability_<class> ...,
        calibrated, and those of `Uncertainty`, written as by `predict`: a value that does not exist is empty, the
        classes of a prediction set are joined by "|", and a "|" in a name is preceded by a backslash.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [f"probability_{name}" for name in self.classes]
        writer.writerow(["file", "truth", "class", *columns, "calibrated", *_UNCERTAINTY])
        result = self.primary
        calibrated = _cell(np.bool_(result.calibrated), self.classes)
        for i, (name, label) in enumerate(zip(self.names, self.labels, strict=True)):
            row = result.probabilities[i]
            values = [f"{p:.6f}" for p in row]
            predicted = self.classes[int(row.argmax())]
            cells = [
                "" if column is None else _cell(column[i], self.classes)
                for column in result.uncertainty or Uncertainty()
            ]
            writer.writerow([name, self.classes[label], predicted, *values, calibrated, *cells])
        return text.getvalue()

    def save_predictions(self, path: str | Path) -> None:
        """Write `to_csv`; an interrupted write leaves no file."""
        with atomic_file(path) as file:
            file.write(self.to_csv().encode("utf-8", "surrogateescape"))

    def print(self, file: Any = None) -> None:
        """Print tables of methods and measures to `file` (default: standard output)."""
        print_evaluation(self, file)


def _cell(value: Any, classes: tuple[str, ...]) -> str:
    """A number, a flag or a set of classes [C] as text."""
    if isinstance(value, np.ndarray):
        return "|".join(classes[c].replace("|", "\\|") for c in np.flatnonzero(value))
    if isinstance(value, np.bool_):
        return "yes" if value else "no"
    return "" if np.isnan(value) else f"{value:.6g}"


def _without_nan(value: Any) -> Any:
    """The value with None for each NaN, in dicts and lists at any depth."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
