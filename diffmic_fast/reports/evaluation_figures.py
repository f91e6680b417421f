"""Figures of an evaluation, each with a table of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmic_fast._optional import require
from diffmic_fast.inference.evaluation import Evaluation
from diffmic_fast.inference.metrics import normalised
from diffmic_fast.inference.report import COVERAGES
from diffmic_fast.inference.results import GUIDANCE, Result
from diffmic_fast.reports.html import number, percent
from diffmic_fast.reports.svg import INK, MUTED, SERIES, label, new_figure, style, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (4.6, 3.5)  # inches
_MAX_POINTS = 400  # of a line


class Table(NamedTuple):
    """A table of numbers: its columns, the first of which names the row, and rows of text."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Drawing(NamedTuple):
    """A figure as an SVG element, what it shows, and its numbers."""

    svg: str
    caption: str
    table: Table


def draw_curves(result: Result, evaluation: Evaluation) -> list[Drawing]:
    """ROC and precision-recall curves of each class against the others; none for classes without both."""
    metrics = require("sklearn.metrics", extra="report", purpose="writing a report")
    p, labels = normalised(result.probabilities), evaluation.labels
    rows, roc, recall = [], [], []
    for c, name in enumerate(evaluation.classes):
        truth = labels == c
        if truth.all() or not truth.any():
            rows.append([name, f"{truth.sum():,}", number(None), number(None)])
            continue
        area = float(metrics.roc_auc_score(truth, p[:, c]))
        average = float(metrics.average_precision_score(truth, p[:, c]))
        false, true, _ = metrics.roc_curve(truth, p[:, c])
        precision, found, _ = metrics.precision_recall_curve(truth, p[:, c])
        roc.append((c, false, true))
        recall.append((c, found, precision))
        rows.append([name, f"{truth.sum():,}", number(area), number(average)])
    columns = ("class", "images", "area under ROC", "average precision")
    table = Table("One class against the others", columns, rows)
    drawings = []
    for key, caption, axes, lines in (
        ("roc", "ROC of each class against the others", ("false positives", "sensitivity"), roc),
        ("pr", "Precision and recall of each class", ("recall", "precision"), recall),
    ):
        with new_figure(*_SIZE) as figure:
            axis = _axis(figure, *axes)
            if key == "roc":
                axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
            for c, x, y in lines:
                axis.plot(
                    *_thinned(x, y), **style(c), linewidth=1.5, label=label(evaluation.classes[c]),
                    drawstyle="default" if key == "roc" else "steps-post",
                )  # fmt: skip
            _legend(figure, len(lines))
            drawings.append(Drawing(to_svg(figure, key, caption), caption, table))
    return drawings


def draw_reliability(result: Result, key: str, caption: str) -> Drawing:
    """Accuracy against confidence in bins, above the number of images in each."""
    groups = [group for group in result.report.table if group.images]
    with new_figure(*_SIZE) as figure:
        axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        axis.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        x = [group.confidence for group in groups]
        axis.plot(
            x,
            [group.accuracy for group in groups],
            color=SERIES[0],
            marker="o",
            markersize=5,
            clip_on=False,
        )
        count = len(result.report.table)
        below.bar(
            (np.arange(count) + 0.5) / count,
            [group.images for group in result.report.table],
            width=0.85 / count, color=SERIES[0],
        )  # fmt: skip
        below.set(xlabel="confidence", ylabel="images")
        svg = to_svg(figure, key, caption)
    rows = [[g.name, f"{g.images:,}", percent(g.accuracy), percent(g.confidence)] for g in groups]
    columns = ("confidence", "images", "accuracy", "mean confidence")
    return Drawing(svg, caption, Table(caption, columns, rows))


def draw_risk(results: Sequence[Result]) -> Drawing:
    """Error rate among the most confident images, of each method."""
    caption = "Error rate among the most confident images"
    with new_figure(*_SIZE) as figure:
        axis = _axis(figure, "coverage: share of the images", "error rate", limits=False)
        for i, result in enumerate(results):
            risk = result.report.risk
            axis.plot(
                *_thinned(risk.coverage, risk.risk), **style(i), linewidth=1.5,
                label=label(result.method, 40),
            )  # fmt: skip
        axis.set(xlim=(0, 1), ylim=(0, None))
        _legend(figure, len(results), columns=1)
        svg = to_svg(figure, "risk", caption)
    columns = ("method", *(percent(c, 0) for c in COVERAGES), "mean (AURC)")
    rows = [
        [r.method, *(percent(r.report.risk.at(c)) for c in COVERAGES), number(r.report.risk.area)]
        for r in results
    ]
    return Drawing(svg, caption, Table("Error rate by coverage", columns, rows))


def draw_samples(evaluation: Evaluation) -> Drawing | None:
    """Accuracy by the first samples alone, with published probabilities; None for a single sample."""
    found = [
        (r.method, (r.labels_by_samples == evaluation.labels[:, None]).mean(axis=0))
        for r in evaluation.results
        if r.labels_by_samples is not None and r.labels_by_samples.shape[1] > 1
    ]
    if not found:
        return None
    caption = "Accuracy by the number of samples per image (published probabilities)"
    shares = [accuracy for _, accuracy in found]
    count = len(shares[0])
    chosen = sorted({1, count} | {2**i for i in range(14) if 2**i <= count})
    with new_figure(*_SIZE) as figure:
        axis = _axis(figure, "samples", "accuracy", limits=False)
        for i, (method, accuracy) in enumerate(found):
            line = _thinned(np.arange(1, count + 1), accuracy)
            axis.plot(*line, **style(i + 1), linewidth=1.5, label=label(method, 40))
        guidance = evaluation.results[0].metrics.accuracy
        axis.axhline(guidance, color=INK, linewidth=0.9, linestyle=":", label=GUIDANCE)
        axis.set_xscale("log", base=2)
        axis.set_xticks(chosen, [f"{n}" for n in chosen])
        axis.minorticks_off()
        _legend(figure, len(found) + 1, columns=1)
        svg = to_svg(figure, "samples", caption)
    rows = [[method, *(percent(a[n - 1]) for n in chosen)] for method, a in found]
    return Drawing(svg, caption, Table(caption, ("method", *(f"{n:,}" for n in chosen)), rows))


def draw_steps(points: Sequence[tuple[str, int, Result]]) -> Drawing | None:
    """Accuracy against the number of steps, with intervals; None if all samplers have the same number.

    Args:
        points: sampler, steps and result of each method.
    """
    if len({steps for _, steps, _ in points}) < 2:
        return None
    caption = "Accuracy by the number of steps"
    with new_figure(*_SIZE) as figure:
        axis = _axis(figure, "steps", "accuracy", limits=False)
        for i, sampler in enumerate(dict.fromkeys(name for name, _, _ in points)):
            own = sorted(((s, r) for n, s, r in points if n == sampler), key=lambda one: one[0])
            x, y = [s for s, _ in own], [r.metrics.accuracy for _, r in own]
            ranges = [r.intervals.get("accuracy") for _, r in own]
            low = [v - (e.low if e else v) for v, e in zip(y, ranges, strict=True)]
            high = [(e.high if e else v) - v for v, e in zip(y, ranges, strict=True)]
            error = np.maximum([low, high], 0.0)
            axis.errorbar(
                x, y, error, **style(i + 1), marker="o", markersize=4, capsize=3, linewidth=1.4,
                elinewidth=0.9, label=label(sampler),
            )  # fmt: skip
        axis.set_xscale("log")
        ticks = sorted({steps for _, steps, _ in points})
        axis.set_xticks(ticks, [f"{steps:,}" for steps in ticks])
        axis.minorticks_off()
        _legend(figure, len(points))
        svg = to_svg(figure, "steps", caption)
    rows = [
        [result.method, f"{steps:,}", percent(result.metrics.accuracy)]
        for _, steps, result in points
    ]
    return Drawing(svg, caption, Table(caption, ("method", "steps", "accuracy"), rows))


def _axis(figure: Figure, x: str, y: str, *, limits: bool = True) -> Any:
    axis: Any = figure.add_subplot()
    axis.set(xlabel=x, ylabel=y)
    if limits:
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    return axis


def _legend(figure: Figure, count: int, columns: int = 3) -> None:
    if count:
        figure.legend(loc="outside lower left", ncols=min(columns, count))


def _thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most `_MAX_POINTS` points of a line, the ends included."""
    if len(x) <= _MAX_POINTS:
        return x, y
    few = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(int))
    return x[few], y[few]
