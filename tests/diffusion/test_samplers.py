"""Step tables of the samplers."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.denoise import denoise


def test_ddpm_walks_every_timestep(schedule):
    steps = make_steps(schedule, "ddpm")
    assert steps.timesteps.tolist() == list(range(99, -1, -1)) and steps.start == 100
    assert torch.equal(make_steps(schedule, "ddpm", 100).sigma, steps.sigma)


def test_truncated_has_the_first_timesteps_and_ddim_the_whole_chain(schedule):
    assert make_steps(schedule, "ddpm_truncated", 4).timesteps.tolist() == [3, 2, 1, 0]
    assert make_steps(schedule, "ddim", 4).timesteps.tolist() == [99, 74, 49, 24]
    assert make_steps(schedule, "ddim", 1).timesteps.tolist() == [99]
    assert make_steps(schedule, "ddim", 100).timesteps.tolist() == list(range(99, -1, -1))


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", None), ("ddpm_truncated", 7), ("ddim", 7)])
def test_last_step_returns_the_estimate(schedule, sampler, steps):
    table = make_steps(schedule, sampler, steps)
    last = [float(column[-1]) for column in table[3:8]]
    assert last == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert all(bool(torch.isfinite(column).all()) for column in table[:-1])


def test_ddim_with_the_exact_noise_returns_the_label(schedule):
    y_0, prior = torch.tensor([0.0, 1.0]), torch.tensor([0.7, 0.3])
    steps = make_steps(schedule, "ddim", 10)
    s, q = steps.sqrt_alpha_bar, steps.sqrt_one_minus_alpha_bar
    eps = torch.tensor([0.4, -1.3])
    y = s[0] * y_0 + (1 - s[0]) * prior + q[0] * eps
    for i in range(10):
        estimate = (y - (1 - s[i]) * prior - q[i] * eps) / s[i]
        y = (
            steps.y0_weight[i] * estimate
            + steps.y_weight[i] * y
            + steps.prior_weight[i] * prior
            + steps.eps_weight[i] * eps
        )
    torch.testing.assert_close(y, y_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "timesteps"), [("const", 1000), ("linear", 2000), ("jsd", 100)])
def test_schedules_whose_alpha_bar_reaches_zero_are_rejected(name, timesteps):
    schedule = make_schedule(name, timesteps)
    with pytest.raises(
        ValueError,
        match=r"cannot walk this schedule: .* got 0 at timestep .* label cannot be estimated",
    ):
        make_steps(schedule, "ddpm")
    assert len(make_steps(schedule, "ddpm_truncated", 50).timesteps) == 50
    if name != "jsd":
        assert bool((make_steps(schedule, "ddim", 20).sqrt_alpha_bar > 0).all())


def test_ddim_with_full_variance_is_ddpm(schedule, weights, features, record):
    """With all timesteps and eta = 1 the two samplers are the same chain in other coefficients."""
    prior = record["y_hat"]
    chains = [
        denoise(features, prior, prior, weights, make_steps(schedule, *arguments), seed=5)
        for arguments in (("ddpm",), ("ddim", 100, 1.0))
    ]
    torch.testing.assert_close(*chains, rtol=0, atol=2e-3)


def test_invalid_arguments_are_rejected(schedule):
    with pytest.raises(ValueError, match=r"one of ddpm, ddpm_truncated, ddim; got 'euler'"):
        make_steps(schedule, "euler")
    with pytest.raises(ValueError, match=r"'ddpm' walks all 100 timesteps, got steps=60"):
        make_steps(schedule, "ddpm", 60)
    with pytest.raises(ValueError, match=r"steps must be in \[1, 100\] .*'ddim', got None"):
        make_steps(schedule, "ddim")
    with pytest.raises(ValueError, match=r"steps must be in \[1, 100\] .* got 101"):
        make_steps(schedule, "ddpm_truncated", 101)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
        make_steps(schedule, "ddim", 10, 1.5)
    with pytest.raises(ValueError, match=r"eta must be 0 for the sampler 'ddpm', got 0\.5"):
        make_steps(schedule, "ddpm", None, 0.5)


@pytest.mark.parametrize("name", ["linear", "quad", "sigmoid", "cosine", "cosine_anneal", "const"])
def test_tables_are_finite_for_every_schedule(name):
    table = make_steps(make_schedule(name, 200), "ddpm")
    for column in table[:-1]:
        assert bool(torch.isfinite(column).all())


def test_a_schedule_must_come_first():
    with pytest.raises(TypeError, match=r"schedule must be a Schedule \(make_schedule\), got str"):
        make_steps("ddim", make_schedule("linear", 100))
