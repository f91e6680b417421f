"""The published program's call sequences through `compat`, against recorded numbers."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_backends import CUDA_BACKENDS, NO_TRITON, TRITON_DEVICE
from torch import nn

import diffmic_fast.compat as compat
from diffmic_fast.compat import (
    DCG,
    ConditionalModel,
    compute_kernel,
    compute_mmd,
    extract,
    make_beta_schedule,
    p_sample,
    p_sample_loop,
    p_sample_t_1to0,
    q_sample,
    y_0_reparam,
)

EMULATED = CUDA_BACKENDS[0]
TRITON_ON_CPU = pytest.param(
    "triton", marks=pytest.mark.skipif(TRITON_DEVICE.type != "cpu" or bool(NO_TRITON), reason="GPU")
)


def namespace(classes=5, feature_dim=64, timesteps=100, arch="resnet18"):
    return SimpleNamespace(
        data=SimpleNamespace(num_classes=classes),
        model=SimpleNamespace(arch=arch, feature_dim=feature_dim),
        diffusion=SimpleNamespace(timesteps=timesteps),
    )


@pytest.fixture
def model(state):
    model = ConditionalModel(namespace(), guidance=True)
    model.encoder_x = nn.Identity()
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture
def tables():
    """alphas, sqrt(alpha_bar), sqrt(1 - alpha_bar), made as a training program makes them."""
    alphas = 1.0 - make_beta_schedule("linear", 100, 1e-4, 2e-2)
    alpha_bar = alphas.cumprod(dim=0)
    return alphas, torch.sqrt(alpha_bar), torch.sqrt(1 - alpha_bar)


@pytest.fixture
def replay(monkeypatch):
    """Makes torch.randn_like give recorded noise in the order drawn; replay.left tells how many are left."""

    class Replay:
        left: list

        def __call__(self, noise):
            self.left = list(noise)
            monkeypatch.setattr(torch, "randn_like", lambda y, **_: self.left.pop(0))

    return Replay()


def test_training_step_is_the_recorded_one(model, record, tables):
    """Three passes in train mode, the loss, one backward: outputs, losses, gradients and buffers."""
    _, sqrt_alpha_bar, deviation = tables
    model.train()
    x, noise, t = record["x"].requires_grad_(), record["noise"], record["t"]
    eps = []
    for prior in (record["y_hat"], record["y_global"], record["y_local"]):
        y_t = q_sample(record["y0"], prior, sqrt_alpha_bar, deviation, t, noise=noise)
        eps.append(model(x, y_t, t, prior))
    mse = (noise - eps[0]).square().mean()
    mmd_global, mmd_local = compute_mmd(noise, eps[1]), compute_mmd(noise, eps[2])
    loss = mse + 0.5 * (mmd_global + mmd_local)
    loss.backward()
    recorded = {
        "eps_fused": eps[0],
        "eps_global": eps[1],
        "eps_local": eps[2],
        "mse": mse,
        "mmd_global": mmd_global,
        "mmd_local": mmd_local,
        "loss": loss,
    }
    for name, value in recorded.items():
        torch.testing.assert_close(
            value.detach(), record[f"train/{name}"], rtol=1e-5, atol=1e-5, msg=name
        )
    assert_gradient("x", x.grad, record["train/grad_x"])
    for name, parameter in model.named_parameters():
        assert_gradient(name, parameter.grad, record[f"train/grad/{name}"])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(
            buffer, record[f"train/buffer/{name}"], rtol=1e-5, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("backend", ["auto", EMULATED, TRITON_ON_CPU])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # operations without this backend warn
def test_one_pass_of_three_branches_is_the_recorded_step(
    model, record, schedule, backend, monkeypatch
):
    """The same step as `DiffMIC.loss` does it."""
    monkeypatch.setenv("DIFFMIC_BACKEND", backend)
    model.train()
    x = record["x"].requires_grad_()
    priors = torch.stack([record[name] for name in ("y_hat", "y_global", "y_local")])
    eps = model.forward_branches(x, record["y0"], record["t"], priors, record["noise"], schedule)
    noise = record["noise"]
    mmds = compute_mmd(noise, eps[1]) + compute_mmd(noise, eps[2])
    ((noise - eps[0]).square().mean() + 0.5 * mmds).backward()
    for value, name in zip(eps.detach(), ("fused", "global", "local"), strict=True):
        torch.testing.assert_close(value, record[f"train/eps_{name}"], rtol=1e-5, atol=1e-5)
    assert_gradient("x", x.grad, record["train/grad_x"])
    for name, parameter in model.named_parameters():
        assert_gradient(name, parameter.grad, record[f"train/grad/{name}"])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(
            buffer, record[f"train/buffer/{name}"], rtol=1e-5, atol=1e-5, msg=name
        )


def assert_gradient(name, value, expected):
    """Within 1e-4 of the largest entry; what only rounding makes non-zero (a bias before BatchNorm) within 1e-6."""
    bound = 1e-4 * float(expected.abs().max()) + 1e-6
    assert float((value - expected).abs().max()) < bound, name


@pytest.mark.parametrize("count", [60, 100])
@pytest.mark.parametrize("way", ["one call", "loop"])
@torch.no_grad()
def test_sampling_run_is_the_recorded_one(model, record, tables, replay, count, way):
    alphas, _, deviation = tables
    model.eval()
    if way == "loop":
        model.lin2.register_forward_hook(lambda *_: None)
    arguments = (model, record["x"], record["y_hat"], record["y_hat"], count, alphas, deviation)
    replay(record[f"loop/{count}/z"])
    states = p_sample_loop(*arguments)
    assert isinstance(states, list) and len(states) == count + 1 and not replay.left
    kept = torch.stack(states)[record[f"loop/{count}/kept"]]
    torch.testing.assert_close(kept, record[f"loop/{count}/trajectory"], rtol=0, atol=1e-3)
    replay(record[f"loop/{count}/z"])
    last = p_sample_loop(*arguments, only_last_sample=True)
    assert torch.equal(last, states[-1])


@torch.no_grad()
def test_single_steps_are_the_recorded_ones(model, record, tables, replay):
    alphas, sqrt_alpha_bar, deviation = tables
    model.eval()
    x, prior, y_t = record["x"], record["y_hat"], record["q_sample"]
    torch.testing.assert_close(
        q_sample(record["y0"], prior, sqrt_alpha_bar, deviation, record["t"], record["noise"]),
        y_t,
        rtol=1e-5,
        atol=1e-5,
    )
    for t in (1, 2, 50, 99):
        replay([record[f"p_sample/{t}/z"]])
        step = p_sample(model, x, y_t, prior, prior, t, alphas, deviation)
        torch.testing.assert_close(step, record[f"p_sample/{t}/out"], rtol=1e-5, atol=1e-5)
    last = p_sample_t_1to0(model, x, y_t, prior, prior, deviation)
    torch.testing.assert_close(last, record["p_sample_t_1to0"], rtol=1e-5, atol=1e-5)
    y_0 = y_0_reparam(model, x, y_t, prior, prior, record["t"], deviation)
    torch.testing.assert_close(y_0, record["eval/y0_reparam"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_seed_gives_the_draws_of_the_published_loop(model, record, tables, train_mode):
    """The generator's numbers are used in the published order, and no others are drawn."""
    alphas, _, deviation = tables
    model.train(train_mode)
    x, prior = record["x"], record["y_hat"]
    with torch.no_grad():
        torch.manual_seed(11)
        y = torch.randn_like(prior) + prior
        for t in range(29, 0, -1):
            y = p_sample(model, x, y, prior, prior, t, alphas, deviation)
        y = p_sample_t_1to0(model, x, y, prior, prior, deviation)
        after = torch.random.get_rng_state()
    if train_mode:
        model.load_state_dict({k[6:]: v for k, v in record.items() if k.startswith("state/")})
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.manual_seed(11)
            result = p_sample_loop(model, x, prior, prior, 30, alphas, deviation, True)
            assert torch.equal(torch.random.get_rng_state(), after)
        torch.testing.assert_close(result.detach(), y, rtol=1e-5, atol=1e-5)
        if train_mode:
            break


def test_gradient_reaches_the_prior_but_not_the_model(model, record, tables):
    alphas, _, deviation = tables
    prior = record["y_hat"].requires_grad_()
    y_0 = p_sample_loop(model.eval(), record["x"], prior, prior, 5, alphas, deviation, True)
    y_0.sum().backward()
    assert prior.grad is not None and float(prior.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_a_loop_runs_the_encoder_once(record, tables):
    alphas, _, deviation = tables
    torch.manual_seed(0)
    model, passes = ConditionalModel(namespace(3, 16)).eval(), []
    model.encoder_x.register_forward_hook(lambda *_: passes.append(1))
    x, prior = torch.randn(2, 3, 40, 40), torch.full((2, 3), 1 / 3)
    p_sample_loop(model, x, prior, prior, 20, alphas, deviation)
    y = prior
    for t in range(19, 0, -1):
        y = p_sample(model, x, y, prior, prior, t, alphas, deviation)
    assert len(passes) == 1


@torch.no_grad()
def test_a_custom_model_is_called(record, tables):
    alphas, _, deviation = tables

    class Own(nn.Module):
        def forward(self, x, y, t, y_0_hat):
            assert t.shape == (1,)
            return y * 0.1 + y_0_hat * float(t)

    prior = record["y_hat"]
    torch.manual_seed(0)
    states = p_sample_loop(Own(), record["x"], prior, prior, 4, alphas, deviation)
    assert len(states) == 5 and states[-1].shape == (8, 5)

    class Shifted(compat.ConditionalModel):
        def forward(self, x, y, t, y_0_hat=None):
            return super().forward(x, y, t, y_0_hat) + 1.0

    plain, shifted = ConditionalModel(namespace()).eval(), Shifted(namespace()).eval()
    plain.encoder_x = shifted.encoder_x = nn.Identity()
    shifted.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, shifted):
        torch.manual_seed(0)
        results.append(p_sample_loop(model, record["x"], prior, prior, 4, alphas, deviation, True))
    assert not torch.allclose(*results)


def test_guidance_gives_three_logits():
    torch.manual_seed(0)
    dcg = DCG(namespace(classes=4))
    y_fusion, y_global, y_local = dcg(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(y_fusion, (y_global + y_local) / 2)
    assert y_fusion.shape == (2, 4)
    dcg.ds_net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 2048, 1))
    assert not torch.allclose(dcg(torch.ones(2, 3, 64, 64))[1], y_global)


ATTRIBUTES = {
    "saliency_map": torch.Tensor,
    "patch_locations": np.ndarray,
    "patches": np.ndarray,
    "patch_attns": torch.Tensor,
    "y_fusion": torch.Tensor,
    "y_global": torch.Tensor,
    "y_local": torch.Tensor,
}


class Fixed(nn.Module):
    """In the place of a network: always the recorded result."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_attributes_after_a_call_are_the_recorded_ones(golden):
    data = golden("guidance")
    dcg = DCG(namespace()).eval()
    assert not any(hasattr(dcg, name) for name in ATTRIBUTES)
    weights = {key[6:]: value for key, value in data.items() if key.startswith("state/")}
    dcg.load_state_dict(weights, strict=False)
    dcg.ds_net, dcg.left_postprocess_net = nn.Identity(), Fixed(data["saliency"])
    dcg.dn_resnet = Fixed(data["h_crops"].flatten(0, 1))
    images = data["image_channel0"].float()[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        y_fusion, y_global, y_local = dcg(images)
    for name, kind in ATTRIBUTES.items():
        assert type(getattr(dcg, name)) is kind, name
    assert dcg.y_fusion is y_fusion and dcg.y_global is y_global and dcg.y_local is y_local
    assert torch.equal(dcg.saliency_map, data["saliency"])
    assert dcg.patch_locations.dtype == np.int64
    np.testing.assert_array_equal(dcg.patch_locations, data["crop_origin"].numpy())
    assert dcg.patches.shape == (*data["crops"].shape[:2], 3, 32, 32)
    for channel in range(3):
        np.testing.assert_array_equal(
            dcg.patches[:, :, channel].astype(np.float16), data["crops"].numpy()
        )
    for name, recorded in (
        ("patch_attns", "attention"),
        ("y_global", "y_global"),
        ("y_local", "y_local"),
    ):
        torch.testing.assert_close(getattr(dcg, name), data[recorded], rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_dcg():
    """A guidance model with trunks of one layer."""
    torch.manual_seed(0)
    dcg = DCG(namespace(classes=3))
    dcg.ds_net, dcg.dn_resnet = nn.Conv2d(3, 2048, 3, stride=16), nn.Conv2d(3, 2048, 3, stride=8)
    return dcg


def test_attributes_are_of_the_last_call_and_differentiable(small_dcg):
    """An auxiliary loss may be made of them; a copy of the patches is not what the backward pass reads."""
    first, second = torch.randn(2, 2, 3, 64, 64)
    small_dcg(first)
    before = small_dcg.saliency_map
    small_dcg(second)
    assert not torch.equal(small_dcg.saliency_map, before)
    kept = weakref.ref(small_dcg.y_global)
    small_dcg.patches[:] = 0.0
    small_dcg.patch_locations[:] = -1
    assert np.abs(small_dcg.patches).max() > 0 and small_dcg.patch_locations.min() >= 0
    (small_dcg.y_local.sum() + small_dcg.saliency_map.abs().sum()).backward()
    assert float(small_dcg.dn_resnet.weight.grad.abs().max()) > 0
    assert float(small_dcg.ds_net.weight.grad.abs().max()) > 0
    with torch.no_grad():
        small_dcg(first)
    gc.collect()
    assert kept() is None and not small_dcg.y_fusion.requires_grad


def test_attributes_are_carried_by_copies_and_are_no_state(small_dcg):
    keys = list(small_dcg.state_dict())
    small_dcg(torch.randn(2, 3, 64, 64, requires_grad=True))
    assert list(small_dcg.state_dict()) == keys
    for other in (copy.deepcopy(small_dcg), pickle.loads(pickle.dumps(small_dcg))):
        for name in ATTRIBUTES:
            own, copied = getattr(small_dcg, name), getattr(other, name)
            np.testing.assert_array_equal(
                *(v if isinstance(v, np.ndarray) else v.detach().numpy() for v in (own, copied))
            )
        assert not other.y_fusion.requires_grad and small_dcg.y_fusion.requires_grad
        other.load_state_dict(small_dcg.state_dict(), strict=True)
        other(torch.zeros(2, 3, 64, 64))
    with pytest.raises(AttributeError, match="no attribute 'y_nothing'"):
        _ = small_dcg.y_nothing


def test_a_traced_call_leaves_no_attributes(small_dcg):
    """Rather than those of the call before."""
    images = torch.randn(2, 3, 64, 64)
    small_dcg.eval()
    with torch.no_grad():
        expected = small_dcg(images)
        compiled = torch.compile(small_dcg, backend="eager", fullgraph=True)
        torch.testing.assert_close(tuple(compiled(images)), tuple(expected))
        assert not hasattr(small_dcg, "y_fusion")
        small_dcg(images)
        exported = torch.export.export(small_dcg, (images,)).module()
        torch.testing.assert_close(tuple(exported(images)), tuple(expected))


def test_small_functions(golden):
    data = golden("mmd")
    torch.testing.assert_close(compute_kernel(data["1/x"], data["1/y"]), data["1/k_xy"])
    torch.testing.assert_close(compute_mmd(data["2/x"], data["2/y"]), data["2/mmd"])
    table = torch.arange(10.0)
    values = extract(table, torch.tensor([2, 7]), torch.zeros(2, 3, 4))
    assert values.shape == (2, 1, 1) and values.flatten().tolist() == [2.0, 7.0]
    with pytest.raises(ValueError, match=r"t must be in \[0, 9\], got 3 … 10"):
        extract(table, torch.tensor([3, 10]), torch.zeros(2, 3))
    torch.manual_seed(1)
    y, prior = torch.eye(3), torch.full((3, 3), 1 / 3)
    drawn = q_sample(y, prior, table / 10, 1 - table / 10, torch.tensor([1, 2, 3]))
    torch.manual_seed(1)
    noise = torch.randn_like(y)
    assert torch.equal(
        drawn, q_sample(y, prior, table / 10, 1 - table / 10, torch.tensor([1, 2, 3]), noise)
    )


def test_configuration_as_mapping_and_missing_settings():
    nested = {
        "data": {"num_classes": 3},
        "model": {"arch": "resnet18", "feature_dim": 8},
        "diffusion": {"timesteps": 5},
    }
    assert ConditionalModel(nested).lin4.out_features == 3
    config = namespace()
    del config.model.feature_dim
    with pytest.raises(ValueError, match=r"no setting model\.feature_dim"):
        ConditionalModel(config)


def test_bad_arguments_are_named(model, record, tables):
    alphas, _, deviation = tables
    with pytest.raises(ValueError, match=r"n_steps must be in \[1, 100\], got 101"):
        p_sample_loop(model, record["x"], record["y_hat"], record["y_hat"], 101, alphas, deviation)


def test_star_import_brings_the_documented_names():
    names: dict[str, object] = {}
    exec("from diffmic_fast.compat import *", names)
    module = importlib.import_module("diffmic_fast.compat")
    assert set(names) - {"__builtins__"} == set(module.__all__)
