"""Resuming a finished run: in its folder, into another one, and with more epochs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from training_fixtures import write_images
from training_runs import flat, make_config, rows, with_training

from diffmic_fast.checkpoint import load_model, read_checkpoint
from diffmic_fast.cli import main
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """60 training and 27 validation images, enough for a calibration; one epoch and two."""
    root = tmp_path_factory.mktemp("resume")
    write_images(root / "train", 20)
    write_images(root / "test", 9, seed=1)
    config = with_training(make_config(root), batch_size=20)
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, samples=2))


@pytest.fixture(scope="module")
def finished(run_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    Trainer(run_config, out, quiet=True).fit()
    run_config.save(out / "config.yml")
    return out


def content(path):
    return {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in flat(torch.load(path, weights_only=True)).items()
    }


def named_files(text):
    """The checkpoints that a text names."""
    return [word.rstrip(",;.") for word in text.split() if ".pth" in word]


def test_a_finished_run_goes_into_another_folder(finished, tmp_path, capsys):
    out = tmp_path / "other"
    status = main(["train", "--resume", str(finished), "--out", str(out), "--quiet"])
    printed = capsys.readouterr().out
    assert status == 0
    assert "had finished its 3 epochs, nothing was trained" in printed
    assert str(out / "ckpt.pth") in printed and str(out / "ckpt_best.pth") in printed
    for name in named_files(printed):
        load_model(name)
    for name in ("ckpt.pth", "ckpt_best.pth", "aux_ckpt.pth", "aux_ckpt_best.pth"):
        old, new = content(finished / name), content(out / name)
        differing = [key for key in old if old[key] != new.get(key)]
        assert all("is_best" in key for key in differing) and old.keys() == new.keys(), name
    model, _ = load_model(out / "ckpt.pth")
    assert model.calibration is not None


def test_a_finished_run_in_its_folder_is_left_as_it_is(finished, run_config, capsys):
    before = {path.name: path.read_bytes() for path in finished.glob("*.pth")}
    assert main(["train", "--resume", "--out", str(finished), "--quiet"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in finished.glob("*.pth")} == before


def test_more_epochs_go_on_from_the_end(finished, run_config, tmp_path, capsys):
    out = tmp_path / "longer"
    trained = []
    longer = with_training(run_config, epochs=4)
    trainer = Trainer(
        longer, out, resume=finished / "ckpt.pth", on_step=lambda *at: trained.append(at)
    )
    start = {k: v.clone() for k, v in trainer.model.denoiser.state_dict().items()}
    assert not trainer.finished
    stored = read_checkpoint(finished / "ckpt.pth").denoiser
    assert all(torch.equal(start[key], value) for key, value in stored.items())
    trainer.fit()
    error = capsys.readouterr().err
    assert (
        "resume: training.epochs is 4, was 2: learning rates, and the views of epochs on features, follow"
        in error
    )
    assert trained == [(epoch, step) for epoch in (3, 4) for step in (1, 2, 3)]
    assert trainer.finished and read_checkpoint(out / "ckpt.pth").epoch == 4
    # Half a cosine over the 3 epochs after the warm-up, at the last step: 2 / 3 of an epoch before its end.
    rate = trainer.steps.optimizer.param_groups[0]["lr"]
    progress = (3 + 2 / 3 - 1) / 3
    assert rate == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * progress)))
    model, _ = load_model(out / "ckpt.pth")
    assert model.calibration is not None


def test_more_epochs_in_the_folder_of_the_run_by_the_command_line(finished, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--resume", str(finished), "--out", str(out), "--quiet"]) == 0
    argv = ["train", "--resume", "--out", str(out), "--set", "training.epochs=3", "--quiet"]
    capsys.readouterr()
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "trained 4 epochs" in printed
    for name in named_files(printed):
        load_model(name)
    assert [row["epoch"] for row in rows(out)] == ["3"]
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, r"training\.epochs: 2 in the checkpoint, 1 now"),
        ({"guidance_epochs": 2}, r"training\.guidance_epochs: 1 in the checkpoint, 2 now"),
        ({"encoder_epochs": 2}, r"training\.encoder_epochs: 0 in the checkpoint, 2 now"),
        ({"epochs": 5, "learning_rate": 0.1}, r"training\.learning_rate: 0.001 in the checkpoint"),
    ],
)
def test_other_changes_of_length_are_rejected(finished, run_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"{message}.*\(training\.epochs may be larger\)"):
        Trainer(with_training(run_config, **changes), tmp_path / "x", resume=finished / "ckpt.pth")
    assert not (tmp_path / "x").exists()


def test_the_last_phase_that_has_epochs_may_be_longer(run_config, tmp_path):
    guidance = with_training(run_config, epochs=0)
    path = Trainer(guidance, tmp_path / "one", quiet=True).fit()
    longer = with_training(guidance, guidance_epochs=2)
    trainer = Trainer(longer, tmp_path / "two", resume=path, quiet=True)
    assert (trainer.progress.epoch, trainer.epochs) == (1, 2)
    with pytest.raises(ValueError, match=r"\(training\.guidance_epochs may be larger\)"):
        Trainer(run_config, tmp_path / "three", resume=path, quiet=True)


def test_another_run_is_not_overwritten(finished, run_config, tmp_path):
    other = Trainer(with_training(run_config, epochs=0), tmp_path / "other", quiet=True).fit()
    before = other.read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(run_config, tmp_path / "other", resume=finished / "ckpt.pth", quiet=True)
    assert other.read_bytes() == before


def test_the_best_of_an_interrupted_run_comes_along(run_config, tmp_path):
    """Only if it is that of the checkpoint: its metric is."""

    def stop(epoch, step):
        if (epoch, step) == (2, 2):
            trainer.interruption.signum = 15

    first = tmp_path / "first"
    trainer = Trainer(run_config, first, quiet=True, on_step=stop)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert (first / "ckpt_best.pth").is_file()
    second = Trainer(run_config, tmp_path / "second", quiet=True, resume=first / "ckpt.pth")
    best = second.best
    second.fit()
    found = read_checkpoint(tmp_path / "second" / "ckpt_best.pth").extras["progress"]["best"]
    assert found == second.best >= best


def test_the_best_comes_along_without_its_guidance_file(run_config, tmp_path):
    """The guidance model is in the checkpoint, too."""
    path = Trainer(run_config, tmp_path / "first", quiet=True).fit()
    best = (tmp_path / "first" / "ckpt_best.pth").read_bytes()
    (tmp_path / "first" / "aux_ckpt_best.pth").unlink()
    Trainer(run_config, tmp_path / "second", quiet=True, resume=path).fit()
    assert (tmp_path / "second" / "ckpt_best.pth").read_bytes() == best
    assert not (tmp_path / "second" / "aux_ckpt_best.pth").exists()
    load_model(tmp_path / "second" / "ckpt_best.pth")
