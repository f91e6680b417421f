"""The report of `predict`: pages with the prediction of each image."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.inference.figures import make_panels
from diffmic_fast.inference.predict import Heading, PredictedBatch
from diffmic_fast.reports.cards import MAX_CLASSES, Card, CardFile, ChainPath, most_probable
from diffmic_fast.reports.html import is_own_page, shown, write_page

PAGE_IMAGES = 1000
CARDS = "cards.jsonl"
_FIRST_PAGE = "index.html"
_WIDTH, _HEIGHT, _MARGIN = 240, 96, 6  # of the plot of a path


class Bar(NamedTuple):
    """A class in the table of probabilities.

    Attributes:
        name: of the class.
        probability, spread: mean, and standard deviation over the samples.
        low, high: ends of the spread, within [0, 1].
        predicted: whether it is the predicted class.
    """

    name: str
    probability: float
    spread: float
    low: float
    high: float
    predicted: bool


class PathPlot(NamedTuple):
    """The plot of a path, in the units of an SVG picture of `_WIDTH` by `_HEIGHT`.

    Attributes:
        lines: points of the mean of each class, the predicted one first.
        band: outline of mean plus and minus deviation of the predicted class.
        zero, one: heights of these values.
        steps: of the chain.
        first, last: value of the predicted class at the ends.
    """

    lines: list[str]
    band: str
    zero: float
    one: float
    steps: int
    first: float
    last: float


class PredictionReport:
    """Collects predictions batch by batch, and writes pages of at most 1,000 images at the end.

    The cards of the images are appended to the file `cards.jsonl` of the folder, from which an interrupted run is
    continued. Neither collecting nor writing holds more than one batch of images in memory.

    Attributes:
        folder: of the pages; the first one is `index.html`.
        heading: the fields that all predictions have in common.
        preprocessing: of the images.
        settings: (name, value) pairs that the pages list, such as those of `sampling_settings`.
    """

    def __init__(
        self,
        folder: str | Path,
        heading: Heading,
        preprocessing: Preprocessing,
        settings: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.folder, self.heading = Path(folder), heading
        self.preprocessing, self.settings = preprocessing, tuple(settings)
        self._cards = CardFile(self.folder / CARDS, heading)

    def begin(self, done: Sequence[str] | None = None) -> None:
        """Prepare the folder.

        Args:
            done: files of the rows of an interrupted run, which stay in the report; None begins a new one.

        Raises:
            ValueError: the rows of `done` were written without this report, or with another model or options.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._cards.begin(done)

    def add(self, batch: PredictedBatch) -> None:
        """Add a batch, whose prediction has trajectory, saliency and boxes, of a single process."""
        cards: list[Card] = []
        if batch.images is not None and batch.prediction is not None:
            names = [path.name for path in batch.paths]
            panels = make_panels(
                batch.images, batch.prediction, names, self.preprocessing, [None] * len(names)
            )
            cards = [
                Card.from_panel(row, panel) for row, panel in zip(batch.rows, panels, strict=True)
            ]
        cards += [Card(file, reason or "unreadable") for file, reason in batch.unreadable]
        self._cards.add(cards)

    def finish(self) -> Path:
        """Write the pages, remove those of an earlier, longer report, and return the first one."""
        summary = self._summary()
        pages = summary["pages"]
        for number, page in enumerate(pages):
            first = number * PAGE_IMAGES
            values = {
                **summary,
                "page": number,
                "first": first + 1,
                "last": min(first + PAGE_IMAGES, len(self._cards)),
                "cards": self._views(first),
            }
            write_page(self.folder / page, "predictions.html", values)
        remove_files(_pages(self.folder), *(self.folder / page for page in pages))
        return self.folder / _FIRST_PAGE

    def close(self) -> None:
        """Close the file of the cards; a later run can continue it."""
        self._cards.close()

    def _summary(self) -> dict[str, Any]:
        """Values of the template that all pages share; reads the cards once."""
        labels: Counter[int] = Counter()
        unreadable = flagged = undecided = 0
        has_novelty = False
        for card in self._cards.cards():
            if card.row is None:
                unreadable += 1
                continue
            labels[card.row.label] += 1
            flagged += bool(card.row.flagged)
            has_novelty |= card.row.novelty is not None
            undecided += card.row.prediction_set is not None and len(card.row.prediction_set) > 1
        count = -(-len(self._cards) // PAGE_IMAGES) or 1
        names = self.heading.classes
        return {
            "heading": self.heading,
            "settings": self.settings,
            "total": len(self._cards),
            "readable": len(self._cards) - unreadable,
            "unreadable": unreadable,
            "flagged": flagged if has_novelty else None,
            "undecided": None if self.heading.obstacle else undecided,
            "counts": [(name, labels[c]) for c, name in enumerate(names)],
            "pages": [_FIRST_PAGE, *(f"page-{n:04d}.html" for n in range(2, count + 1))],
            "plot": {"width": _WIDTH, "height": _HEIGHT},
            "max_classes": MAX_CLASSES,
        }

    def _views(self, first: int) -> Iterator[dict[str, Any]]:
        """Values of the template for each card of a page."""
        for number, card in enumerate(self._cards.cards(first, first + PAGE_IMAGES), first + 1):
            path = Path(card.file)
            view: dict[str, Any] = {
                "number": number,
                "card": card,
                "name": shown(path.name),
                "folder": shown(str(path.parent)),
                "row": card.row,
            }
            if card.row is not None:
                view |= {
                    "bars": _bars(card, self.heading.classes),
                    "hidden": max(len(self.heading.classes) - MAX_CLASSES, 0),
                    "plot": None if card.path is None else _plot(card.path),
                }
            yield view


def check_folder(folder: str | Path) -> list[Path]:
    """Make the folder of a report, before the work whose results it will hold.

    Returns:
        The files of an earlier report, which the new one replaces or continues.

    Raises:
        ValueError: an `index.html` in it is not of a report.
        OSError: it cannot be made, or is a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / _FIRST_PAGE
    if first.exists() and not is_own_page(first):
        raise ValueError(
            f"--report: {folder} must not contain an index.html that is not of a report; name another folder"
        )
    cards = folder / CARDS
    return [*([cards] if cards.exists() else []), *_pages(folder)]


def remove_files(files: Sequence[Path], *written: Path) -> None:
    """Remove the files of an earlier report, except those that were written anew."""
    for path in files:
        if path not in written:
            path.unlink()


def print_if_replaced(folder: str | Path) -> None:
    """Print to standard error that an earlier report is replaced, if there is one."""
    if (Path(folder) / _FIRST_PAGE).exists():
        print(f"the earlier report in {folder} is replaced", file=sys.stderr)


def _pages(folder: Path) -> list[Path]:
    """The pages of a report that a folder has."""
    found = sorted(folder.glob("page-[0-9][0-9][0-9][0-9]*.html"))
    first = folder / _FIRST_PAGE
    return [path for path in (first, *found) if path.is_file() and is_own_page(path)]


def _bars(card: Card, classes: Sequence[str]) -> list[Bar]:
    """The most probable classes, in the order of the model."""
    assert card.row is not None
    row = card.row
    bars = []
    for c in sorted(most_probable(row.probabilities)):
        p, s = row.probabilities[c], row.spread[c]
        bars.append(Bar(classes[c], p, s, max(p - s, 0.0), min(p + s, 1.0), c == row.label))
    return bars


def _plot(path: ChainPath) -> PathPlot:
    """The plot of a path, scaled to its smallest and largest value and to 0 and 1."""
    mean, deviation = np.array(path.mean), np.array(path.deviation)
    low = min(0.0, float(mean.min()), float((mean[0] - deviation).min()))
    high = max(1.0, float(mean.max()), float((mean[0] + deviation).max()))
    scale = (_HEIGHT - 2 * _MARGIN) / (high - low)
    x = np.linspace(0, _WIDTH, mean.shape[1])

    def heights(values: Any) -> Any:
        return _HEIGHT - _MARGIN - (values - low) * scale

    above, below = heights(mean[0] + deviation), heights(mean[0] - deviation)
    return PathPlot(
        lines=[_points(x, heights(values)) for values in mean],
        band=_points(np.concatenate([x, x[::-1]]), np.concatenate([above, below[::-1]])),
        zero=round(float(heights(0.0)), 1),
        one=round(float(heights(1.0)), 1),
        steps=path.steps,
        first=float(mean[0, 0]),
        last=float(mean[0, -1]),
    )


def _points(x: Any, y: Any) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
