"""Targets of the cross-entropies of guidance model and image encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_labels(labels: Tensor, classes: int, smoothing: float, *, ordinal: bool) -> Tensor:
    """Target distributions: 1 - smoothing on the label, the rest spread evenly.

    Args:
        labels: [B] int64 in [0, C).
        classes: C >= 2.
        smoothing: in [0, 1).
        ordinal: spread over the one or two neighbouring classes instead of all C - 1 others.

    Returns:
        [B, C] float32.
    """
    hard = F.one_hot(labels, classes).float()
    if ordinal:
        others = torch.zeros_like(hard)
        others[:, 1:] += hard[:, :-1]
        others[:, :-1] += hard[:, 1:]
    else:
        others = 1.0 - hard
    return (1.0 - smoothing) * hard + smoothing * others / others.sum(dim=1, keepdim=True)


def class_weights(labels: Tensor, balance: float) -> Tensor:
    """Probabilities, up to a factor, with which images are drawn: (images of their class)^-balance.

    Args:
        labels: [N] int64.
        balance: in [0, 1].

    Returns:
        [N] float64.
    """
    return torch.bincount(labels).double().pow(-balance)[labels]
