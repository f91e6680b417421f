"""Settings of a trained model: preprocessing, names, sampling; predictions for files and Pillow images."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from training_runs import MODEL

import diffmic_fast
from diffmic_fast import DiffMIC, Preprocessing
from diffmic_fast.checkpoint import Checkpoint, load_model, save_checkpoint
from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.decode import UnreadableImageError
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.predict import collect_files, predict_files

NAMES = ("blue", "green", "red")
OWN = SamplingOptions("ddim", 3, eta=0.5, samples=4, seed=9, views=2)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(1)
    return DiffMIC(MODEL).eval()


@pytest.fixture
def model(built):
    built.preprocessing, built.sampling, built.class_names = Preprocessing(), OWN, NAMES
    yield built
    built.preprocessing = built.sampling = built.class_names = None


@pytest.fixture(scope="module")
def files(images):
    return collect_files([images / "test"])


@pytest.fixture
def checkpoint(built, shared_config, tmp_path):
    """A checkpoint as training writes it."""
    data = dataclasses.replace(
        shared_config.data,
        augmentation=AugmentationConfig(bit_depth=12, mean=(0.1, 0.2, 0.3)),
    )
    config = RunConfig(data, shared_config.model, sampling=shared_config.sampling)
    extras = {
        "config": config.to_dict(),
        "classes": list(NAMES),
        "guidance": built.guidance.state_dict(),
        "guidance_optimizer": {},
    }
    save_checkpoint(Checkpoint(tmp_path / "ckpt.pth", built.denoiser.state_dict(), extras=extras))
    return tmp_path / "ckpt.pth"


def test_predictions_for_paths_are_those_of_the_command_line(model, files):
    expected = predict_files(model, files, NAMES, Preprocessing(), OWN, batch_size=len(files))
    assert len(expected.rows) == len(files) > 0
    opened = [Image.open(path) for path in files]
    for inputs in (files, [str(path) for path in files], opened, model.preprocess(files)):
        found = model.predict(inputs)
        for number, row in enumerate(expected.rows):
            assert found.label[number] == row.label
            assert tuple(found.probabilities[number].tolist()) == row.probabilities
            assert tuple(found.spread[number].tolist()) == row.spread


def test_one_image_is_a_batch_of_one(model, files):
    for image in (files[0], str(files[0]), Image.open(files[0])):
        assert model.preprocess(image).shape == (1, 3, 32, 32)
        assert model.predict(image).label.shape == (1,)


def test_files_require_preprocessing(built, files):
    for call in (built.preprocess, built.predict):
        with pytest.raises(ValueError, match=r"model\.preprocessing = diffmic_fast\.Preprocessing"):
            call(files[0])
    assert built.predict(torch.zeros(1, 3, 32, 32), sampler="ddim", steps=2).label.shape == (1,)
    assert diffmic_fast.Preprocessing is Preprocessing


def test_errors_name_the_operation(model, files):
    with pytest.raises(TypeError, match=r"^DiffMIC\.predict: .* all be paths or all Pillow images"):
        model.predict([files[0], Image.open(files[1])])
    with pytest.raises(TypeError, match=r"^DiffMIC\.preprocess: .*got ndarray"):
        model.preprocess(torch.zeros(1, 3, 32, 32).numpy())
    with pytest.raises(UnreadableImageError, match="nothere"):
        model.predict([files[0], "nothere.png"])


def test_a_checkpoint_states_preprocessing_names_and_sampling(checkpoint):
    for config in (None, MODEL):  # a configuration of the model alone leaves the others
        model, names = load_model(checkpoint, config=config)
        assert model.preprocessing == Preprocessing(bit_depth=12, mean=(0.1, 0.2, 0.3))
        assert model.class_names == names == NAMES
        assert model.sampling == SamplingOptions("ddim", 2)


def test_a_given_run_configuration_comes_first(checkpoint, shared_config):
    model, _ = load_model(checkpoint, config=shared_config)
    assert model.preprocessing == Preprocessing()


def test_published_files_state_nothing(built, shared_config, tmp_path):
    torch.save([built.denoiser.state_dict(), {}, 1, 1], tmp_path / "ckpt.pth")
    torch.save([built.guidance.state_dict(), {}], tmp_path / "aux_ckpt.pth")
    model, _ = load_model(tmp_path / "ckpt.pth", config=MODEL)
    assert model.preprocessing is model.class_names is model.sampling is None
    stated, _ = load_model(tmp_path / "ckpt.pth", config=shared_config)
    assert stated.preprocessing == Preprocessing() and stated.sampling == SamplingOptions("ddim", 2)


def test_a_call_without_a_sampler_takes_the_model_s_own(model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    named = dataclasses.asdict(OWN)

    def same(expected: dict[str, object], **arguments: object) -> bool:
        a, b = model.predict(images, **arguments), model.predict(images, **(named | expected))
        return torch.equal(a.samples, b.samples)

    assert same({})
    assert torch.equal(model(images), model.predict(images, **named).probabilities)
    assert same({"steps": 2}, steps=2) and same({"eta": 0.0}, eta=0.0)
    assert same({"seed": 0, "samples": 1}, seed=0, samples=1) and same({"views": 1}, views=1)
    single = {"steps": 2, "eta": 0.0, "samples": 1, "seed": 0, "views": 1}
    assert same(single, sampler="ddim", steps=2)
    shared = {"guidance": model.guide(images), "features": model.encode(images)}
    assert same({"views": 1}, **shared)
    model.sampling = None
    assert same({"sampler": "ddpm", **single, "steps": None})


@pytest.mark.slow
@pytest.mark.usefixtures("auto_backend")
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch 2.7 and 2.8 do not trace the context managers of predict",
)
def test_the_model_s_own_sampling_in_a_compiled_forward(model):
    torch._dynamo.reset()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-6)
