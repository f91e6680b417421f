"""Checks of the images of a run, before its first epoch."""

from __future__ import annotations

from collections.abc import Iterable

from diffmic_fast.checkpoint import Checkpoint
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.scan import describe, find_unreadable
from diffmic_fast.data.table import ImageTable
from diffmic_fast.distributed.processes import Processes
from diffmic_fast.training.datasets import digest


def check_training_images(config: RunConfig, table: ImageTable, saved: Checkpoint | None) -> None:
    """Raise ValueError if the training images do not fit the model, or are not those of a resumed checkpoint."""
    if len(table.classes) != config.model.classes:
        raise ValueError(
            f"training: the data has {len(table.classes)} classes ({', '.join(table.classes)}), the configuration "
            f"says model.classes={config.model.classes}; set one of them"
        )
    if saved is not None and saved.extras["data_digest"] != digest(table):
        raise ValueError(
            f"resume: the training images are not those {saved.path} was trained with (their names, labels or "
            f"order differ; {len(table)} images now); restore them, or start anew in another folder"
        )


def check_readable(config: RunConfig, tables: Iterable[ImageTable], processes: Processes) -> None:
    """Collective: raise ValueError, with all names, if images cannot be read."""
    reason = ""
    if processes.is_rank_zero:
        data = config.data
        sources = [entry.source for table in tables for entry in table.entries]
        unreadable = find_unreadable(
            sources, bit_depth=data.augmentation.bit_depth, extent=data.scan
        )
        reason = f"data: {describe(unreadable)}" if unreadable else ""
    processes.raise_together(reason)
