"""Bootstrap replicates against scikit-learn on the resampled images, and intervals with known ends."""

import math

import numpy as np
import pytest
import sklearn.metrics as sk

from diffmic_fast.inference.bootstrap import (
    MEASURES,
    Interval,
    auc_one_vs_one,
    bootstrap,
)
from diffmic_fast.inference.metrics import compute_metrics


def classifier(images, classes, seed=0, levels=None):
    """Probabilities and labels; probabilities are whole multiples of 1 / levels, for ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    p = rng.dirichlet(np.ones(classes), images) + 0.3 * np.eye(classes)[labels]
    p /= p.sum(axis=1, keepdims=True)
    return (p if levels is None else rng.multinomial(levels, p) / levels), labels


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_replicates_are_the_measures_of_the_resampled_images(classes):
    """The drawn indices are repeated here: seed, order and block size are part of the result."""
    p, labels = classifier(67, classes, seed=classes)
    found = bootstrap([p], labels, resamples=9, seed=5)[0]
    drawn = np.random.Generator(np.random.PCG64(5)).integers(0, 67, (9, 67))
    for r, indices in enumerate(drawn):
        expected = compute_metrics(p[indices], labels[indices])
        for name in MEASURES:
            assert found[name][r] == pytest.approx(getattr(expected, name), rel=1e-12), name


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("levels", [None, 2, 16])
def test_auc_equals_scikit_learn_with_ties(classes, levels):
    p, labels = classifier(129, classes, levels=levels)
    expected = sk.roc_auc_score(
        labels, p[:, 1] if classes == 2 else p, multi_class="ovo", average="macro"
    )
    assert auc_one_vs_one(p, labels, np.ones((1, 129)))[0] == pytest.approx(expected, rel=1e-12)


def test_auc_counts_weighted_pairs():
    p = np.array([[0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    labels = np.array([0, 1, 0, 1])
    # Positives 0.5 (weight 2) and 0.9 (weight 1), negatives 0.2 (weight 1) and 0.5 (weight 3).
    weights = np.array([[1.0, 2.0, 3.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    first, second = auc_one_vs_one(p, labels, weights)
    assert first == pytest.approx((2 * (1 + 3 / 2) + 1 * 4) / 12)
    assert math.isnan(second)


def test_blocks_do_not_change_the_replicates(monkeypatch):
    p, labels = classifier(31, 3)
    whole = bootstrap([p], labels, resamples=20, seed=1)[0]
    monkeypatch.setattr("diffmic_fast.inference.bootstrap._BLOCK_ELEMENTS", 100)
    blocks = bootstrap([p], labels, resamples=20, seed=1)[0]
    for name in MEASURES:
        np.testing.assert_array_equal(whole[name], blocks[name])


def test_the_seed_alone_decides():
    p, labels = classifier(40, 3)
    a, b, other = (bootstrap([p], labels, resamples=30, seed=s)[0] for s in (2, 2, 3))
    np.testing.assert_array_equal(a["accuracy"], b["accuracy"])
    assert not np.array_equal(a["accuracy"], other["accuracy"])


def test_classifiers_share_their_resamples():
    p, labels = classifier(40, 3)
    alone = bootstrap([p], labels, resamples=10)[0]
    other = np.roll(p, 1, axis=1)
    for together in (bootstrap([p, other], labels, 10)[0], bootstrap([other, p], labels, 10)[1]):
        np.testing.assert_array_equal(together["kappa"], alone["kappa"])


def test_the_interval_of_the_accuracy_has_the_binomial_width():
    """400 images, 300 of them right: standard error sqrt(0.75 * 0.25 / 400) = 0.02165."""
    labels = np.zeros(400, dtype=np.int64)
    labels[::2] = 1
    predicted = np.where(np.arange(400) % 4 < 3, labels, 1 - labels)
    p = np.eye(2)[predicted] * 0.8 + 0.1
    interval = Interval.from_replicates(bootstrap([p], labels, 4000)[0]["accuracy"])
    assert interval.resamples == 4000
    assert interval.low == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.004)
    assert interval.high == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.004)


def test_the_interval_lies_between_the_quantiles_of_the_defined_replicates():
    values = np.append(np.arange(101.0), [np.nan, np.nan])
    assert Interval.from_replicates(values) == pytest.approx((2.5, 97.5, 101))
    assert Interval.from_replicates(values, 0.5) == pytest.approx((25.0, 75.0, 101))
    low, high, resamples = Interval.from_replicates(np.full(3, np.nan))
    assert math.isnan(low) and math.isnan(high) and resamples == 0
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1"):
        Interval.from_replicates(values, 1.0)


def test_resamples_without_a_class_have_no_auc():
    """Of 10 images one is of class 2: a resample lacks it with probability 0.9 ** 10 = 0.35."""
    p, labels = classifier(10, 2)
    p = np.column_stack([p * 0.9, np.full(10, 0.1)])
    labels[7] = 2
    found = bootstrap([p], labels, resamples=1000)[0]
    assert Interval.from_replicates(found["auc_ovo"]).resamples == pytest.approx(650, abs=60)
    for name in ("accuracy", "macro_f1", "balanced_accuracy"):
        assert not np.isnan(found[name]).any()


def test_an_absent_class_has_no_auc_at_all():
    p, labels = classifier(12, 2)
    found = bootstrap([np.column_stack([p, np.zeros(12)])], labels, resamples=50)[0]
    assert Interval.from_replicates(found["auc_ovo"]).resamples == 0
    assert Interval.from_replicates(found["balanced_accuracy"]).resamples == 50


def test_one_image():
    found = bootstrap([np.array([[0.2, 0.8]])], np.array([1]), resamples=5)[0]
    assert found["accuracy"].tolist() == found["macro_f1"].tolist() == [1.0] * 5
    assert np.isnan(found["kappa"]).all() and np.isnan(found["auc_ovo"]).all()


def test_all_right():
    labels = np.arange(9) % 3
    found = bootstrap([np.eye(3)[labels]], labels, resamples=100)[0]
    for name in MEASURES:
        assert set(found[name][~np.isnan(found[name])].tolist()) == {1.0}


def test_bad_arguments_are_rejected():
    p, labels = classifier(5, 3)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        bootstrap([p], labels, resamples=0)
    p[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"got NaN or infinity in 1 of 5 rows \(first row 2\)"):
        bootstrap([p], labels)
