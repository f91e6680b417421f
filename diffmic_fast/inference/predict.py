"""Prediction of image files: one row per file, with unreadable files listed instead of raising."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffmic_fast import __version__
from diffmic_fast.calibration import Confidence, confidence
from diffmic_fast.calibration.conformal import check_coverage
from diffmic_fast.checkpoint import weights_digest
from diffmic_fast.checks import finite_on_device
from diffmic_fast.config.differences import deciding_values
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.data.decode import UnreadableImageError, load_image
from diffmic_fast.data.files import IMAGE_SUFFIXES, file_version, scan_folder
from diffmic_fast.data.loading import load_batches
from diffmic_fast.data.transforms import evaluation_transform
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import current
from diffmic_fast.models import DiffMIC, Prediction
from diffmic_fast.models.execution import bfloat16_obstacle


@dataclass(frozen=True)
class ProbabilityOptions:
    """Which probabilities `predict_files` gives, and the coverage of their prediction sets.

    Attributes:
        probability: as in `DiffMIC.predict`: None, "published" or "calibrated".
        coverage: share of images whose class is to be in their prediction set, in (0, 1).

    Raises:
        ValueError: from the constructor: `coverage` is out of range.
    """

    probability: str | None = None
    coverage: float = 0.9

    def __post_init__(self) -> None:
        check_coverage(self.coverage)


@dataclass(frozen=True)
class Row:
    """The prediction for one file.

    Attributes:
        file: its path.
        label, name: number and name of the predicted class.
        probabilities: for each class.
        spread: for each class, the standard deviation over the samples.
        calibrated: whether the probabilities are.
        guidance_name: name of the class that the guidance model alone predicts.
        guidance_probability: the guidance model's probability of that class, calibrated if `calibrated`.
        interval_width, p_value, agreement: as in `Confidence`; None where they are not defined (a single sample).
        prediction_set: names of the classes in the conformal set, or None without a calibration.
        novelty, flagged: as in `Confidence`, or None without a novelty detector.
        version: `data.files.file_version` of the file, taken before it was read.
    """

    file: str
    label: int
    name: str
    probabilities: tuple[float, ...]
    spread: tuple[float, ...]
    calibrated: bool
    guidance_name: str
    guidance_probability: float
    interval_width: float | None
    p_value: float | None
    agreement: float
    prediction_set: tuple[str, ...] | None
    novelty: float | None
    flagged: bool | None
    version: str = ""


@dataclass(frozen=True)
class Heading:
    """The fields that all rows of a prediction have in common.

    Attributes:
        classes: names of the classes.
        coverage: of the prediction sets.
        obstacle: why the probabilities are not calibrated, or None if they are.
        digest: of all weights, the calibration, the preprocessing, the options, the type of device, the dtype of the
            convolutions, and the versions of this package, torch and Pillow; 16 hexadecimal digits. Rows of one image
            with the same digest differ by rounding alone.
    """

    classes: tuple[str, ...]
    coverage: float = 0.9
    obstacle: str | None = None
    digest: str = ""


@dataclass(frozen=True)
class Predictions:
    """Predictions for a list of files.

    Attributes:
        heading: the fields that all rows have in common.
        rows: of the readable files, in the order given.
        unreadable: (file, reason) of the others, in the order given.
    """

    heading: Heading
    rows: tuple[Row, ...]
    unreadable: tuple[tuple[str, str], ...]


class PredictedBatch(NamedTuple):
    """Predictions for some consecutive files.

    Attributes:
        rows: of the readable files, in the order given; with several processes those of all of them.
        unreadable: (file, reason) of the others, likewise.
        paths: this process's readable files.
        images: [B, 3, H, W], their pixels, or None if there are none.
        prediction: for them, or None.
    """

    rows: list[Row]
    unreadable: list[tuple[str, str]]
    paths: list[Path]
    images: Tensor | None
    prediction: Prediction | None


def collect_files(
    inputs: Sequence[str | Path],
    *,
    outputs: Sequence[str | Path] = (),
    output_folder: str | Path | None = None,
) -> list[Path]:
    """List the files to classify, each once.

    Args:
        inputs: files, taken as they are, and folders, replaced by the files at any depth, sorted: images and, so that
            `predict_files` reports them as unreadable, all others of `files.scan_folder`. A missing file stays in the
            list if its name has the suffix of an image, and is reported too.
        outputs: files that the command writes; left out where a folder has them.
        output_folder: likewise with all of its files.

    Raises:
        ValueError: another path does not exist, a folder has no image or is `output_folder`, or `inputs` is empty.
    """
    files: dict[Path, None] = {}
    written = {Path(path).resolve() for path in outputs}
    folder = None if output_folder is None else Path(output_folder).resolve()
    for entry in map(Path, inputs):
        if entry.is_dir():
            found = scan_folder(entry, recursive=True)
            if not found.images:
                raise ValueError(f"data: there is no image file in {entry}")
            inside = sorted((*found.images, *found.others))
            here = entry.resolve()
            if here == folder:
                raise ValueError(
                    f"predict: the pictures must be written to another folder than {entry}, an input"
                )
            if any(here in path.parents for path in (*written, *([folder] if folder else []))):
                inside = [
                    path for path in inside if not _is_output(path.resolve(), written, folder)
                ]
            files.update(dict.fromkeys(inside))
        elif entry.suffix.lower() in IMAGE_SUFFIXES or entry.exists():
            files[entry] = None
        else:
            raise ValueError(f"predict: there is no folder or file {entry}")
    if not files:
        raise ValueError("predict: no files were given")
    return list(files)


def _is_output(path: Path, written: set[Path], folder: Path | None) -> bool:
    return path in written or folder in path.parents


class _Decoded(NamedTuple):
    """A file, its version, and its image or the reason why it has none."""

    path: Path
    version: str
    image: Tensor | None
    reason: str


class _Files(Dataset[_Decoded]):
    """Decoded files."""

    def __init__(self, files: Sequence[Path], size: int, augmentation: Preprocessing) -> None:
        self.files = files
        self.transform = evaluation_transform(size, augmentation)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Decoded:
        path = self.files[index]
        try:
            version = file_version(path)
        except OSError:
            version = ""  # reading says why
        try:
            pixels = load_image(path, bit_depth=self.transform.bit_depth)
        except UnreadableImageError as error:
            return _Decoded(path, version, None, error.reason or str(error))
        return _Decoded(path, version, self.transform(pixels), "")


class FilePredictor:
    """Classifies image files batch by batch.

    The noise of an image is addressed by its pixels and the seed, so a row does not depend on the other files.

    Attributes:
        model: on its device, in evaluation mode.
        heading: the fields that all rows have in common.
        device: where the model runs.
    """

    def __init__(
        self,
        model: DiffMIC,
        classes: Sequence[str],
        augmentation: Preprocessing,
        options: SamplingOptions,
        *,
        probabilities: ProbabilityOptions | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare a model.

        Args:
            model: moved to `device` and set to evaluation mode.
            classes: names of the model's classes.
            augmentation: the preprocessing that the model was trained with.
            options: how labels are sampled.
            probabilities: which to give (default: calibrated where the model's calibration is for these options).
            device: where the model runs.

        Raises:
            ValueError: the number of class names is not the model's, the sampler does not fit its schedule, or
                calibrated probabilities are asked for and there is no calibration for these options.
        """
        wanted = self._wanted = probabilities or ProbabilityOptions()
        options.check(model.config.timesteps)
        if len(classes) != model.config.classes:
            raise ValueError(
                f"predict: there must be {model.config.classes} class names, one for each class of the model, got "
                f"{len(classes)}"
            )
        obstacle = model.calibration_obstacle(options)
        if wanted.probability == "published":
            obstacle = "published probabilities were asked for"
        elif wanted.probability == "calibrated" and obstacle is not None:
            raise ValueError(f"predict: probabilities are not calibrated: {obstacle}")
        self.model, self.device = model.to(device).eval(), device
        self._augmentation, self._options = augmentation, options
        digest = self._digest(classes, calibrated=obstacle is None)
        self.heading = Heading(tuple(classes), wanted.coverage, obstacle, digest)

    def _digest(self, classes: Sequence[str], *, calibrated: bool) -> str:
        model, device = self.model, torch.device(self.device)
        calibration = None if model.calibration is None else model.calibration.to_state()
        settings = [
            weights_digest(model),
            _plain(calibration),
            deciding_values(asdict(model.config), asdict(self._augmentation)),
            asdict(self._options),
            [calibrated, self._wanted.coverage],
            list(classes),
            [device.type, self._options.precision == "bf16" and not bfloat16_obstacle(device)],
            [__version__, torch.__version__, PIL.__version__],
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def batches(
        self,
        files: Sequence[Path],
        *,
        batch_size: int = 32,
        workers: int = 0,
        explain: bool = False,
    ) -> Iterator[PredictedBatch]:
        """Classify files; memory does not grow with their number.

        Collective: each process of a `torch.distributed` group takes a contiguous part of every batch.

        Args:
            files: image files, the same on all processes.
            batch_size: images at a time and process.
            workers: processes that decode files; 0 decodes them in this one.
            explain: whether the predictions have trajectory, saliency and boxes.
        """
        processes = current()
        size = batch_size * processes.world_size
        loader = load_batches(
            _Files(files, self.model.config.image_size, self._augmentation),
            [
                list(processes.shard(range(i, min(i + size, len(files)))))
                for i in range(0, len(files), size)
            ],
            workers=workers,
            collate=list,
        )
        for batch in loader:
            own = self._predict(batch, explain)
            found = processes.all_gather((own.rows, own.unreadable))
            yield own._replace(
                rows=[row for rows, _ in found for row in rows],
                unreadable=[failed for _, unreadable in found for failed in unreadable],
            )

    def _predict(self, batch: list[_Decoded], explain: bool) -> PredictedBatch:
        """Classify decoded files."""
        unreadable = [(str(file.path), file.reason) for file in batch if file.image is None]
        readable = [file for file in batch if file.image is not None]
        paths = [file.path for file in readable]
        if not paths:
            return PredictedBatch([], unreadable, [], None, None)
        images = torch.stack([file.image for file in readable if file.image is not None])
        images = finite_on_device("predict: the images", images, torch.device(self.device))
        model = self.model
        prediction = model.predict(
            images,
            trajectory=explain,
            saliency=explain,
            boxes=explain,
            probability=self._wanted.probability,
            **asdict(self._options),
        )
        prediction.check()
        coverage = self.heading.coverage
        sure = confidence(prediction, model.calibration, images=images, coverage=coverage)
        rows = _rows(readable, self.heading.classes, prediction, sure, model)
        return PredictedBatch(rows, unreadable, paths, images, prediction)


def predict_files(
    model: DiffMIC,
    files: Sequence[Path],
    classes: Sequence[str],
    augmentation: Preprocessing,
    options: SamplingOptions,
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[list[Path], Tensor, Prediction], None] | None = None,
    probabilities: ProbabilityOptions | None = None,
) -> Predictions:
    """Classify image files; all rows at once, where `FilePredictor` gives them batch by batch.

    Args:
        model: moved to `device` and set to evaluation mode.
        files: image files.
        classes: names of the model's classes.
        augmentation: the preprocessing that the model was trained with.
        options: how labels are sampled.
        batch_size: images at a time.
        workers: processes that decode files; 0 decodes them in this one.
        device: where the model runs.
        on_batch: called after each batch of this process with the readable files, their images [B, 3, H, W] and the
            prediction, which then has trajectory, saliency and boxes.
        probabilities: which to give (default: calibrated where the model's calibration is for these options).

    Raises:
        ValueError: as in `FilePredictor`.
    """
    predictor = FilePredictor(
        model, classes, augmentation, options, probabilities=probabilities, device=device
    )
    rows: list[Row] = []
    unreadable: list[tuple[str, str]] = []
    explain = on_batch is not None
    for batch in predictor.batches(files, batch_size=batch_size, workers=workers, explain=explain):
        rows += batch.rows
        unreadable += batch.unreadable
        if on_batch is not None and batch.images is not None and batch.prediction is not None:
            on_batch(batch.paths, batch.images, batch.prediction)
    return Predictions(predictor.heading, tuple(rows), tuple(unreadable))


def _plain(value: Any) -> Any:
    """Nested values as JSON has them, tensors as digests of their bytes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    return value


def _rows(
    files: Sequence[_Decoded],
    classes: Sequence[str],
    prediction: Prediction,
    sure: Confidence,
    model: DiffMIC,
) -> list[Row]:
    guidance = prediction.guidance[:, 0]
    if prediction.calibrated and model.calibration is not None:
        guidance = model.calibration.guidance_probabilities(guidance)
    best = guidance.max(dim=1)
    columns = (
        prediction.label.tolist(),
        prediction.probabilities.tolist(),
        prediction.spread.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        *(_column(values, len(files)) for values in sure),
    )
    return [
        Row(
            str(file.path),
            label,
            classes[label],
            tuple(probabilities),
            tuple(spread),
            prediction.calibrated,
            classes[guided],
            guidance_probability,
            _defined(width),
            _defined(p_value),
            agreement,
            None if members is None else tuple(compress(classes, members)),
            novelty,
            flagged,
            file.version,
        )
        for file, label, probabilities, spread, guided, guidance_probability, width, p_value,
            agreement, members, novelty, flagged in zip(files, *columns, strict=True)
    ]  # fmt: skip


def _column(values: Tensor | None, count: int) -> list[Any]:
    """A field of `Confidence` by image; None for each where there is none."""
    return [None] * count if values is None else values.tolist()


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
