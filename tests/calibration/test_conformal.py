"""Conformal prediction sets: the quantile by hand, coverage on new images, and sets that are never empty."""

from __future__ import annotations

import math

import pytest
import torch

from diffmic_fast.calibration.conformal import (
    conformal_scores,
    empirical_p_value,
    prediction_sets,
    score_quantile,
)


def test_the_quantile_has_the_finite_sample_correction() -> None:
    scores = torch.arange(1, 10) / 10  # nine scores
    assert score_quantile(scores, 0.9) == pytest.approx(0.9)  # ceil(10 * 0.9) = 9th
    assert score_quantile(scores, 0.5) == pytest.approx(0.5)
    assert score_quantile(scores, 0.51) == pytest.approx(0.6)
    assert score_quantile(scores, 0.91) == math.inf
    assert score_quantile(torch.arange(1, 20) / 20, 0.55) == pytest.approx(
        0.55
    )  # 20 * 0.55 = 11.000000000000002


def test_scores_are_those_of_the_labels() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    torch.testing.assert_close(conformal_scores(p, torch.tensor([0, 2])), torch.tensor([0.3, 0.7]))


def test_sets_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.98, 0.01, 0.01]])
    scores = torch.tensor([0.05, 0.1, 0.7])
    found = prediction_sets(p, scores, 0.75)  # limit 0.7
    assert found.tolist() == [[True, False, False], [True, True, False], [True, False, False]]
    # Limit 0.1: the most probable class stays although its score is above it.
    assert prediction_sets(p, scores, 0.5).sum(dim=1).tolist() == [1, 1, 1]
    # Three scores do not support 90 %.
    assert bool(prediction_sets(p, scores, 0.9).all())


@pytest.mark.parametrize("coverage", [0.6, 0.9])
def test_new_images_are_covered(coverage: float) -> None:
    """Mean over 200 splits of 100 calibration images, for a classifier that is overconfident."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    p = (3 * logits).softmax(dim=1)
    covered = []
    for part in range(200):
        here = slice(200 * part, 200 * part + 100)
        new = slice(200 * part + 100, 200 * part + 200)
        sets = prediction_sets(p[new], conformal_scores(p[here], labels[here]), coverage)
        covered.append(sets.gather(1, labels[new][:, None]).float().mean())
    assert coverage - 0.005 <= float(torch.stack(covered).mean()) <= coverage + 0.02


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.1, math.nan])
def test_coverage_out_of_range_is_rejected(coverage: float) -> None:
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\), got"):
        prediction_sets(torch.eye(3), torch.zeros(30), coverage)


def test_p_values_count_the_value_itself() -> None:
    reference = torch.tensor([1.0, 2.0, 2.0, 4.0])
    found = empirical_p_value(torch.tensor([0.0, 2.0, 3.0, 5.0]), reference)
    torch.testing.assert_close(found, torch.tensor([1.0, 4 / 5, 2 / 5, 1 / 5]))
