"""Cards: the content of a report for each image, in a file from which pages are written and a run is resumed."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffmic_fast.data.files import file_version
from diffmic_fast.inference.figures import Panel
from diffmic_fast.inference.predict import Heading, Row
from diffmic_fast.inference.row_file import lock_file
from diffmic_fast.reports.thumbnails import heat_map, thumbnail

MAX_POINTS = 33  # of a path
MAX_CLASSES = 7  # of bars and paths; the others are counted
_FORMAT = 1


@dataclass(frozen=True)
class ChainPath:
    """The label vector along the chain.

    Attributes:
        steps: number of steps of the chain.
        mean: for each of at most `MAX_CLASSES` classes, the mean over the samples at at most `MAX_POINTS` steps, evenly
            spaced; the predicted class first, then by probability.
        deviation: the standard deviation over the samples of the predicted class.
    """

    steps: int
    mean: list[list[float]]
    deviation: list[float]


@dataclass(frozen=True)
class Card:
    """One image of a report.

    Attributes:
        file: its path.
        reason: why it was not read, empty if it was; then it has a `row` and all that follows.
        row: its prediction.
        width, height: of the image as the model saw it, in pixels.
        picture, heat: thumbnail and saliency as data URIs.
        boxes: patches in pixels: top, left, bottom, right.
        path: of the label.
    """

    file: str
    reason: str = ""
    row: Row | None = None
    width: int = 0
    height: int = 0
    picture: str = ""
    heat: str = ""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    path: ChainPath | None = None

    @classmethod
    def from_panel(cls, row: Row, panel: Panel) -> Card:
        """The card of a prediction."""
        height, width = panel.image.shape[:2]
        return cls(
            file=row.file,
            row=row,
            width=width,
            height=height,
            picture=thumbnail(panel.image),
            heat=heat_map(panel.saliency),
            boxes=tuple(tuple(box) for box in panel.boxes.tolist()),
            path=_path(panel),
        )

    @classmethod
    def from_json(cls, text: bytes) -> Card:
        """The card of `to_json`."""
        value: dict[str, Any] = json.loads(text)
        if value["row"] is not None:
            row: dict[str, Any] = value["row"]
            for name in ("probabilities", "spread", "prediction_set"):
                row[name] = None if row[name] is None else tuple(row[name])
            value["row"] = Row(**row)
        if value["path"] is not None:
            value["path"] = ChainPath(**value["path"])
        value["boxes"] = tuple(map(tuple, value["boxes"]))
        return cls(**value)

    def to_json(self) -> bytes:
        """One line; bytes of a file name that are not text are kept."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def most_probable(probabilities: Sequence[float]) -> list[int]:
    """Numbers of the `MAX_CLASSES` most probable classes, the first one first."""
    order = sorted(range(len(probabilities)), key=lambda c: -probabilities[c])
    return order[:MAX_CLASSES]


def _path(panel: Panel) -> ChainPath:
    states = panel.trajectory.shape[1]
    points = np.unique(np.round(np.linspace(0, states - 1, min(states, MAX_POINTS))).astype(int))
    few = panel.trajectory[:, points]
    classes = most_probable(panel.probabilities.tolist())
    mean = few.mean(axis=0).T[classes].round(4)
    deviation = few.std(axis=0)[:, classes[0]].round(4)
    return ChainPath(states - 1, mean.tolist(), deviation.tolist())


class CardFile:
    """The cards of a report, a line each, after a line with the digest of the predictions.

    Uses 8 bytes of memory per card. The file is locked (flock) from `begin` on.

    Attributes:
        path: of the file.
        heading: the fields that all predictions have in common.
    """

    def __init__(self, path: str | Path, heading: Heading) -> None:
        self.path, self.heading = Path(path), heading
        self._file: BinaryIO | None = None
        self._offsets = array("q")

    def begin(self, done: Sequence[str] | None = None) -> None:
        """Open the file.

        Args:
            done: files of the rows of an interrupted run, in their order, whose cards are kept. None starts a new file.

        Raises:
            ValueError: the file lacks a card of `done`, has another digest, or is written by another process.
        """
        if done and not self.path.exists():
            raise ValueError(
                f"predict: --report: the rows that --resume keeps were written without {self.path}; leave out "
                "--report, or --resume to classify all images again"
            )
        with contextlib.ExitStack() as stack:
            # Not truncated before it is locked.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file = open(descriptor, "r+b")  # noqa: SIM115 (closed by `close`)
            stack.callback(self.close)
            lock_file(self._file, self.path)
            if done:
                self._keep(self._file, done)
            else:
                self._file.truncate(0)
                self._file.write(self._first_line())
            stack.pop_all()

    def _first_line(self) -> bytes:
        value = {"format": _FORMAT, "digest": self.heading.digest}
        return json.dumps(value).encode() + b"\n"

    def _keep(self, file: BinaryIO, done: Sequence[str]) -> None:
        """Find the last card of each file, and cut off an incomplete one at the end."""
        if file.readline() != self._first_line():
            raise ValueError(
                f"predict: --report: the cards in {self.path} are of another model or other options; name another "
                "folder, or leave out --resume"
            )
        wanted, found = set(done), dict[str, int]()
        end = file.tell()
        for line in iter(file.readline, b""):
            if not line.endswith(b"\n"):
                break
            card = Card.from_json(line)
            if card.row is not None and card.file in wanted and _is_current(card.row):
                found[card.file] = end
            end = file.tell()
        missing = [name for name in done if name not in found]
        if missing:
            raise ValueError(
                f"predict: --report: {self.path} must have a card for each row that --resume keeps, got none for "
                f"{len(missing)} of {len(done)} rows, {missing[0]} for one; leave out --report, or --resume to "
                "classify all images again"
            )
        file.truncate(end)
        file.seek(end)
        self._offsets.extend(found[name] for name in done)

    def add(self, cards: Sequence[Card]) -> None:
        """Append cards and pass them to the operating system."""
        assert self._file is not None, "begin must be called first"
        self._file.seek(0, os.SEEK_END)
        for card in cards:
            self._offsets.append(self._file.tell())
            self._file.write(card.to_json())
        self._file.flush()

    def __len__(self) -> int:
        return len(self._offsets)

    def cards(self, first: int = 0, last: int | None = None) -> Iterator[Card]:
        """The cards from number `first` to before `last`, read one at a time."""
        assert self._file is not None, "begin must be called first"
        for offset in self._offsets[first:last]:
            self._file.seek(offset)
            yield Card.from_json(self._file.readline())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_current(row: Row) -> bool:
    """Whether an image file has not changed since its prediction; True if it was removed."""
    try:
        return file_version(row.file) == row.version
    except OSError:
        return True
