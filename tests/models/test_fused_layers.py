"""Fused convolutions: the network's function, with the current weights, in bfloat16 on request."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from diffmic_fast.cpu_capabilities import bfloat16_instructions
from diffmic_fast.models.encoders import make_trunk
from diffmic_fast.models.fused_layers import fused
from tests.models.test_folding import TOLERANCE, library, unsettle

needs_bfloat16 = pytest.mark.skipif(
    bfloat16_instructions() not in ("AMX", "AVX-512"), reason="no bfloat16 instructions"
)


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def error(result, expected):
    return float((result - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check(network, images):
    """The graph gives the network's numbers in float32 and does not change the images."""
    expected, before = network(images), images.clone()
    network = fused(network)
    assert error(network(images, torch.float32), expected) <= TOLERANCE
    assert torch.equal(images, before)
    return network


def counts(network):
    """Convolutions; those with a residual; those with an activation."""
    calls = [n for n in network.graph.calls() if n.target in network.convolutions]
    layers = network.convolutions.values()
    residuals = sum(len(call.args) == 2 for call in calls)
    return len(layers), residuals, sum(layer.activation is not None for layer in layers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", (20, 8, 17)),
        ("resnet50", (53, 16, 49)),
        ("densenet121", (120, 0, 59)),
        ("efficientnet_b0", (81, 0, 49)),  # stochastic depth is between convolution and sum
        ("mobilenet_v2", (52, 10, 35)),
        ("mobilenet_v3_small", (52, 6, 32)),
        ("regnet_y_400mf", (85, 16, 65)),
        ("shufflenet_v2_x0_5", (56, 0, 37)),
        ("tf_efficientnet_lite0", (49, 9, 33)),
        ("resnet26d", (31, 8, 27)),
        ("repvgg_a0", (44, 22, 5)),
        ("resnetv2_50", (53, 4, 32)),  # most sums are read twice
        ("nf_resnet26", (0, 0, 0)),  # standardises its weights
    ],
)
def test_every_family(name, expected, images):
    torch.manual_seed(0)
    assert counts(check(unsettle(make_trunk(name)[0]), images)) == expected


def test_a_tensor_besides_activations_is_not_recorded():
    assert fused(make_trunk("convnext_tiny")[0].eval()) is None  # multiplies by a parameter


def network_of(*layers):
    return unsettle(nn.Sequential(*layers))


@library
class Residual(nn.Module):
    """The result of a convolution is added to that of another."""

    def __init__(self, channels=4):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, channels, 3, padding=1),
        )
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        y = self.first(x)
        return self.relu(self.bn(self.second(self.relu(y))) + y)


@library
class OfImages(Residual):
    """The residual is the network's input, which must stay what it is."""

    def forward(self, x):
        return self.relu(self.bn(self.first(x)[:, :3]) + x)


@library
class ReadAfterwards(Residual):
    def forward(self, x):
        y = self.first(x)
        return (self.bn(self.second(y)) + y) * y


@library
class ReadThroughView(Residual):
    def forward(self, x):
        y = self.first(x)
        part = y[:, :1]
        return (self.bn(self.second(y)) + y) * part


@library
class OfItsOwnInput(Residual):
    """What the second convolution reads is also what is added."""

    def forward(self, x):
        y = self.first(x)
        return self.bn(self.second(y)) + y


@library
class ReadInBetween(Residual):
    """The residual is read after the convolution and before the sum."""

    def forward(self, x):
        y = self.first(x)
        z = self.bn(self.second(torch.relu(y)))
        w = torch.sigmoid(y)
        return (z + y) * w


@library
class Doubled(Residual):
    def forward(self, x):
        y = self.bn(self.second(self.first(x)))
        return y + y


@pytest.mark.parametrize(
    ("kind", "residuals"),
    [
        (Residual, 0),  # ReLU reads the residual, and may return the same tensor
        (OfImages, 0),
        (ReadAfterwards, 0),
        (ReadThroughView, 0),
        (OfItsOwnInput, 0),
        (ReadInBetween, 0),
        (Doubled, 0),
    ],
)
def test_what_is_read_again_is_not_overwritten(kind, residuals, images):
    torch.manual_seed(0)
    network = kind(3) if kind is OfImages else kind()
    assert counts(check(network_of(network), images))[1] == residuals


@library
class Two(nn.Module):
    """Two convolutions of the same images, summed."""

    def __init__(self, channels, activation):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.bn, self.activation = nn.BatchNorm2d(4), activation

    def forward(self, x):
        return self.activation(self.left(x) + self.bn(self.right(x)))


@pytest.mark.parametrize("channels", [4, 1])
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(inplace=True), nn.GELU()]
)
def test_sums_and_activations(channels, activation, images):
    """Also of a residual that is broadcast."""
    torch.manual_seed(0)
    network = network_of(Two(channels, activation))
    assert counts(check(network, images))[:2] == (2, 1)
    network[0].bn.weight = network[0].bn.bias = None
    check(network, images)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 6, 3, stride=2, groups=3, dilation=2),
        weight_norm(nn.Conv2d(3, 4, 3)),
    ],
)
def test_every_kind_of_convolution(layer, images):
    channels = layer.out_channels
    check(network_of(layer, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)), images)


class Mine(nn.Conv2d):
    """A layer of another package."""


def test_what_is_not_fused(images):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    assert fused(network_of(*layers)) is not None
    assert fused(nn.Conv2d(3, 4, 3)) is None
    assert fused(network_of(Mine(3, 4, 3), nn.BatchNorm2d(4))) is None
    network = network_of(*copy.deepcopy(layers))
    assert fused(network) is not None
    handle = network[2].register_forward_hook(lambda *_: None)
    assert fused(network) is None
    handle.remove()
    assert fused(network) is not None
    network[1].train()  # its result for an image depends on the batch
    assert fused(network) is None
    network[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert fused(network) is None


@torch.no_grad()
def test_weights_are_read_at_every_call(images):
    network = network_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    check(network, images)
    network[0].weight.data.mul_(1.5)
    network[1].running_var.numpy()[0] = 7.0
    network[1].eps = 0.1
    network[0].stride = (2, 2)
    check(network, images)
    network[2] = nn.SiLU()
    check(network, images)


@library
class Watching(nn.Module):
    """Passes its input on and records the sizes of the batches."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return x


@torch.no_grad()
@pytest.mark.parametrize(("count", "blocks"), [(1, [1]), (2, [2]), (5, [2, 2, 1])])
def test_blocks_of_a_batch(count, blocks):
    """Of 8 x 224 x 224 pixels at most."""
    network = network_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Watching())
    images = torch.randn(count, 3, 448, 448)
    check(network, images)
    assert network[3].sizes == [count, *blocks]


def test_a_fused_network_can_be_freed():
    network = make_trunk("resnet18")[0].eval()
    assert fused(network) is fused(network)
    reference = weakref.ref(network)
    del network
    gc.collect()
    assert reference() is None


@needs_bfloat16
@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenet_v2"])
def test_bfloat16_errs_no_more_than_autocast(name, images):
    torch.manual_seed(0)
    network = unsettle(make_trunk(name)[0])
    exact = copy.deepcopy(network).double()(images.double())
    with torch.autocast("cpu", torch.bfloat16):
        usual = network(images)
    result = fused(network)(images)
    assert result.dtype == torch.bfloat16

    def distance(found):
        return float((found.double() - exact).norm())

    assert 0 < distance(result) <= 1.2 * distance(usual)
