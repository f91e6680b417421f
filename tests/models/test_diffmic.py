"""DiffMIC: loss, prediction, and what a prediction depends on."""

from __future__ import annotations

import copy

import pytest
import torch

from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.checks import check_finite
from diffmic_fast.models.loss import antithetic_timesteps


@pytest.fixture(scope="module")
def trained():
    """A small model whose running statistics have seen images."""
    torch.manual_seed(0)
    config = DiffMICConfig(
        classes=3,
        image_size=64,
        timesteps=40,
        feature_dim=24,
        guidance_trunk="resnet18",
        crops=3,
        crop_size=16,
    )
    model = DiffMIC(config).train()
    optimizer = torch.optim.Adam(model.denoiser.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(torch.randn(8, 3, 64, 64), torch.randint(0, 3, (8,))).total.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def images():
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_forward_gives_probabilities(model, images):
    probabilities = model(images)
    assert probabilities.shape == (5, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    assert torch.equal(probabilities, model.predict(images, sampler="ddpm").probabilities)
    with pytest.raises(RuntimeError, match="must be called in evaluation mode"):
        model.train()(images)


def test_prediction_fields(model, images):
    result = model.predict(
        images, sampler="ddim", steps=6, samples=4, trajectory=True, saliency=True, boxes=True
    )
    assert result.samples.shape == (5, 4, 3) and result.trajectory.shape == (5, 4, 7, 3)
    assert torch.equal(result.trajectory[:, :, -1], result.samples)
    each = result.samples.softmax(-1)
    torch.testing.assert_close(result.probabilities, each.mean(1))
    torch.testing.assert_close(result.spread, each.std(1, correction=0))
    assert torch.equal(result.label, result.probabilities.argmax(1))
    assert result.guidance.shape == (5, 3, 3) and result.saliency.shape == (5, 3, 2, 2)
    height = result.boxes[..., 2:] - result.boxes[..., :2]
    assert result.boxes.shape == (5, 3, 4) and bool((height == 16).all())
    single = model.predict(images, sampler="ddim", steps=6)
    assert bool((single.spread == 0).all()) and single.trajectory is None


@pytest.mark.parametrize("sampler", [("ddpm", None), ("ddpm_truncated", 12), ("ddim", 8)])
def test_a_prediction_does_not_depend_on_its_batch(model, images, sampler):
    name, steps = sampler
    together = model.predict(images, sampler=name, steps=steps, samples=2, seed=3)
    order = [3, 0]
    some = model.predict(images[order], sampler=name, steps=steps, samples=2, seed=3)
    torch.testing.assert_close(some.samples, together.samples[order], rtol=1e-3, atol=1e-3)
    more = model.predict(images, sampler=name, steps=steps, samples=5, seed=3)
    torch.testing.assert_close(more.samples[:, :2], together.samples, rtol=1e-3, atol=1e-3)
    again = model.predict(images, sampler=name, steps=steps, samples=2, seed=3)
    assert torch.equal(again.samples, together.samples)


def test_seed_and_ids_key_the_noise(model, images):
    arguments = {"sampler": "ddim", "steps": 5}
    ids = torch.tensor([4, 4, 7, 8, 9])
    same = images[:1].expand(5, -1, -1, -1)
    result = model.predict(same, ids=ids, **arguments).samples
    torch.testing.assert_close(result[0], result[1], rtol=1e-4, atol=1e-4)
    assert float((result[0] - result[2]).abs().max()) > 1e-3
    other = model.predict(same, ids=ids, seed=1, **arguments).samples
    assert float((result - other).abs().max()) > 1e-3
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    model.predict(images, **arguments)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_predict_leaves_the_model_as_it_was(model, images):
    model.train()
    model.denoiser.norm.eval()
    state = copy.deepcopy(model.state_dict())
    model.predict(images, sampler="ddim", steps=2)
    assert model.training and model.guidance.training and not model.denoiser.norm.training
    assert all(torch.equal(a, state[key]) for key, a in model.state_dict().items())


def test_replaced_and_hooked_layers_are_used(model, images):
    arguments = {"sampler": "ddim", "steps": 4}
    plain = model.predict(images, **arguments).samples
    calls = []
    handle = model.denoiser.lin2.register_forward_hook(lambda *_: calls.append(1))
    hooked = model.predict(images, **arguments).samples
    torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4
    handle.remove()
    model.denoiser.lin4 = torch.nn.Sequential(model.denoiser.lin4, torch.nn.Tanh())
    assert not torch.allclose(model.predict(images, **arguments).samples, plain)
    model.guidance.ds_net = torch.nn.Sequential(model.guidance.ds_net, torch.nn.ReLU6())
    assert not torch.allclose(model.predict(images, **arguments).guidance[:, 1], plain[:, 0])


def test_precision_of_the_chain(model, images):
    arguments = dict(sampler="ddim", steps=5, samples=2)
    plain = model.predict(images, **arguments).samples
    coarse = model.predict(images, precision="bf16", **arguments).samples
    assert not torch.equal(coarse, plain)
    torch.testing.assert_close(coarse, plain, rtol=0.1, atol=0.1)
    with pytest.raises(
        ValueError, match="precision must be one of fp32, bf16, fp8, int8, got 'int4'"
    ):
        model.predict(images, precision="int4", **arguments)
    handle = model.denoiser.lin2.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"precision='bf16' is not available.*hook"):
        model.predict(images, precision="bf16", **arguments)
    handle.remove()


@pytest.mark.parametrize("draws", [1, 3])
def test_several_draws_share_the_encoder(model, images, draws):
    calls = []
    model.train().denoiser.encoder_x.register_forward_hook(lambda *_: calls.append(1))
    labels = torch.tensor([0, 2, 1, 1, 0])
    generator = torch.Generator().manual_seed(0)
    loss = model.loss(images, labels, draws=draws, generator=generator)
    assert len(calls) == 1 and bool(torch.isfinite(loss.total))
    drawn = torch.Generator().manual_seed(0)
    antithetic_timesteps(5 * draws, 40, drawn)
    torch.randn(5 * draws, 3, generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())


def test_loss_is_its_definition(model, images):
    """Against the three branches written out, one pass each, in the published order."""
    from diffmic_fast.reference.mmd import mmd

    labels = torch.tensor([0, 2, 1, 1, 0])
    three = copy.deepcopy(model)
    model.train(), three.train()
    loss = model.loss(images, labels, generator=torch.Generator().manual_seed(2))
    loss.total.backward()

    generator = torch.Generator().manual_seed(2)
    t = antithetic_timesteps(5, 40, generator)
    noise = torch.randn(5, 3, generator=generator)
    three.guidance.eval()
    with torch.no_grad():
        priors = [logits.softmax(1) for logits in three.guidance(images)]
    s = three.schedule.sqrt_alpha_bar[t][:, None]
    q = three.schedule.sqrt_one_minus_alpha_bar[t][:, None]
    y_0 = torch.eye(3)[labels]
    eps = [
        three.denoiser(images, s * y_0 + (1 - s) * prior + q * noise, t, prior) for prior in priors
    ]
    expected = (noise - eps[0]).square().mean() + 0.5 * (mmd(noise, eps[1]) + mmd(noise, eps[2]))
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, loss.noise + 0.5 * (loss.mmd_global + loss.mmd_local))
    largest = max(float(b.grad.abs().max()) for b in three.denoiser.parameters())
    for (name, a), b in zip(
        model.denoiser.named_parameters(), three.denoiser.parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert all(parameter.grad is None for parameter in model.guidance.parameters())
    assert model.guidance.training


def test_antithetic_timesteps():
    for count in (1, 2, 7, 32):
        t = antithetic_timesteps(count, 50, torch.Generator().manual_seed(count))
        half = count // 2 + 1
        assert t.shape == (count,) and 0 <= int(t.min()) <= int(t.max()) < 50
        assert torch.equal(t[half:], 49 - t[: count - half])


def test_bad_arguments_are_named(model, images):
    labels = torch.zeros(5).long()
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \(5, 1, 64, 64\)"):
        model.predict(images[:, :1])
    with pytest.raises(
        TypeError, match=r"images must be torch\.float32 as the model is, got torch\.float64"
    ):
        model.predict(images.double())
    with pytest.raises(ValueError, match="images must not be empty"):
        model.predict(images[:0])
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 1\.5"):
        model.predict(images, seed=1.5)
    with pytest.raises(ValueError, match=f"seed must be from .* to {2**64 - 1}, got"):
        model.predict(images, seed=2**64)
    with pytest.raises(ValueError, match="at least 2 images for its batch statistics"):
        copy.deepcopy(model).train().loss(images[:1], labels[:1])
    with pytest.raises(TypeError, match="images must be a floating-point tensor"):
        model.predict(images.to(torch.uint8))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\], got 0 … 3"):
        model.loss(images, torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match=r"labels must be \[B=5\], got \(4,\)"):
        model.loss(images, labels[:4])
    with pytest.raises(ValueError, match=r"ids must be \[B=5\], got \(2,\)"):
        model.predict(images, ids=labels[:2])
    with pytest.raises(ValueError, match="samples must be at least 1"):
        model.predict(images, samples=0)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        model.loss(images, labels, draws=0)
    with pytest.raises(ValueError, match="'ddpm' walks all 40 timesteps, got steps=60"):
        model.predict(images, steps=60)
    images[3, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity for image 3"):
        model.predict(images)


def test_a_result_that_is_not_finite_raises(model, images):
    model.denoiser.lin4.bias.data[1] = float("nan")
    with pytest.raises(FloatingPointError, match="result: NaN or infinity for image 0"):
        model.predict(images, sampler="ddim", steps=2)


def test_finite_images_whose_sum_overflows_are_accepted():
    images = torch.full((3, 3, 2, 2), 3e38)
    check_finite("images", images, ValueError)
    for bad in (float("inf"), float("-inf"), float("nan")):
        images[1, 0, 1, 0] = bad
        with pytest.raises(ValueError, match="images: NaN or infinity for image 1"):
            check_finite("images", images, ValueError)
    images[2, 0, 0, 0] = float("inf")  # and a NaN: the sum is NaN
    with pytest.raises(ValueError, match="image 1, 2"):
        check_finite("images", images, ValueError)
