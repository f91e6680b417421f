"""`denoise` against recorded chains, and what its noise depends on."""

from __future__ import annotations

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, TRITON, device_of
from denoise_cases import weights_on

from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, estimate_y0, predict_noise


def test_recorded_noise_and_estimate(record, features, weights):
    y, t = record["q_sample"], record["t"]
    eps = predict_noise(features, y, record["y_hat"], weights, t)
    torch.testing.assert_close(eps, record["eval/eps"], rtol=1e-5, atol=1e-5)
    q = record["sqrt_one_minus_alpha_bar"][t][:, None]
    y_0 = estimate_y0(y, record["y_hat"], eps, torch.sqrt(1 - q.square()), q)
    torch.testing.assert_close(y_0, record["eval/y0_reparam"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", *CUDA_BACKENDS, TRITON])
@pytest.mark.parametrize("count", [60, 100])
def test_recorded_chain(record, features, weights, schedule, count, backend):
    device = device_of(backend)
    steps = make_steps(schedule, "ddpm_truncated", count)
    prior = record["y_hat"].to(device)
    arguments = (features.to(device), prior, prior, weights_on(device, weights), steps)
    noise = record[f"loop/{count}/z"].to(device)
    states = denoise(*arguments, noise=noise, trajectory=True, backend=backend)
    kept = states.cpu()[record[f"loop/{count}/kept"]]
    torch.testing.assert_close(kept, record[f"loop/{count}/trajectory"], rtol=0, atol=1e-3)
    last = denoise(*arguments, noise=noise, backend=backend)
    assert torch.equal(last, states[-1]) and states.shape == (count + 1, 8, 5)


@pytest.mark.parametrize(
    "sampler", [("ddpm", None, 0.0), ("ddpm_truncated", 70, 0.0), ("ddim", 9, 0.7)]
)
def test_a_row_does_not_depend_on_its_neighbours(record, features, weights, schedule, sampler):
    steps, prior = make_steps(schedule, *sampler), record["y_hat"]
    ids, samples = torch.arange(8) * 10**15, torch.arange(8) % 3
    together = denoise(
        features, prior, prior, weights, steps, seed=4, image_ids=ids, sample_ids=samples
    )
    order = torch.tensor([6, 2, 3])
    some = denoise(
        features[order],
        prior[order],
        prior[order],
        weights,
        steps,
        seed=4,
        image_ids=ids[order],
        sample_ids=samples[order],
    )
    torch.testing.assert_close(some, together[order], rtol=1e-4, atol=1e-4)
    other = denoise(
        features, prior, prior, weights, steps, seed=5, image_ids=ids, sample_ids=samples
    )
    assert float((other - together).abs().max()) > 1e-2


def test_ddim_without_variance_draws_once(record, features, weights, schedule):
    """Noise of the steps is not looked at when eta is 0: only the beginning is random."""
    steps, prior = make_steps(schedule, "ddim", 12), record["y_hat"]
    noise = torch.randn(12, 8, 5)
    first = denoise(features, prior, prior, weights, steps, noise=noise)
    noise[1:] = float("nan")
    assert torch.equal(denoise(features, prior, prior, weights, steps, noise=noise), first)


def test_empty_batch(features, weights, schedule):
    steps = make_steps(schedule, "ddim", 3)
    empty = torch.zeros(0, 5)
    assert denoise(features[:0], empty, empty, weights, steps).shape == (0, 5)


def test_a_single_feature_of_any_strides(schedule):
    """A column of one element has no stride to speak of."""

    def layer(width):
        weight = torch.randn(3, 7).t()[:1, :1] if width == 1 else torch.randn(1, width)
        return ConditionalLayer(weight, *(torch.rand(*s) for s in [(1,), (101, 1), *[(1,)] * 4]))

    weights = DenoiserWeights(
        layer(6), (layer(1), layer(1)), torch.randn(7, 5).t()[:3, :1], torch.randn(3)
    )
    inputs = torch.randn(2, 1), torch.rand(2, 3), torch.rand(2, 3)
    steps = make_steps(schedule, "ddim", 3)
    found = denoise(*inputs, weights, steps, backend="cpu")
    torch.testing.assert_close(found, denoise(*inputs, weights, steps, backend="reference"))


def test_bad_steps_are_named(features, record, weights, schedule):
    steps, prior = make_steps(schedule, "ddim", 3), record["y_hat"]
    call = features, prior, prior, weights
    with pytest.raises(ValueError, match=r"steps\.sigma must be \[n=3\], got \(2,\)"):
        denoise(*call, steps._replace(sigma=steps.sigma[:2]))
    with pytest.raises(TypeError, match=r"steps\.y_weight must be a floating-point tensor"):
        denoise(*call, steps._replace(y_weight=torch.zeros(3, dtype=torch.int64)))
    none = type(steps)(*(column[:0] for column in steps[:-1]), steps.start)
    with pytest.raises(ValueError, match="at least one step if noise is given"):
        denoise(*call, none, noise=torch.zeros(0, 8, 5))


def test_bad_arguments_are_named(features, record, weights, schedule):
    steps, prior = make_steps(schedule, "ddim", 3), record["y_hat"]
    with pytest.raises(ValueError, match=r"denoise: prior must be \[M=8, C\], got \(7, 5\)"):
        denoise(features, prior[:7], prior, weights, steps)
    with pytest.raises(ValueError, match=r"noise must be \[n=3, M=8, C=5\], got \(2, 8, 5\)"):
        denoise(features, prior, prior, weights, steps, noise=torch.zeros(2, 8, 5))
    with pytest.raises(ValueError, match=r"image_ids must be \[M=8\]"):
        denoise(features, prior, prior, weights, steps, image_ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"weight must be"):
        denoise(features, prior[:, :4], prior[:, :4], weights, steps)
    longer = make_steps(make_schedule("linear", 400), "ddim", 3)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 100\], got 132 … 399"):
        denoise(features, prior, prior, weights, longer)


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_layers_of_other_schedules_are_named(features, record, weights, schedule, backend):
    """Each backend reads the rows of the sampler's timesteps; one layer has fewer, or more, than the first."""
    steps, prior = make_steps(schedule, "ddim", 3), record["y_hat"]
    first, second = weights.hidden
    for gamma in (second.gamma[:-1], torch.cat([second.gamma, second.gamma[:1]])):
        other = weights._replace(hidden=(first, second._replace(gamma=gamma)))
        with pytest.raises(ValueError, match=r"gamma must be \[rows=101, out=64\], got"):
            denoise(features, prior, prior, other, steps, backend=backend)
