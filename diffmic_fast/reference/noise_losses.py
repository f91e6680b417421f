"""The terms of the denoiser's training loss (docs/algorithm.md, "Training step")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmic_fast.reference.mmd import mmd


def noise_losses(noise: Tensor, predictions: Tensor) -> Tensor:
    """Mean squared error of the first prediction, `mmd(noise, prediction)` of each other.

    Args:
        noise: [B, C] floating; half types are computed in float32.
        predictions: [S, B, C], dtype and device of `noise`.

    Returns:
        [S] of that dtype.
    """
    dtype = predictions.dtype
    if dtype in (torch.float16, torch.bfloat16):
        return noise_losses(noise.float(), predictions.float()).to(dtype)
    error = F.mse_loss(predictions[0], noise)
    return torch.stack([error, *(mmd(noise, prediction) for prediction in predictions[1:])])
