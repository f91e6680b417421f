"""Predictions as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.inference.predict import Predictions


def to_csv(predictions: Predictions) -> str:
    """A table with the columns file, label, class, probability_<class> ... and spread_<class> ..."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = [
        f"{kind}_{name}" for kind in ("probability", "spread") for name in predictions.classes
    ]
    writer.writerow(["file", "label", "class", *numbers])
    for row in predictions.rows:
        values = [f"{v:.6f}" for v in (*row.probabilities, *row.spread)]
        writer.writerow([row.file, row.label, row.name, *values])
    return text.getvalue()


def to_json(predictions: Predictions) -> str:
    """An object with `classes`, `predictions` (one record per file) and `unreadable`."""
    names = predictions.classes
    records = [
        {
            "file": row.file,
            "label": row.label,
            "class": row.name,
            "probabilities": dict(zip(names, row.probabilities, strict=True)),
            "spread": dict(zip(names, row.spread, strict=True)),
        }
        for row in predictions.rows
    ]
    failed = [{"file": file, "reason": reason} for file, reason in predictions.unreadable]
    value = {"classes": list(names), "predictions": records, "unreadable": failed}
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
