"""A table of images as a data set that PyTorch's loaders read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffmic_fast.data.decode import load_image
from diffmic_fast.data.table import ImageTable
from diffmic_fast.data.transforms import ImageTransform


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Images of a table: (image float32 [3, H, W], label, index).

    What augmentation does to an image is decided by (seed, epoch, index) alone, so a resumed run,
    another order or another number of workers sees the same images.

    Attributes:
        table: the images and labels.
        transform: applied to their pixels.
    """

    def __init__(
        self,
        table: ImageTable,
        transform: ImageTransform,
        *,
        seed: int = 0,
        cache: bool = False,
        shared: bool = False,
    ) -> None:
        """Read images on demand.

        Args:
            table: what to read.
            transform: see `transforms.training_transform` and `evaluation_transform`.
            seed: of the augmentation.
            cache: keep prepared images in memory, 3 * size**2 bytes each.
            shared: keep them in memory that a loader's worker processes share (of which containers
                may have little).
        """
        self.table = table
        self.transform = transform
        self._seed = seed
        # Shared, because workers may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._prepared: Tensor | None = None
        self._known: Tensor | None = None
        if cache:
            shape = (len(table), 3, transform.size, transform.size)
            self._prepared = torch.empty(shape, dtype=torch.uint8)
            self._known = torch.zeros(len(table), dtype=torch.bool)
            if shared:
                self._prepared.share_memory_()
                self._known.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Number the epoch, which decides the augmentation together with seed and index."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Image, label and index.

        Raises:
            UnreadableImageError: the file is missing or damaged, by its name.
        """
        prepared = self._prepare(index)
        key = np.random.SeedSequence([self._seed % 2**64, int(self._epoch), index])
        # The transforms draw from torch's global generator; it gets its own state back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
            image = self.transform.finish(prepared)
        return image, self.table.entries[index].label, index

    def _prepare(self, index: int) -> Tensor:
        if self._known is not None and self._prepared is not None and self._known[index]:
            return self._prepared[index]
        source = self.table.entries[index].source
        prepared = self.transform.prepare(load_image(source, bit_depth=self.transform.bit_depth))
        if self._known is not None and self._prepared is not None:
            self._prepared[index] = prepared
            self._known[index] = True
        return prepared
