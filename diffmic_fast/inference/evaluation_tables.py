"""An evaluation as tables of text, at most 140 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffmic_fast._optional import require
from diffmic_fast.inference.bootstrap import LEVEL, MEASURES, Interval
from diffmic_fast.inference.comparison import MEASURES as COMPARED
from diffmic_fast.inference.comparison import Difference
from diffmic_fast.inference.metrics import NAMES, TITLES
from diffmic_fast.inference.report import SET_COVERAGE
from diffmic_fast.inference.results import Result

if TYPE_CHECKING:
    from diffmic_fast.inference.evaluation import Evaluation

_WIDTH = 140
_UNDEFINED = "-"


def print_evaluation(evaluation: Evaluation, file: Any = None) -> None:
    """Print the measures, their uncertainty, the comparison with the guidance, and the prediction sets.

    Args:
        evaluation: what to print.
        file: a text file (default: standard output).
    """
    require("rich", extra="evaluate", purpose="printing an evaluation")
    from rich.console import Console

    console = Console(file=file)
    if not console.is_terminal:  # rich would assume 80 columns and fold the cells
        console = Console(file=file, width=_WIDTH)
    results = evaluation.results
    console.print(_measures(evaluation))
    reasons = {f"{TITLES[k]}: {v}" for r in results for k, v in r.metrics.notes.items()}
    for reason in sorted(reasons):
        console.print(f"{_UNDEFINED} = not defined, {reason}", markup=False)
    console.print(_uncertainty(evaluation))
    if any(r.comparison for r in results):
        console.print(_comparisons(results))
    if any(r.report.sets for r in results):
        console.print(_sets(evaluation))
    if evaluation.calibration is not None:
        console.print(f"calibration: {evaluation.calibration}", markup=False)
    for reason in evaluation.not_calibrated:
        console.print(f"not calibrated: {reason}", markup=False)


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _measures(evaluation: Evaluation) -> Any:
    """The measures of every method, and its time."""
    images, classes = len(evaluation.labels), len(evaluation.classes)
    columns = [*(TITLES[name] for name in NAMES), "ms / image"]
    table = _table(f"{images} images, {classes} classes", columns)
    for r in evaluation.results:
        cells = [_number(getattr(r.metrics, name), 4) for name in NAMES]
        table.add_row(r.method, *cells, f"{1000 * r.seconds_per_image:.2f}")
    return table


def _uncertainty(evaluation: Evaluation) -> Any:
    """Bootstrap intervals, and how well the probabilities fit."""
    count = evaluation.bootstrap
    title = "probabilities"
    if count:
        title = f"uncertainty: {100 * LEVEL:g} % intervals of {count} bootstrap resamples, and probabilities"
    named = [TITLES[name].replace(" ", "\n", 1) for name in MEASURES] if count else []
    table = _table(title, [*named, "log\nloss", "Brier\nscore", "AURC"])
    for r in evaluation.results:
        intervals = [_interval(r.intervals[name]) for name in MEASURES] if count else []
        numbers = (r.metrics.nll, r.metrics.brier, r.report.risk.area)
        table.add_row(r.method, *intervals, *(_number(n, 3) for n in numbers))
    return table


def _comparisons(results: Sequence[Result]) -> Any:
    """Every sampler against the guidance alone."""
    columns = ["right alone,\nit : guidance", "McNemar\np"]
    title = "difference from the guidance alone, paired by image"
    table = _table(title, [*columns, *(TITLES[name] for name in COMPARED)])
    for r in results:
        if r.comparison is None:
            continue
        test = r.comparison.mcnemar
        cells = [f"{test.only_first} : {test.only_second}", f"{test.p_value:.2g}"]
        cells += [_difference(r.comparison.differences[name]) for name in COMPARED]
        table.add_row(r.method, *cells)
    return table


def _sets(evaluation: Evaluation) -> Any:
    """Prediction sets and flagged images."""
    columns = [
        "share with\nthe true class",
        "mean size",
        "lowest share\nof a class",
        "flagged\nimages",
    ]
    table = _table(f"prediction sets for a coverage of {SET_COVERAGE:.0%}", columns)
    for r in evaluation.results:
        if r.report.sets is None:
            continue
        overall, *each = r.report.sets
        shares = [
            (s.coverage, n) for s, n in zip(each, evaluation.classes, strict=True) if s.images
        ]
        share, name = min(shares)
        flagged = math.nan if r.report.flagged is None else r.report.flagged
        cells = [_number(overall.coverage, 3), _number(overall.size, 2)]
        table.add_row(r.method, *cells, f"{share:.3f} ({name})", _number(flagged, 3))
    return table


def _number(value: float, digits: int) -> str:
    return _UNDEFINED if math.isnan(value) else f"{value:.{digits}f}"


def _interval(interval: Interval) -> str:
    if interval.resamples == 0:
        return _UNDEFINED
    return f"{interval.low:.3f}…{interval.high:.3f}"


def _difference(difference: Difference) -> str:
    if math.isnan(difference.value):
        return _UNDEFINED
    text = f"{difference.value:+.3f}"
    if difference.interval is not None and difference.interval.resamples:
        text += f" ({difference.interval.low:.3f}, {difference.interval.high:.3f})"
    return text
