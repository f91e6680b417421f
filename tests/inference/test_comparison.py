"""Paired comparison: exact probabilities by hand and by scipy, differences on shared resamples."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from diffmic_fast.inference.bootstrap import bootstrap
from diffmic_fast.inference.comparison import Measured, compare, mcnemar
from diffmic_fast.inference.metrics import compute_metrics


def right(only_first, only_second, both=0, neither=0):
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return np.array(first, dtype=bool), np.array(second, dtype=bool)


def test_the_exact_p_value_is_the_binomial_tail_twice():
    # P(X <= 1) of 6 fair draws is (1 + 6) / 64.
    assert mcnemar(*right(5, 1, 7, 3)) == (5, 1, pytest.approx(2 * 7 / 64))
    assert mcnemar(*right(1, 5)) == (1, 5, pytest.approx(2 * 7 / 64))
    assert mcnemar(*right(30, 12, 100)).p_value == pytest.approx(2 * binom.cdf(12, 42, 0.5))


@pytest.mark.parametrize("case", [(0, 0, 4, 0), (3, 3, 1, 1), (1, 0, 0, 0), (0, 0, 0, 1)])
def test_balanced_or_without_a_disagreement_the_p_value_is_one(case):
    assert mcnemar(*right(*case)).p_value == 1.0


def test_the_images_must_be_the_same():
    with pytest.raises(ValueError, match=r"same images \[N\], got \(3,\) and \(2,\)"):
        mcnemar(np.ones(3, dtype=bool), np.ones(2, dtype=bool))


def measured(name, predicted, labels, replicates=None):
    p = np.eye(3)[predicted]
    return Measured(name, predicted == labels, compute_metrics(p, labels), replicates)


def test_differences_are_the_method_minus_the_baseline():
    labels = np.array([0, 0, 1, 1, 2, 2])
    method, baseline = np.array([0, 0, 1, 1, 2, 0]), np.array([0, 1, 1, 1, 0, 2])
    found = compare(measured("a", method, labels), measured("b", baseline, labels))
    assert found.baseline == "b" and found.mcnemar[:2] == (2, 1)
    assert found.differences["accuracy"].value == pytest.approx(1 / 6)
    # F1: 4/5, 1, 2/3 against 1/2, 4/5, 2/3.
    expected = (4 / 5 + 1 + 2 / 3) / 3 - (1 / 2 + 4 / 5 + 2 / 3) / 3
    assert found.differences["macro_f1"].value == pytest.approx(expected)
    assert all(d.interval is None for d in found.differences.values())
    assert found.to_dict()["differences"]["kappa"]["interval"] is None


def test_intervals_are_paired_by_image():
    """The method is right wherever the baseline is, and on a tenth of the images more: the difference is never below 0,
    and varies less than each accuracy does."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    baseline = np.where(np.arange(200) % 2, labels, (labels + 1) % 3)
    method = np.where(np.arange(200) % 10 == 0, labels, baseline)
    replicates = bootstrap([np.eye(3)[method], np.eye(3)[baseline]], labels, 1000)
    found = compare(
        measured("a", method, labels, replicates[0]),
        measured("b", baseline, labels, replicates[1]),
    )
    difference = found.differences["accuracy"]
    assert difference.value == pytest.approx(0.1)
    assert difference.interval.resamples == 1000
    # Standard error of the paired difference sqrt(0.1 * 0.9 / 200) = 0.0212, unpaired 0.0497.
    assert difference.interval.low == pytest.approx(0.1 - 1.96 * 0.0212, abs=0.008)
    assert difference.interval.high == pytest.approx(0.1 + 1.96 * 0.0212, abs=0.008)
    assert found.mcnemar == (20, 0, pytest.approx(2 * 0.5**20))


def test_a_method_against_itself():
    labels = np.array([0, 1, 2, 2])
    p = np.eye(3)[labels]
    replicates = bootstrap([p, p], labels, 50)
    both = [measured(n, labels, labels, r) for n, r in zip("ab", replicates, strict=True)]
    found = compare(*both)
    assert found.mcnemar == (0, 0, 1.0)
    assert found.differences["accuracy"] == (0.0, (0.0, 0.0, 50))


def test_a_measure_that_is_not_defined_has_no_difference():
    labels = np.zeros(3, dtype=np.int64)
    p = np.eye(3)[labels]
    replicates = bootstrap([p], labels, 20)[0]
    same = measured("a", labels, labels, replicates)
    kappa = compare(same, same).differences["kappa"]
    assert math.isnan(kappa.value) and kappa.interval.resamples == 0
