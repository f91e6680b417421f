"""Folding BatchNorm into convolutions: the same function, with the current weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from diffmic_fast.models.encoders import make_trunk
from diffmic_fast.models.folding import FoldedConvolution, folded

# Of the largest result. Against float64 a trained-like ResNet-50 errs 5e-6 unfolded and 3e-6 folded, an EfficientNet-B0
# 7e-6 and 3e-5.
TOLERANCE = 1e-4


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def unsettle(network):
    """Give every BatchNorm statistics and weights as after training, some variances nearly 0."""
    generator = torch.Generator().manual_seed(2)
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.2, 2.0, generator=generator)
            part.running_var[0] = 1e-4
            part.weight.data.uniform_(-0.5, 1.5, generator=generator)
            part.bias.data.normal_(generator=generator)
    return network.eval()


def always(network):
    """Let every layer be folded, however small the images."""
    for part in network.modules():
        if isinstance(part, FoldedConvolution):
            part.always = True
    return network


def check(network, images, count=None):
    """The folded network gives the network's numbers; `count` BatchNorms are folded in it."""
    with torch.no_grad():
        other = always(folded(network))
        expected, result = network(images), other(images)
    error = float((result - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE
    found = [part for part in other.modules() if isinstance(part, FoldedConvolution)]
    assert count is None or len(found) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 20),
        ("resnet50", 53),
        ("densenet121", 59),  # the other 62 precede their convolution
        ("efficientnet_b0", 49),
        ("mobilenet_v2", 52),
        ("mobilenet_v3_small", 34),
        ("regnet_y_400mf", 53),
        ("shufflenet_v2_x0_5", 56),
        ("convnext_tiny", 0),
        ("tf_efficientnet_lite0", 49),
        ("resnet26d", 31),
        ("repvgg_a0", 44),  # 17 are on shortcuts
        ("resnetv2_50", None),
        ("nf_resnet26", 0),  # standardises its weights
    ],
)
def test_every_family(name, count, images):
    torch.manual_seed(0)
    check(unsettle(make_trunk(name)[0]), images, count)


def looked_into(*layers):
    """A Sequential, whose forward is known."""
    return unsettle(nn.Sequential(*layers))


def library(kind):
    """Let a class count as one of torchvision, whose forward is recorded on proxies."""
    kind.__module__ = "torchvision.tests"
    return kind


@library
class Branching(nn.Module):
    """The convolution's result is normalised and also used as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


@library
class Repeating(Branching):
    """One convolution, one BatchNorm, twice."""

    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x))))


@library
class InPlace(Branching):
    """The result is changed in place before BatchNorm reads it."""

    def forward(self, x):
        y = self.conv(x)
        y.relu_()
        return self.bn(y)


@library
class Returning(Branching):
    def forward(self, x):
        y = self.conv(x)
        return torch.cat([self.bn(y), y], dim=1)


@library
class Deciding(Branching):
    """A forward that takes no proxy."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if float(x.sum()) > 1e9 else y


@library
class Listing(nn.Module):
    """Layers called from a plain list."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.layers = [self.conv, self.bn]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Foreign(nn.Module):
    """Of another package, whose forward is not known."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        self.calls += 1
        return self.bn(self.conv(x))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def conv(**options):
    return nn.Conv2d(3, 3, 3, **options)


def bn(**options):
    return nn.BatchNorm2d(3, **options)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (lambda: looked_into(bn(), conv(), bn(), bn(), nn.ReLU(), bn()), 1),
        (lambda: looked_into(conv(bias=False), bn(eps=0.5), conv(groups=3, stride=2), bn()), 2),
        (lambda: looked_into(conv(padding=2, padding_mode="reflect"), bn()), 1),
        (lambda: looked_into(conv(), nn.Identity(), bn()), 0),
        (lambda: looked_into(nn.ConvTranspose2d(3, 3, 3), bn()), 0),
        (lambda: looked_into(Standardised(3, 3, 3), bn()), 0),
        (lambda: looked_into(weight_norm(conv()), bn()), 0),
        (lambda: looked_into(Branching()), 0),
        (lambda: looked_into(Repeating()), 0),
        (lambda: looked_into(InPlace()), 0),
        (lambda: looked_into(Returning()), 0),
        (lambda: looked_into(Deciding(), nn.Sequential(conv(), bn())), 1),
        (lambda: looked_into(Listing()), 0),
        (lambda: looked_into(Foreign()), 0),
        (lambda: looked_into(nn.Sequential(conv(), nn.Sequential(bn()))), 1),
    ],
)
def test_unusual_places(network, count, images):
    torch.manual_seed(0)
    network = network()
    check(network, images, count)
    foreign = [part for part in network.modules() if isinstance(part, Foreign)]
    assert all(part.calls == 2 for part in foreign)


def test_layers_in_two_places(images):
    first, norm = conv(padding=1), bn()
    check(looked_into(first, norm, first, bn()), images, 0)
    check(looked_into(conv(), norm, nn.ReLU(), conv(), norm), images, 0)
    block = nn.Sequential(conv(padding=1), bn())
    check(looked_into(block, nn.ReLU(), block), images, 0)
    one, two = conv(), conv()
    two.weight = one.weight
    check(looked_into(one, bn(), two, bn()), images, 2)


def test_batch_statistics_are_not_folded():
    images = torch.randn(2, 3, 8, 8)
    network = nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    check(network, images)
    network = looked_into(conv(), bn())
    with torch.no_grad():
        folded(network)
        network[1].train()  # batch statistics, and an update of the running ones
        before = network[1].running_mean.clone()
        expected = copy.deepcopy(network)(images)
        torch.testing.assert_close(always(folded(network))(images), expected)
    assert not torch.equal(network[1].running_mean, before)


def test_a_weight_that_is_not_a_parameter():
    network, images = looked_into(conv(), bn()), torch.randn(2, 3, 8, 8)
    weight = network[0].weight.detach()
    del network[0].weight
    network[0].weight = weight
    check(network, images, 1)


def test_no_affine():
    images = torch.randn(2, 3, 8, 8)
    check(nn.Sequential(conv(), nn.BatchNorm2d(3, affine=False)).eval(), images, 1)


def _step(network):
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    with torch.enable_grad():
        torch.autograd.backward(network(torch.ones(2, 3, 8, 8)).square().sum())
    optimizer.step()


CHANGES = {
    "optimizer": _step,
    "data": lambda n: n[0].weight.data.mul_(2),
    "in place": lambda n: n[1].bias.add_(1),
    "numpy": lambda n: n[0].bias.detach().numpy().fill(3.0),
    "running mean": lambda n: n[1].running_mean.add_(1),
    "load": lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}),
    "assign": lambda n: n.load_state_dict(
        {k: v + 1 for k, v in n.state_dict().items()}, assign=True
    ),
    "eps": lambda n: setattr(n[1], "eps", 0.3),
    "replaced": lambda n: n.__setitem__(0, conv()),
    "replaced norm": lambda n: n.__setitem__(1, nn.Identity()),
    "appended": lambda n: n.append(nn.ReLU()),
    "frozen": lambda n: n.requires_grad_(False),
    "hook": lambda n: n[0].register_forward_hook(lambda _m, _x, y: y + 1) and None,
    "pre-hook": lambda n: n[1].register_forward_pre_hook(lambda _m, x: (x[0] + 1,)) and None,
    "outer hook": lambda n: n.register_forward_hook(lambda _m, _x, y: y + 1) and None,
    "own forward": lambda n: setattr(n[1], "forward", torch.relu),
    "parametrized": lambda n: weight_norm(n[0]) and None,
    "layout": lambda n: n.to(memory_format=torch.channels_last) and None,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen(change):
    torch.manual_seed(0)
    network, images = looked_into(conv(), bn()), torch.randn(2, 3, 8, 8)
    folded(network)(images)
    CHANGES[change](network)
    check(network, images)


@torch.no_grad()
def test_inner_changes_are_seen(images):
    network = unsettle(make_trunk("resnet18")[0])
    folded(network)(images)
    network[4][0].bn1 = nn.Identity()
    check(network, images, 19)
    calls = []
    network[5].register_forward_hook(lambda *_: calls.append(1))
    check(network, images, 14)
    assert len(calls) == 2
    network[6].compile(backend="eager")
    check(network, images, 9)


@torch.no_grad()
def test_copies_and_casts(images):
    network = unsettle(make_trunk("resnet18")[0])
    keys = list(network.state_dict())
    before = copy.deepcopy(network.state_dict())
    folded(network)(images)
    assert list(network.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(isinstance(part, FoldedConvolution) for part in network.modules())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        other[0].weight.mul_(2)
        check(other, images, 20)
    check(network, images, 20)
    exact = copy.deepcopy(network).double()
    expected = exact(images.double())
    result = always(folded(exact))(images.double())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        always(folded(network))(images).double(),
        expected,
        rtol=1e-3,
        atol=1e-5 * float(expected.max()),
    )


@torch.no_grad()
def test_a_folded_network_can_be_freed():
    network = make_trunk("resnet18")[0].eval()
    folded(network)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_several_threads(images):
    """Modules of other threads run undisturbed while a network is recorded."""
    networks = [unsettle(make_trunk("resnet18")[0]) for _ in range(3)]
    expected = networks[0](images)
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    results, start = [], threading.Barrier(6)

    @torch.no_grad()
    def work(number):
        start.wait()
        for _ in range(3):
            network = networks[number % 3]
            results.append(always(folded(network))(images) if number < 5 else network(images))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 18
    scale = float(expected.abs().max())
    assert all(float((r - expected).abs().max()) <= TOLERANCE * scale for r in results)


@pytest.mark.parametrize(("side", "folds"), [(48, True), (46, False)])
@torch.no_grad()
def test_only_layers_with_less_weight_than_result_are_folded(side, folds):
    """576 weights per output channel, against 24 x 24 or 23 x 23 pixels."""
    network = unsettle(nn.Sequential(nn.Conv2d(64, 64, 3, stride=2), nn.BatchNorm2d(64)))
    with Operators() as operators:
        folded(network)(torch.empty(1, 64, side, side))
    assert any("batch_norm" in name for name in operators.names) is not folds


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))
