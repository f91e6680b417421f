"""bfloat16 convolutions for inference on a CPU, each in one oneDNN call with the layers that follow it.

A convolution, the BatchNorm that reads it, the addition of a residual and the activation are one pass over the result,
without casts or float32 activations between them. A batch is processed in blocks of a few images, whose activations
stay in the cache.

As in `folding`, no folded weight is cached: weights are folded in float32 from the module's own tensors and rounded to
bfloat16 once per call, so that they are never stale. What is cached is the graph of the layers.

Supported are networks of torch, torchvision, timm and this package without hooks, all of whose layers are known.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from diffmic_fast.models._torch_internals import AnyBatchNorm, convolve, with_parameters
from diffmic_fast.models.layer_graph import (
    LayerGraph,
    StructureCache,
    is_known,
    is_layer,
    only_user,
)

# Activations of 8 images of 224 x 224 stay in a cache of 16 MiB. (Zen 4, one thread, ResNet-50, 32 images in blocks of
# 2, 4, 8, 16 and 32: 1343, 1325, 1293, 1297 and 1351 ms.)
_BLOCK_PIXELS = 8 * 224 * 224
# Activations without state, with TorchInductor's names of those that oneDNN computes after a convolution.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("none", []),
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class _Weights(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def fused(network: nn.Module) -> Fused | None:
    """The forward pass of a network in evaluation mode in bfloat16; None if a layer is not known or has a hook."""
    if is_layer(network) or not all(map(_is_batch_invariant, network.modules())):
        return None
    return _fused(network)


class Fused:
    """A network's forward pass; reads the network's tensors at every call.

    Attributes:
        graph: The calls of layers that remain.
        convolutions: By the target of their call.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        for call in graph.calls():
            if type(graph.layer(call)) is nn.Identity:
                _absorb(call, call.args[0])  # type: ignore[arg-type]
        order = {node: i for i, node in enumerate(graph.graph.nodes)}
        found: dict[Node, FusedConvolution] = {}
        for call in graph.calls():
            if graph.is_convolution(call):
                found[call] = _fuse(graph, call, order, found)
        self.convolutions = {str(call.target): layer for call, layer in found.items()}

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The network's result.

        Args:
            images: [B, 3, H, W] floating.
            dtype: Of weights, activations and result, bfloat16 or float32.
        """
        weights = {name: layer.weights(dtype) for name, layer in self.convolutions.items()}
        images = images.to(dtype, memory_format=torch.channels_last)
        count = -(-images.numel() // images.shape[1] // _BLOCK_PIXELS)
        blocks = images.tensor_split(min(count, images.shape[0]))
        half = dtype == torch.bfloat16  # the other layers run under autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            results = [_Pass(self, weights).run(block) for block in blocks]
        return results[0] if len(results) == 1 else torch.cat(results)


class _Pass(Interpreter):
    """One pass over the graph."""

    def __init__(self, network: Fused, weights: dict[str, _Weights]) -> None:
        super().__init__(nn.Module(), graph=network.graph.graph)
        self.network, self.weights = network, weights

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        convolution = self.network.convolutions.get(target)
        if convolution is not None:
            return convolution(*args, weights=self.weights[target])
        return self.network.graph.layers[int(target)](*args, **kwargs)


class FusedConvolution:
    """activation(norm(convolution(x)) + residual), all but the convolution optional.

    Attributes:
        convolution, norm, activation: The network's own layers, or None.
    """

    def __init__(self, convolution: nn.Conv2d, norm: AnyBatchNorm | None) -> None:
        self.convolution, self.norm = convolution, norm
        self.activation: nn.Module | None = None

    def weights(self, dtype: torch.dtype) -> _Weights:
        """The convolution's weight, channels last, and bias, with BatchNorm folded into them."""
        norm = self.norm
        weight, bias = self.convolution.weight, self.convolution.bias
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            # As `fuse_conv_bn_weights`, but that the bias is rounded once less.
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            weight = weight * scale[:, None, None, None]
            shift = -norm.running_mean if bias is None else bias - norm.running_mean
            bias = shift * scale
            if norm.bias is not None:
                bias = bias + norm.bias
        weight = weight.to(dtype, memory_format=torch.channels_last)
        return _Weights(weight, None if bias is None else bias.to(dtype))

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, weights: _Weights) -> Tensor:
        """[B, in, H, W] to [B, out, h, w]; a residual of that shape is overwritten with the result."""
        x = x.to(weights.weight.dtype)
        convolution, activation = self.convolution, self.activation
        if not _is_plain(convolution) or (
            residual is not None and residual.shape != _result_shape(convolution, x)
        ):
            result = with_parameters(convolution, **weights._asdict())(x)
            if residual is not None:
                result = result + residual
            return result if activation is None else activation(result)
        name, scalars = _ACTIVATIONS.get(type(activation), ("none", []))  # type: ignore[arg-type]
        if residual is not None and name != "relu":  # oneDNN has no other after an addition
            name = "none"
        result = convolve(x, *weights, convolution, name, scalars, residual)
        return result if activation is None or name != "none" else activation(result)


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether its attributes describe it completely."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def _result_shape(convolution: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    geometry = zip(
        x.shape[2:],
        cast(tuple[int, ...], convolution.padding),
        convolution.dilation,
        convolution.kernel_size,
        convolution.stride,
        strict=True,
    )
    sizes = [
        (n + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for n, pad, dil, kernel, step in geometry
    ]
    return (x.shape[0], convolution.out_channels, *sizes)


def _is_batch_invariant(part: nn.Module) -> bool:
    """Whether a layer is known and gives an image the same result in any batch."""
    if isinstance(part, AnyBatchNorm) and (part.training or part.running_mean is None):
        return False
    return is_known(part)


def _build(network: nn.Module) -> Fused | None:
    try:
        graph = LayerGraph(network)
    except Exception:  # the forward takes no proxy
        return None
    return None if graph.reads_tensors else Fused(graph)


_fused = StructureCache(_build)


def _absorb(call: Node, into: Node) -> None:
    """Remove a call; what read its result reads that of another node."""
    call.replace_all_uses_with(into)
    call.graph.erase_node(call)


def _fuse(
    graph: LayerGraph, call: Node, order: dict[Node, int], found: dict[Node, FusedConvolution]
) -> FusedConvolution:
    """Fuse a convolution with all that can be; its call replaces theirs.

    Args:
        graph: Changed in place.
        call: The convolution's.
        order: Position of every node.
        found: The convolutions before this one.
    """
    norm = graph.norm_of(call)
    layer = FusedConvolution(
        graph.layer(call),  # type: ignore[arg-type]
        None if norm is None else graph.layer(norm),  # type: ignore[arg-type]
    )
    if norm is not None:
        _absorb(norm, call)
        activation = getattr(layer.norm, "act", None)  # of timm's BatchNormAct2d
        if activation is not None and type(activation) is not nn.Identity:
            layer.activation = activation
            return layer
    addition = only_user(call)
    if addition is not None and _is_addition(addition):
        residual = next(node for node in addition.all_input_nodes if node is not call)
        # It is overwritten: it must be a tensor of its own that nothing reads after the convolution.
        own = residual in found or (
            residual.op == "call_module" and type(graph.layer(residual)) is nn.MaxPool2d
        )
        if own and all(
            user is addition or (user in found and order[user] < order[call])
            for user in residual.users
        ):
            _absorb(addition, call)
            call.args = (*call.args, residual)
    user = only_user(call)
    if (
        user is not None
        and user.op == "call_module"
        and user.args == (call,)
        and not user.kwargs
        and type(graph.layer(user)) in _ACTIVATIONS
    ):
        layer.activation = graph.layer(user)
        _absorb(user, call)
    return layer


def _is_addition(node: Node) -> bool:
    return (
        node.op == "call_function"
        and node.target in _ADDITIONS
        and not node.kwargs
        and len(node.args) == len(node.all_input_nodes) == 2
    )
