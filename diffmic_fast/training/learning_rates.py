"""Learning rates at a fractional epoch (docs/algorithm.md, "Training step").

PyTorch's schedulers count steps and put their state into the optimizer's, which published checkpoints do not have.
"""

from __future__ import annotations

import math


def half_cosine(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 along half a cosine."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warmup_cosine(
    epoch: float, *, rate: float, minimum: float, warmup: float, epochs: float
) -> float:
    """Learning rate at a fractional epoch: linear from 0 over `warmup` epochs, then a half-cosine to `minimum`.

    A warm-up of `epochs` or longer leaves no epoch for the cosine.
    """
    if epoch < warmup:
        return rate * epoch / warmup
    return half_cosine((epoch - warmup) / max(epochs - warmup, 1e-12), rate, minimum)
