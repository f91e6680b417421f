"""A batch in micro-batches, over all processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmic_fast.distributed.processes import Processes, split_sizes


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        images: of this process; in feature steps their features.
        labels: of this process.
        counts: number of images of every process, in this micro-batch.
        total: number of images of all processes, in the whole batch.
        last: whether it is the last of the step.
        prior: [3, B, C], the guidance model's label distributions; None where it is run.
    """

    images: Tensor
    labels: Tensor
    counts: list[int]
    total: int
    last: bool
    prior: Tensor | None = None

    @property
    def share(self) -> float:
        """Weight of this process's mean losses in those of the whole batch."""
        return len(self.images) / self.total


def split_batch(
    images: Tensor, labels: Tensor, parts: int, processes: Processes
) -> list[MicroBatch]:
    """Collective: split a batch into nearly equal micro-batches with at least two images of every process each."""
    counts = processes.all_gather(len(images))
    parts = max(min(parts, min(counts) // 2), 1)
    sizes = [split_sizes(count, parts) for count in counts]
    own = sizes[processes.rank]
    return [
        MicroBatch(some, theirs, [each[i] for each in sizes], sum(counts), i == parts - 1)
        for i, (some, theirs) in enumerate(zip(images.split(own), labels.split(own), strict=True))
    ]


def check_batch(images: Tensor, labels: Tensor, classes: int, processes: Processes) -> None:
    """Collective: raise ValueError on every process if a batch is invalid, so that none waits for one that raised.

    A single process leaves the checks to the models.
    """
    if processes.world_size == 1:
        return
    reason = ""
    if not bool(torch.isfinite(images).all()):
        reason = "the images hold not-a-number or infinity"
    elif not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        reason = f"labels must be in [0, {classes - 1}]"
    processes.raise_together(reason)
