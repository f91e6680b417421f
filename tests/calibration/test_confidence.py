"""Measures of confidence: interval width, t-test, agreement, and what is missing without a calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffmic_fast.calibration import Calibration, Scaling, confidence
from diffmic_fast.calibration.confidence import (
    interval_width,
    paired_t_test,
    student_t_p_value,
)
from diffmic_fast.models import Prediction


@pytest.mark.parametrize("degrees", [1, 2, 7, 31, 999])
def test_student_t_against_scipy(degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = torch.tensor([0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.5, 10.0, 50.0, -2.0, -40.0]).double()
    expected = 2 * stats.t.sf(np.abs(values.numpy()), degrees)
    np.testing.assert_allclose(
        student_t_p_value(values, degrees).numpy(), expected, rtol=1e-9, atol=1e-300
    )


def test_student_t_of_one_degree_is_the_cauchy_distribution() -> None:
    values = torch.tensor([0.0, 1.0, 3.0**0.5]).double()
    expected = torch.tensor([1.0, 0.5, 1 / 3]).double()
    torch.testing.assert_close(student_t_p_value(values, 1), expected)


def test_paired_t_test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(7, 9, generator=generator), torch.rand(7, 9, generator=generator)
    expected = stats.ttest_rel(x.double().numpy(), y.double().numpy(), axis=1).pvalue
    np.testing.assert_allclose(paired_t_test(x, y).numpy(), expected, rtol=1e-9)


def test_a_constant_difference_and_a_single_sample() -> None:
    x = torch.tensor([[0.5, 0.5, 0.5], [0.75, 0.5, 0.25]])
    y = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.25, 0.0]])
    assert paired_t_test(x, y).tolist() == [1.0, 0.0]
    assert bool(paired_t_test(x[:, :1], y[:, :1]).isnan().all())
    assert bool(interval_width(x[:, :1]).isnan().all())


def test_interval_width_is_that_of_numpy_percentiles() -> None:
    values = torch.rand(5, 13, generator=torch.Generator().manual_seed(1))
    low, high = np.percentile(values.numpy(), [2.5, 97.5], axis=1)
    np.testing.assert_allclose(interval_width(values).numpy(), high - low, rtol=1e-5)


def prediction(samples: torch.Tensor) -> Prediction:
    batch, count, classes = samples.shape
    guidance = torch.full((batch, 3, classes), 1 / classes)
    return Prediction.from_states(samples.reshape(1, batch * count, classes), guidance, count)


def calibration(scores: torch.Tensor) -> Calibration:
    identity = Scaling("temperature", 1.0, 0.0, torch.zeros(3))
    return Calibration("ddim", 5, 0.0, 4, len(scores), Scaling("temperature", 9.0, 0.0, torch.zeros(3)),
                       identity, scores, scores)  # fmt: skip


SAMPLES = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]]])


def test_published_probabilities() -> None:
    found = confidence(prediction(SAMPLES))
    each = SAMPLES[0].softmax(dim=1)
    assert float(found.agreement) == 0.75
    low, high = np.percentile(each[:, 0].numpy(), [2.5, 97.5])
    assert float(found.width) == pytest.approx(high - low)
    assert float(found.p_value) == pytest.approx(
        float(paired_t_test(each[None, :, 0], each[None, :, 1]))
    )
    assert (found.prediction_set, found.novelty, found.flagged) == (None, None, None)


def test_calibrated_probabilities() -> None:
    own = calibration(torch.linspace(0, 0.5, 30))
    found = confidence(prediction(SAMPLES).calibrate(own), own, coverage=0.5)
    assert found.prediction_set is not None and found.prediction_set.tolist() == [
        [True, False, False]
    ]
    each = (9 * SAMPLES[0]).softmax(dim=1)[:, 0]
    low, high = np.percentile(each.numpy(), [2.5, 97.5])
    assert float(found.width) == pytest.approx(high - low, rel=1e-5)
    assert found.novelty is None
    # Published probabilities have no set, although there is a calibration.
    assert confidence(prediction(SAMPLES), own).prediction_set is None


def test_bad_arguments_are_named() -> None:
    own = calibration(torch.linspace(0, 0.5, 30))
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\), got 1\.5"):
        confidence(prediction(SAMPLES), own, coverage=1.5)
    with pytest.raises(ValueError, match="calibration must be given for calibrated probabilities"):
        confidence(prediction(SAMPLES).calibrate(own))


def test_a_single_sample_has_no_interval() -> None:
    found = confidence(prediction(SAMPLES[:, :1]))
    assert math.isnan(float(found.width)) and math.isnan(float(found.p_value))
    assert float(found.agreement) == 1.0
