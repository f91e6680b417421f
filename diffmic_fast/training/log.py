"""Logs of a training run: one row per epoch, as CSV, as TensorBoard events and as a line of text."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffmic_fast._optional import require
from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.inference.figures import Panel, draw_predictions, to_pixels
from diffmic_fast.inference.metrics import NAMES
from diffmic_fast.training.progress import SUMS, Progress
from diffmic_fast.training.random_states import keep_random_states
from diffmic_fast.training.steps import LOSSES

COLUMNS = (
    "epoch", "phase", "step", "images", "learning_rate", "loss", "noise_loss", "mmd_global",
    "mmd_local", "guidance_loss", "encoder_loss",
    *(f"validation_{name}" for name in NAMES),
    *(f"validation_guidance_{name}" for name in NAMES),
    "seconds", "images_per_second",
)  # fmt: skip
# The loss that each phase of a run minimises.
MAIN_LOSS = {
    "guidance": "guidance_loss",
    "encoder": "encoder_loss",
    "joint": "loss",
    "features": "loss",
}


def epoch_row(
    progress: Progress, phase: str, images: int, learning_rate: float | None
) -> dict[str, Any]:
    """The row of an epoch, without validation; with a learning rate if the denoiser was trained."""
    keys = {MAIN_LOSS[phase]}
    row: dict[str, Any] = {
        "epoch": progress.epoch,
        "phase": phase,
        "step": progress.step,
        "images": images,
        "seconds": progress.seconds,
        "images_per_second": images / progress.seconds,
    }
    if learning_rate is not None:
        row["learning_rate"] = learning_rate
        keys |= set(LOSSES)
    if phase == "joint":
        keys.add("guidance_loss")
    return row | {key: progress.sums[key] / images for key in SUMS if key in keys}


def summary(title: str, row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    parts = [title]
    for key, name in (("loss", "loss"), ("guidance_loss", "guidance loss"),
                      ("encoder_loss", "encoder loss"),
                      ("validation_guidance_accuracy", "guidance accuracy"),
                      ("validation_accuracy", "accuracy")):  # fmt: skip
        if key in row:
            parts.append(f"{name} {row[key]:.4f}")
    return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s"])


class CsvLog:
    """Rows of COLUMNS appended to a file, each on the disk before the next checkpoint.

    Only the rows of the first `epochs` are kept when a run resumes: later ones are newer than the checkpoint.
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self.path = path
        rows: list[dict[str, str]] = []
        if epochs and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    number = row.get("epoch") or ""
                    # A row truncated by a crash lacks its last columns.
                    if number.isdigit() and int(number) < epochs and None not in row.values():
                        rows.append({key: row.get(key, "") for key in COLUMNS})
        with atomic_file(path) as target:
            target.write(_text(rows, header=True))

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; columns that `row` lacks are empty, and other keys raise ValueError."""
        cells = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
        with open(self.path, "ab") as file:
            file.write(_text([cells], header=False))
            file.flush()
            os.fsync(file.fileno())


def _text(rows: list[dict[str, Any]], *, header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


class TensorBoardLog:
    """The numbers of each epoch as TensorBoard events, with pictures of some predictions.

    Events after the first `epochs` are purged; `classes` are the names in the pictures.

    Raises:
        MissingPackageError: from the constructor, where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, epochs: int, classes: Sequence[str]) -> None:
        self._classes = classes
        tensorboard = require(
            "torch.utils.tensorboard",
            extra="train",
            purpose="training.tensorboard=true (false does without)",
        )
        self.writer = tensorboard.SummaryWriter(str(folder), purge_step=epochs or None)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write every number of `row` at its epoch."""
        for key, value in row.items():
            if key not in ("epoch", "step") and isinstance(value, (int, float)):
                name = key.removeprefix("validation_")
                group = "train" if name == key else "validation"
                self.writer.add_scalar(f"{group}/{name}", value, row["epoch"])
        self.writer.flush()

    def show(self, panels: Sequence[Panel], epoch: int) -> None:
        """Write a picture of predictions as "validation/samples"; a UserWarning if it cannot be drawn."""
        try:
            with keep_random_states():
                picture = to_pixels(draw_predictions(panels, self._classes))
        except Exception as error:  # matplotlib raises many types, for instance for fonts
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            warnings.warn(
                f"TensorBoard has no picture of the samples: {reason}", UserWarning, stacklevel=2
            )
            return
        self.writer.add_image("validation/samples", picture, epoch, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.writer.close()
