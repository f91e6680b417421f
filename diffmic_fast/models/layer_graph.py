"""The graph of a network's layers: which layer reads the result of which.

The graph is recorded by running the network's own `forward` on `torch.fx` proxies, through copies of its modules that
share the tensors. (`torch.fx.symbolic_trace` patches `nn.Module` for all threads while it traces.) Modules of torch,
torchvision, timm and this package are looked into. Modules of other packages, and modules with hooks,
parametrizations or a compiled call, are single layers, called as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import GraphAppendingTracer, Proxy

from diffmic_fast.models._torch_internals import (
    AnyBatchNorm,
    calls_only_forward,
    children_of,
    with_children,
)

# Subclasses may do more with their weight than convolve (weight standardisation, for one).
_CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")
_NORMS = (
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",  # followed by its own activation
)

T = TypeVar("T")


class LayerGraph(GraphAppendingTracer):
    """The calls of layers in one forward pass.

    Attributes:
        layers: The layer of every call; the target of a call is its index.
        reads_tensors: Whether anything but a layer reads a tensor other than activations, which is not recorded.
    """

    def __init__(self, network: nn.Module) -> None:
        """Record a network.

        Args:
            network: Not changed.

        Raises:
            Exception: Whatever the network's forward raises for a proxy.
        """
        super().__init__(Graph())
        self.layers: list[nn.Module] = []
        self.reads_tensors = False
        images = Proxy(self.graph.placeholder("images"), self)
        traced = copy_replacing(
            network, lambda part: partial(self._record, part) if is_layer(part) else None
        )
        self.graph.output(self.create_arg(traced(images)))

    def _record(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Proxy:
        self.layers.append(layer)
        return self.create_proxy("call_module", str(len(self.layers) - 1), args, kwargs)

    def create_arg(self, a: Any) -> Any:
        """An argument of a node (called by the base class)."""
        if isinstance(a, Tensor):
            self.reads_tensors = True
            return None
        return super().create_arg(a)

    def calls(self) -> list[Node]:
        """The calls of layers, in order."""
        return [node for node in self.graph.nodes if node.op == "call_module"]

    def layer(self, call: Node) -> nn.Module:
        """The layer that is called."""
        return self.layers[int(str(call.target))]

    def is_convolution(self, node: Node) -> bool:
        """Whether a node is the only call of a convolution whose forward is known."""
        return self._is_only_call(node, _CONVOLUTIONS)

    def norm_of(self, node: Node) -> Node | None:
        """The call of the BatchNorm that is the only reader of a convolution's result, or None."""
        user = only_user(node)
        if user is None or user.args != (node,) or user.kwargs or not self.is_convolution(node):
            return None
        return user if self._is_only_call(user, _NORMS) else None

    def _is_only_call(self, node: Node, classes: tuple[str, ...]) -> bool:
        if node.op != "call_module":
            return False
        layer = self.layer(node)
        kind = type(layer)
        return (
            f"{kind.__module__}.{kind.__qualname__}" in classes
            and self.layers.count(layer) == 1
            and all(map(calls_only_forward, layer.modules()))
        )


def only_user(node: Node) -> Node | None:
    """The only node that reads the result of this one, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is called as it is: it has no submodules, or its forward is not known."""
    return (
        next(module.children(), None) is None
        or not is_known(module)
        or (type(module).__module__.startswith("torch.") and not isinstance(module, (nn.Sequential, nn.ModuleList)))
        or isinstance(module, AnyBatchNorm)
    )  # fmt: skip


def is_known(module: nn.Module) -> bool:
    """Whether a module is of a package whose forward functions are known, and a call runs nothing else."""
    package = type(module).__module__.partition(".")[0]
    return package in ("torch", "torchvision", "timm", "diffmic_fast") and calls_only_forward(
        module
    )


def copy_replacing(module: nn.Module, replace: Callable[[nn.Module], Any]) -> Any:
    """A copy of a tree of modules that shares its tensors.

    Args:
        module: The root.
        replace: What takes the place of a module; None for a copy.
    """
    other = replace(module)
    if other is not None:
        return other
    children = {
        name: None if part is None else copy_replacing(part, replace)
        for name, part in children_of(module).items()
    }
    return with_children(module, children)


class StructureCache(Generic[T]):
    """A function of networks whose result is cached while a network's layers, hooks and classes are the same objects.

    A network can be freed while its result is cached.
    """

    def __init__(self, make: Callable[[nn.Module], T]) -> None:
        self._make = make
        self._results: WeakKeyDictionary[nn.Module, tuple[list[object], T]] = WeakKeyDictionary()

    def __call__(self, network: nn.Module) -> T:
        """make(network)."""
        structure = _structure(network)
        last = self._results.get(network)
        if (
            last is None
            or len(last[0]) != len(structure)
            or any(a is not b for a, b in zip(last[0], structure, strict=True))
        ):
            last = self._results[network] = structure, self._make(network)
        return last[1]


def _structure(network: nn.Module) -> list[object]:
    """The layers, their classes, whether they have hooks, and their attributes, to be compared by identity.

    Without the network itself, which the values of a dictionary with weak keys must not keep alive.
    """
    found: list[object] = list(children_of(network).values())
    for layer in network.children():
        for part in layer.modules():
            found += (part, type(part), calls_only_forward(part))
            if children := children_of(part):
                found += children.values()
                found += vars(part).values()
    return found
