"""Predictions as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.inference.predict import Predictions, Row

# After the columns of the classes, whose names begin with "probability_" and "spread_".
_CONFIDENCE = (
    "calibrated", "guidance_class", "guidance_probability", "interval_width", "t_test_p", "agreement",
    "prediction_set", "novelty", "flagged",
)  # fmt: skip


def to_csv(predictions: Predictions) -> str:
    """A table with a row per file.

    The columns are file, label, class, probability_<class> ..., spread_<class> ..., and those of the confidence
    (docs/usage.md, "Evaluation and prediction"). A field that is not defined is empty. The classes of a prediction set
    are joined by "|"; a "|" in a name is preceded by a backslash.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = [
        f"{kind}_{name}" for kind in ("probability", "spread") for name in predictions.classes
    ]
    writer.writerow(["file", "label", "class", *numbers, *_CONFIDENCE])
    for row in predictions.rows:
        values = [f"{v:.6f}" for v in (*row.probabilities, *row.spread)]
        confidence = map(_cell, _confidence(row).values())
        writer.writerow([row.file, row.label, row.name, *values, *confidence])
    return text.getvalue()


def _confidence(row: Row) -> dict[str, Any]:
    """The values of _CONFIDENCE."""
    values = (
        row.calibrated, row.guidance_name, row.guidance_probability, row.interval_width, row.p_value, row.agreement,
        None if row.prediction_set is None else list(row.prediction_set), row.novelty, row.flagged,
    )  # fmt: skip
    return dict(zip(_CONFIDENCE, values, strict=True))


def _cell(value: Any) -> str:
    """A value of the confidence as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "|".join(name.replace("|", "\\|") for name in value)
    return value if isinstance(value, str) else f"{value:.6g}"


def to_json(predictions: Predictions) -> str:
    """An object with `classes`, `not_calibrated`, `coverage`, `predictions` (one record per file) and `unreadable`.

    `not_calibrated` is the reason why the probabilities are not calibrated, or null; `coverage` is that of the
    prediction sets. A field that is not defined is null.
    """
    names = predictions.classes
    records = [
        {
            "file": row.file,
            "label": row.label,
            "class": row.name,
            "probabilities": dict(zip(names, row.probabilities, strict=True)),
            "spread": dict(zip(names, row.spread, strict=True)),
            **_confidence(row),
        }
        for row in predictions.rows
    ]
    failed = [{"file": file, "reason": reason} for file, reason in predictions.unreadable]
    value = {
        "classes": list(names),
        "not_calibrated": predictions.obstacle,
        "coverage": predictions.coverage,
        "predictions": records,
        "unreadable": failed,
    }
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_WRITERS = {".csv": to_csv, ".json": to_json}


def check_suffix(path: str | Path) -> str:
    """The suffix of an output file in lower case; raises a ValueError unless it is .csv or .json."""
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(f"predict: the output must end in .csv or .json, got {str(path)!r}")
    return suffix


def save(predictions: Predictions, path: str | Path) -> None:
    """Write CSV or JSON by the suffix of `path`; an interrupted write leaves no file."""
    text = _WRITERS[check_suffix(path)](predictions)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
