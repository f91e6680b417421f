"""Logs of a training run: a CSV with a row an epoch, TensorBoard, and progress on the terminal."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from diffmic_fast.checkpoint import atomic_file
from diffmic_fast.inference.metrics import NAMES

COLUMNS = (
    "epoch", "phase", "step", "images", "learning_rate", "loss", "noise_loss", "mmd_global",
    "mmd_local", "guidance_loss",
    *(f"validation_{name}" for name in NAMES),
    *(f"validation_guidance_{name}" for name in NAMES),
    "seconds", "images_per_second",
)  # fmt: skip


class CsvLog:
    """Rows of COLUMNS appended to a file, each on the disk before the next checkpoint.

    epochs: rows of earlier epochs to keep when a run is resumed. A row may be newer than the
        checkpoint that the run resumes from; it is taken out here and written again.
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self.path = path
        rows: list[dict[str, str]] = []
        if epochs and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    number = row.get("epoch") or ""
                    # A row cut short by a crash lacks its last columns.
                    if number.isdigit() and int(number) < epochs and None not in row.values():
                        rows.append(row)
        with atomic_file(path) as target:
            target.write(self._text(rows, header=True))

    @staticmethod
    def _text(rows: list[dict[str, str]], *, header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; columns that `row` lacks stay empty."""
        unknown = [key for key in row if key not in COLUMNS]
        if unknown:
            raise ValueError(f"log: unknown columns {unknown}")
        cells = {
            key: f"{value:.9g}" if isinstance(value, float) else value for key, value in row.items()
        }
        with open(self.path, "ab") as file:
            file.write(self._text([cells], header=False))
            file.flush()
            os.fsync(file.fileno())


class TensorBoardLog:
    """Numbers of each epoch for TensorBoard; events past `epochs` of an earlier run are purged."""

    def __init__(self, folder: Path, epochs: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"log: TensorBoard cannot be loaded ({error}); install the package tensorboard, or "
                "set training.tensorboard=false"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=epochs or None)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write every number of `row` at its epoch."""
        for key, value in row.items():
            if key not in ("epoch", "step") and isinstance(value, (int, float)):
                tag = f"validation/{key[11:]}" if key.startswith("validation_") else f"train/{key}"
                self.writer.add_scalar(tag, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.writer.close()


class Progress:
    """A bar with images a second on a terminal; elsewhere a line an epoch.

    quiet: neither.
    """

    def __init__(self, quiet: bool = False, file: TextIO | None = None) -> None:
        self.file = file if file is not None else sys.stderr
        self.quiet = quiet
        self.bars = not quiet and self.file.isatty()
        self._bar: Any = None

    def start(self, title: str, images: int, done: int = 0) -> None:
        """Begin an epoch of `images` images, of which `done` were seen before a resume."""
        if self.bars:
            from tqdm import tqdm

            self._bar = tqdm(
                total=images, initial=done, desc=title, unit="img", file=self.file, leave=False
            )

    def advance(self, images: int, **numbers: float) -> None:
        """Count `images` more and show `numbers`."""
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)
            self._bar.update(images)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, text: str) -> None:
        """Print a line of its own."""
        if not self.quiet:
            print(text, file=self.file, flush=True)


class Stopwatch:
    """Seconds of an epoch, over interruptions."""

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds until now, those before a resume included."""
        return self.before + time.perf_counter() - self.start
