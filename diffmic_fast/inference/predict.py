"""Labels for image files: a row a file, damaged files listed and left out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffmic_fast.checkpoint import atomic_file
from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.config.run import check_steps
from diffmic_fast.data.decode import IMAGE_SUFFIXES, UnreadableImageError, list_images, load_image
from diffmic_fast.data.transforms import evaluation_transform
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.evaluate import Method
from diffmic_fast.models import DiffMIC, Prediction


@dataclass(frozen=True)
class Row:
    """One classified file: probabilities and their spread over the samples, class by class."""

    file: str
    label: int
    name: str
    probabilities: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """Rows of readable files in the order given, and (file, reason) of the unreadable ones."""

    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    unreadable: tuple[tuple[str, str], ...]


def collect_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as given, and folders' images by ending (all levels, sorted); each file once.

    A path that is not there stays in the list if it ends like an image, and is reported as
    unreadable when it is its turn. Raises ValueError for any other path that is not there, for a
    folder without images and for an empty list.
    """
    files: dict[Path, None] = {}
    for entry in map(Path, inputs):
        if entry.is_dir():
            files.update(dict.fromkeys(list_images(entry, recursive=True)))
        elif entry.suffix.lower() in IMAGE_SUFFIXES or entry.exists():
            files[entry] = None
        else:
            raise ValueError(f"predict: there is no folder or file {entry}")
    if not files:
        raise ValueError("predict: no files were given")
    return list(files)


class _Files(Dataset[tuple[int, "Tensor | None", str]]):
    """Decoded files: (number, image or None, reason). An error is data here, not an exception."""

    def __init__(self, files: Sequence[Path], size: int, augmentation: AugmentationConfig) -> None:
        self.files = files
        self.bit_depth = augmentation.bit_depth
        self.transform = evaluation_transform(size, augmentation)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            pixels = load_image(self.files[index], bit_depth=self.bit_depth)
            return index, self.transform(pixels), ""
        except UnreadableImageError as error:
            return index, None, error.reason or str(error)


def _keep(batch: list[Any]) -> list[Any]:
    return batch


def predict_files(
    model: DiffMIC,
    files: Sequence[Path],
    classes: Sequence[str],
    augmentation: AugmentationConfig,
    method: Method,
    *,
    samples: int = 1,
    seed: int = 0,
    precision: str = "fp32",
    compile: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    explain: bool = False,
    on_batch: Callable[[list[Path], Tensor, Prediction], None] | None = None,
) -> Predictions:
    """Classify files; the noise of an image follows from its pixels and `seed`, not from the batch.

    augmentation: the preprocessing the model was trained with.
    precision, compile: as in `DiffMIC.predict`.
    explain: let the predictions passed to `on_batch` carry trajectory, saliency and boxes.
    on_batch: called with the files, images and prediction of each batch (readable files only).

    Several processes of a `torch.distributed` group take a contiguous shard each, and all get the whole result;
    `on_batch` sees those of its process.
    """
    check_steps(method.sampler, method.steps, model.config.timesteps)
    if len(classes) != model.config.classes:
        raise ValueError(
            f"predict: {len(classes)} class names for a model of {model.config.classes} classes"
        )
    model.to(device).eval()
    processes = current()
    files = processes.shard(files)
    dataset = _Files(files, model.config.image_size, augmentation)
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        collate_fn=_keep,
        generator=torch.Generator().manual_seed(0),
    )
    rows: list[Row] = []
    unreadable: list[tuple[str, str]] = []
    for batch in loader:
        unreadable += [(str(files[i]), reason) for i, image, reason in batch if image is None]
        good = [(files[i], image) for i, image, _ in batch if image is not None]
        if not good:
            continue
        names = [path for path, _ in good]
        images = torch.stack([image for _, image in good]).to(device)
        prediction = model.predict(
            images,
            sampler=method.sampler,
            steps=method.steps,
            eta=method.eta,
            samples=samples,
            seed=seed,
            precision=precision,
            compile=compile,
            trajectory=explain,
            saliency=explain,
            boxes=explain,
        )
        for i, path in enumerate(names):
            label = int(prediction.label[i])
            rows.append(
                Row(
                    str(path),
                    label,
                    classes[label],
                    tuple(prediction.probabilities[i].tolist()),
                    tuple(prediction.spread[i].tolist()),
                )
            )
        if on_batch is not None:
            on_batch(names, images, prediction)
    found = processes.all_of((rows, unreadable))
    return Predictions(
        tuple(classes),
        tuple(row for theirs, _ in found for row in theirs),
        tuple(failed for _, theirs in found for failed in theirs),
    )


def to_csv(predictions: Predictions) -> str:
    """Columns file, label, class, probability_<class> ..., spread_<class> ... with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = predictions.classes
    writer.writerow(
        ["file", "label", "class", *(f"probability_{n}" for n in names),
         *(f"spread_{n}" for n in names)]
    )  # fmt: skip
    for row in predictions.rows:
        numbers = [f"{v:.6f}" for v in (*row.probabilities, *row.spread)]
        writer.writerow([row.file, row.label, row.name, *numbers])
    return text.getvalue()


def to_json(predictions: Predictions) -> str:
    """An object with `classes`, `predictions` (a record a file) and `unreadable`."""
    names = predictions.classes
    records = [
        {
            "file": row.file,
            "label": row.label,
            "class": row.name,
            "probabilities": dict(zip(names, row.probabilities, strict=True)),
            "spread": dict(zip(names, row.spread, strict=True)),
        }
        for row in predictions.rows
    ]
    failed = [{"file": file, "reason": reason} for file, reason in predictions.unreadable]
    value = {"classes": list(names), "predictions": records, "unreadable": failed}
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def save(predictions: Predictions, path: str | Path) -> None:
    """Write CSV or JSON by the ending of `path`, whole or not at all."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".json"):
        raise ValueError(f"predict: the output's ending must be .csv or .json, got {str(path)!r}")
    text = to_json(predictions) if suffix == ".json" else to_csv(predictions)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


class Pictures:
    """Collects what pictures of predictions need while they are made, and draws them.

    figure: PNG with the first images on one sheet; folder: a PNG for every image.
    truth: right classes of files, where they are known.
    """

    def __init__(
        self,
        classes: Sequence[str],
        augmentation: AugmentationConfig,
        figure: str | Path | None,
        folder: str | Path | None,
        *,
        truth: Mapping[Path, int] | None = None,
        title: str = "",
    ) -> None:
        self.truth, self.title = truth, title
        self.classes, self.augmentation = classes, augmentation
        self.figure = figure
        self.folder = Path(folder) if folder else None
        self.count = 0
        self.panels: list[Any] = []

    @property
    def wanted(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.figure or self.folder)

    def add(self, files: list[Path], images: Tensor, prediction: Prediction) -> None:
        """Take a batch (the `on_batch` of predict_files, with explain=True)."""
        from diffmic_fast.inference import figures as figure

        panels = figure.make_panels(
            images,
            prediction,
            [path.name for path in files],
            self.augmentation.mean,
            self.augmentation.std,
            None if self.truth is None else [self.truth[path] for path in files],
        )
        if self.figure:
            self.panels += panels[: figure.MAX_ROWS - len(self.panels)]
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path, panel in zip(files, panels, strict=True):
                # Files of different folders may share a name: the number keeps them apart.
                name = f"{self.count:05d}_{path.stem}.png"
                figure.save(figure.draw_predictions([panel], self.classes), self.folder / name)
                self.count += 1

    def finish(self) -> None:
        """Draw the sheet of the first images."""
        if self.figure and self.panels:
            from diffmic_fast.inference import figures as figure

            sheet = figure.draw_predictions(self.panels, self.classes, self.title)
            figure.save(sheet, self.figure)
