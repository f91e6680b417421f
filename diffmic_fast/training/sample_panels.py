"""What the model under training predicts for a few validation images, for TensorBoard."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from diffmic_fast.calibration.novelty import evenly_spaced
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.figures import Panel, make_panels
from diffmic_fast.models import DiffMIC

IMAGES = 4


def sample_panels(
    model: DiffMIC, dataset: ImageDataset, config: RunConfig, device: torch.device
) -> list[Panel]:
    """Classify `IMAGES` images, evenly spaced, with the run's sampling; the probabilities are not calibrated.

    Args:
        model: on `device`, in evaluation mode.
        dataset: validation images.
        config: of the run.
        device: of the model.
    """
    chosen = evenly_spaced(len(dataset), IMAGES)
    images = torch.stack([dataset[i][0] for i in chosen]).to(device)
    # Another batch size than that of the validation would be compiled anew.
    options = replace(SamplingOptions.from_config(config.sampling), compile=False)
    prediction = model.predict(
        images,
        trajectory=True,
        saliency=True,
        boxes=True,
        probability="published",
        **asdict(options),
    )
    entries = [dataset.table.entries[i] for i in chosen]
    names, truths = [entry.name for entry in entries], [entry.label for entry in entries]
    return make_panels(images, prediction, names, config.data.augmentation, truths)
