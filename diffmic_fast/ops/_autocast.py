"""Autocast: operations that are float32 throughout take half-precision arguments as float32 and give float32.

That is what PyTorch does for its losses and norms, and here for every operation but `conditional_linear`, whose product
is in autocast's dtype, and `rois`, which hands pixels on in their own. Float64 stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights

_HALF = (torch.float16, torch.bfloat16)


def active(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is."""
    return torch.is_autocast_enabled(tensor.device.type)


def off(tensor: Tensor) -> torch.autocast:
    """A block without autocast there."""
    return torch.autocast(tensor.device.type, enabled=False)


def single(tensor: Tensor) -> Tensor:
    """The tensor as float32 where it is of half precision."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def single_layer(layer: ConditionalLayer) -> ConditionalLayer:
    """The same of a layer's tensors."""
    return ConditionalLayer(*map(single, layer))


def single_weights(weights: DenoiserWeights) -> DenoiserWeights:
    """The same of a denoiser's."""
    first, second = map(single_layer, weights.hidden)
    return weights._replace(
        conditioning=single_layer(weights.conditioning),
        hidden=(first, second),
        output_weight=single(weights.output_weight),
        output_bias=single(weights.output_bias),
    )


def keep_statistics(layer: ConditionalLayer, taken: ConditionalLayer) -> None:
    """Write running statistics, updated in `single_layer`'s copies, where they came from."""
    for name in ("running_mean", "running_var"):
        own, copy = getattr(layer, name), getattr(taken, name)
        if own is not copy:
            own.copy_(copy)
