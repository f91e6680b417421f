"""Distance of images from the training images (docs/algorithm.md, "Calibration and confidence").

Features of a trained encoder alone do not tell unknown images from known ones: training collapses what it never saw
onto the classes. Statistics of the pixels do not depend on training. A detector therefore combines three distances:

1. Mahalanobis distance of the statistics, with a shrunk covariance (Ledoit and Wolf 2004).
2. Distance of the statistics to the 5th nearest training image (Sun et al. 2022), for training images of several kinds.
3. Mahalanobis distance of the encoder's features, with the covariance of a probabilistic PCA (Tipping and Bishop 1999;
   Lee et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmic_fast.calibration.conformal import empirical_p_value

# Training images that a detector is fitted to; more are thinned out evenly.
MAX_TRAINING_IMAGES = 2048
MIN_TRAINING_IMAGES = 50
# An image is flagged from this p-value on: 5 % false alarms.
FLAG_P_VALUE = 0.05

_GRID = 4  # the image as GRID x GRID mean colours
_SCALES = 4  # resolutions at which gradients are measured
_QUANTILES = 9  # of each channel's values
_SMALLEST_SQUARE = 1e-6
_SMALLEST_SCALE = 1e-3
_NEIGHBOUR = 5
_COMPONENTS = 64
_FEATURE_ROWS = 1024
# Quantile of the validation images' distances at which each of the three counts as 1. The features get less of the
# false alarms, because they often tell little.
_LEVELS = (0.95, 0.95, 0.99)


def image_statistics(images: Tensor) -> Tensor:
    """Statistics of the pixels of an image.

    Mean colours of a 4 x 4 grid, standard deviation and quantiles of each channel, logarithms of the mean squared
    horizontal and vertical gradients at four resolutions, and of the variance between the channels.

    Args:
        images: [B, 3, H, W], as the model takes them; H and W at least 2.

    Returns:
        [B, 103] float32.

    Raises:
        ValueError: `images` have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 2:
        raise ValueError(
            f"image_statistics: images must be [B, 3, H, W] with H, W >= 2, got {tuple(images.shape)}"
        )
    x = images.float()
    values = x.flatten(2).sort(dim=2).values
    positions = torch.linspace(
        0, values.shape[2] - 1, _QUANTILES, dtype=torch.float32, device=x.device
    ).long()
    between = (x - x.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2, 3))
    parts = [
        F.adaptive_avg_pool2d(x, _GRID).flatten(1),
        x.std(dim=(2, 3), correction=0),
        values[:, :, positions].flatten(1),
        _log_root(between)[:, None],
    ]
    for _ in range(_SCALES):
        parts.append(_log_root(x.diff(dim=3).square().mean(dim=(2, 3))))
        parts.append(_log_root(x.diff(dim=2).square().mean(dim=(2, 3))))
        if min(x.shape[2:]) >= 4:
            x = F.avg_pool2d(x, 2)
    return torch.cat(parts, dim=1)


def _log_root(squares: Tensor) -> Tensor:
    return (squares + _SMALLEST_SQUARE).log() / 2


@dataclass(frozen=True, eq=False)
class NoveltyDetector:
    """Distances from the training images; all tensors are float32 on the CPU.

    Attributes:
        statistics_mean: [P], of the training images' statistics.
        statistics_scale: [P], their standard deviation.
        whitening: [P, P], to uncorrelated standardised statistics.
        neighbours: [R, P], standardised statistics of training images.
        feature_mean: [F].
        feature_scale: [F].
        basis: [K, F], principal directions of the standardised features.
        variances: [K], along the directions.
        residual_variance: [], along every other direction.
        centre: [3], median of the validation images' distances of each kind.
        spread: [3], quantile of them minus the median.
        reference: [n] in ascending order, the combined distances of the validation images.
    """

    statistics_mean: Tensor
    statistics_scale: Tensor
    whitening: Tensor
    neighbours: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    basis: Tensor
    variances: Tensor
    residual_variance: Tensor
    centre: Tensor
    spread: Tensor
    reference: Tensor

    def distance(self, features: Tensor, statistics: Tensor) -> Tensor:
        """[B] float32, the largest of the three distances, each relative to those of the validation images.

        Args:
            features: [B, F] of the encoder (`DiffMIC.encode`).
            statistics: [B, P] of the same images (`image_statistics`), on the same device.

        Raises:
            ValueError: The features have another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.feature_mean):
            raise ValueError(
                f"NoveltyDetector: features must be [B, {len(self.feature_mean)}], got {tuple(features.shape)}"
            )
        each = self._distances(features.float(), statistics.float())
        device = features.device
        return ((each - self.centre.to(device)) / self.spread.to(device)).amax(dim=1)

    def p_value(self, distance: Tensor) -> Tensor:
        """[B], the share of validation images that are at least as far, the image itself counted among them."""
        return empirical_p_value(distance, self.reference.to(distance.device))

    def referred_to(self, features: Tensor, statistics: Tensor) -> NoveltyDetector:
        """The same training images, with the distances of other validation images [n] as the reference."""
        each = self._distances(features.float(), statistics.float())
        centre = each.quantile(0.5, dim=0)
        levels = [each[:, i].quantile(level) for i, level in enumerate(_LEVELS)]
        spread = torch.stack(levels) - centre
        spread = torch.maximum(spread, 1e-6 * (1.0 + centre.abs()))
        detector = replace(self, centre=centre.cpu(), spread=spread.cpu())
        reference = detector.distance(features, statistics).sort().values
        return replace(detector, reference=reference.cpu())

    def _distances(self, features: Tensor, statistics: Tensor) -> Tensor:
        """[B, 3], the distances of the three kinds."""
        device = features.device
        z = (statistics - self.statistics_mean.to(device)) / self.statistics_scale.to(device)
        whitened = z @ self.whitening.to(device).T
        # Differences, not products, so that close rows keep their digits.
        between = torch.cdist(
            z, self.neighbours.to(device), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = between.kthvalue(min(_NEIGHBOUR, between.shape[1]), dim=1).values
        x = (features - self.feature_mean.to(device)) / self.feature_scale.to(device)
        along = x @ self.basis.to(device).T
        rest = (x.square().sum(dim=1) - along.square().sum(dim=1)).clamp_min(0.0)
        squared = (along.square() / self.variances.to(device)).sum(dim=1)
        squared = squared + rest / self.residual_variance.to(device)
        return torch.stack([whitened.norm(dim=1), nearest, squared.sqrt()], dim=1)


def fit_novelty(
    features: Tensor,
    statistics: Tensor,
    validation_features: Tensor,
    validation_statistics: Tensor,
) -> NoveltyDetector:
    """Fit a detector to training images, and its reference distances to validation images.

    Training images are nearer to themselves than new ones are, so that their own distances give no threshold.

    Args:
        features: [N, F] of the training images, of which at most 2048, evenly spaced, are used.
        statistics: [N, P].
        validation_features: [n, F].
        validation_statistics: [n, P].

    Raises:
        ValueError: Fewer than 50 training images.
    """
    if len(features) < MIN_TRAINING_IMAGES:
        raise ValueError(
            f"fit_novelty: there must be at least {MIN_TRAINING_IMAGES} training images, got {len(features)}"
        )
    chosen = evenly_spaced(len(features), MAX_TRAINING_IMAGES)
    features, statistics = features[chosen].double().cpu(), statistics[chosen].double().cpu()
    z, mean, scale = _standardised(statistics)
    x, feature_mean, feature_scale = _standardised(
        features[evenly_spaced(len(features), _FEATURE_ROWS)]
    )
    basis, variances, residual = _principal_components(x)
    tensors = {
        "statistics_mean": mean,
        "statistics_scale": scale,
        "whitening": _whitening(z),
        "neighbours": z,
        "feature_mean": feature_mean,
        "feature_scale": feature_scale,
        "basis": basis,
        "variances": variances,
        "residual_variance": residual,
    }
    detector = NoveltyDetector(
        **{name: tensor.float().contiguous() for name, tensor in tensors.items()},
        centre=torch.zeros(3, dtype=torch.float32, device="cpu"),
        spread=torch.ones(3, dtype=torch.float32, device="cpu"),
        reference=torch.zeros(1, dtype=torch.float32, device="cpu"),
    )
    return detector.referred_to(validation_features.cpu(), validation_statistics.cpu())


def evenly_spaced(count: int, most: int) -> list[int]:
    """All indices below `count`, or `most` of them at equal distances."""
    return [i * count // most for i in range(most)] if count > most else list(range(count))


def _standardised(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with mean 0 and standard deviation 1 by column, the mean and the deviation."""
    mean = rows.mean(dim=0)
    scale = rows.std(dim=0, correction=0).clamp_min(_SMALLEST_SCALE)
    return (rows - mean) / scale, mean, scale


def _whitening(z: Tensor) -> Tensor:
    """[P, P], the inverse Cholesky factor of the covariance of z [N, P], shrunk as by Ledoit and Wolf (2004)."""
    count, size = z.shape
    covariance = z.T @ z / count
    level = covariance.trace() / size
    identity = torch.eye(size, dtype=z.dtype, device=z.device)
    dispersion = (covariance - level * identity).square().sum()
    squares = z.square()
    error = (squares.T @ squares / count - covariance.square()).sum() / count
    share = (error / dispersion.clamp_min(1e-12)).clamp(1e-6, 1.0)
    factor = torch.linalg.cholesky((1.0 - share) * covariance + share * level * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _principal_components(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading directions [K, F] of rows [N, F], the variances along them [K] and along the others []."""
    count, width = x.shape
    number = min(_COMPONENTS, count // 8, width - 1)
    # Of the smaller of the two products, which have the same eigenvalues.
    values, vectors = torch.linalg.eigh(x @ x.T / count if count < width else x.T @ x / count)
    values, vectors = values.flip(0)[:number], vectors.flip(1)[:, :number]
    if count < width:
        vectors = F.normalize(x.T @ vectors, dim=0)
    total = x.square().sum() / count
    residual = ((total - values.sum()) / (width - number)).clamp_min(_SMALLEST_SQUARE)
    return vectors.T, torch.maximum(values, residual), residual
