"""BatchNorm folded into the preceding convolution, for inference.

In evaluation mode a BatchNorm is a per-channel scale and shift, which the convolution's weight and bias can take: one
pass over the activations less, and a result that differs by rounding. No folded weight is cached. A convolution's
weight is folded when it runs, from the module's own tensors, so that it is never stale, adds no state and needs the
memory of one layer's weight. What is cached is which BatchNorm reads which convolution (`layer_graph`).
"""

from __future__ import annotations

import math
from collections import Counter

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from diffmic_fast.models._torch_internals import (
    AnyBatchNorm,
    calls_only_forward,
    parameter_names,
    with_parameters,
)
from diffmic_fast.models.layer_graph import LayerGraph, StructureCache, copy_replacing, is_layer


def folded(network: nn.Module) -> nn.Module:
    """The same function in evaluation mode, its BatchNorms folded where that is faster.

    Args:
        network: Layers in evaluation mode; not changed.

    Returns:
        Modules that share the network's tensors and read them whenever they run. For use at once: after replacing a
        layer or adding a hook, call `folded` again.
    """
    return _folded(network) if calls_only_forward(network) else network


class FoldedConvolution(nn.Module):
    """A convolution and the BatchNorm that reads it, in the place of the convolution.

    Attributes:
        convolution, norm: The network's own layers.
        always: Fold also where `pays` is False.
    """

    always = False

    def __init__(self, convolution: nn.Conv2d, norm: AnyBatchNorm) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, h, w]."""
        convolution, norm = self.convolution, self.norm
        if (
            norm.training
            or norm.running_mean is None
            or norm.running_var is None
            # A replica of nn.DataParallel has its tensors elsewhere.
            or parameter_names(convolution) != {"weight", "bias"}
            or not (self.always or self.pays(images))
        ):
            return norm(convolution(images))
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        result = with_parameters(convolution, weight=weight, bias=bias)(images)
        if type(norm) is nn.BatchNorm2d:
            return result
        return norm.act(norm.drop(result))  # type: ignore[operator]

    def pays(self, images: Tensor) -> bool:
        """Whether scaling the weight moves less memory than normalising the result."""
        convolution = self.convolution
        pixels = images.numel() // (images.shape[1] * math.prod(convolution.stride))
        return convolution.weight[0].numel() <= pixels


def _fold(network: nn.Module) -> nn.Module:
    pairs = _find_pairs(network)
    # A layer in two places of the network may be followed by different layers there.
    places = Counter(part for _, part in network.named_modules(remove_duplicate=False))
    pairs = {c: n for c, n in pairs.items() if places[c] == places[n] == 1}
    norms = set(pairs.values())

    def replace(part: nn.Module) -> nn.Module | None:
        if part in pairs:
            return FoldedConvolution(part, pairs[part])  # type: ignore[arg-type]
        if part in norms:
            return nn.Identity()
        return part if is_layer(part) else None

    return copy_replacing(network, replace)


_folded = StructureCache(_fold)


def _find_pairs(network: nn.Module) -> dict[nn.Module, AnyBatchNorm]:
    """Convolutions whose result only one BatchNorm reads, in a network that is no single layer."""
    try:
        graph = LayerGraph(network)
    except Exception:
        # The forward takes no proxy. A Sequential only calls its layers in turn, so that each can be recorded alone.
        if type(network).forward is not nn.Sequential.forward:
            return {}
        parts = [part for part in network.children() if not is_layer(part)]
        return {c: n for part in parts for c, n in _find_pairs(part).items()}
    pairs = ((call, graph.norm_of(call)) for call in graph.calls())
    return {graph.layer(c): graph.layer(n) for c, n in pairs if n is not None}  # type: ignore[misc]
