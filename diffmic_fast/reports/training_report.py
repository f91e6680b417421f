"""The report of a training run: one page of learning curves, beside the checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from diffmic_fast.inference.metrics import TITLES
from diffmic_fast.reports.evaluation_figures import Drawing, Table
from diffmic_fast.reports.html import number, percent, write_page
from diffmic_fast.reports.svg import label, new_figure, style, to_svg

PAGE = "report.html"
_SIZE = (4.6, 3.2)  # inches
_LOSSES = {
    "guidance_loss": "guidance",
    "encoder_loss": "encoder",
    "loss": "denoiser",
}
_MEASURES = ("accuracy", "macro_f1", "kappa", "balanced_accuracy", "auc_ovo", "ece")
_GUIDANCE = "guidance alone: "
_CURVES = ("accuracy", "macro_f1", "kappa")

Points = dict[str, list[tuple[int, float]]]


def write_training_report(folder: str | Path, classes: Sequence[str]) -> Path:
    """Write `report.html` from the files `log.csv` and `config.yml` of a run.

    Args:
        folder: of the run.
        classes: names of its classes.

    Returns:
        The page.

    Raises:
        OSError: a file is missing or cannot be written.
    """
    folder = Path(folder)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values: dict[str, Any] = {
        "rows": rows,
        "classes": list(classes),
        "totals": _tiles(rows),
        "table": _phases(rows),
        "drawings": _drawings(rows),
        "configuration": (folder / "config.yml").read_text("utf-8"),
    }
    write_page(folder / PAGE, "training.html", values)
    return folder / PAGE


def _epoch(row: Mapping[str, str]) -> int:
    """The number of a row's epoch from 1, as `train` prints it; `log.csv` counts from 0."""
    return int(row["epoch"]) + 1


def _points(rows: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> Points:
    """For each title of the columns `names` that have values, epochs and values."""
    found = {
        title: [(_epoch(row), float(row[name])) for row in rows if row.get(name)]
        for name, title in names.items()
    }
    return {title: points for title, points in found.items() if points}


def _tiles(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """Duration, and the last measures of the validation images."""
    seconds = sum(float(row["seconds"]) for row in rows)
    images = sum(int(row["images"]) for row in rows)
    speed = f"{images / seconds:,.1f} images per second" if seconds > 0 else ""
    tiles = [("Time of the steps", _duration(seconds), speed)]
    measured = [row for row in rows if row.get("validation_accuracy")]
    for name in _MEASURES if measured else ():
        text = measured[-1][f"validation_{name}"]
        value = float(text) if text else None
        form = percent if name in ("accuracy", "balanced_accuracy") else number
        tiles.append((f"Validation: {TITLES[name]}", form(value), f"epoch {_epoch(measured[-1])}"))
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _phases(rows: Sequence[Mapping[str, str]]) -> Table:
    """A row for each phase."""
    lines = []
    for phase, group in groupby(rows, key=lambda row: row["phase"]):
        own = list(group)
        seconds = sum(float(row["seconds"]) for row in own)
        images = sum(int(row["images"]) for row in own)
        loss = next(
            (own[-1][name] for name in ("loss", "guidance_loss", "encoder_loss") if own[-1].get(name)), ""
        )  # fmt: skip
        epochs = f"{_epoch(own[0])} to {_epoch(own[-1])}"
        speed = number(images / seconds, 1) if seconds > 0 else number(None)
        lines.append(
            [phase, epochs, number(float(loss), 4) if loss else "-", _duration(seconds), speed]
        )
    columns = ("phase", "epochs", "last loss", "time", "images per second")
    return Table("Phases of the run", columns, lines)


def _drawings(rows: Sequence[Mapping[str, str]]) -> list[Drawing]:
    """The curves that have values."""
    measures = {f"validation_{name}": TITLES[name] for name in _CURVES}
    measures |= {f"validation_guidance_{name}": f"{_GUIDANCE}{TITLES[name]}" for name in _CURVES}
    curves = (
        ("losses", "Losses of the training images", _LOSSES, "loss", True),
        ("validation", "Measures of the validation images", measures, "", False),
        ("rate", "Learning rate of the denoiser", {"learning_rate": "learning rate"}, "", False),
        ("speed", "Throughput", {"images_per_second": "images per second"}, "", False),
    )
    drawings = []
    for key, caption, names, unit, logarithmic in curves:
        points = _points(rows, names)
        if points:
            positive = all(value > 0 for line in points.values() for _, value in line)
            drawings.append(_draw(key, caption, points, unit, logarithmic and positive))
    return drawings


def _draw(key: str, caption: str, points: Points, unit: str, logarithmic: bool) -> Drawing:
    from matplotlib.ticker import MaxNLocator

    order = list(points)
    with new_figure(*_SIZE) as figure:
        axis = figure.add_subplot()
        axis.set(xlabel="epoch", ylabel=unit)
        for title, line in points.items():
            # Guidance and diffusion have the same colour for a measure.
            measure = title.removeprefix(_GUIDANCE)
            own = style(order.index(measure if measure in order else title))
            if title.startswith(_GUIDANCE):
                own["linestyle"] = ":"
            x, y = zip(*line, strict=True)
            marker = "o" if len(line) < 30 else None
            axis.plot(
                x, y, **own, linewidth=1.4, marker=marker, markersize=3,
                label=label(title, 40),
            )  # fmt: skip
        if logarithmic:
            axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(points) > 1:
            figure.legend(loc="outside lower left", ncols=2)
        svg = to_svg(figure, key, caption)
    epochs = sorted({epoch for line in points.values() for epoch, _ in line})
    columns = [dict(line) for line in points.values()]
    table = [
        [f"{epoch}", *(f"{c[epoch]:.5g}" if epoch in c else "-" for c in columns)]
        for epoch in epochs
    ]
    return Drawing(svg, caption, Table(caption, ("epoch", *points), table))
