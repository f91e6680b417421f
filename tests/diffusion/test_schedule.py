"""Noise schedules and the forward process against recorded numbers."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.diffusion import SCHEDULES, make_betas, make_schedule, q_sample


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_the_recorded_ones(golden, name):
    torch.testing.assert_close(make_betas(name, 100), golden("schedules")[name], rtol=1e-6, atol=0)


def test_tables_are_the_recorded_ones(record, schedule):
    torch.testing.assert_close(schedule.betas, record["betas"])
    torch.testing.assert_close(schedule.sqrt_alpha_bar, record["sqrt_alpha_bar"])
    torch.testing.assert_close(
        schedule.sqrt_one_minus_alpha_bar, record["sqrt_one_minus_alpha_bar"]
    )


def test_cosine_scales_the_deviation():
    plain = make_schedule("cosine", 50)
    expected = torch.sqrt(1 - plain.alpha_bar) * 0.9999
    assert torch.equal(plain.sqrt_one_minus_alpha_bar, expected)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 2, 1000])
def test_betas_of_any_length(name, timesteps):
    betas = make_betas(name, timesteps)
    assert betas.shape == (timesteps,) and betas.dtype == torch.float32
    assert bool(((betas >= 0) & (betas <= 1)).all())


def test_q_sample_is_the_recorded_one(record, schedule):
    y_t = q_sample(record["y0"], record["y_hat"], schedule, record["t"], record["noise"])
    torch.testing.assert_close(y_t, record["q_sample"], rtol=1e-5, atol=1e-5)


def test_q_sample_broadcasts_over_branches(record, schedule):
    prior = torch.stack((record["y_hat"], record["y_global"], record["y_local"]))
    branches = q_sample(record["y0"], prior, schedule, record["t"], record["noise"])
    for branch, mean in zip(branches, prior, strict=True):
        alone = q_sample(record["y0"], mean, schedule, record["t"], record["noise"])
        assert torch.equal(branch, alone)


def test_invalid_schedules_are_rejected():
    with pytest.raises(ValueError, match=r"schedule must be one of linear.*got 'square'"):
        make_betas("square", 10)
    with pytest.raises(ValueError, match="timesteps must be at least 1, got 0"):
        make_betas("linear", 0)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\]"):
        make_schedule("linear", 10, 0.1, 1.5)
