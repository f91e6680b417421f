"""bfloat16 convolutions for inference on a CPU, each in one oneDNN call with what follows it.

A convolution, the BatchNorm that reads it, the addition of a residual and the activation are one pass over the result:
between the layers there are no casts, no passes for BatchNorm, activation and sum, and no float32 activations. A batch
goes through the layers in blocks of a few images, whose activations stay in the cache.

As in `folding`, no folded weight outlives a call: weights are folded in float32 out of the module's own tensors and
rounded to bfloat16 once a call, so that they cannot be stale. What is kept is the graph of the layers.

Networks of torch, torchvision, timm and this package are run so, if all of their layers are known and none of them
carries a hook; for others there is no `Fused`.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn.modules.batchnorm import _BatchNorm

from diffmic_fast.models.folding import (
    MAKERS,
    Known,
    Recorder,
    is_leaf,
    is_special,
    of_structure,
    record,
)

# Activations of 8 images of 224 x 224 stay in a cache of 16 MiB. (Zen 4, one thread, ResNet-50, 32 images in blocks of
# 2, 4, 8, 16 and 32: 1343, 1325, 1293, 1297 and 1351 ms.)
_BLOCK_PIXELS = 8 * 224 * 224
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)  # without state
_ADDITIONS = (operator.add, operator.iadd, torch.add)

_known: Known[Fused | None] = WeakKeyDictionary()


class _Weights(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def fused(network: nn.Module) -> Fused | None:
    """The forward pass of a network in eval mode in bfloat16; None if a layer is not known or carries a hook."""
    if is_leaf(network) or not all(map(_is_known, network.modules())):
        return None
    return of_structure(_known, network, _build)


def operators_exist() -> bool:
    """Whether this torch has the operators that TorchInductor fuses convolutions with.

    They are no public API. Without them convolutions run under autocast.
    """
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise_"
    )


class Fused:
    """A network's forward pass; reads the network's tensors at every call.

    Attributes:
        recorder: its graph.
        convolutions: by their index among the layers.
    """

    def __init__(self, recorder: Recorder, convolutions: dict[str, FusedConvolution]) -> None:
        self.recorder, self.convolutions = recorder, convolutions

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The network's result.

        Args:
            images: [B, 3, H, W] floating.
            dtype: of weights, activations and result, bfloat16 or float32.
        """
        weights = {name: layer.weights(dtype) for name, layer in self.convolutions.items()}
        images = images.to(dtype, memory_format=torch.channels_last)
        count = -(-images.numel() // images.shape[1] // _BLOCK_PIXELS)
        blocks = images.tensor_split(min(count, images.shape[0]))
        half = dtype == torch.bfloat16  # the other layers under autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            results = [_Pass(self, weights).run(block) for block in blocks]
        return results[0] if len(results) == 1 else torch.cat(results)


class _Pass(Interpreter):
    """One pass over the graph."""

    def __init__(self, network: Fused, weights: dict[str, _Weights]) -> None:
        super().__init__(nn.Module(), graph=network.recorder.graph)
        self.network, self.weights = network, weights

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        convolution = self.network.convolutions.get(target)
        if convolution is not None:
            return convolution(*args, weights=self.weights[target])
        return self.network.recorder.layers[int(target)](*args, **kwargs)


class FusedConvolution:
    """activation(norm(convolution(x)) + residual), all but the first optional.

    Attributes:
        convolution, norm: the network's own.
        activation: the network's own, or None.
    """

    def __init__(self, convolution: nn.Conv2d, norm: _BatchNorm | None) -> None:
        self.convolution, self.norm = convolution, norm
        self.activation: nn.Module | None = None

    def weights(self, dtype: torch.dtype) -> _Weights:
        """The convolution's weight, channels last, and bias with BatchNorm in them."""
        convolution, norm = self.convolution, self.norm
        weight, bias = convolution.weight, convolution.bias
        if norm is not None:
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            scale = torch.rsqrt(variance + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            weight = weight * scale[:, None, None, None]
            shift = -mean if bias is None else bias - mean
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
            scaled = copy.copy(convolution)
            scaled._parameters = dict(zip(("weight", "bias"), weights, strict=True))  # type: ignore[arg-type]
            result = scaled(x)
            if residual is not None:
                result = result + residual
            return result if activation is None else activation(result)
        how = (
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
        )
        name, scalars = _post_operation(activation)
        if residual is None:
            result = torch.ops.mkldnn._convolution_pointwise(x, *weights, *how, name, scalars, "")
        else:  # after an addition there is no other activation
            name = "relu" if name == "relu" else "none"
            after = None if name == "none" else name
            result = torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, *weights, *how, "add", 1.0, after, [], ""
            )
        return result if activation is None or name != "none" else activation(result)


def _post_operation(activation: nn.Module | None) -> tuple[str, list[float]]:
    """oneDNN's name for an activation and its parameters; "none" where it is computed by itself."""
    kind = type(activation)
    if kind is nn.ReLU:
        return "relu", []
    if kind is nn.ReLU6:
        return "hardtanh", [0.0, 6.0]
    if kind is nn.SiLU:
        return "swish", []
    return "none", []


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether its attributes tell all there is to it."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def _result_shape(convolution: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            x.shape[2:],
            cast(tuple[int, ...], convolution.padding),
            convolution.dilation,
            convolution.kernel_size,
            convolution.stride,
            strict=True,
        )
    ]
    return (x.shape[0], convolution.out_channels, *sizes)


def _is_known(part: nn.Module) -> bool:
    """Whether a layer gives every image the same result in any batch, and nothing else happens when it is called."""
    if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
        return False
    return type(part).__module__.partition(".")[0] in MAKERS and not is_special(part)


def _build(network: nn.Module) -> Fused | None:
    try:
        recorder = record(network)
    except Exception:  # a forward that a proxy does not go through
        return None
    if recorder.reads_tensors:
        return None
    for node in recorder.calls():
        if type(recorder.called(node)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            recorder.graph.erase_node(node)
    place = {node: i for i, node in enumerate(recorder.graph.nodes)}
    found: dict[Node, FusedConvolution] = {}
    for node in recorder.calls():
        if recorder.is_convolution(node):
            found[node] = _fuse(recorder, node, place, found)
    return Fused(recorder, {str(node.target): layer for node, layer in found.items()})


def _fuse(
    recorder: Recorder, node: Node, place: dict[Node, int], found: dict[Node, FusedConvolution]
) -> FusedConvolution:
    """The convolution that `node` calls with all that can be fused; its call takes the place of theirs."""
    norm = recorder.norm_of(node)
    layer = FusedConvolution(
        recorder.called(node),  # type: ignore[arg-type]
        None if norm is None else recorder.called(norm),  # type: ignore[arg-type]
    )

    def absorb(call: Node) -> None:
        call.replace_all_uses_with(node)
        recorder.graph.erase_node(call)

    if norm is not None:
        absorb(norm)
        activation = getattr(layer.norm, "act", None)  # of timm's BatchNormAct2d
        if activation is not None and type(activation) is not nn.Identity:
            layer.activation = activation
            return layer
    addition = _only_user(node)
    if addition is not None and _is_addition(addition):
        residual = next(a for a in addition.all_input_nodes if a is not node)
        # It is overwritten: it is a tensor of its own, and nobody reads it after the convolution.
        own = residual in found or (
            residual.op == "call_module" and type(recorder.called(residual)) is nn.MaxPool2d
        )
        if own and all(
            user is addition or (user in found and place[user] < place[node])
            for user in residual.users
        ):
            absorb(addition)
            node.args = (*node.args, residual)
    user = _only_user(node)
    if (
        user is not None
        and user.op == "call_module"
        and user.args == (node,)
        and not user.kwargs
        and type(recorder.called(user)) in _ACTIVATIONS
    ):
        layer.activation = recorder.called(user)
        absorb(user)
    return layer


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: Node) -> bool:
    return (
        node.op == "call_function"
        and node.target in _ADDITIONS
        and not node.kwargs
        and len(node.args) == len(node.all_input_nodes) == 2
    )
