"""Reliability tables, groups, risk against coverage and prediction sets against values computed by hand."""

import math

import numpy as np
import pytest

from diffmic_fast.inference.metrics import expected_calibration_error
from diffmic_fast.inference.reliability import (
    by_edges,
    by_quantile,
    reliability_table,
    risk_coverage,
    set_statistics,
)

R, W = True, False


def test_the_table_has_the_bins_of_the_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 257)
    labels = rng.integers(0, 4, 257)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    table = reliability_table(confidence, right)
    assert len(table) == 15 and sum(g.images for g in table) == 257
    assert table[0] == ("(0.000, 0.067]", 0, pytest.approx(math.nan, nan_ok=True),
                        pytest.approx(math.nan, nan_ok=True))  # fmt: skip
    gaps = [g.images * abs(g.accuracy - g.confidence) for g in table if g.images]
    assert sum(gaps) / 257 == pytest.approx(expected_calibration_error(p, labels))


def test_a_confidence_on_a_limit_is_in_the_lower_bin():
    table = reliability_table(np.array([0.5, 0.500001, 1.0]), np.array([R, W, R]), bins=2)
    assert [(g.images, g.accuracy) for g in table] == [(1, 1.0), (2, 0.5)]
    assert table[1].confidence == pytest.approx(0.7500005)


def test_quantile_groups():
    values = np.array([4.0, 1.0, 3.0, 2.0, 8.0, 6.0, 5.0, 7.0])
    right = np.array([R, W, R, W, R, R, W, R])
    groups = by_quantile(values, values / 10, right, 4)
    # In ascending order: 1 W, 2 W | 3 R, 4 R | 5 W, 6 R | 7 R, 8 R.
    assert [g.images for g in groups] == [2, 2, 2, 2]
    assert [g.accuracy for g in groups] == [0.0, 1.0, 0.5, 1.0]
    assert [g.confidence for g in groups] == pytest.approx([0.15, 0.35, 0.55, 0.75])
    assert groups[0].name.startswith("[1, ") and groups[-1].name.endswith(", 8]")


def test_equal_values_share_a_group_whatever_their_order():
    values = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    right = np.array([R, W, R, W, R])
    groups = by_quantile(values, np.full(5, 0.9), right, 4)
    assert [g.images for g in groups] == [4, 0, 0, 1]
    assert groups[0].accuracy == 0.5 and math.isnan(groups[1].accuracy)
    backwards = by_quantile(values[::-1], np.full(5, 0.9), right[::-1], 4)
    assert [g[:3] for g in backwards if g.images] == [g[:3] for g in groups if g.images]


def test_groups_by_limits():
    p_values = np.array([0.01, 0.05, 0.049, 0.9])
    groups = by_edges(
        p_values, np.full(4, 0.7), np.array([R, W, R, R]), [0.05], ["p < 0.05", "p >= 0.05"]
    )
    assert groups == [
        ("p < 0.05", 2, 1.0, pytest.approx(0.7)),
        ("p >= 0.05", 2, 0.5, pytest.approx(0.7)),
    ]


def test_risk_against_coverage():
    found = risk_coverage(np.array([0.6, 0.9, 0.8, 0.7]), np.array([W, R, W, R]))
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(found.risk, [0.0, 1 / 2, 1 / 3, 1 / 2])
    assert found.area == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found.at(0.5) == 1 / 2 and found.at(0.51) == pytest.approx(1 / 3)
    for coverage in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"coverage must be in \(0, 1\], got {coverage}"):
            found.at(coverage)


def test_a_coverage_of_k_images_in_n_is_not_missed_by_rounding():
    found = risk_coverage(np.arange(10.0)[::-1], np.array([R, R, R, W, W, W, W, W, W, W]))
    assert found.at(0.3) == 0.0 and found.at(0.1 * 3) == 0.0


def test_the_risk_of_tied_images_is_the_mean_over_their_orders():
    found = risk_coverage(np.array([0.9, 0.5, 0.5]), np.array([R, W, R]))
    # Orders R W R and R R W: the risk at two images is 1/2 or 0.
    np.testing.assert_allclose(found.risk, [0.0, 1 / 4, 1 / 3])
    swapped = risk_coverage(np.array([0.9, 0.5, 0.5]), np.array([R, R, W]))
    np.testing.assert_array_equal(found.risk, swapped.risk)


def test_risk_of_one_image_and_of_none_wrong():
    assert risk_coverage(np.array([0.4]), np.array([W])).area == 1.0
    assert risk_coverage(np.array([0.4, 0.9, 0.9]), np.array([R, R, R])).area == 0.0


def test_prediction_sets_overall_and_by_class():
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=bool)
    overall, *classes = set_statistics(sets, np.array([0, 1, 0, 1]))
    assert overall == (4, 0.5, 1.0, 1)
    assert classes[0] == (2, 0.5, 1.0, 0) and classes[1] == (2, 0.5, 1.0, 1)
    assert classes[2][0] == 0 and math.isnan(classes[2].coverage) and math.isnan(classes[2].size)


def test_values_that_are_not_finite_are_rejected():
    values, right = np.array([0.5, np.nan]), np.array([R, R])
    for call in (
        lambda: by_quantile(values, values, right, 2),
        lambda: by_edges(values, values, right, [0.1], ["a", "b"]),
        lambda: risk_coverage(values, right),
    ):
        with pytest.raises(ValueError, match="values must be finite, got nan at index 1"):
            call()
