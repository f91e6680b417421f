"""Evaluation on labelled images: the guidance model alone and each sampler, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmic_fast.calibration import Calibration, Confidence, confidence, prediction_sets
from diffmic_fast.checks import finite_on_device
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.loading import in_batches, load_batches
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.bootstrap import RESAMPLES
from diffmic_fast.inference.evaluation import Evaluation
from diffmic_fast.inference.report import SET_COVERAGE, Uncertainty
from diffmic_fast.inference.results import CALIBRATED, GUIDANCE, Output, Result, make_results
from diffmic_fast.models import DiffMIC, Prediction
from diffmic_fast.ops.image_ids import image_ids

__all__ = ["CALIBRATED", "GUIDANCE", "Evaluation", "Result", "evaluate"]

_T = TypeVar("_T")


class _Batch(NamedTuple):
    """A batch of images.

    Attributes:
        labels, ids: [B]; the ids do not depend on batch or order.
        outputs: one for each method.
    """

    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    outputs: list[Output]


def evaluate(
    model: DiffMIC,
    dataset: ImageDataset,
    methods: Sequence[SamplingOptions],
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """Classify every image with the guidance model alone and with each sampler.

    Probabilities are the published ones, and beside them the calibrated ones where `DiffMIC.calibration` applies to the
    method; the chains run once for both.

    The noise of an image is addressed by its pixels, the seed and the sample number, so results depend neither on the
    batch size nor on the order of the images. Guidance and encoder run once per image for all samplers. Times are of
    the model alone, with images loaded and on the device; a sampler's time includes guidance and encoder, as if it
    were the only one.

    The processes of a `torch.distributed` group take a contiguous shard of the images each; all return the whole
    result.

    Args:
        model: moved to `device` and set to evaluation mode.
        dataset: images and labels.
        methods: samplers, with the same `samples`, `seed`, `precision`, `compile` and `views`. May be empty.
        batch_size: images at a time.
        workers: processes that load images; 0 loads them in this one.
        device: where the model runs.
        on_batch: called with the number of images after each batch. May raise to stop the evaluation.
        resamples: of the bootstrap, 0 for none.

    Raises:
        ValueError: the classes of the images and of the model differ in number, a sampler does not fit, or `resamples`
            is negative.
    """
    options = _check(model, dataset, methods, resamples)
    device = torch.device(device)
    model.eval()
    # A module that is on the device is not asked to move: that would shard weights that are gathered for this call.
    if next(model.parameters()).device != torch.empty(0, device=device).device:
        model.to(device)
    own = current().shard(range(len(dataset)))
    loader = load_batches(dataset, in_batches(own, batch_size), workers=workers)
    batches: list[_Batch] = []
    for images, labels, _ in loader:
        images = finite_on_device("evaluate: the images", images, device)
        if not batches:
            _warm_up(model, images, options, sample=bool(methods))
        outputs = _classify(model, images, methods, options)
        ids = image_ids(images).cpu().numpy()
        batches.append(_Batch(np.asarray(labels, dtype=np.int64), ids, outputs))
        if on_batch is not None:
            on_batch(len(images))
    every = [batch for theirs in current().all_gather(batches) for batch in theirs]
    truth = np.concatenate([batch.labels for batch in every])
    keys = np.concatenate([batch.ids for batch in every])
    parts = zip(*(batch.outputs for batch in every), strict=True)
    return Evaluation(
        dataset.table.classes,
        truth,
        make_results([Output.concatenate(same) for same in parts], truth, keys, resamples),
        options.samples,
        options.seed,
        names=tuple(entry.name for entry in dataset.table.entries),
        bootstrap=resamples,
        calibration=None if model.calibration is None else model.calibration.summary,
        not_calibrated=_not_calibrated(model, methods),
    )


def _check(
    model: DiffMIC, dataset: ImageDataset, methods: Sequence[SamplingOptions], resamples: int
) -> SamplingOptions:
    """Raise a ValueError unless the arguments of `evaluate` fit; return what all methods have in common."""
    classes = dataset.table.classes
    if len(classes) != model.config.classes:
        raise ValueError(
            f"evaluate: the images must have the {model.config.classes} classes of the model, got {len(classes)} "
            f"({', '.join(classes)})"
        )
    if resamples < 0:
        raise ValueError(f"evaluate: resamples must be at least 0, got {resamples}")
    for method in methods:
        method.check(model.config.timesteps)
    return _shared_options(methods)


def _not_calibrated(model: DiffMIC, methods: Sequence[SamplingOptions]) -> tuple[str, ...]:
    """Why there are no calibrated probabilities: of the model, or of some of the methods."""
    if model.calibration is None:
        return ("the model has no calibration",)
    obstacles = [(method.method, model.calibration_obstacle(method)) for method in methods]
    return tuple(f"{method}: {reason}" for method, reason in obstacles if reason is not None)


def _shared_options(methods: Sequence[SamplingOptions]) -> SamplingOptions:
    """What all methods have in common, with the default sampler."""
    shared = {replace(m, sampler="ddpm", steps=None, eta=0.0) for m in methods}
    if len(shared) > 1:
        raise ValueError(
            "evaluate: all methods must have the same samples, seed, precision, compile and views, got "
            f"{', '.join(map(repr, methods))}"
        )
    return shared.pop() if shared else SamplingOptions()


def _warm_up(model: DiffMIC, images: Tensor, options: SamplingOptions, sample: bool) -> None:
    """Make the first calls, which allocate memory and choose algorithms, outside the timed ones."""
    few = images if options.compile else images[:1]
    model.guide(few, precision=options.precision, compile=options.compile)
    if sample:
        model.predict(few, **asdict(replace(options, sampler="ddim", steps=1, samples=1)))


def _classify(
    model: DiffMIC, images: Tensor, methods: Sequence[SamplingOptions], options: SamplingOptions
) -> list[Output]:
    """The guidance model alone and each method, then those of them that can be calibrated."""
    networks: dict[str, Any] = {
        "precision": options.precision,
        "compile": options.compile,
        "views": options.views,
    }
    guidance, guiding = _time(images.device, partial(model.guide, images, **networks))
    fused = guidance.logits.fused.float().softmax(dim=1)
    outputs = [Output(GUIDANCE, _to_numpy(fused), guiding)]
    calibrated = []
    if model.calibration is not None and model.calibration.views == options.views:
        calibrated.append(_calibrated_guidance(model.calibration, fused, guiding))
    if methods:
        features, encoding = _time(images.device, partial(model.encode, images, **networks))
    given: dict[str, Any] = {"guidance": guidance, "probability": "published"}
    novelty = None
    for method in methods:
        predict = partial(model.predict, images, features=features, **given, **asdict(method))
        prediction, sampling = _time(images.device, predict)
        prediction.check()
        seconds = guiding + encoding + sampling
        if novelty is None:  # of the image, not of the sampler
            novelty = confidence(prediction, model.calibration, images=images)
        describe = partial(_sampled, model.calibration, seconds=seconds, novelty=novelty)
        outputs.append(describe(prediction, method.method))
        if model.calibration is not None and model.calibration.mismatch(method) is None:
            adjusted = prediction.calibrate(model.calibration)
            calibrated.append(describe(adjusted, method.method + CALIBRATED))
    return [*outputs, *calibrated]


def _sampled(
    calibration: Calibration | None,
    prediction: Prediction,
    method: str,
    *,
    seconds: float,
    novelty: Confidence,
) -> Output:
    """A sampler's output, with the novelty that another prediction of the same images has."""
    found = confidence(prediction, calibration, coverage=SET_COVERAGE)
    found = found._replace(novelty=novelty.novelty, flagged=novelty.flagged)
    return Output(
        method,
        _to_numpy(prediction.probabilities),
        seconds,
        prediction.calibrated,
        Uncertainty(
            width=_to_numpy(found.width),
            p_value=_to_numpy(found.p_value),
            agreement=_to_numpy(found.agreement),
            prediction_set=_flags(found.prediction_set),
            novelty=None if found.novelty is None else _to_numpy(found.novelty),
            flagged=_flags(found.flagged),
        ),
        None if prediction.calibrated else _labels_by_samples(prediction.samples),
    )


def _labels_by_samples(samples: Tensor) -> NDArray[np.int64]:
    """[B, S], the published label by the first 1 ... S of the samples [B, S, C]."""
    each = samples.double().softmax(dim=2)
    labels: NDArray[np.int64] = each.cumsum(dim=1).argmax(dim=2).cpu().numpy()
    return labels


def _calibrated_guidance(calibration: Calibration, fused: Tensor, seconds: float) -> Output:
    """The guidance alone with calibrated probabilities and their prediction sets."""
    probabilities = calibration.guidance_probabilities(fused)
    scores = calibration.guidance_scores.to(fused.device)
    sets = _flags(prediction_sets(probabilities, scores, SET_COVERAGE))
    own = Uncertainty(prediction_set=sets)
    return Output(GUIDANCE + CALIBRATED, _to_numpy(probabilities), seconds, True, own)


def _to_numpy(values: Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()


def _flags(values: Tensor | None) -> NDArray[np.bool_] | None:
    return None if values is None else values.cpu().numpy()


def _time(device: torch.device, call: Callable[[], _T]) -> tuple[_T, float]:
    """The result of a call and its seconds, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
