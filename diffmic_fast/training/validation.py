"""Validation between two epochs of training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch

from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.fsdp import gathered
from diffmic_fast.inference.evaluate import Evaluation, evaluate
from diffmic_fast.inference.figures import Panel
from diffmic_fast.inference.metrics import NAMES
from diffmic_fast.training.random_states import keep_random_states
from diffmic_fast.training.sample_panels import sample_panels
from diffmic_fast.training.steps import Steps


def validate(
    steps: Steps,
    dataset: ImageDataset,
    config: RunConfig,
    device: torch.device,
    joint: bool,
    on_batch: Callable[[int], None],
) -> tuple[Evaluation, list[Panel]]:
    """Collective: evaluate the model under training, with the state of training unchanged.

    Args:
        steps: of the model.
        dataset: validation images.
        config: of the run.
        device: of the model.
        joint: also evaluate the diffusion, with the moving average of its weights. Otherwise the guidance model is
            evaluated with its own, if it has one.
        on_batch: called with the number of images after each batch; may raise.

    Returns:
        The evaluation, and for TensorBoard, where the diffusion is evaluated, the predictions for a few images.
    """
    average = steps.average if joint else steps.guidance_average
    sampling = config.sampling
    # Libraries draw random numbers, some already when they are imported.
    with (
        keep_random_states(),
        average.applied() if average else contextlib.nullcontext(),
        gathered(steps.model.denoiser, steps.model.guidance),
    ):
        evaluation = evaluate(
            steps.model,
            dataset,
            [SamplingOptions.from_config(sampling)] if joint else [],
            batch_size=sampling.batch_size,
            workers=config.data.workers,
            device=device,
            on_batch=on_batch,
            resamples=0,
        )
        shown = joint and config.training.tensorboard
        panels = sample_panels(steps.model, dataset, config, device) if shown else []
    # A calibration is of the weights before this training.
    published = tuple(result for result in evaluation.results if not result.calibrated)
    return replace(evaluation, results=published), panels


def log_columns(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation as columns of the log."""
    prefixes = ("validation_guidance_", "validation_")
    return {
        f"{prefix}{name}": getattr(result.metrics, name)
        for prefix, result in zip(prefixes, evaluation.results, strict=False)
        for name in NAMES
    }
