"""The report of `evaluate`: one page of measures, curves and mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.decode import load_image
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.bootstrap import LEVEL, MEASURES
from diffmic_fast.inference.comparison import MEASURES as COMPARED
from diffmic_fast.inference.evaluation import Evaluation
from diffmic_fast.inference.metrics import NAMES, TITLES
from diffmic_fast.inference.report import SET_COVERAGE
from diffmic_fast.inference.results import CALIBRATED, Result
from diffmic_fast.reports.evaluation_figures import (
    Drawing,
    Table,
    draw_curves,
    draw_reliability,
    draw_risk,
    draw_samples,
    draw_steps,
)
from diffmic_fast.reports.html import number, percent, shown, write_page
from diffmic_fast.reports.thumbnails import thumbnail

MISTAKES = 20
_PAGE = "index.html"
_SHADES = 10
_SHARES = ("accuracy", "balanced_accuracy")  # written in per cent


class Mistake(NamedTuple):
    """An image with a wrong label.

    Attributes:
        name: of the image.
        picture: as the model saw it, a data URI.
        predicted, truth: names of the classes.
        confidence, of_truth: probabilities of these.
    """

    name: str
    picture: str
    predicted: str
    truth: str
    confidence: float
    of_truth: float


class Cell(NamedTuple):
    """A cell of the confusion matrix: images, their share of the row, shade from 0, whether it is on the diagonal."""

    images: int
    share: float
    shade: int
    right: bool


def write_evaluation_report(
    folder: str | Path,
    evaluation: Evaluation,
    dataset: ImageDataset,
    methods: Sequence[SamplingOptions],
    *,
    timesteps: int,
    split: str,
    settings: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the page, `index.html`.

    Args:
        folder: of the page; made if it is missing.
        evaluation: of `dataset` by `methods`.
        dataset: the images, of which the most confident mistakes are read again.
        methods: the samplers.
        timesteps: of the model's schedule.
        split: name of the images' split.
        settings: (name, value) pairs that the page lists, such as those of `sampling_settings`.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = evaluation.primary
    counts = np.bincount(evaluation.labels, minlength=len(evaluation.classes))
    values: dict[str, Any] = {
        "evaluation": evaluation,
        "result": result,
        "split": split,
        "settings": settings,
        "level": percent(LEVEL, 0),
        "coverage": percent(SET_COVERAGE, 0),
        "counts": list(zip(evaluation.classes, counts.tolist(), strict=True)),
        "primary": _tiles(result),
        "measures": _measures(evaluation),
        "probabilities": _probabilities(evaluation),
        "notes": sorted({f"{TITLES[k]}: {v}" for r in evaluation.results for k, v in r.metrics.notes.items()}),
        "comparisons": _comparisons(evaluation),
        "confusion": _confusion(result),
        "curves": draw_curves(result, evaluation),
        "reliability": _reliability(evaluation),
        "confidence": _confidence(result),
        "risk": draw_risk([r for r in evaluation.results if r.calibrated == result.calibrated]),
        "samples": draw_samples(evaluation),
        "steps": draw_steps(_steps(evaluation, methods, timesteps)),
        "sets": _sets(evaluation),
        "mistakes": find_mistakes(evaluation, dataset),
        "wrong": int((result.probabilities.argmax(axis=1) != evaluation.labels).sum()),
    }  # fmt: skip
    write_page(folder / _PAGE, "evaluation.html", values)
    return folder / _PAGE


def find_mistakes(evaluation: Evaluation, dataset: ImageDataset) -> list[Mistake]:
    """The at most `MISTAKES` images with the most probable wrong labels, by `Evaluation.primary`."""
    p, labels = evaluation.primary.probabilities, evaluation.labels
    predicted = p.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-p[wrong, predicted[wrong]], kind="stable")][:MISTAKES]
    classes, transform = evaluation.classes, dataset.transform
    mistakes = []
    for i in order.tolist():
        entry = dataset.table.entries[i]
        pixels = transform.prepare(load_image(entry.source, bit_depth=transform.bit_depth))
        own, truth = int(predicted[i]), int(labels[i])
        mistakes.append(
            Mistake(
                shown(entry.name),
                thumbnail(pixels.permute(1, 2, 0).numpy()),
                classes[own],
                classes[truth],
                float(p[i, own]),
                float(p[i, truth]),
            )
        )
    return mistakes


def _value(name: str, value: float) -> str:
    return percent(value) if name in _SHARES else number(value)


def _tiles(result: Result) -> list[tuple[str, str, str]]:
    """(title, value, interval) of the measures at the top."""
    tiles = []
    for name in NAMES:
        interval = result.intervals.get(name)
        text = ""
        if interval is not None and interval.resamples:
            text = f"{_value(name, interval.low)} to {_value(name, interval.high)}"
        tiles.append((TITLES[name], _value(name, getattr(result.metrics, name)), text))
    return tiles


def _measures(evaluation: Evaluation) -> Table:
    """The measures of the labels of all methods, an interval below each."""
    rows = []
    for r in evaluation.results:
        cells = []
        for name in MEASURES:
            text = _value(name, getattr(r.metrics, name))
            interval = r.intervals.get(name)
            if interval is not None and interval.resamples:
                text += f"\n{_value(name, interval.low)} to {_value(name, interval.high)}"
            cells.append(text)
        rows.append([r.method, *cells])
    return Table("Labels of each method", ("method", *(TITLES[name] for name in MEASURES)), rows)


def _probabilities(evaluation: Evaluation) -> Table:
    """How well the probabilities of all methods fit, and the time that they take."""
    rows = []
    for r in evaluation.results:
        m, seconds = r.metrics, r.seconds_per_image
        fit = [number(value) for value in (m.ece, m.nll, m.brier, r.report.risk.area)]
        speed = number(1 / seconds, 1) if seconds > 0 else number(None)
        rows.append([r.method, *fit, number(1000 * seconds, 1), speed])
    columns = ("calibration error", "log loss", "Brier score", "AURC", "ms per image")
    caption = "Probabilities and speed of each method"
    return Table(caption, ("method", *columns, "images per second"), rows)


def _comparisons(evaluation: Evaluation) -> Table | None:
    """Every sampler against the guidance alone, paired by image."""
    rows = []
    for r in evaluation.results:
        if r.comparison is None:
            continue
        test = r.comparison.mcnemar
        cells = []
        for name in COMPARED:
            difference = r.comparison.differences[name]
            text = "-" if np.isnan(difference.value) else f"{difference.value:+.3f}"
            interval = difference.interval
            if interval is not None and interval.resamples:
                text += f"\n{interval.low:+.3f} to {interval.high:+.3f}"
            cells.append(text)
        rows.append(
            [r.method, f"{test.only_first:,}", f"{test.only_second:,}", f"{test.p_value:.2g}", *cells]
        )  # fmt: skip
    if not rows:
        return None
    right = ("only this right", "only guidance right", "McNemar's exact p")
    return Table(
        "Difference from the guidance alone, paired by image",
        ("method", *right, *(TITLES[name] for name in COMPARED)),
        rows,
    )


def _confusion(result: Result) -> list[list[Cell]]:
    """Rows of true classes, columns of predicted ones."""
    counts = result.metrics.confusion
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shades = np.minimum((share * _SHADES).astype(int), _SHADES - 1)
    return [
        [
            Cell(int(counts[i, j]), float(share[i, j]), int(shades[i, j]), i == j)
            for j in range(len(counts))
        ]
        for i in range(len(counts))
    ]


def _reliability(evaluation: Evaluation) -> list[Drawing]:
    """The published and, where there are any, the calibrated probabilities of the first sampler."""
    method = evaluation.primary.method.removesuffix(CALIBRATED)
    found = [r for r in evaluation.results if r.method in (method, method + CALIBRATED)]
    names = ("before", "after") if len(found) > 1 else ("published",)
    captions = {
        "before": "Before calibration",
        "after": "After calibration",
        "published": "Published probabilities, not calibrated",
    }
    return [
        draw_reliability(
            r, f"reliability-{key}", f"{captions[key]}: calibration error {number(r.metrics.ece)}"
        )
        for key, r in zip(names, found, strict=True)
    ]


def _confidence(result: Result) -> list[Table]:
    """Accuracy in groups of images by confidence, interval width, t-test and agreement of the samples."""
    titles = {
        "confidence": "by probability",
        "interval_width": "by interval width",
        "t_test": "by paired t-test",
        "agreement": "by the share of samples that agree",
    }
    columns = ("group", "images", "accuracy", "mean confidence")
    return [
        Table(
            f"Accuracy {titles[name]}",
            columns,
            [[g.name, f"{g.images:,}", percent(g.accuracy), percent(g.confidence)] for g in groups],
        )
        for name, groups in result.report.groups.items()
    ]


def _steps(
    evaluation: Evaluation, methods: Sequence[SamplingOptions], timesteps: int
) -> list[tuple[str, int, Result]]:
    """Sampler, steps and published result of each method."""
    results = {r.method: r for r in evaluation.results}
    points = []
    for method in methods:
        sampler = f"{method.sampler} eta {method.eta:g}" if method.eta else method.sampler
        points.append((sampler, method.steps or timesteps, results[method.method]))
    return points


def _sets(evaluation: Evaluation) -> Table | None:
    """Prediction sets of the first sampler: all images and each class."""
    sets = evaluation.primary.report.sets
    if sets is None:
        return None
    rows = [
        [name, f"{s.images:,}", percent(s.coverage), number(s.size, 2), f"{s.empty:,}"]
        for name, s in zip(("all", *evaluation.classes), sets, strict=True)
    ]
    columns = ("true class", "images", "sets with the true class", "mean size", "empty sets")
    return Table("Prediction sets", columns, rows)
