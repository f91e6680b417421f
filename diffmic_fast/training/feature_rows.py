"""What the denoiser's layers read of augmented images, computed once for the epochs that train them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.models import DiffMIC, ImageEncoder


class FeatureRows(NamedTuple):
    """Rows of V augmented views of N images.

    Attributes:
        features: [V, N, channels] float32, of `ImageEncoder.pooled`.
        prior: [V, 3, N, C] float32, label distributions of the guidance model's branches.
        labels: [N] int64.
    """

    features: Tensor
    prior: Tensor
    labels: Tensor

    def batches(
        self, batches: Sequence[Sequence[int]], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features [B, channels], prior [3, B, C] and labels [B] of each batch of images, each in a random view.

        Args:
            batches: indices of images.
            generator: CPU generator of the views; one draw per batch.
        """
        for batch in batches:
            images = torch.tensor(batch)
            views = torch.randint(len(self.features), images.shape, generator=generator)
            prior = self.prior[views, :, images].transpose(0, 1)
            yield self.features[views, images], prior.contiguous(), self.labels[images]


@torch.no_grad()
def feature_rows(
    model: DiffMIC,
    dataset: ImageDataset,
    loader: Callable[[list[list[int]]], Iterable[tuple[Tensor, Tensor, Tensor]]],
    *,
    views: int,
    first_epoch: int,
    batch_size: int,
    precision: str,
    on_batch: Callable[[int], None],
) -> FeatureRows:
    """Compute the rows of all images of a data set.

    Args:
        model: on its device; runs in evaluation mode.
        dataset: augmented images. View v has the augmentation of epoch `first_epoch` + v.
        loader: loads the images, labels and indices of batches of indices, on the CPU.
        views: V.
        first_epoch: of the augmentation.
        batch_size: images at a time.
        precision: of the convolutions, "fp32" or "bf16" (`DiffMIC.guide`).
        on_batch: called with the number of images after each batch; may raise.

    Returns:
        The rows, on the CPU.

    Raises:
        ValueError: the encoder is not an `ImageEncoder`.
    """
    encoder = model.denoiser.encoder_x
    if not isinstance(encoder, ImageEncoder):
        raise ValueError(
            f"training.feature_epochs: the denoiser's encoder must be an ImageEncoder, got {type(encoder).__name__}"
        )
    device = next(model.parameters()).device
    count = len(dataset)
    indices = list(range(count))
    batches = [indices[i : i + batch_size] for i in range(0, count, batch_size)]
    features = torch.empty(views, count, encoder.g.in_features, dtype=torch.float32)
    prior = torch.empty(views, 3, count, model.config.classes, dtype=torch.float32)
    labels = torch.empty(count, dtype=torch.int64)
    for view in range(views):
        dataset.set_epoch(first_epoch + view)
        for batch, (images, theirs, _) in zip(batches, loader(batches), strict=True):
            rows = slice(batch[0], batch[-1] + 1)
            images = images.to(device)
            logits = model.guide(images, precision=precision).logits
            features[view, rows] = model.pool(images, precision=precision).cpu()
            prior[view, :, rows] = torch.stack(logits).float().softmax(dim=-1).cpu()
            labels[rows] = theirs
            on_batch(len(images))
    return FeatureRows(features, prior, labels)
