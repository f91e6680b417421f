"""Torch's default dtype and device, and models of other dtypes: the same numbers, or an error that names them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from diffmic_fast.calibration import confidence, fit_novelty
from diffmic_fast.calibration.novelty import image_statistics
from diffmic_fast.checkpoint import Checkpoint, load_model, save_checkpoint
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.diffusion.schedule import SCHEDULES, make_schedule
from diffmic_fast.inference.calibrate import calibrate
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.reference.rois import choose_windows
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.trainer import Trainer

DTYPES = [torch.float64, torch.bfloat16, torch.float16]
CONFIG = RunConfig(
    DataConfig(kind="synthetic_fundus", synthetic_size=48, synthetic_per_class=12),
    DiffMICConfig(
        5, image_size=48, timesteps=60, feature_dim=32, encoder="test_resnet",
        guidance_trunk="test_resnet", crops=2, crop_size=16,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiffMIC(CONFIG.model).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def tensors(value):
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple) else []


def use(model, images):
    """Every public method, as a list of tensors."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([0, 1, 4], device="cpu")
    found = [
        model.guide(images, views=2),
        model.encode(images, views=4),
        model.pool(images),
        model(images),
    ]
    for sampler, steps, eta in (("ddpm", None, 0.0), ("ddpm_truncated", 5, 0.0), ("ddim", 5, 0.7)):
        prediction = model.predict(
            images,
            sampler=sampler,
            steps=steps,
            eta=eta,
            samples=3,
            trajectory=True,
            saliency=True,
            boxes=True,
        )
        found += [prediction, confidence(prediction, None)]
    found.append(model.loss(images, labels, draws=2, generator=generator))
    found.append(copy.deepcopy(model).train().loss(images, labels, generator=generator))
    return tensors(tuple(found))


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_has_the_same_numbers_under_another_default_dtype(model, images, dtype):
    expected = use(model, images)
    torch.set_default_dtype(dtype)
    same(use(model, images), expected)


def test_a_model_has_the_same_numbers_under_another_default_device(model, images):
    expected = use(model, images)
    torch.set_default_device("meta")
    same(use(model, images), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_float32(name, dtype):
    expected = make_schedule(name, 50)
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    same(tensors(make_schedule(name, 50)), tensors(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_and_statistics_do_not_depend_on_the_default_dtype(images, dtype):
    def compute():
        detector = fit_novelty(rows, image_statistics(many), rows[:20], image_statistics(many[:20]))
        values = [getattr(detector, name) for name in detector.__dataclass_fields__]
        return tensors((image_statistics(images), choose_windows(saliency, (3, 3), 5), *values))

    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(4, 3, 12, 12, generator=generator)
    rows, many = (
        torch.randn(60, 9, generator=generator),
        torch.rand(60, 3, 33, 33, generator=generator),
    )
    expected = compute()
    torch.set_default_dtype(dtype)
    same(compute(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_and_calibration_do_not_depend_on_the_default_dtype(model, dtype):
    def compute():
        dataset = make_dataset(CONFIG, open_source(CONFIG.data, "train"), train=False)
        fitted = calibrate(copy.deepcopy(model), dataset, dataset, options)
        calibrated = copy.deepcopy(model)
        calibrated.calibration = fitted
        results = evaluate(calibrated, dataset, [options], resamples=20).to_dict()["results"]
        for result in results:
            del result["seconds_per_image"]
        return results

    options = SamplingOptions("ddim", 3, samples=2)
    expected = compute()
    torch.set_default_dtype(dtype)
    assert compute() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_is_read_in_float32(model, images, tmp_path, dtype):
    extras = {
        "config": CONFIG.to_dict(),
        "guidance": model.guidance.state_dict(),
        "guidance_optimizer": {},
    }
    path = tmp_path / "ckpt.pth"
    save_checkpoint(Checkpoint(path, model.denoiser.state_dict(), {}, extras=extras))
    expected = model.predict(images, sampler="ddim", steps=3)
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    loaded, _ = load_model(path)
    same(tensors(loaded.predict(images, sampler="ddim", steps=3)), tensors(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_rejected(model, images, dtype):
    half, labels = copy.deepcopy(model).to(dtype), torch.tensor([0, 1, 2])
    calls = {
        "predict": lambda: half.predict(images.to(dtype)),
        "guide": lambda: half.guide(images.to(dtype)),
        "encode": lambda: half.encode(images.to(dtype)),
        "pool": lambda: half.pool(images.to(dtype)),
        "loss": lambda: half.loss(images.to(dtype), labels),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"DiffMIC\.{name}: the model must be .*, got {dtype}"):
            call()
    with pytest.raises(TypeError, match=rf"the model must be torch\.float32 or .*, got {dtype}"):
        evaluate(half, make_dataset(CONFIG, open_source(CONFIG.data), train=False), [])


def test_a_model_of_two_dtypes_is_rejected(model, images):
    mixed = copy.deepcopy(model)
    mixed.guidance.double()
    with pytest.raises(TypeError, match=r"the model must be torch\.float32, got torch\.float64"):
        mixed.predict(images)
    with pytest.raises(TypeError, match=r"the model must be .*, got torch\.float64"):
        mixed.loss(images, torch.tensor([0, 1, 2]))


def test_a_float64_model_has_guidance_and_loss_but_no_chain(model, images):
    double = copy.deepcopy(model).double()
    logits = torch.stack(double.guide(images.double()).logits).float()
    torch.testing.assert_close(
        logits, torch.stack(model.guide(images).logits), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(TypeError, match=r"predict: the model must be torch\.float32, got torch\.f"):
        double.predict(images.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_needs_the_default_dtype_float32(tmp_path, dtype):
    torch.set_default_dtype(dtype)
    with pytest.raises(TypeError, match=f"default dtype must be torch.float32, got {dtype}"):
        Trainer(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
