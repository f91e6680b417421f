"""Predictions as CSV and JSON: the text of a heading, of each row and of the end."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.inference.predict import Heading, Predictions, Row

# After the columns of the classes, whose names begin with "probability_" and "spread_".
_CONFIDENCE = (
    "calibrated", "guidance_class", "guidance_probability", "interval_width", "t_test_p", "agreement",
    "prediction_set", "novelty", "flagged",
)  # fmt: skip


class Format(Protocol):
    """How predictions are written, a row at a time."""

    def begin(self, heading: Heading) -> str:
        """What comes before the rows."""
        ...

    def row(self, heading: Heading, row: Row, *, first: bool) -> str:
        """A row; `first` if no other is before it."""
        ...

    def end(self, unreadable: Sequence[tuple[str, str]], *, empty: bool) -> str:
        """What comes after the rows; `empty` if there are none."""
        ...


class Csv:
    """A table with a row per file.

    The columns are file, label, class, probability_<class> ..., spread_<class> ..., those of the confidence
    (docs/usage.md, "Evaluation and prediction"), version and digest. A field that is not defined is empty. The classes
    of a prediction set are joined by "|"; a "|" or a backslash in a name is preceded by a backslash.
    """

    def begin(self, heading: Heading) -> str:
        """The names of the columns."""
        kinds = ("probability", "spread")
        numbers = [f"{kind}_{name}" for kind in kinds for name in heading.classes]
        return _line(["file", "label", "class", *numbers, *_CONFIDENCE, "version", "digest"])

    def row(self, heading: Heading, row: Row, *, first: bool) -> str:
        """A record."""
        values = [f"{v:.6f}" for v in (*row.probabilities, *row.spread)]
        confidence = map(_cell, _confidence(row).values())
        made = row.version, heading.digest
        return _line([row.file, str(row.label), row.name, *values, *confidence, *made])

    def end(self, unreadable: Sequence[tuple[str, str]], *, empty: bool) -> str:
        """Nothing: unreadable files are not in the table."""
        return ""


class Json:
    """An object with `classes`, `not_calibrated`, `coverage`, `digest`, `predictions` and `unreadable`.

    `not_calibrated` is the reason why the probabilities are not calibrated, or null; `coverage` is that of the
    prediction sets. `predictions` has a record per file, each on a line of its own. A field that is not defined
    is null.
    """

    def begin(self, heading: Heading) -> str:
        """Up to the list of predictions."""
        entries = {
            "classes": list(heading.classes),
            "not_calibrated": heading.obstacle,
            "coverage": heading.coverage,
            "digest": heading.digest,
        }
        lines = [f'  "{name}": {_json(value)},\n' for name, value in entries.items()]
        return "{\n" + "".join(lines) + '  "predictions": ['

    def row(self, heading: Heading, row: Row, *, first: bool) -> str:
        """A record, after a comma if it is not the first."""
        names = heading.classes
        record = {
            "file": row.file,
            "label": row.label,
            "class": row.name,
            "probabilities": dict(zip(names, row.probabilities, strict=True)),
            "spread": dict(zip(names, row.spread, strict=True)),
            **_confidence(row),
            "version": row.version,
        }
        return f"{'' if first else ','}\n    {_json(record)}"

    def end(self, unreadable: Sequence[tuple[str, str]], *, empty: bool) -> str:
        """The unreadable files."""
        records = [_json({"file": file, "reason": reason}) for file, reason in unreadable]
        listed = ",".join(f"\n    {record}" for record in records)
        rows_close, close = ("" if is_empty else "\n  " for is_empty in (empty, not records))
        return f'{rows_close}],\n  "unreadable": [{listed}{close}]\n}}\n'


FORMATS: dict[str, Format] = {".csv": Csv(), ".json": Json()}


def _line(fields: Sequence[str]) -> str:
    """A record of a CSV file."""
    text = io.StringIO()
    # The writer quotes fields with a character of its line terminator: a name may have either.
    csv.writer(text, lineterminator="\r\n").writerow(fields)
    return text.getvalue()[:-2] + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


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
        return "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in value)
    return value if isinstance(value, str) else f"{value:.6g}"


def check_suffix(path: str | Path) -> str:
    """The suffix of an output file in lower case; raises a ValueError unless it is .csv or .json."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"predict: the output must end in .csv or .json, got {str(path)!r}")
    return suffix


def encode(text: str) -> bytes:
    """UTF-8; bytes of a file name that are not UTF-8 stay as they are."""
    return text.encode("utf-8", "surrogateescape")


def save(predictions: Predictions, path: str | Path) -> None:
    """Write CSV or JSON by the suffix of `path`; an interrupted write leaves no file."""
    form, heading = FORMATS[check_suffix(path)], predictions.heading
    with atomic_file(path) as file:
        file.write(encode(form.begin(heading)))
        for number, row in enumerate(predictions.rows):
            file.write(encode(form.row(heading, row, first=number == 0)))
        file.write(encode(form.end(predictions.unreadable, empty=not predictions.rows)))
