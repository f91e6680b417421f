"""BatchNorm folded into the convolution before it, for inference.

In eval mode a BatchNorm is a scale and a shift a channel, which the convolution's weight and bias can take: the pass
over the activations goes away, and the result differs by rounding. Nothing folded is kept. A convolution's weight is
folded when it runs, out of the module's own tensors, so it cannot be stale, adds no state and needs no more memory
than one layer's weight. A layer whose weight has more elements to scale than its result has to normalise (the last
layers, for small batches) is left as it is.

What is kept is which BatchNorm reads which convolution. It is found by running the network's own `forward` on
`torch.fx` proxies, through copies of its modules that share the tensors: `torch.fx.symbolic_trace` would for that time
change `nn.Module` for every thread. Only layers of torch, torchvision, timm and this package are looked into; modules
of other makers, with hooks or parametrizations, run as they are.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

MAKERS = ("torch", "torchvision", "timm", "diffmic_fast")
# Subclasses may do more with their weight than convolve (standardise it, for one).
_CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")
_NORMS = (
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",  # followed by its own activation
)

_Pairs = dict[nn.Module, _BatchNorm]
T = TypeVar("T")
Known: TypeAlias = "WeakKeyDictionary[nn.Module, tuple[list[object], T]]"
_known: Known[nn.Module] = WeakKeyDictionary()


def folded(network: nn.Module) -> nn.Module:
    """The same function in eval mode, its BatchNorms folded where that pays.

    Args:
        network: layers in eval mode; not changed.

    Returns:
        Modules that share the network's tensors and read them whenever they run. For use at once: a replaced layer, a
        new hook or setting wants another call.
    """
    if is_special(network):
        return network
    return of_structure(_known, network, _fold)


def of_structure(known: Known[T], network: nn.Module, make: Callable[[nn.Module], T]) -> T:
    """make(network), or its last result while the network's layers, hooks and classes are the same objects.

    Args:
        known: results of `make`, by network.
    """
    structure = _structure(network)
    last = known.get(network)
    if (
        last is None
        or len(last[0]) != len(structure)
        or any(a is not b for a, b in zip(last[0], structure, strict=True))
    ):
        last = structure, make(network)
        known[network] = last
    return last[1]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more, or something else, than its class's forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class FoldedConvolution(nn.Module):
    """A convolution and the BatchNorm that reads it, in the place of the first.

    Attributes:
        convolution, norm: the network's own.
    """

    def __init__(self, convolution: nn.Conv2d, norm: _BatchNorm) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        convolution, norm = self.convolution, self.norm
        if (
            norm.training
            or norm.running_mean is None
            or norm.running_var is None
            # A replica of nn.DataParallel, say, has its tensors elsewhere.
            or convolution._parameters.keys() != {"weight", "bias"}
            or not _pays(convolution, images)
        ):
            return norm(convolution(images))
        scaled = copy.copy(convolution)
        scaled._parameters = dict(
            zip(
                ("weight", "bias"),
                fuse_conv_bn_weights(
                    convolution.weight,
                    convolution.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                ),
                strict=True,
            )
        )
        result = scaled(images)
        if type(norm) is nn.BatchNorm2d:
            return result
        return norm.act(norm.drop(result))  # type: ignore[operator]


def _pays(convolution: nn.Conv2d, images: Tensor) -> bool:
    """Whether scaling the weight moves less than normalising the result, a read and a write an element both."""
    pixels = images.numel() // (images.shape[1] * math.prod(convolution.stride))
    return convolution.weight[0].numel() <= pixels


def _fold(network: nn.Module) -> nn.Module:
    pairs = _find_pairs(network)
    # A layer in two places of the network may be followed by different things there.
    places = Counter(part for _, part in network.named_modules(remove_duplicate=False))
    pairs = {c: n for c, n in pairs.items() if places[c] == places[n] == 1}
    norms = set(pairs.values())

    def replace(part: nn.Module) -> nn.Module | None:
        if part in pairs:
            return FoldedConvolution(part, pairs[part])  # type: ignore[arg-type]
        if part in norms:
            return nn.Identity()
        return part if is_leaf(part) else None

    return _copy(network, replace)


def _structure(network: nn.Module) -> list[object]:
    """What `_fold` goes by, to be compared by identity: every layer, its class, its hooks, and what else a copy takes.

    The network itself is not in it, nor in its copy, which the dictionary of weak keys would keep for ever.
    """
    found: list[object] = list(network._modules.values())
    for layer in network.children():
        for part in layer.modules():
            found += (part, type(part), is_special(part))
            if part._modules:
                found += part._modules.values()
                found += vars(part).values()
    return found


def _find_pairs(network: nn.Module) -> _Pairs:
    """Convolutions whose result goes to one BatchNorm and nowhere else, in a network that is no leaf."""
    try:
        return _trace(network)
    except Exception:
        # Whatever its forward did not want to do with a proxy. A Sequential only calls its layers in turn, so each
        # can be looked at alone; of anything else nothing is known.
        if type(network).forward is not nn.Sequential.forward:
            return {}
        pairs: _Pairs = {}
        for part in network.children():
            pairs |= {} if is_leaf(part) else _find_pairs(part)
        return pairs


def _trace(network: nn.Module) -> _Pairs:
    recorder = record(network)
    pairs: _Pairs = {}
    for node in recorder.calls():
        user = recorder.norm_of(node)
        if user is not None:
            pairs[recorder.called(node)] = recorder.called(user)  # type: ignore[assignment]
    return pairs


def record(network: nn.Module) -> Recorder:
    """The graph of a forward pass of `network`, whose leaves are layers (`is_leaf`).

    Raises:
        Exception: whatever its forward raises when it is given a proxy.
    """
    recorder = Recorder()
    result = _copy(network, lambda part: _Call(part, recorder) if is_leaf(part) else None)(
        Proxy(recorder.graph.placeholder("images"), recorder)
    )
    recorder.graph.output(recorder.create_arg(result))
    return recorder


class Recorder(GraphAppendingTracer):
    """Records which layer is called on what.

    Attributes:
        layers: the layer of every call; the call's target is its index.
        reads_tensors: whether something else than a layer reads a tensor besides activations, which is not recorded.
    """

    def __init__(self) -> None:
        super().__init__(Graph())
        self.layers: list[nn.Module] = []
        self.reads_tensors = False

    def call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
        self.layers.append(layer)
        return self.create_proxy("call_module", str(len(self.layers) - 1), args, kwargs)

    def calls(self) -> list[Node]:
        """The calls of layers."""
        return [node for node in self.graph.nodes if node.op == "call_module"]

    def called(self, node: Node) -> nn.Module:
        """The layer of a call."""
        return self.layers[int(str(node.target))]

    def is_convolution(self, node: Node) -> bool:
        """Whether a node is the only call of a convolution whose forward is known."""
        return (
            node.op == "call_module"
            and _name(self.called(node)) in _CONVOLUTIONS
            and self._once(node)
        )

    def norm_of(self, node: Node) -> Node | None:
        """The call of the BatchNorm that alone reads the result of a convolution, or None."""
        if not self.is_convolution(node) or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            return None
        return user if _name(self.called(user)) in _NORMS and self._once(user) else None

    def _once(self, node: Node) -> bool:
        return sum(self.called(call) is self.called(node) for call in self.calls()) == 1

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            self.reads_tensors = True
            return None
        return super().create_arg(a)


class _Call(nn.Module):
    """Stands for a layer while a network is traced."""

    def __init__(self, layer: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.training = False
        # Not a submodule: nothing shall be found behind this.
        vars(self)["call"] = lambda args, kwargs: recorder.call(layer, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Proxy:
        return self.call(args, kwargs)  # type: ignore[operator]


def _copy(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The tree of modules anew, with the same tensors, and each that `replace` has another for replaced."""
    other = replace(module)
    if other is not None:
        return other
    clone = copy.copy(module)
    clone._modules = {
        name: None if part is None else _copy(part, replace)
        for name, part in module._modules.items()
    }
    return clone


def is_leaf(module: nn.Module) -> bool:
    """Whether a network is not looked into here: nothing is inside, or what its forward does is not known."""
    maker = type(module).__module__.partition(".")[0]
    return (
        next(module.children(), None) is None
        or maker not in MAKERS
        or (maker == "torch" and not isinstance(module, (nn.Sequential, nn.ModuleList)))
        or isinstance(module, _BatchNorm)
        or is_special(module)
    )


def is_special(module: nn.Module) -> bool:
    return has_hooks(module) or getattr(module, "_compiled_call_impl", None) is not None


def _name(layer: nn.Module) -> str:
    """The class's full name; empty for a layer that must be called as it is."""
    kind = type(layer)
    inside = any(is_special(part) for part in layer.modules())
    return "" if inside else f"{kind.__module__}.{kind.__qualname__}"
