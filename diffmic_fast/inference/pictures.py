"""Pictures of predictions, collected batch by batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.inference.figures import (
    MAX_ROWS,
    Panel,
    draw_predictions,
    draw_to,
    make_panels,
)
from diffmic_fast.models import Prediction

_MAX_NAME = 180  # bytes of the name of an image in that of its picture


@dataclass
class Pictures:
    """Draws the images that `predict_files` passes to `add`; what cannot be drawn is a UserWarning, not an error.

    Attributes:
        classes: names of the classes.
        augmentation: the preprocessing of the images.
        sheet: PNG file for the first images, written by `finish`, or None.
        folder: folder for a PNG file per image, written by `add`, or None; made if it is missing.
        truth: labels of the files, where they are known.
        title: of the sheet.
        panels: the images of the sheet, at most `figures.MAX_ROWS`.
    """

    classes: Sequence[str]
    augmentation: Preprocessing
    sheet: str | Path | None = None
    folder: str | Path | None = None
    truth: Mapping[Path, int] = field(default_factory=dict)
    title: str = ""
    panels: list[Panel] = field(default_factory=list)
    _count: int = 0
    _failed: int = 0

    def __post_init__(self) -> None:
        """Create the folder, before the work whose pictures it will hold."""
        if self.folder:
            Path(self.folder).mkdir(parents=True, exist_ok=True)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.sheet or self.folder)

    def skip(self, count: int) -> None:
        """Number the next picture of `folder` as if `count` images had been added."""
        self._count += count

    def add(self, files: list[Path], images: Tensor, prediction: Prediction) -> None:
        """Take a batch; the `on_batch` of `predict_files`."""
        names, truths = [path.name for path in files], [self.truth.get(path) for path in files]
        panels = make_panels(images, prediction, names, self.augmentation, truths)
        if self.sheet:
            self.panels += panels[: MAX_ROWS - len(self.panels)]
        if self.folder:
            for path, panel in zip(files, panels, strict=True):
                # Numbered, because files of different folders may share a name.
                target = Path(self.folder, f"{self._count:05d}_{_shortened(path.stem)}.png")
                self._draw(target, [panel])
                self._count += 1

    def finish(self) -> None:
        """Draw the sheet, if an image was added, and count what could not be drawn in a warning."""
        if self.sheet and self.panels:
            self._draw(self.sheet, self.panels, self.title)
        if self._failed > 1:
            warnings.warn(f"{self._failed} figures were not drawn", UserWarning, stacklevel=2)

    def _draw(self, path: str | Path, panels: list[Panel], title: str = "") -> None:
        """Draw a picture; warn of the first one that cannot be drawn."""
        with warnings.catch_warnings():
            if self._failed:
                warnings.filterwarnings("ignore", "the figure .* was not drawn")
            if not draw_to(path, lambda: draw_predictions(panels, self.classes, title)):
                self._failed += 1


def _shortened(stem: str) -> str:
    """The end of a name of a file, with room for what is added: file systems take 255 bytes."""
    while len(os.fsencode(stem)) > _MAX_NAME:
        stem = stem[1:]
    return stem
