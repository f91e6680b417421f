"""The denoiser against recorded numbers; several branches against single passes; replaced submodules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffmic_fast.diffusion import make_schedule, q_sample
from diffmic_fast.models import BranchForward, ConditionalModel
from diffmic_fast.models.modes import repeated_statistics


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


@pytest.fixture
def schedule():
    return make_schedule("linear", 10)


def noisy(y_0, guidance, schedule, t, noise):
    """Noisy labels of every branch, [S, rows, C]."""
    return torch.stack([q_sample(y_0, prior, schedule, t, noise) for prior in guidance])


@pytest.mark.usefixtures("auto_backend")
def test_branches_are_single_passes(schedule):
    """Outputs, gradients of every parameter and every buffer, with a real image encoder, over two steps.

    In float64: a bias before BatchNorm has the gradient 0, and float32 would leave only rounding to compare.
    """
    once, thrice = small_model().double(), small_model().double()
    x, t = torch.randn(6, 3, 32, 32).double(), torch.randint(0, 10, (6,))
    for _ in range(2):
        (y_0, noise), guidance = torch.randn(2, 6, 3).double(), torch.randn(3, 6, 3).double()
        branches = once.forward_branches(x, y_0, t, guidance, noise, schedule)
        y = noisy(y_0, guidance, schedule, t, noise)
        single = torch.stack([thrice(x, y[s], t, guidance[s]) for s in range(3)])
        torch.testing.assert_close(branches, single, rtol=1e-9, atol=1e-9)
        weight = torch.randn_like(branches)
        (branches * weight).sum().backward()
        (single * weight).sum().backward()
    for (name, a), b in zip(once.named_parameters(), thrice.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=name)
    for (name, a), b in zip(once.named_buffers(), thrice.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_branches_run_the_encoder_once(schedule):
    model, calls = small_model(), []
    model.encoder_x.register_forward_hook(lambda *_: calls.append(1))
    labels, noise = torch.randn(2, 4, 3)
    guidance = torch.randn(3, 4, 3)
    model.forward_branches(
        torch.randn(4, 3, 40, 40), labels, torch.zeros(4).long(), guidance, noise, schedule
    )
    assert len(calls) == 1


def test_a_module_of_the_branches_has_the_models_tensors(schedule):
    """For wrappers that call a module's forward alone; the model's own state dict stays as published."""
    model = small_model()
    keys = list(model.state_dict())
    wrapped = BranchForward(model)
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in model.parameters()]
    assert list(model.state_dict()) == keys
    labels, noise = torch.randn(2, 4, 3)
    arguments = (torch.randn(4, 3, 40, 40), labels, torch.zeros(4).long())
    arguments += (torch.randn(3, 4, 3), noise, schedule)
    expected = copy.deepcopy(model).forward_branches(*arguments)
    assert torch.equal(wrapped(*arguments), expected)


class Doubled(nn.Module):
    """A layer in the place of another."""

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


def test_composed_layers_train_as_the_operations_do(schedule):
    plain, hooked = small_model().train(), small_model().train()
    hooked.unetnorm1.register_forward_hook(lambda *_: None)
    x, t = torch.randn(5, 3, 40, 40), torch.randint(0, 10, (5,))
    (y_0, noise), guidance = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(
        plain.forward_branches(x, y_0, t, guidance, noise, schedule),
        hooked.forward_branches(x, y_0, t, guidance, noise, schedule),
        rtol=1e-4,
        atol=1e-5,
    )
    for a, b in zip(plain.buffers(), hooked.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("kind", ["as built", "eval", "a hook", "without guidance"])
def test_labels_noised_by_the_kernel_are_those_noised_before(kind, branches, schedule):
    """Outputs, gradients and running statistics, from clean labels and from noisy ones, two draws per image."""
    x, t, noise = torch.randn(3, 3, 40, 40), torch.randint(0, 10, (6,)), torch.randn(6, 3)
    y_0 = F.one_hot(torch.tensor([0, 0, 2, 2, 1, 1]), 3).float()
    prior = torch.rand(branches, 6, 3)
    y_t = noisy(y_0, prior, schedule, t, noise)
    inside, before = (small_model(guidance=kind != "without guidance") for _ in range(2))
    for model in (inside, before):
        model.train(kind != "eval")
        if kind == "a hook":
            model.unetnorm1.register_forward_hook(lambda *_: None)
    found = inside.forward_branches(x, y_0, t, prior, noise, schedule, 2)
    with (
        repeated_statistics(before.encoder_x, branches),
        repeated_statistics(before.norm, branches),
    ):
        features = before.encode(x).repeat_interleave(2, dim=0)
    expected = before.denoise_features(features, y_t, t, prior)
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


def test_bad_arguments_of_branches_are_named(schedule):
    model = small_model()
    x, y, t = torch.randn(2, 3, 40, 40), torch.randn(2, 3), torch.zeros(2).long()
    guidance = torch.rand(3, 2, 3)
    with pytest.raises(ValueError, match=r"guidance must be \[S, rows=2, C=3\]"):
        model.forward_branches(x, y, t, guidance[0], y, schedule)
    with pytest.raises(ValueError, match=r"noise must be \[rows=2, C=3\], got \(1, 3\)"):
        model.forward_branches(x, y, t, guidance, torch.randn(1, 3), schedule)
    with pytest.raises(ValueError, match=r"y_0 must be \[rows, C\]"):
        model.forward_branches(x, guidance, t, guidance, y, schedule)
    with pytest.raises(ValueError, match="y_0 must have one row per row of features"):
        model.forward_branches(x, y, t, guidance, y, schedule, 2)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 9\]"):
        model.forward_branches(x, y, t + 10, guidance, y, schedule)
    with pytest.raises(ValueError, match=r"y must be \[rows, C\], one branch, got \(3, 2, 3\)"):
        model(x, guidance, t, guidance)


def test_without_guidance():
    torch.manual_seed(0)
    model = ConditionalModel(3, timesteps=10, feature_dim=16, guidance=False).eval()
    assert model.lin1.lin.in_features == 3
    x, y, t = torch.randn(2, 3, 40, 40), torch.randn(2, 3), torch.tensor([1])
    torch.testing.assert_close(model(x, y, t), model(x, y, t, torch.randn(2, 3)))


@pytest.mark.parametrize("guidance", [False, True])
def test_branches_reject_timesteps_outside_the_schedule(guidance):
    model = ConditionalModel(3, timesteps=10, feature_dim=16, guidance=guidance).eval()
    x, y_0, noise = torch.randn(2, 3, 40, 40), torch.eye(3)[:2], torch.randn(2, 3)
    for t in (-1, 10, 11):
        with pytest.raises(ValueError, match=r"timesteps must be in \[0, 9\]"):
            model.forward_branches(
                x,
                y_0,
                torch.tensor([0, t]),
                torch.rand(2, 2, 3),
                noise,
                make_schedule("linear", 10),
            )


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
    with pytest.raises(ValueError, match="y must have one row per row of features"):
        model(x, y[:1], t, y[:1])
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \(2, 1, 40, 40\)"):
        model(x[:, :1], y, t, y)
    with pytest.raises(TypeError, match="none of whose layers was replaced or carries a hook"):
        small_model().train().weights()
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        ConditionalModel(1)
