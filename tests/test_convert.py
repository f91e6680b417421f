"""Conversion of models: the same bits in every direction; what a format cannot store is reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from calibrated_models import NAMES, calibrated_model, redigest
from safetensors.torch import load_file, save_file
from training_runs import MODEL, assert_same_values, make_config

from diffmic_fast import DiffMIC
from diffmic_fast.checkpoint import (
    Checkpoint,
    add_calibration,
    load_model,
    read_checkpoint,
    read_guidance,
    save_checkpoint,
)
from diffmic_fast.cli import main
from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.config.run import RunConfig
from diffmic_fast.inference.predict import FilePredictor

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The same model as folder, run/ckpt.pth with weights beside their average, and theirs/ckpt.pth of the authors."""
    root = tmp_path_factory.mktemp("convert")
    model = calibrated_model()
    model.save_pretrained(root / "folder")
    run = make_config(root / "images")
    run = RunConfig(run.data, run.model, run.training, run.sampling)
    run.data.augmentation = AugmentationConfig(**vars(model.preprocessing))
    run.data.augmentation.rotation = 7.0
    run.sampling.sampler, run.sampling.steps, run.sampling.eta = "ddim", 2, 0.25
    run.sampling.samples, run.sampling.seed, run.sampling.views = 3, 5, 2
    state = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    average = {name: p.detach() for name, p in model.denoiser.named_parameters()}
    for name in average:
        state[name] = state[name] + 1
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}},
        "param_groups": [],
    }
    extras = {
        "config": run.to_dict(), "classes": list(NAMES), "guidance": model.guidance.state_dict(),
        "guidance_optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "progress": {"epoch": 2, "position": 0}, "images": {"training": torch.arange(5)},
    }  # fmt: skip
    for folder in ("run", "theirs"):
        (root / folder).mkdir()
        save_checkpoint(
            Checkpoint(root / folder / "ckpt.pth", state, optimizer, 2, 40, average, extras),
            published=folder == "theirs",
        )
    add_calibration(root / "run" / "ckpt.pth", model.calibration)
    run.save(root / "config.yml")
    return root


@pytest.fixture(scope="module")
def model() -> DiffMIC:
    return calibrated_model()


def convert(capsys, *arguments: object) -> list[str]:
    assert main(["convert", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def assert_same_model(model: DiffMIC, path: Path, config: RunConfig | None = None) -> None:
    """Tensors, predictions and, unless a configuration has to be given, calibration, bit by bit."""
    loaded, names = load_model(path, config=config)
    assert_same_values(model.state_dict(), loaded.state_dict())
    a, b = (each.predict(IMAGES, probability="published") for each in (model, loaded))
    assert torch.equal(a.label, b.label) and torch.equal(a.probabilities, b.probabilities)
    assert loaded.preprocessing == model.preprocessing and loaded.sampling == model.sampling
    if config is None:
        assert names == NAMES
        assert_same_values(model.calibration.to_state(), loaded.calibration.to_state())
        a, b = model.predict(IMAGES), loaded.predict(IMAGES)
        assert b.calibrated and torch.equal(a.probabilities, b.probabilities)


def digest_of_rows(path: Path) -> str:
    """Of the rows of `predict`, which an interrupted run continues only with an equal one."""
    model, names = load_model(path)
    return FilePredictor(model, names, model.preprocessing, model.sampling).heading.digest


def test_a_folder_becomes_a_checkpoint_and_a_folder_again(model, sources, tmp_path, capsys):
    assert convert(capsys, sources / "folder", tmp_path / "ckpt.pth") == [
        f"{tmp_path / 'ckpt.pth'}: a checkpoint"
    ]
    assert_same_model(model, tmp_path / "ckpt.pth")
    lines = convert(capsys, tmp_path / "ckpt.pth", tmp_path / "again")
    assert lines[0].endswith("again: a folder of save_pretrained")
    assert_same_model(model, tmp_path / "again")
    for name in ("model.safetensors", "calibration.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (sources / "folder" / name).read_bytes()


def test_a_run_becomes_a_folder_and_a_checkpoint_again(model, sources, tmp_path, capsys):
    lines = convert(capsys, sources / "run", tmp_path / "folder")
    for part in (
        "state of the training", "the weights that it averages", "keys of the training images", "where the images are",
    ):  # fmt: skip
        assert any(line.startswith("not kept: ") and part in line for line in lines), part
    assert not any("not known" in line for line in lines)
    assert_same_model(model, tmp_path / "folder")
    assert digest_of_rows(sources / "run" / "ckpt.pth") == digest_of_rows(tmp_path / "folder")
    convert(capsys, tmp_path / "folder", tmp_path / "back.pth", "--to", "checkpoint")
    assert_same_model(model, tmp_path / "back.pth")
    assert (
        main(["train", "--resume", str(tmp_path / "back.pth"), "--out", str(tmp_path / "r")]) == 2
    )
    assert "it can be evaluated, not resumed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:checkpoint. the calibration of")
def test_the_weights_beside_their_average(sources, tmp_path, capsys):
    lines = convert(capsys, sources / "run" / "ckpt.pth", tmp_path / "folder", "--no-ema")
    assert "not kept: their moving average" in lines
    assert any(
        "not known: a calibration" in line for line in lines
    )  # it was fitted for the average
    expected, _ = load_model(sources / "run" / "ckpt.pth", ema=False)
    found = DiffMIC.from_pretrained(tmp_path / "folder")
    assert_same_values(expected.state_dict(), found.state_dict())
    assert found.calibration is None


def test_a_run_becomes_a_published_checkpoint_and_a_checkpoint_again(
    model, sources, tmp_path, capsys
):
    lines = convert(capsys, sources / "run", tmp_path / "a" / "ckpt.pth", "--to", "published")
    for part in ("calibration", "preprocessing", "names of the classes", "sampling", "--config"):
        assert any(line.startswith("not kept: ") and part in line for line in lines), part
    files = ("ckpt.pth", "aux_ckpt.pth")
    for name in files:
        mine, theirs = (
            torch.load(folder / name, weights_only=True)
            for folder in (tmp_path / "a", sources / "theirs")
        )
        assert_same_values(mine, theirs)
    config = ("--config", sources / "config.yml")
    lines = convert(capsys, tmp_path / "a" / "ckpt.pth", tmp_path / "b.pth", *config)
    assert lines[1:] == [
        "not known: the names of the classes",
        "not known: a calibration; probabilities are those of the softmax",
    ]
    before, after = (
        read_checkpoint(sources / "run" / "ckpt.pth"),
        read_checkpoint(tmp_path / "b.pth"),
    )
    for name in ("denoiser", "optimizer", "epoch", "step", "ema"):
        assert_same_values({name: getattr(before, name)}, {name: getattr(after, name)})
    assert_same_values(read_guidance(sources / "run" / "aux_ckpt.pth"), after.extras["guidance"])
    loaded, _ = load_model(tmp_path / "b.pth")
    assert loaded.preprocessing == model.preprocessing and loaded.calibration is None


def test_a_published_checkpoint_becomes_a_folder_and_published_again(
    model, sources, tmp_path, capsys
):
    run = RunConfig.from_dict(read_checkpoint(sources / "run" / "ckpt.pth").extras["config"])
    lines = convert(
        capsys, sources / "theirs" / "ckpt.pth", tmp_path / "folder", "--config", sources / "config.yml",
    )  # fmt: skip
    assert "not known: the names of the classes" in lines
    assert_same_model(model, tmp_path / "folder", run)
    lines = convert(capsys, tmp_path / "folder", tmp_path / "ckpt.pth", "--to", "published")
    assert_same_model(model, tmp_path / "ckpt.pth", run)
    parts = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    # Their program loads entry 0, then the average at the end of the list.
    assert_same_values(parts[0], model.denoiser.state_dict())
    assert_same_values(parts[-1], {k: p.detach() for k, p in model.denoiser.named_parameters()})


@pytest.mark.parametrize("form", ["pretrained", "checkpoint"])
def test_a_guidance_file_of_another_folder(model, sources, tmp_path, capsys, form):
    alone = Path(shutil.copy(sources / "theirs" / "ckpt.pth", tmp_path))
    options = ("--to", form, "--config", sources / "config.yml")
    assert main(["convert", str(alone), str(tmp_path / "new"), *map(str, options)]) == 2
    assert "guidance" in capsys.readouterr().err
    guidance = sources / "theirs" / "aux_ckpt.pth"
    convert(capsys, alone, tmp_path / "new", *options, "--guidance", guidance)
    loaded, _ = load_model(tmp_path / "new")
    assert_same_values(model.state_dict(), loaded.state_dict())


def test_a_calibration_of_other_weights_is_not_carried_into_a_checkpoint(sources, tmp_path, capsys):
    folder = Path(shutil.copytree(sources / "folder", tmp_path / "folder"))
    weights = load_file(folder / "model.safetensors")
    weights["denoiser.lin4.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    redigest(folder)
    lines = convert(capsys, folder, tmp_path / "ckpt.pth")
    assert any("not known: a calibration" in line for line in lines)
    assert "calibration" not in read_checkpoint(tmp_path / "ckpt.pth").extras


def test_a_published_checkpoint_without_preprocessing(sources, tmp_path, capsys):
    from diffmic_fast.convert import convert as function

    with pytest.raises(ValueError, match=r"no configuration inside.*--config"):
        function(sources / "theirs" / "ckpt.pth", tmp_path / "a", "pretrained")
    assert not (tmp_path / "a").exists()
    model, _ = load_model(sources / "theirs" / "ckpt.pth", config=MODEL)
    model.save_pretrained(tmp_path / "b")
    lines = convert(capsys, tmp_path / "b", tmp_path / "c.pth")
    assert any("not known: the preprocessing" in line and "--config" in line for line in lines)
    loaded, _ = load_model(tmp_path / "c.pth")
    assert loaded.preprocessing is None
    assert_same_values(model.state_dict(), loaded.state_dict())
    assert main(["predict", str(tmp_path / "c.pth"), "x.png"]) == 2
    assert "has no configuration inside" in capsys.readouterr().err


def test_preprocessing_changes_only_with_override(sources, tmp_path, capsys):
    change = ["--set", "data.augmentation.bit_depth=10"]
    arguments = ["convert", str(sources / "folder"), str(tmp_path / "a.pth"), *change]
    assert main(arguments) == 2
    assert "data.augmentation.bit_depth: 12 in the checkpoint, 10 now" in capsys.readouterr().err
    assert main([*arguments, "--override"]) == 0
    assert load_model(tmp_path / "a.pth")[0].preprocessing.bit_depth == 10
    assert read_checkpoint(tmp_path / "a.pth").config.data.augmentation.bit_depth == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "x"], "is a folder of save_pretrained already"),
        (["run", "x.pth"], "is a checkpoint already"),
        (["theirs", "x.pth", "--to", "published"], "is a checkpoint of the published program already"),
        (["nothere", "x"], "there is no file"),
        (["folder", "x.pth", "--no-ema"], "a checkpoint has both"),
        (["folder", "x.pth", "--evaluation", "e.json"], "which a checkpoint does not have"),
        (["folder", "used.pth"], r"used.pth exists already"),
        (["folder", "ready.pth"], r"aux_ready.pth exists already"),
        (["run", "run"], "must be a new or empty folder"),
        (["run", "x", "--evaluation", "nothere.json"], "cannot be read"),
    ],
)  # fmt: skip
def test_errors(sources, tmp_path, capsys, monkeypatch, arguments, message):
    root = Path(shutil.copytree(sources, tmp_path / "work"))
    for name in ("used.pth", "aux_ready.pth"):
        (root / name).write_text("x")
    before = sorted(root.rglob("*"))
    monkeypatch.chdir(root)
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before


@pytest.mark.slow
def test_overwrite(sources, tmp_path, capsys):
    for _ in range(2):
        convert(capsys, sources / "folder", tmp_path / "a.pth", "--overwrite")
        convert(capsys, sources / "run", tmp_path / "a", "--overwrite")
