"""The settings that a report lists: model, sampling, versions and time."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import torch

from diffmic_fast.diffusion.sampling_options import SamplingOptions


def sampling_settings(options: SamplingOptions, checkpoint: Path) -> list[tuple[str, str]]:
    """Names and values: model, sampling, versions and the time now, with its time zone."""
    return [
        ("Checkpoint", str(checkpoint)),
        ("Sampler", options.method),
        ("Samples per image", str(options.samples)),
        ("Mirror images", str(options.views)),
        ("Seed", str(options.seed)),
        ("Precision", options.precision),
        ("PyTorch", torch.__version__),
        ("Written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    ]
