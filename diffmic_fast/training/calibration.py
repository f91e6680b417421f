"""The calibration of a finished run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from diffmic_fast.calibration.scaling import MIN_IMAGES
from diffmic_fast.checkpoint import (
    BEST_NAME,
    NAME,
    add_calibration,
    load_model,
    read_checkpoint,
)
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.table import ImageTable
from diffmic_fast.data.transforms import evaluation_transform
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.calibrate import calibrate, images_of
from diffmic_fast.progress_bar import ProgressBar
from diffmic_fast.training.random_states import keep_random_states


def calibrate_run(
    folder: Path,
    config: RunConfig,
    training: ImageTable,
    validation: ImageDataset | None,
    *,
    device: torch.device,
    on_batch: Callable[[], None],
    say: Callable[[str], None],
    quiet: bool,
) -> None:
    """Collective: fit a calibration for ckpt.pth and ckpt_best.pth, each with its own weights, where it is missing.

    Rank 0 replaces each file atomically, so that an interruption leaves valid checkpoints. The states of the global
    random generators are kept.

    Args:
        folder: Of the run.
        config: Of the run; its sampling is what the calibration is for.
        training: The training images.
        validation: Images to fit to, or None.
        device: Where the model runs.
        on_batch: Called after each batch; may raise.
        say: Called with a line for each checkpoint, or with the reason why nothing is fitted.
        quiet: Show no progress.
    """
    obstacle = _obstacle(config, validation)
    if validation is None or obstacle:
        say(f"probabilities are not calibrated: {obstacle}")
        return
    processes = current()
    transform = evaluation_transform(config.model.image_size, config.data.augmentation)
    encoded = ImageDataset(training, transform)
    images = -(-images_of(validation, encoded) // processes.world_size)

    def count(images: int) -> None:
        bar.update(images)
        on_batch()

    with keep_random_states():
        # Rank 0 decides: it changes the files.
        for names in processes.all_gather(_uncalibrated(folder))[0]:
            model, _ = load_model(folder / names[0])
            with ProgressBar(f"calibrate {names[0]}", images, quiet=quiet) as bar:
                calibration = calibrate(
                    model,
                    validation,
                    encoded,
                    SamplingOptions.from_config(config.sampling),
                    batch_size=config.sampling.batch_size,
                    workers=config.data.workers,
                    device=device,
                    on_batch=count,
                )
            if processes.is_rank_zero:
                for name in names:
                    add_calibration(folder / name, calibration)
            say(f"{', '.join(names)}: {calibration.summary}")


def _obstacle(config: RunConfig, validation: ImageDataset | None) -> str:
    """Why a run is not calibrated, or ""."""
    if validation is None:
        return "there are no validation images"
    if len(validation) < MIN_IMAGES:
        return f"there must be at least {MIN_IMAGES} validation images, got {len(validation)}"
    trained = config.training.epochs or config.training.feature_epochs
    return "" if trained else "the denoiser was not trained"


def _uncalibrated(folder: Path) -> list[list[str]]:
    """Names of the checkpoints without a calibration; two names of one file together."""
    names = [
        name
        for name in (NAME, BEST_NAME)
        if (folder / name).exists()
        and read_checkpoint(folder / name, mmap=True).calibration is None
    ]
    if len(names) == 2 and (folder / NAME).samefile(folder / BEST_NAME):
        return [names]
    return [[name] for name in names]
