"""`denoise`: a whole reverse chain in one call."""

from __future__ import annotations

from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import denoise as reference
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable

__all__ = ["DenoiserWeights", "StepTable", "denoise"]


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
    backend: str = "auto",
) -> Tensor:
    """From noise around the prior to the label vector, over M independent rows (spec, section 6).

    Args:
        features: [M, F] floating, image features after `norm`.
        prior: [M, C], mean of the chain's beginning.
        guidance: [M, C], what the denoiser is conditioned on.
        weights: the denoiser in eval mode.
        steps: the sampler, n steps (`diffusion.make_steps`).
        noise: [n, M, C] in the order drawn: noise[0] makes the beginning, noise[i] is z of step i - 1. Without it,
            Philox noise addressed by (seed, image, sample, timestep).
        seed: 64-bit key of that noise.
        image_ids, sample_ids: [M] int64, the row's image and sample (default 0 … M-1, and 0).
        trajectory: return every state instead of the last.
        backend: a backend's name, or "auto".

    Returns:
        y_0 [M, C], or with `trajectory` [n + 1, M, C] from the beginning to y_0.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        RuntimeError: the backend asked for cannot serve.
    """
    args = Arguments("denoise")
    args.floating("features", features, "M F")
    args.floating("prior", prior, "M C")
    args.floating("guidance", guidance, "M C")
    args.sizes["n"] = len(steps.timesteps)
    if noise is not None:
        args.floating("noise", noise, "n M C")
    if image_ids is not None:
        args.integer("image_ids", image_ids, "M")
    if sample_ids is not None:
        args.integer("sample_ids", sample_ids, "M")
    _check_weights(args, weights, steps)
    resolve("denoise", backend, features.device)
    return reference.denoise(
        features,
        prior,
        guidance,
        weights,
        steps,
        noise=noise,
        seed=seed,
        image_ids=image_ids,
        sample_ids=sample_ids,
        trajectory=trajectory,
    )


def _check_weights(args: Arguments, weights: DenoiserWeights, steps: StepTable) -> None:
    sizes = args.sizes
    layers = (weights.conditioning, *weights.hidden)
    for layer, width in zip(layers, (2 * sizes["C"], sizes["F"], sizes["F"]), strict=True):
        inner = Arguments("denoise")
        inner.sizes = {"out": sizes["F"], "in": width, "B": len(steps.timesteps)}
        check_layer(inner, layer, steps.timesteps.to(layer.weight.device), "in", training=False)
    args.floating("output_weight", weights.output_weight, "C F")
    args.floating("output_bias", weights.output_bias, "C")
