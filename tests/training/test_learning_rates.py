"""Learning rates against their formulas."""

import math

import pytest

from diffmic_fast.training.learning_rates import warmup_cosine


def test_learning_rate_of_the_published_schedule():
    def rate(epoch):
        return warmup_cosine(epoch, rate=1e-3, minimum=0.0, warmup=40, epochs=1000)

    assert rate(0) == 0.0
    assert rate(10) == pytest.approx(0.25e-3)
    assert rate(40) == pytest.approx(1e-3)
    assert rate(520) == pytest.approx(0.5e-3)
    assert rate(760) == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 0.75)))
    assert rate(1000) == pytest.approx(0.0, abs=1e-12)


def test_no_warmup_and_a_warmup_longer_than_the_run():
    assert warmup_cosine(0, rate=2.0, minimum=0.5, warmup=0, epochs=4) == 2.0
    assert warmup_cosine(4, rate=2.0, minimum=0.5, warmup=0, epochs=4) == pytest.approx(0.5)
    assert warmup_cosine(3, rate=2.0, minimum=0.0, warmup=8, epochs=4) == 0.75
