"""How sure a prediction is (docs/algorithm.md, "Calibration and confidence")."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffmic_fast.calibration.conformal import check_coverage, prediction_sets
from diffmic_fast.calibration.novelty import FLAG_P_VALUE, image_statistics

if TYPE_CHECKING:
    from diffmic_fast.calibration.calibration import Calibration
    from diffmic_fast.models.prediction import Prediction

_TINY = 1e-300
_MAX_TERMS = 500


class Confidence(NamedTuple):
    """Measures of confidence of B predictions.

    Attributes:
        width: [B], interval width (Han et al. 2022): difference of the 97.5 and 2.5 percentiles, over the samples, of
            the predicted class's probability. NaN for a single sample.
        p_value: [B] float64, two-sided paired t-test over the samples between the two most probable classes (Han et
            al. 2022). NaN for a single sample. Where the difference is the same in all samples, 1 if it is 0 and
            otherwise 0. It measures the noise of sampling, which more samples reduce, not whether the label is right.
        agreement: [B], share of the samples whose own label is the predicted one.
        prediction_set: [B, C] bool, conformal set, or None without a calibration of these probabilities.
        novelty: [B], share of the validation images that are at least as far from the training images, or None.
        flagged: [B] bool, whether `novelty` is at most the limit, or None.
    """

    width: Tensor
    p_value: Tensor
    agreement: Tensor
    prediction_set: Tensor | None = None
    novelty: Tensor | None = None
    flagged: Tensor | None = None


def confidence(
    prediction: Prediction,
    calibration: Calibration | None = None,
    *,
    images: Tensor | None = None,
    coverage: float = 0.9,
    flag_p_value: float = FLAG_P_VALUE,
) -> Confidence:
    """Measures of confidence of a prediction.

    Args:
        prediction: From `DiffMIC.predict`.
        calibration: `DiffMIC.calibration` of the model that predicted. Required if the prediction is calibrated.
        images: [B, 3, H, W], the images of the prediction, for `novelty`.
        coverage: Share of images whose class is to be in their prediction set, in (0, 1).
        flag_p_value: Images are flagged up to this `novelty`, which is the share of false alarms.

    Raises:
        ValueError: `coverage` is out of range, or the prediction is calibrated and there is no calibration.
    """
    check_coverage(coverage)
    if prediction.calibrated and calibration is None:
        raise ValueError(
            "confidence: calibration must be given for calibrated probabilities, got None"
        )
    label = prediction.label[:, None]
    each = sample_probabilities(prediction, calibration)
    own = each.gather(2, label[:, :, None].expand(-1, each.shape[1], 1))[:, :, 0]
    sets = novelty = flagged = None
    if prediction.calibrated and calibration is not None:
        sets = prediction_sets(
            prediction.probabilities, calibration.scores.to(label.device), coverage
        )
    detector = None if calibration is None else calibration.novelty
    if detector is not None and images is not None and prediction.features is not None:
        distance = detector.distance(prediction.features, image_statistics(images))
        novelty = detector.p_value(distance)
        flagged = novelty <= flag_p_value
    return Confidence(
        interval_width(own),
        paired_t_test(*_two_best(prediction.probabilities, each)),
        (each.argmax(dim=2) == label).float().mean(dim=1),
        sets,
        novelty,
        flagged,
    )


def sample_probabilities(prediction: Prediction, calibration: Calibration | None) -> Tensor:
    """[B, S, C], the probabilities of each sample, calibrated if the prediction is."""
    if not prediction.calibrated or calibration is None:
        return prediction.samples.softmax(dim=-1)
    return calibration.sample_probabilities(prediction.samples, prediction.guidance[:, 0])


def interval_width(values: Tensor) -> Tensor:
    """[B], difference of the 97.5 and 2.5 percentiles of values [B, S], linearly interpolated; NaN if S is 1."""
    if values.shape[1] < 2:
        return values.new_full((len(values),), torch.nan)
    bounds = values.quantile(values.new_tensor([0.025, 0.975]), dim=1)
    return bounds[1] - bounds[0]


def _two_best(probabilities: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S] each, the samples' probabilities of the most and the second most probable class."""
    best = probabilities.topk(2, dim=1).indices[:, None].expand(-1, each.shape[1], -1)
    return tuple(each.gather(2, best).unbind(dim=2))  # type: ignore[return-value]


def paired_t_test(x: Tensor, y: Tensor) -> Tensor:
    """Two-sided p-values of the paired t-test between x [B, S] and y [B, S].

    Returns:
        [B] float64 in [0, 1]; NaN if S is 1. Where x - y is constant, 1 if it is 0 and otherwise 0.
    """
    difference = x.double() - y.double()
    count = difference.shape[1]
    if count < 2:
        return difference.new_full((len(difference),), torch.nan)
    mean, deviation = difference.mean(dim=1), difference.std(dim=1)
    # Equal differences have a standard deviation of their rounding.
    constant = (difference == difference[:, :1]).all(dim=1)
    statistic = mean / torch.where(constant, torch.ones_like(deviation), deviation) * count**0.5
    p = student_t_p_value(statistic, count - 1)
    return torch.where(constant, (difference[:, 0] == 0).double(), p)


def student_t_p_value(statistic: Tensor, degrees: int) -> Tensor:
    """Two-sided p-value of Student's t: the regularised incomplete beta function I_x(degrees / 2, 1 / 2).

    x = degrees / (degrees + t^2); by a continued fraction (Numerical Recipes, 6.4) in float64.

    Args:
        statistic: [B].
        degrees: At least 1.
    """
    square = statistic.double().square()
    x = degrees / (degrees + square)
    a, b = x.new_tensor(degrees / 2), x.new_tensor(0.5)
    # The fraction converges fast below this x; above it that of the complement does.
    direct = x < (a + 1) / (a + b + 2)
    complement = square / (degrees + square)
    first, second = torch.where(direct, a, b), torch.where(direct, b, a)
    value = _beta_fraction(torch.where(direct, x, complement), first, second)
    front = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    front = torch.exp(front + torch.xlogy(a, x) + torch.xlogy(b, complement))
    result = front * value / first
    return torch.where(direct, result, 1.0 - result).clamp(0.0, 1.0)


def _beta_fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    c = torch.ones_like(x)
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    result = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            result = result * c * d
        if bool(((c * d - 1.0).abs() < 1e-15).all()):
            break
    return result


def _away_from_zero(value: Tensor) -> Tensor:
    return torch.where(value.abs() < _TINY, torch.full_like(value, _TINY), value)
