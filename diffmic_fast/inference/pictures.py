"""Pictures of predictions, collected batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.inference.figures import (
    MAX_ROWS,
    Panel,
    draw_predictions,
    make_panels,
    save_figure,
)
from diffmic_fast.models import Prediction


@dataclass
class Pictures:
    """Draws the images that `predict_files` passes to `add`.

    Attributes:
        classes: names of the classes.
        augmentation: the preprocessing of the images.
        sheet: PNG file for the first images, written by `finish`, or None.
        folder: folder for a PNG file per image, written by `add`, or None.
        truth: labels of the files, where they are known.
        title: of the sheet.
        panels: the images of the sheet, at most `figures.MAX_ROWS`.
    """

    classes: Sequence[str]
    augmentation: AugmentationConfig
    sheet: str | Path | None = None
    folder: str | Path | None = None
    truth: Mapping[Path, int] = field(default_factory=dict)
    title: str = ""
    panels: list[Panel] = field(default_factory=list)
    _count: int = 0

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
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            for path, panel in zip(files, panels, strict=True):
                # Numbered, because files of different folders may share a name.
                target = Path(self.folder, f"{self._count:05d}_{path.stem}.png")
                save_figure(draw_predictions([panel], self.classes), target)
                self._count += 1

    def finish(self) -> None:
        """Draw the sheet, if an image was added."""
        if self.sheet and self.panels:
            save_figure(draw_predictions(self.panels, self.classes, self.title), self.sheet)
