"""Images as a model takes them."""

from __future__ import annotations

import hashlib

from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.table import ImageTable
from diffmic_fast.data.transforms import evaluation_transform, training_transform


def make_dataset(config: RunConfig, table: ImageTable, *, train: bool) -> ImageDataset:
    """The images of `table` for the model of `config`, augmented if they are to train it."""
    make = training_transform if train else evaluation_transform
    transform = make(config.model.image_size, config.data.augmentation)
    return ImageDataset(
        table,
        transform,
        seed=config.seed,
        cache=config.data.cache,
        shared=config.data.workers > 0,
    )


def digest(table: ImageTable) -> str:
    """SHA-256 of the names and labels of a table in order, to detect that the data has changed."""
    hashed = hashlib.sha256()
    for entry in table.entries:
        hashed.update(f"{entry.name}\0{entry.label}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()
