"""The denoiser against recorded numbers; streams against single passes; replaced submodules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffmic_fast.diffusion import make_schedule, q_sample
from diffmic_fast.models import ConditionalModel, Noising


@pytest.fixture
def model(state):
    model = ConditionalModel(5, timesteps=100, feature_dim=64)
    model.encoder_x = nn.Identity()
    model.load_state_dict(state, strict=True)
    return model.eval()


def test_recorded_noise(model, record):
    eps = model(record["x"], record["q_sample"], record["t"], record["y_hat"])
    torch.testing.assert_close(eps, record["eval/eps"], rtol=1e-5, atol=1e-5)


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    return ConditionalModel(3, timesteps=10, feature_dim=16, **options)


@pytest.mark.usefixtures("auto_backend")
def test_streams_are_three_passes():
    """Outputs, gradients of every parameter and every buffer, with a real image encoder, over two steps.

    In float64: a bias before BatchNorm has the gradient 0, and float32 would leave only rounding to compare.
    """
    once, thrice = small_model().double(), small_model().double()
    x, t = torch.randn(6, 3, 32, 32).double(), torch.randint(0, 10, (6,))
    for _ in range(2):
        y, guidance = torch.randn(2, 3, 6, 3).double()
        streams = once.forward_streams(x, y, t, guidance)
        single = torch.stack([thrice(x, y[s], t, guidance[s]) for s in range(3)])
        torch.testing.assert_close(streams, single, rtol=1e-9, atol=1e-9)
        weight = torch.randn_like(streams)
        (streams * weight).sum().backward()
        (single * weight).sum().backward()
    for (name, a), b in zip(once.named_parameters(), thrice.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=name)
    for (name, a), b in zip(once.named_buffers(), thrice.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_streams_run_the_encoder_once():
    model, calls = small_model(), []
    model.encoder_x.register_forward_hook(lambda *_: calls.append(1))
    y = torch.randn(3, 4, 3)
    model.forward_streams(torch.randn(4, 3, 40, 40), y, torch.zeros(4).long(), y)
    assert len(calls) == 1


class Doubled(nn.Module):
    """A layer that somebody put in the place of another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return 2 * self.inner(*arguments)


@pytest.mark.parametrize("name", ["lin1", "unetnorm2", "lin3", "lin4", "norm", "encoder_x"])
@torch.no_grad()
def test_a_replaced_submodule_is_used(name):
    model = small_model().eval()
    x, y, t = torch.randn(4, 3, 40, 40), torch.randn(4, 3), torch.tensor([3])
    before = model(x, y, t, y)
    setattr(model, name, Doubled(getattr(model, name)))
    after = model(x, y, t, y)
    assert not torch.allclose(before, after)
    if name == "lin4":
        torch.testing.assert_close(after, 2 * before)


@pytest.mark.parametrize("name", ["lin2", "unetnorm3"])
@torch.no_grad()
def test_a_hook_runs_and_gives_the_same_numbers(name):
    model, calls = small_model().eval(), []
    x, y, t = torch.randn(4, 3, 40, 40), torch.randn(4, 3), torch.tensor([3])
    before = model(x, y, t, y)
    getattr(model, name).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x, y, t, y), before, rtol=1e-5, atol=1e-6)
    assert calls == [1] and not model.runs_on_weights


@pytest.mark.parametrize("name", ["lin2", "lin3.lin", "unetnorm1", "lin4"])
@torch.no_grad()
def test_a_patched_forward_is_used(name):
    model = small_model().eval()
    x, y, t = torch.randn(4, 3, 40, 40), torch.randn(4, 3), torch.tensor([3])
    before = model(x, y, t, y)
    part = model.get_submodule(name)
    original = part.forward
    part.forward = lambda *arguments: original(*arguments) * 0.5
    assert not torch.allclose(model(x, y, t, y), before) and not model.runs_on_weights


def test_composed_layers_train_as_the_operations_do():
    plain, hooked = small_model().train(), small_model().train()
    hooked.unetnorm1.register_forward_hook(lambda *_: None)
    x, t = torch.randn(5, 3, 40, 40), torch.randint(0, 10, (5,))
    y, guidance = torch.randn(2, 3, 5, 3)
    torch.testing.assert_close(
        plain.forward_streams(x, y, t, guidance),
        hooked.forward_streams(x, y, t, guidance),
        rtol=1e-4,
        atol=1e-5,
    )
    for a, b in zip(plain.buffers(), hooked.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("kind", ["as built", "eval", "a hook", "without guidance"])
def test_labels_noised_inside_are_those_noised_before(kind):
    """Outputs, gradients and running statistics, from clean labels and from noisy ones, two draws an image."""
    schedule = make_schedule("linear", 10)
    x, t, noise = torch.randn(3, 3, 40, 40), torch.randint(0, 10, (6,)), torch.randn(6, 3)
    y_0, prior = F.one_hot(torch.tensor([0, 0, 2, 2, 1, 1]), 3).float(), torch.rand(3, 6, 3)
    y_t = torch.stack([q_sample(y_0, each, schedule, t, noise) for each in prior])
    inside, before = (small_model(guidance=kind != "without guidance") for _ in range(2))
    for model in (inside, before):
        model.train(kind != "eval")
        if kind == "a hook":
            model.unetnorm1.register_forward_hook(lambda *_: None)
    found = inside(x, y_0, t, prior, 2, Noising(schedule, noise))
    expected = before(x, y_t, t, prior, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, a), b in zip(inside.named_parameters(), before.parameters(), strict=True):
        if kind == "eval" or not name.endswith("lin.bias"):  # 0 before a BatchNorm, or rounding
            scale = float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    for (name, a), b in zip(inside.named_buffers(), before.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_labels_of_one_stream_are_noised_too():
    """And move the running statistics once."""
    schedule, noise, prior = make_schedule("linear", 10), torch.randn(4, 3), torch.rand(4, 3)
    x, y_0, t = torch.randn(4, 3, 40, 40), torch.eye(4, 3), torch.randint(0, 10, (4,))
    inside, before = small_model(), small_model()
    found = inside(x, y_0, t, prior, noising=Noising(schedule, noise))
    expected = before(x, q_sample(y_0, prior, schedule, t, noise), t, prior)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(inside.named_buffers(), before.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_a_noising_that_does_not_fit_is_named():
    model, schedule, t = small_model(guidance=False), make_schedule("linear", 10), torch.zeros(2)
    x, y, t = torch.randn(2, 3, 40, 40), torch.randn(2, 3), t.long()
    with pytest.raises(ValueError, match="y_0_hat"):  # clean labels are never taken for noisy ones
        model(x, y, t, None, noising=Noising(schedule, torch.randn(2, 3)))
    with pytest.raises(ValueError, match="noise must be"):
        model(x, y, t, y, noising=Noising(schedule, torch.randn(1, 3)))
    with pytest.raises(ValueError, match="y must be"):
        streams = y.expand(3, 2, 3)
        model(x, streams, t, streams, noising=Noising(schedule, torch.randn(2, 3)))


def test_without_guidance():
    torch.manual_seed(0)
    model = ConditionalModel(3, timesteps=10, feature_dim=16, guidance=False).eval()
    assert model.lin1.lin.in_features == 3
    x, y, t = torch.randn(2, 3, 40, 40), torch.randn(2, 3), torch.tensor([1])
    torch.testing.assert_close(model(x, y, t), model(x, y, t, torch.randn(2, 3)))


def test_functional_call_uses_the_given_weights():
    model = small_model().eval()
    x, y, t = torch.randn(2, 3, 40, 40), torch.randn(2, 3), torch.tensor([1])
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    with torch.no_grad():
        model(x, y, t, y)
        result = torch.func.functional_call(model, zeros, (x, y, t, y))
        torch.testing.assert_close(result, torch.zeros(2, 3))
        again = copy.deepcopy(model)(x, y, t, y)
        assert torch.equal(model(x, y, t, y), again)


def test_bad_arguments_are_named():
    model = small_model().eval()
    x, y = torch.randn(2, 3, 40, 40), torch.randn(2, 3)
    t = torch.tensor([1])
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 10\], got 11 … 11"):
        model(x, y, t + 10, y)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 10\], got -1"):
        model(x, y, t - 2, y)
    with pytest.raises(ValueError, match=r"y must be \[rows, C\]"):
        model(x, y[0], t, y)
    with pytest.raises(ValueError, match="pass y_0_hat"):
        model(x, y, t)
    with pytest.raises(ValueError, match="y must have a row an image"):
        model(x, y[:1], t, y[:1])
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \(2, 1, 40, 40\)"):
        model(x[:, :1], y, t, y)
    with pytest.raises(TypeError, match="none of whose layers was replaced or carries a hook"):
        small_model().train().weights()
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        ConditionalModel(1)
