"""The reverse chain, from noise around the prior to the label vector (docs/algorithm.md, "Sampling")."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmic_fast.reference import philox
from diffmic_fast.reference.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.reference.conditioning import conditioning

# Noise of this many timesteps is drawn at a time, so that its hundred small operations are paid once for all of them.
_NOISE_BLOCK = 64


class DenoiserWeights(NamedTuple):
    """Weights of the denoiser without its image encoder.

    Attributes:
        conditioning: first conditional layer, 2C -> F.
        hidden: the two conditional layers F -> F.
        output_weight: [C, F].
        output_bias: [C].
        eps: of the three layers' BatchNorm.
    """

    conditioning: ConditionalLayer
    hidden: tuple[ConditionalLayer, ConditionalLayer]
    output_weight: Tensor
    output_bias: Tensor
    eps: tuple[float, float, float] = (1e-5, 1e-5, 1e-5)


class StepTable(NamedTuple):
    """A sampler as the coefficients of its n steps (docs/algorithm.md, "Sampling").

    Step i, at timestep t with s = sqrt(alpha_bar_t) and q = sqrt(1 - alpha_bar_t), estimates

        y0 = (y - (1 - s) prior - q eps) / s

    and moves to  y0_weight * y0 + y_weight * y + prior_weight * prior + eps_weight * eps + sigma * z.

    The table is on the CPU.

    Attributes:
        timesteps: [n] int64, decreasing.
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar: [n] float32, s and q.
        y0_weight, y_weight, prior_weight, eps_weight, sigma: [n] float32.
        start: the timestep that addresses the noise of the initial state: T, one above every timestep.
    """

    timesteps: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    y0_weight: Tensor
    y_weight: Tensor
    prior_weight: Tensor
    eps_weight: Tensor
    sigma: Tensor
    start: int

    def coefficients(self) -> Tensor:
        """[7, n], the columns from `sqrt_alpha_bar` to `sigma`."""
        return torch.stack([getattr(self, name) for name in COEFFICIENTS])


# Older versions of torch.compile can neither slice a NamedTuple nor read its `_fields`.
COEFFICIENTS = StepTable._fields[1:-1]


def predict_noise(
    features: Tensor, y: Tensor, guidance: Tensor, weights: DenoiserWeights, timesteps: Tensor
) -> Tensor:
    """Return eps [M, C] of the denoiser in evaluation mode.

    Args:
        features: [M, F] float32.
        y, guidance: [M, C] float32.
        weights: the denoiser.
        timesteps: [M] or [1] int64.
    """
    h = conditioning(features, y, guidance, weights.conditioning, timesteps, eps=weights.eps[0])
    for layer, eps in zip(weights.hidden, weights.eps[1:], strict=True):
        h = conditional_linear(h, layer, timesteps, eps=eps)
    return F.linear(h, weights.output_weight, weights.output_bias)


def estimate_y0(y: Tensor, prior: Tensor, eps: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """Return y0 = (y - (1 - s) prior - q eps) / s, the label from which the noise eps leads to y."""
    return 1.0 / s * (y - (1.0 - s) * prior - eps * q)


def denoise(
    features: Tensor,
    prior: Tensor,
    guidance: Tensor,
    weights: DenoiserWeights,
    steps: StepTable,
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    image_ids: Tensor | None = None,
    sample_ids: Tensor | None = None,
    trajectory: bool = False,
) -> Tensor:
    """Run a reverse chain over M independent rows.

    Args:
        features: [M, F] float32, image features after `norm`.
        prior: [M, C] float32, mean of the initial state.
        guidance: [M, C] float32, label distribution that conditions the denoiser.
        weights: the denoiser in evaluation mode.
        steps: the sampler, n steps.
        noise: [n, M, C] float32, in the order of use: noise[0] is added to the prior, noise[i] is z of step i - 1;
            the last step uses none. None: Philox noise of `seed`, `image_ids` and `sample_ids` at `steps.start` and
            at each step's timestep.
        seed: 64-bit key of the Philox noise.
        image_ids, sample_ids: [M] int64, image and sample of each row. None: 0 … M-1, and 0.
        trajectory: return all states instead of the last one.

    Returns:
        y_0 [M, C] float32, or with `trajectory` all states [n + 1, M, C], y_0 last.
    """
    return chain(
        lambda y, timestep: predict_noise(features, y, guidance, weights, timestep),
        prior,
        steps,
        noise=noise,
        seed=seed,
        image_ids=image_ids,
        sample_ids=sample_ids,
        trajectory=trajectory,
    )


def chain(
    predict: Callable[[Tensor, Tensor], Tensor],
    prior: Tensor,
    steps: StepTable,
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    image_ids: Tensor | None = None,
    sample_ids: Tensor | None = None,
    trajectory: bool = False,
) -> Tensor:
    """Run the reverse chain of any denoiser.

    Args:
        predict: eps [M, C] from the state [M, C] and the timestep [1].
        prior, steps, noise, seed, image_ids, sample_ids, trajectory: as in `denoise`.

    Returns:
        As `denoise`.
    """
    draw = _noise_source(prior, steps, noise, seed, image_ids, sample_ids)
    y = prior + draw(0)
    states = [y]
    timesteps = steps.timesteps.to(prior.device, non_blocking=steps.timesteps.device.type == "cpu")
    for i in range(len(timesteps)):
        eps = predict(y, timesteps[i : i + 1])
        y0 = estimate_y0(y, prior, eps, steps.sqrt_alpha_bar[i], steps.sqrt_one_minus_alpha_bar[i])
        mean = steps.y0_weight[i] * y0 + steps.y_weight[i] * y + steps.prior_weight[i] * prior
        y = mean + steps.eps_weight[i] * eps
        if steps.sigma[i] > 0:
            y = y + steps.sigma[i] * draw(i + 1)
        states.append(y)
    return torch.stack(states) if trajectory else y


def _noise_source(
    prior: Tensor,
    steps: StepTable,
    noise: Tensor | None,
    seed: int,
    image_ids: Tensor | None,
    sample_ids: Tensor | None,
) -> Callable[[int], Tensor]:
    """draw(0) makes the chain's beginning, draw(i) is z of step i - 1, each [M, C]."""
    if noise is not None:
        return lambda i: noise[i]
    rows, classes = prior.shape
    device = prior.device
    images = torch.arange(rows, device=device) if image_ids is None else image_ids.to(device)
    samples = torch.zeros_like(images) if sample_ids is None else sample_ids
    moments = torch.cat((steps.timesteps.new_tensor([steps.start]), steps.timesteps))
    blocks: dict[int, Tensor] = {}

    def draw(i: int) -> Tensor:
        number, offset = divmod(i, _NOISE_BLOCK)
        if number not in blocks:
            blocks.clear()
            block = moments[number * _NOISE_BLOCK : (number + 1) * _NOISE_BLOCK]
            blocks[number] = philox.normal(seed, images, samples, block, classes)
        return blocks[number][offset]

    return draw
