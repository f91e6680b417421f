"""Fitting a calibration to a trained model's predictions for validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from diffmic_fast.calibration import Calibration, NoveltyDetector, fit_calibration, fit_novelty
from diffmic_fast.calibration.novelty import (
    MAX_TRAINING_IMAGES,
    MIN_TRAINING_IMAGES,
    evenly_spaced,
    image_statistics,
)
from diffmic_fast.calibration.scaling import check_count
from diffmic_fast.checkpoint import weights_digest
from diffmic_fast.checks import finite_on_device
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.loading import in_batches, load_batches
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import current
from diffmic_fast.models import DiffMIC


def calibrate(
    model: DiffMIC,
    validation: ImageDataset,
    training: ImageDataset | None,
    options: SamplingOptions,
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Calibration:
    """Fit a calibration (docs/algorithm.md, "Calibration and confidence").

    The result depends neither on the batch size nor on the device, up to the rounding of the model. The processes of a
    `torch.distributed` group take a contiguous shard of the images each; all return the same calibration. The model is
    not changed; set `DiffMIC.calibration`, or write the result with `checkpoint.add_calibration`.

    Args:
        model: Trained; moved to `device` and set to evaluation mode.
        validation: Images and labels that the model was not trained on, with the evaluation transform.
        training: The training images with the evaluation transform, for the novelty detector, of which at most 2048,
            evenly spaced, are encoded. If None, the training images of `model.calibration` are kept, and without such
            there is no detector. Nor is there one for fewer than 50 training images.
        options: How labels are sampled; the calibration is for this sampling alone.
        batch_size: Images at a time.
        workers: Processes that load images; 0 loads them in this one.
        device: Where the model runs.
        on_batch: Called with the number of images after each batch. May raise to stop.

    Raises:
        ValueError: Fewer than 20 validation images, other classes than the model's, or a sampler that does not fit.
    """
    check_count(len(validation))
    classes = validation.table.classes
    if len(classes) != model.config.classes:
        raise ValueError(
            f"calibrate: the images must have the {model.config.classes} classes of the model, got {len(classes)} "
            f"({', '.join(classes)})"
        )
    options.check(model.config.timesteps)
    digest = weights_digest(model)
    model.to(device).eval()
    passes = _Passes(model, options, batch_size, workers, torch.device(device), on_batch)
    found = passes.predict(validation, range(len(validation)))
    detector = None
    chosen = _encoded(training)
    if training is not None and chosen:
        features, statistics = passes.encode(training, chosen)
        detector = fit_novelty(features, statistics, found.features, found.statistics)
    elif training is None and model.calibration is not None:
        detector = _renewed(model.calibration.novelty, found)
    return fit_calibration(
        found.samples, found.guidance, found.labels, options, novelty=detector, weights=digest
    )


def images_of(validation: ImageDataset, training: ImageDataset | None) -> int:
    """The number of images that `calibrate` passes to its `on_batch`, of all processes together."""
    return len(validation) + len(_encoded(training))


def _encoded(training: ImageDataset | None) -> Sequence[int]:
    """The training images whose features the novelty detector is fitted to; empty if there is none."""
    if training is None or len(training) < MIN_TRAINING_IMAGES:
        return ()
    return evenly_spaced(len(training), MAX_TRAINING_IMAGES)


def _renewed(detector: NoveltyDetector | None, found: _Found) -> NoveltyDetector | None:
    return None if detector is None else detector.referred_to(found.features, found.statistics)


class _Found(NamedTuple):
    """What the model found for N images: y_0 [N, S, C], fused branch [N, C], features, pixel statistics, labels."""

    samples: Tensor
    guidance: Tensor
    features: Tensor
    statistics: Tensor
    labels: Tensor


class _Passes:
    """Passes of a model over images, in shards."""

    def __init__(
        self,
        model: DiffMIC,
        options: SamplingOptions,
        batch_size: int,
        workers: int,
        device: torch.device,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        self.model, self.options, self.device = model, options, device
        self.batch_size, self.workers, self.on_batch = batch_size, workers, on_batch

    def predict(self, dataset: ImageDataset, indices: Sequence[int]) -> _Found:
        """Collective: predictions for these images, in their order."""

        def call(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            result = self.model.predict(images, probability="published", **asdict(self.options))
            result.check()
            assert result.features is not None
            statistics = image_statistics(images)
            return result.samples, result.guidance[:, 0], result.features, statistics, labels

        return _Found(*self._run(dataset, indices, call))

    def encode(self, dataset: ImageDataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Collective: features and pixel statistics of these images, in their order."""
        options = self.options

        def call(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            features = self.model.encode(
                images, precision=options.precision, compile=options.compile, views=options.views
            )
            return features, image_statistics(images)

        features, statistics = self._run(dataset, indices, call)
        return features, statistics

    def _run(
        self,
        dataset: ImageDataset,
        indices: Sequence[int],
        call: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> list[Tensor]:
        processes = current()
        batches = in_batches(processes.shard(indices), self.batch_size)
        loader = load_batches(dataset, batches, workers=self.workers)
        rows: list[tuple[Tensor, ...]] = []
        for images, labels, _ in loader:
            found = call(finite_on_device("calibrate: the images", images, self.device), labels)
            rows.append(tuple(tensor.cpu() for tensor in found))
            if self.on_batch is not None:
                self.on_batch(len(labels))
        every = [row for part in processes.all_gather(rows) for row in part]
        return [torch.cat(column) for column in zip(*every, strict=True)]
