"""A table of images as a `torch.utils.data.Dataset`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffmic_fast.data.decode import load_image
from diffmic_fast.data.shared_array import SharedArray
from diffmic_fast.data.table import ImageTable
from diffmic_fast.data.transforms import ImageTransform


class _Array:
    """As `SharedArray`, in the memory of this process."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        # NumPy's zeros take no memory before they are written.
        flat = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        self.tensor = flat.view(dtype).view(shape)


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Images of a table, as (image [3, size, size] float32, label, index).

    The augmentation of an image is a function of (seed, epoch, index), so a resumed run, another order or another
    number of workers gives the same images.

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
        """Create the data set; files are read on demand.

        Args:
            table: the images and labels.
            transform: from `transforms.training_transform` or `evaluation_transform`.
            seed: of the augmentation.
            cache: keep images as `transform.prepare` returns them, in 3 * size**2 bytes each.
            shared: keep them in memory that the worker processes of a loader share (`SharedArray`).

        Raises:
            ValueError: there is not enough memory for the cache.
        """
        self.table = table
        self.transform = transform
        self._seed = seed
        # Shared, because workers may outlive an epoch.
        self._epoch = SharedArray((), torch.int64)
        # Images, and which of them are filled in.
        self._cache: tuple[SharedArray | _Array, SharedArray | _Array] | None = None
        if cache:
            make = SharedArray if shared else _Array
            shape = (len(table), 3, transform.size, transform.size)
            try:
                self._cache = make(shape, torch.uint8), make(shape[:1], torch.bool)
            except (OSError, MemoryError) as error:
                raise ValueError(
                    f"data.cache: there is no memory for {len(table)} images of {3 * transform.size**2} bytes each; "
                    f"set data.cache=false to decode them in every epoch ({error})"
                ) from error

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentation."""
        self._epoch.tensor.fill_(epoch)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Image, label and index.

        Raises:
            UnreadableImageError: the file is unreadable (`decode.load_image`).
        """
        prepared = self._prepare(index)
        key = np.random.SeedSequence([self._seed % 2**64, int(self._epoch.tensor), index])
        # The transforms draw from torch's global generator, whose state is restored.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
            image = self.transform.finish(prepared)
        return image, self.table.entries[index].label, index

    def _prepare(self, index: int) -> Tensor:
        if self._cache is not None and self._cache[1].tensor[index]:
            return self._cache[0].tensor[index]
        source = self.table.entries[index].source
        prepared = self.transform.prepare(load_image(source, bit_depth=self.transform.bit_depth))
        if self._cache is not None:
            images, filled = self._cache
            images.tensor[index] = prepared
            filled.tensor[index] = True
        return prepared
