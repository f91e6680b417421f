"""The order of the training images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def epoch_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    least: int = 2,
    weights: Tensor | None = None,
) -> list[list[int]]:
    """The indices of `count` images by batch, in an order of the seed and epoch; no image is dropped.

    With `weights` [count], `count` images are drawn with these probabilities (up to a factor), with replacement.

    A last batch of fewer than `least` images is joined to the one before it, for batch normalisation. Raises ValueError
    for fewer than `least` images.
    """
    if count < least:
        raise ValueError(f"training: at least {least} training images are needed, got {count}")
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(mixed)
    if weights is None:
        order = torch.randperm(count, generator=generator).tolist()
    else:
        drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
        order = drawn.tolist()
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if len(batches[-1]) < least and len(batches) > 1:
        last = batches.pop()
        batches[-1] += last
    return batches
