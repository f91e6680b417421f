"""Split-conformal prediction sets (docs/algorithm.md, "Calibration and confidence").

The score of an image is 1 minus the probability of its class (Sadinle et al. 2019, "least ambiguous set-valued
classifiers"), which gives the smallest sets on average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def conformal_scores(probabilities: Tensor, labels: Tensor) -> Tensor:
    """[N] float32 in ascending order: 1 minus the probability of each image's class.

    Args:
        probabilities: [N, C], of a classifier that was not fitted on these images.
        labels: [N] int64.
    """
    own = probabilities.float().gather(1, labels[:, None])[:, 0]
    return (1.0 - own).sort().values


def score_quantile(scores: Tensor, coverage: float) -> float:
    """The score that a new image's does not exceed with a probability of at least `coverage`.

    It is the ceil((n + 1) * coverage)-th smallest of the n scores, if images are exchangeable (Vovk et al. 2005).

    Args:
        scores: [n], in ascending order.
        coverage: In (0, 1).

    Returns:
        In [0, 1], or infinity where n scores do not support the coverage, which is then above n / (n + 1).

    Raises:
        ValueError: `coverage` is out of range.
    """
    check_coverage(coverage)
    # The product may exceed a whole number by its rounding.
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return math.inf if rank > len(scores) else float(scores[max(rank, 1) - 1])


def prediction_sets(probabilities: Tensor, scores: Tensor, coverage: float = 0.9) -> Tensor:
    """The classes whose score is within the quantile of the validation images' scores.

    The most probable class is always in the set. With too few scores for the coverage every class is.

    Args:
        probabilities: [B, C].
        scores: [n], from `conformal_scores`.
        coverage: Share of images whose class is to be in their set, in (0, 1).

    Returns:
        [B, C] bool.

    Raises:
        ValueError: `coverage` is out of range.
    """
    limit = score_quantile(scores, coverage)
    sets = (1.0 - probabilities.float()) <= limit
    return sets.scatter(1, probabilities.argmax(dim=1, keepdim=True), True)


def check_coverage(coverage: float) -> None:
    """Raise a ValueError unless 0 < coverage < 1."""
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"coverage must be in (0, 1), got {coverage}")


def empirical_p_value(values: Tensor, reference: Tensor) -> Tensor:
    """[B]: the share of `reference` and the value itself that are at least as large as each of the values [B].

    Args:
        values: [B].
        reference: [n], in ascending order.

    Returns:
        (1 + number of reference values >= value) / (n + 1), in (0, 1]: a conformal p-value (Bates et al. 2023).
    """
    at_least = len(reference) - torch.searchsorted(reference, values.to(reference.dtype))
    return (1 + at_least).to(reference.dtype) / (len(reference) + 1)
