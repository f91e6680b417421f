"""Measures against values computed by hand."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics as sk

from diffmic_fast.inference.metrics import (
    brier_score,
    compute_metrics,
    expected_calibration_error,
    negative_log_likelihood,
)


def one_hot(predicted, classes=3, sure=0.8):
    p = np.full((len(predicted), classes), (1 - sure) / (classes - 1))
    p[np.arange(len(predicted)), predicted] = sure
    return p


def test_measures_of_three_classes():
    labels = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 1, 1, 1, 2, 0])
    m = compute_metrics(one_hot(predicted), labels)
    assert m.accuracy == pytest.approx(4 / 6)
    assert m.balanced_accuracy == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert m.macro_f1 == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    assert m.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    # Quadratic weights: observed 1 + 4; expected sum_ij (i - j)^2 * true_i * predicted_j / 6.
    expected = sum((i - j) ** 2 * 2 * n / 6 for i in range(3) for j, n in enumerate([2, 3, 1]))
    assert m.kappa == pytest.approx(1 - 5 / expected)
    assert m.ece == pytest.approx(0.8 - 4 / 6)
    assert m.nll == pytest.approx(-(4 * math.log(0.8) + 2 * math.log(0.1)) / 6)
    assert m.brier == pytest.approx((4 * (0.04 + 2 * 0.01) + 2 * (0.64 + 0.81 + 0.01)) / 6)
    assert m.notes == {}


def test_calibration_error_bins():
    p = np.array([[0.55, 0.45], [0.57, 0.43], [0.95, 0.05], [1.0, 0.0]])
    labels = np.array([0, 1, 0, 1])
    # Bins of width 1/15: 0.55 and 0.57 are in (8/15, 9/15], 0.95 and 1.0 in the last one.
    by_hand = (abs(0.55 + 0.57 - 1) + abs(1.95 - 1)) / 4
    assert expected_calibration_error(p, labels) == pytest.approx(by_hand)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_log_likelihood_and_brier_score_match_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, 0.5), 129)
    labels = rng.integers(0, classes, 129)
    every = np.arange(classes)
    assert negative_log_likelihood(p, labels) == pytest.approx(
        sk.log_loss(labels, p, labels=every), rel=1e-9
    )
    assert brier_score(p, labels) == pytest.approx(
        sk.brier_score_loss(labels, p, labels=every, scale_by_half=False), rel=1e-9
    )


def test_a_probability_of_zero_is_clipped():
    p = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert negative_log_likelihood(p, np.array([0, 1])) == 0.0
    smallest = 2.0**-126
    assert negative_log_likelihood(p, np.array([1, 1])) == pytest.approx(-math.log(smallest) / 2)
    assert brier_score(p, np.array([1, 1])) == 1.0


def test_auc_of_a_perfect_and_of_a_binary_classifier():
    labels = np.array([0, 1, 2, 0, 1, 2])
    assert compute_metrics(one_hot(labels), labels).auc_ovo == 1.0
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]])
    assert compute_metrics(p, np.array([0, 0, 1, 1])).auc_ovo == pytest.approx(0.75)


def test_a_missing_class_gives_nan_and_the_reason():
    m = compute_metrics(one_hot([0, 1, 1]), np.array([0, 1, 1]))
    assert math.isnan(m.auc_ovo) and "no image of class 2" in m.notes["auc_ovo"]
    assert m.accuracy == 1.0 and m.macro_f1 == 1.0
    assert json.loads(json.dumps(m.to_dict(), allow_nan=False))["auc_ovo"] is None
    single = compute_metrics(one_hot([1, 1]), np.array([1, 1]))
    assert math.isnan(single.kappa) and "one class" in single.notes["kappa"]


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[np.nan, 1.0]], [0], "must be finite, got NaN or infinity in 1 of 1 rows"),
        ([[0.7, 0.7]], [0], "add up to 1"),
        ([[1.2, -0.2]], [0], "at least 0"),
        ([[0.5, 0.5]], [2], "labels must be in 0..1, got 2..2"),
        ([[0.5, 0.5]], [0.0], "labels must be whole numbers"),
        ([[0.5, 0.5]], [0, 1], "labels must be whole numbers"),
        ([[1.0]], [0], "C >= 2"),
        (np.zeros((0, 2)), np.zeros(0, dtype=np.int64), "at least one image"),
    ],
)
def test_bad_input_is_rejected(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(np.array(probabilities), np.array(labels))
