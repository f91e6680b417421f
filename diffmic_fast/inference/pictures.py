"""Pictures of predictions, collected batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Pictures:
    """Draws the images that `predict_files` passes to `add`.

    Attributes:
        panels: The images of the sheet, at most `figures.MAX_ROWS`.
    """

    def __init__(
        self,
        classes: Sequence[str],
        augmentation: AugmentationConfig,
        sheet: str | Path | None = None,
        folder: str | Path | None = None,
        *,
        truth: Mapping[Path, int] | None = None,
        title: str = "",
    ) -> None:
        """Say what to draw.

        Args:
            classes: Names of the classes.
            augmentation: The preprocessing of the images.
            sheet: PNG file for the first images, written by `finish`.
            folder: Folder for a PNG file per image, written by `add`.
            truth: Labels of the files, where they are known.
            title: Of the sheet.
        """
        self.panels: list[Panel] = []
        self._classes, self._augmentation = classes, augmentation
        self._sheet, self._folder = sheet, Path(folder) if folder else None
        self._truth, self._title = truth, title
        self._count = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self._sheet or self._folder)

    def add(self, files: list[Path], images: Tensor, prediction: Prediction) -> None:
        """Take a batch; the `on_batch` of `predict_files`."""
        panels = make_panels(
            images,
            prediction,
            [path.name for path in files],
            self._augmentation.mean,
            self._augmentation.std,
            None if self._truth is None else [self._truth[path] for path in files],
        )
        if self._sheet:
            self.panels += panels[: MAX_ROWS - len(self.panels)]
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path, panel in zip(files, panels, strict=True):
                # Numbered, because files of different folders may share a name.
                target = self._folder / f"{self._count:05d}_{path.stem}.png"
                save_figure(draw_predictions([panel], self._classes), target)
                self._count += 1

    def finish(self) -> None:
        """Draw the sheet, if an image was added."""
        if self._sheet and self.panels:
            save_figure(draw_predictions(self.panels, self._classes, self._title), self._sheet)
