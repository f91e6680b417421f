"""How encoder and guidance run in a prediction: once, in the requested precision, compiled on request."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.models import DCG
from diffmic_fast.models import execution as module
from diffmic_fast.models.execution import bfloat16_convolutions, bfloat16_obstacle, inference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built():
    """A small model whose running statistics have seen images."""
    torch.manual_seed(0)
    config = DiffMICConfig(
        classes=3,
        image_size=64,
        timesteps=40,
        feature_dim=24,
        encoder="test_resnet",
        guidance_trunk="test_resnet",
        crops=3,
        crop_size=16,
    )
    model = DiffMIC(config).train()
    with torch.no_grad():
        for _ in range(3):
            model.guidance(torch.randn(8, 3, 64, 64))
            model.loss(torch.randn(8, 3, 64, 64), torch.randint(0, 3, (8,)))
    return model.eval()


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture
def images():
    """As many pixels as folding is faster for."""
    return torch.randn(26, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def emulated(monkeypatch):
    """bfloat16 convolutions on any processor, however slow."""
    monkeypatch.setattr(module, "bfloat16_obstacle", lambda _: "")


class Operators(TorchDispatchMode):
    """Counts the operators that run, with the dtype of their first tensor."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        dtype = None if first is None else first.dtype
        self.count[function.overloadpacket.__name__, dtype] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operators(call):
    with Operators() as mode:
        call()
    return mode.count


def convolutions(*networks):
    return sum(isinstance(p, nn.Conv2d) for network in networks for p in network.modules())


FUSED = ("_convolution_pointwise", "_convolution_pointwise_")
DDIM = {"sampler": "ddim", "steps": 4}


def test_encoder_and_guidance_run_once_and_folded(model, images):
    guidance, denoiser = model.guidance, model.denoiser
    norms = [p for p in model.modules() if isinstance(p, nn.BatchNorm2d)]
    wanted = convolutions(guidance, denoiser)
    for samples in (1, 5):
        count = operators(lambda samples=samples: model.predict(images, samples=samples, **DDIM))
        assert count["convolution", torch.float32] == wanted
        left = sum(n for (name, _), n in count.items() if "batch_norm" in name)
        assert left < len(norms) - 10  # of layers with more weight than result
    calls = Counter()
    for name in ("guidance.ds_net", "guidance.dn_resnet", "denoiser.encoder_x"):
        part = model.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model.predict(images, samples=3, **DDIM)
    assert set(calls.values()) == {1} and len(calls) == 3


def test_folding_changes_rounding_alone(model, images):
    """Images in a batch large enough for folding, and in smaller ones, for which layers run as they are."""
    results = []
    for some, folds in ((images, True), (images[:24], False)):
        count = operators(lambda some=some: model.guidance.ds_net(some))
        left = sum(n for (name, _), n in count.items() if "batch_norm" in name)
        norms = sum(isinstance(p, nn.BatchNorm2d) for p in model.guidance.ds_net.modules())
        assert (left < norms) is folds
        results.append(model.predict(some, samples=2, saliency=True, boxes=True, **DDIM))
    result, expected = results
    for name in ("label", "boxes"):
        assert torch.equal(getattr(result, name)[:24], getattr(expected, name))
    for name in ("probabilities", "guidance", "saliency", "samples"):
        torch.testing.assert_close(
            getattr(result, name)[:24], getattr(expected, name), rtol=1e-4, atol=1e-4, msg=name
        )


@torch.no_grad()
def test_predictions_follow_the_weights(model, images):
    """Equal to a copy that has not predicted before, also after changes that no version counter sees."""
    start = copy.deepcopy(model.state_dict())
    model.predict(images, **DDIM)
    for change in (
        lambda m: m.guidance.ds_net.f[0].conv1[0].weight.data.mul_(1.5),
        lambda m: m.denoiser.encoder_x.f[0].bn1.running_var.mul_(2.0),
        lambda m: m.load_state_dict(start),
    ):
        change(model)
        result = model.predict(images, **DDIM).samples
        assert torch.equal(copy.deepcopy(model).predict(images, **DDIM).samples, result)
    assert list(model.state_dict()) == list(start)


def test_given_guidance_and_features_are_used(model, images):
    whole = model.predict(images, samples=2, **DDIM)
    detail, features = model.guide(images), model.encode(images)
    assert features.shape == (26, 24) and features.dtype == torch.float32
    count = operators(
        lambda: model.predict(images, samples=2, guidance=detail, features=features, **DDIM)
    )
    assert not any("conv" in name for name, _ in count)
    again = model.predict(images, samples=2, guidance=detail, features=features, **DDIM)
    assert torch.equal(again.samples, whole.samples)
    assert torch.equal(again.guidance, whole.guidance)
    with pytest.raises(ValueError, match=r"features must be \[B=26, F\], got \(3, 24\)"):
        model.predict(images, features=features[:3])
    with pytest.raises(ValueError, match=r"guidance.logits.fused must be \[B=3, C\]"):
        model.predict(images[:3], guidance=detail)


def test_bfloat16_convolutions(model, images, emulated):
    count = operators(lambda: model.predict(images, precision="bf16", **DDIM))
    heads = 1  # the saliency's
    assert count["convolution", torch.float32] == heads
    fused = sum(count[name, torch.bfloat16] for name in FUSED)
    assert count["convolution", torch.bfloat16] + fused == convolutions(model) - heads
    # The patches have too few pixels.
    fuses = "fused" in bfloat16_convolutions()
    assert fused == (convolutions(model.guidance.ds_net, model.denoiser) if fuses else 0)
    exact = model.predict(images, saliency=True, **DDIM)
    coarse = model.predict(images, precision="bf16", saliency=True, **DDIM)
    assert coarse.saliency.dtype == coarse.guidance.dtype == torch.float32
    assert not torch.equal(coarse.saliency, exact.saliency)
    assert float((coarse.guidance - exact.guidance).abs().max()) < 0.02
    best = exact.probabilities.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.01
    assert bool(clear.any()) and torch.equal(coarse.label[clear], exact.label[clear])


def test_convolutions_stay_float32_without_bfloat16_instructions(model, images, monkeypatch):
    monkeypatch.setattr(module, "bfloat16_obstacle", lambda _: "none here")
    exact, coarse = model.predict(images, **DDIM), model.predict(images, precision="bf16", **DDIM)
    assert torch.equal(coarse.guidance, exact.guidance)
    assert not torch.equal(coarse.samples, exact.samples)


def report_instructions(monkeypatch, instructions):
    """Report these bfloat16 instructions as the processor's."""
    monkeypatch.setattr(module, "bfloat16_instructions", lambda: instructions)


def test_obstacles_of_bfloat16(monkeypatch):
    assert "mps" in bfloat16_obstacle(torch.device("mps"))
    for instructions in ("", "AVX-512", "AMX", "Arm"):
        report_instructions(monkeypatch, instructions)
        found = bfloat16_obstacle(CPU)
        assert ("no bfloat16 instructions" in found) is (instructions == "")
        assert bool(found) is (instructions == "")
    with torch.backends.mkldnn.flags(enabled=False):
        assert "oneDNN" in bfloat16_obstacle(CPU)
        assert bfloat16_convolutions().startswith("no: ")


@pytest.mark.parametrize(
    ("instructions", "exist", "shown"),
    [
        ("AMX", True, "yes, with AMX, fused with BatchNorm, sum and activation"),
        ("AVX-512", True, "yes, with AVX-512, fused with BatchNorm, sum and activation"),
        ("AMX", False, "yes, with AMX, under autocast"),
        ("Arm", True, "yes, with Arm, under autocast"),
        ("", True, "no: this processor has no bfloat16 instructions"),
    ],
)
def test_the_processor_decides_how_convolutions_run(
    instructions, exist, shown, model, images, monkeypatch
):
    ran = []

    def network(images, *_):
        ran.append(images.shape)
        return torch.zeros(len(images), 96, 2, 2, dtype=torch.bfloat16)

    report_instructions(monkeypatch, instructions)
    monkeypatch.setattr(module, "convolution_operators_exist", lambda: exist)
    monkeypatch.setattr(module, "fused", lambda _: network)
    assert bfloat16_convolutions() == shown
    layers = model.denoiser.encoder_x.f
    with torch.no_grad():
        for precise in (False, True):
            with inference(bfloat16=not precise):
                assert module.run_layers(layers, images).dtype == torch.float32
            assert bool(ran) is ("fused" in shown and not precise)
            ran.clear()
        with torch.autocast("cpu", torch.bfloat16):
            result = module.run_layers(layers, images)
        assert bool(ran) is (exist and instructions in ("AMX", "AVX-512"))
        assert result.dtype == torch.bfloat16
        ran.clear()
        with inference(bfloat16=True):
            module.run_layers(layers, images[:1])  # too few pixels
    assert not ran


@torch.no_grad()
def test_a_block_applies_to_its_thread_alone(model, images, emulated):
    layers, results = model.denoiser.encoder_x.f, []
    expected = module.run_layers(layers, images)

    @torch.no_grad()
    def work():
        results.append(module.run_layers(layers, images))

    with inference(bfloat16=True):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not torch.equal(module.run_layers(layers, images), expected)
    assert torch.equal(results[0], expected)
    assert torch.equal(module.run_layers(layers, images), expected)


def test_compiled(model, images):
    expected = model.predict(images, samples=2, saliency=True, **DDIM)
    result = model.predict(images, samples=2, saliency=True, compile=True, **DDIM)
    assert not torch.equal(result.saliency, expected.saliency)  # it was compiled
    torch.testing.assert_close(result.saliency, expected.saliency, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.samples, expected.samples, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.label, expected.label)
    few = model.predict(images[:7], samples=2, compile=True, **DDIM)
    torch.testing.assert_close(few.samples, expected.samples[:7], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.guidance.ds_net.f[0].conv1[0].weight.data.mul_(1.5)
    changed = model.predict(images, samples=2, compile=True, saliency=True, **DDIM)
    expected = model.predict(images, samples=2, saliency=True, **DDIM)
    torch.testing.assert_close(changed.saliency, expected.saliency, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        model.predict(images, compile="yes")


@pytest.mark.parametrize("count", [1, 26])
@torch.no_grad()
def test_guidance_reads_no_value(count):
    """On tensors without contents: .item(), .tolist(), .cpu() and a branch on a value would raise."""
    with FakeTensorMode():
        guidance = DCG(3, "resnet18", crops=2, crop_size=16).eval()
        detail = guidance.detail(torch.empty(count, 3, 64, 64))
    assert detail.logits.fused.shape == (count, 3)
    assert detail.crops.shape == (count, 2, 3, 16, 16)


@torch.no_grad()
def test_guidance_is_one_graph(model, images):
    compiled = torch.compile(model.guidance, backend="eager", fullgraph=True)
    for a, b in zip(compiled(images), model.guidance(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_layers_run_as_they_are_with_gradients_and_in_training_mode(model, images, monkeypatch):
    monkeypatch.setattr(module, "folded", lambda _: pytest.fail("folded"))
    model.guidance(images)  # gradients
    with torch.no_grad():
        model.train().denoiser.encode(images)
