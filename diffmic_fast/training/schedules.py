"""Learning rates, the moving average of weights, and the order of images (spec 5)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diffmic_fast.distributed.fsdp import own_share, share_of


def half_cosine(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 along half a cosine."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warmup_cosine(
    epoch: float, *, rate: float, minimum: float, warmup: float, epochs: float
) -> float:
    """Learning rate at a fractional epoch: linear from 0 over `warmup`, then a half-cosine.

    A warm-up as long as the run or longer leaves no room for the cosine.
    """
    if epoch < warmup:
        return rate * epoch / warmup
    return half_cosine((epoch - warmup) / max(epochs - warmup, 1e-12), rate, minimum)


class MovingAverage:
    """Exponential moving average of a module's trainable parameters, by name.

    average <- decay * average + (1 - decay) * parameter, started at the parameters' first values.
    Buffers (running statistics) are not averaged, as in published checkpoints. Of divided parameters
    (`parallel.divide`) each process has its share of the average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = module
        self.values = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the module's present parameters."""
        parameters = dict(self.module.named_parameters())
        averages = [own_share(value) for value in self.values.values()]
        present = [own_share(parameters[name]) for name in self.values]
        torch._foreach_lerp_(averages, present, 1.0 - self.decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the averages, by name, from whole ones."""
        with torch.no_grad():
            for name, value in self.values.items():
                own_share(value).copy_(own_share(share_of(values[name], value)))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the module has the averages as its parameters."""
        parameters = dict(self.module.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.values}
        with torch.no_grad():
            for name, value in self.values.items():
                own_share(parameters[name]).copy_(own_share(value))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    own_share(parameters[name]).copy_(own_share(value))


def epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int, *, least: int = 2
) -> list[list[int]]:
    """Image indices of each batch of an epoch, the same for the same seed and epoch.

    A last batch of fewer than `least` images joins the one before it: batch normalisation over one row has
    no variance, and dropping the image would lose it.
    """
    if count < least:
        raise ValueError(f"training: at least {least} training images are needed, got {count}")
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(mixed)
    order = torch.randperm(count, generator=generator).tolist()
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if len(batches[-1]) < least and len(batches) > 1:
        last = batches.pop()
        batches[-1] = batches[-1] + last
    return batches
