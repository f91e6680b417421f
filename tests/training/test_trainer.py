"""The training run: phases and logs, exact resumption, interruption and errors."""

import copy
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from training_runs import assert_same_run, rows

from diffmic_fast.checkpoint import load_model, read_checkpoint
from diffmic_fast.data.sources import open_source
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.log import COLUMNS
from diffmic_fast.training.trainer import Trainer, TrainingError


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folders of unbroken runs by name; each is run once."""
    made = {}

    def run(name, config):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            Trainer(config, made[name], quiet=True).fit()
        return made[name]

    return run


def test_files_of_a_run(config, unbroken, images):
    out = unbroken("plain", config)
    assert {p.name for p in out.iterdir()} == {
        "config.yml", "log.csv", "ckpt.pth", "aux_ckpt.pth", "ckpt_best.pth", "aux_ckpt_best.pth",
    }  # fmt: skip
    table = rows(out)
    assert tuple(table[0]) == COLUMNS
    assert [r["epoch"] for r in table] == ["0", "1", "2"]
    assert [r["phase"] for r in table] == ["guidance", "joint", "joint"]
    assert [r["step"] for r in table] == ["0", "4", "8"]  # 15 images in batches of 4
    assert table[0]["loss"] == "" and float(table[1]["loss"]) > 0
    for r in table:
        assert 0 <= float(r["validation_guidance_accuracy"]) <= 1
        assert (r["validation_accuracy"] == "") == (r["phase"] == "guidance")
    # Learning rate of the last step: 3/4 through the last of 2 epochs, warm-up 1.
    rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * 0.75))
    assert float(table[2]["learning_rate"]) == pytest.approx(rate)

    file = read_checkpoint(out / "ckpt.pth")
    assert (file.epoch, file.step, file.class_names) == (2, 8, ("blue", "green", "red"))
    assert file.config == config
    names = set(dict(DiffMIC(config.model).denoiser.named_parameters()))
    assert set(file.ema) == names
    model, classes = load_model(out / "ckpt.pth")
    assert classes == ("blue", "green", "red")
    assert torch.equal(model.denoiser.lin4.weight, file.ema["lin4.weight"])
    assert not torch.equal(model.denoiser.lin4.weight, file.denoiser["lin4.weight"])


def test_the_checkpoint_has_the_published_format(config, unbroken):
    """Published programs load entries 0 to 3 and take the average from the end of the list."""
    parts = torch.load(unbroken("plain", config) / "ckpt.pth", weights_only=True)
    assert len(parts) == 5 and [type(part) for part in parts[2:4]] == [int, int]
    denoiser = DiffMIC(config.model).denoiser
    denoiser.load_state_dict(parts[0], strict=True)
    torch.optim.Adam(denoiser.parameters()).load_state_dict(parts[1])
    trainable = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    assert parts[-1].keys() == trainable.keys()
    assert all(parts[-1][name].shape == p.shape for name, p in trainable.items())


def test_the_guidance_file_has_the_published_format(config, unbroken):
    out = unbroken("plain", config)
    parts = torch.load(out / "aux_ckpt.pth", weights_only=True)
    assert isinstance(parts, list) and len(parts) == 2
    inside = read_checkpoint(out / "ckpt.pth").extras["guidance"]
    assert all(torch.equal(v, inside[k]) for k, v in parts[0].items())
    DiffMIC(config.model).guidance.load_state_dict(parts[0], strict=True)


def test_guidance_epochs_do_not_change_the_denoiser(config, tmp_path):
    alone = dataclasses.replace(config.training, epochs=0)
    trainer = Trainer(dataclasses.replace(config, training=alone), tmp_path, quiet=True)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.fit()
    after = trainer.model.state_dict()
    for key, value in before.items():
        if key.startswith("denoiser."):
            assert torch.equal(value, after[key]), key
    assert not torch.equal(
        before["guidance.classifier_linear.weight"], after["guidance.classifier_linear.weight"]
    )
    with pytest.warns(UserWarning, match="before the denoiser's first step"):
        load_model(tmp_path / "ckpt.pth")


def test_a_joint_step_updates_each_model_by_its_own_loss(config, tmp_path):
    """The denoiser's step first, then the guidance model's own (docs/algorithm.md, "Training step")."""
    trainer = Trainer(config, tmp_path, quiet=True)
    other = Trainer(config, tmp_path / "other", quiet=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    got = trainer.steps.denoiser_step(images, labels, 1.0)
    guidance_loss = trainer.steps.guidance_step(images, labels, 0.5)

    model = other.model
    model.train()
    losses = model.loss(images, labels, generator=torch.Generator().manual_seed(config.seed))
    assert got["loss"] == float(losses.total.detach())
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
    torch.optim.Adam(model.denoiser.parameters(), lr=1e-3).step()
    assert all(p.grad is None for p in model.guidance.parameters())
    loss = torch.nn.functional.cross_entropy(model.guidance(images)[0], labels)
    assert guidance_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    torch.optim.Adam(model.guidance.parameters(), lr=2e-4, amsgrad=True).step()
    expected = model.state_dict()
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)


def test_encoder_learning_rate_and_draws(config, tmp_path):
    training = dataclasses.replace(config.training, encoder_learning_rate=1e-4, draws=3)
    trainer = Trainer(dataclasses.replace(config, training=training), tmp_path, quiet=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    model = copy.deepcopy(trainer.model)
    got = trainer.steps.denoiser_step(images, labels, 0.5)
    rest, encoder = trainer.steps.optimizer.param_groups
    assert (rest["lr"], encoder["lr"]) == pytest.approx((0.5e-3, 0.5e-4))
    sizes = [sum(p.numel() for p in group["params"]) for group in (rest, encoder)]
    assert sizes[1] == sum(p.numel() for p in model.denoiser.encoder_x.parameters())
    assert sum(sizes) == sum(p.numel() for p in model.denoiser.parameters())
    model.train()
    noise = torch.Generator().manual_seed(config.seed)
    assert got["loss"] == float(model.loss(images, labels, draws=3, generator=noise).total.detach())


@pytest.mark.parametrize(
    ("epoch", "step", "signum"),
    [(0, 2, signal.SIGTERM), (1, 1, signal.SIGINT), (1, 4, signal.SIGTERM), (2, 3, signal.SIGINT)],
    ids=["guidance", "middle", "last step of an epoch", "last epoch"],
)
def test_an_interrupted_run_resumes_bit_for_bit(config, unbroken, tmp_path, epoch, step, signum):
    def strike(e, s):
        if (e, s) == (epoch, step):
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=r"saved .*ckpt.pth$") as caught:
        Trainer(config, tmp_path, quiet=True, on_step=strike).fit()
    assert caught.value.signum == signum
    assert len(rows(tmp_path)) == epoch
    torch.manual_seed(99)  # the state of the global generator must not matter
    Trainer(config, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth").fit()
    assert_same_run(unbroken("plain", config), tmp_path)


def test_a_crashed_run_resumes_from_the_last_checkpoint(config, unbroken, tmp_path):
    """A crash in the middle of an epoch, with rows in the log that no checkpoint covers."""

    def crash(e, s):
        if (e, s) == (2, 2):
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        Trainer(config, tmp_path, quiet=True, on_step=crash).fit()
    assert len(rows(tmp_path)) == 2
    with open(tmp_path / "log.csv", "a") as file:
        file.write(file_row := "2,joint,8,15,0.1,0.5\n")
        file.write(file_row[:4])
    Trainer(config, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth").fit()
    assert_same_run(unbroken("plain", config), tmp_path)


def test_loader_workers_do_not_change_the_result(config, unbroken, tmp_path):
    data = dataclasses.replace(config.data, workers=1)
    out = tmp_path / "run"
    Trainer(dataclasses.replace(config, data=data), out, quiet=True).fit()
    one, other = (read_checkpoint(p / "ckpt.pth") for p in (unbroken("plain", config), out))
    assert all(torch.equal(v, other.denoiser[k]) for k, v in one.denoiser.items())


def test_resuming_a_finished_run_changes_nothing(config, unbroken, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(unbroken("plain", config), out)
    Trainer(config, out, quiet=True, resume=out / "ckpt.pth").fit()
    assert_same_run(unbroken("plain", config), out)


def test_a_failed_checkpoint_leaves_the_last_one_usable(config, unbroken, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def failing(value, file):
        calls.append(1)
        if len(calls) > 4:  # two files a checkpoint: the third checkpoint fails
            file.write(b"half")
            raise OSError("no space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        Trainer(config, tmp_path, quiet=True).fit()
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*tmp"))
    trainer = Trainer(config, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth")
    assert (trainer.progress.epoch, trainer.progress.position) == (2, 0)
    trainer.fit()
    assert_same_run(unbroken("plain", config), tmp_path)


def test_resuming_another_run_is_an_error(config, unbroken, tmp_path):
    out = unbroken("plain", config)
    path = out / "ckpt.pth"
    other = dataclasses.replace(
        config, training=dataclasses.replace(config.training, learning_rate=0.01), seed=8
    )
    with pytest.raises(ValueError) as error:
        Trainer(other, out, quiet=True, resume=path)
    assert "training.learning_rate: 0.001 in the checkpoint, 0.01 now" in str(error.value)
    assert "seed: 7 in the checkpoint, 8 now" in str(error.value)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, feature_dim=64))
    with pytest.raises(ValueError, match="feature_dim 32, the configuration says 64"):
        Trainer(wide, out, quiet=True, resume=path)
    table = open_source(config.data, "train")
    with pytest.raises(ValueError, match="training images are not those"):
        Trainer(config, out, quiet=True, resume=path, train=table.select(range(14)))
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(config, out, quiet=True)
    published = tmp_path / "p.pth"
    torch.save([read_checkpoint(path).denoiser, {}, 1, 1], published)
    with pytest.raises(ValueError, match="no training state beyond the denoiser"):
        Trainer(config, tmp_path / "new", quiet=True, resume=published)


def test_a_best_checkpoint_of_another_run_is_not_taken_over(config, tmp_path):
    path = Trainer(config, tmp_path / "run", quiet=True).fit()
    for best in ("ckpt_best.pth", "aux_ckpt_best.pth"):
        (tmp_path / "run" / best).unlink(missing_ok=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "ckpt_best.pth").write_bytes(b"of another run")
    for options in ({}, {"resume": path}):
        with pytest.raises(ValueError, match=r"already holds a run \(ckpt_best\.pth\)"):
            Trainer(config, other, quiet=True, **options)
    assert [file.name for file in other.iterdir()] == ["ckpt_best.pth"]


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(config, tmp_path):
    trainer = Trainer(config, tmp_path, quiet=True)

    def poison(epoch, step):
        if (epoch, step) == (1, 2):
            with torch.no_grad():
                trainer.model.denoiser.lin4.bias.fill_(math.nan)

    trainer.on_step = poison
    with pytest.raises(TrainingError) as error:
        trainer.fit()
    text = str(error.value)
    assert "epoch 2 of 3, step 3 of 4: the denoiser's loss is not finite (loss nan" in text
    assert f"the last checkpoint is {tmp_path / 'ckpt.pth'}" in text
    saved = read_checkpoint(tmp_path / "ckpt.pth")
    assert saved.extras["progress"]["epoch"] == 1
    assert all(v.isfinite().all() for v in saved.denoiser.values())


def test_a_guidance_loss_that_is_not_finite_before_any_checkpoint(config, tmp_path):
    trainer = Trainer(config, tmp_path, quiet=True)
    with torch.no_grad():
        trainer.model.guidance.classifier_linear.weight.fill_(math.inf)
    with pytest.raises(
        TrainingError, match=r"epoch 1 of 3, step 1 of 4: .*no checkpoint was writt"
    ):
        trainer.fit()


def test_class_count_of_data_and_model_must_agree(config, tmp_path):
    five = dataclasses.replace(config, model=dataclasses.replace(config.model, classes=5))
    with pytest.raises(ValueError, match=r"3 classes \(blue, green, red\).*model.classes=5"):
        Trainer(five, tmp_path, quiet=True)


@pytest.mark.usefixtures("auto_backend")
def test_bf16_tensorboard_and_printed_lines(config, tmp_path, capsys):
    training = dataclasses.replace(
        config.training, precision="bf16", tensorboard=True, epochs=1, ema_decay=None
    )
    trainer = Trainer(dataclasses.replace(config, training=training), tmp_path)
    trainer.fit()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "images of 3 classes:" and "duplicates: none" in lines[-4]
    lines = lines[-3:]
    assert lines[0].startswith("epoch 1/2 guidance, ") and lines[1].startswith(
        "epoch 2/2 joint, loss "
    )
    assert lines[1].endswith("images/s")
    assert lines[2].startswith("probabilities are not calibrated: ")
    assert trainer.model.denoiser.lin4.weight.dtype == torch.float32
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/guidance_loss", "validation/macro_f1"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("train/guidance_loss")] == [0, 1]
    (picture,) = events.Images(
        "validation/samples"
    )  # of the epoch with validation of the diffusion
    assert picture.step == 1 and picture.width > picture.height > 500
    assert float(rows(tmp_path)[1]["loss"]) == pytest.approx(
        events.Scalars("train/loss")[0].value, rel=1e-5
    )
    assert read_checkpoint(tmp_path / "ckpt.pth").ema == {}


def test_unknown_devices_are_rejected(config, tmp_path):
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        Trainer(config, tmp_path, device="gpu", quiet=True)


def test_a_run_does_not_draw_from_the_global_generators(config, tmp_path):
    """In a fresh interpreter: some libraries draw when they are imported."""
    training = dataclasses.replace(config.training, tensorboard=True)
    dataclasses.replace(config, training=training).save(tmp_path / "config.yml")
    script = """
        import random, sys
        import numpy as np
        from diffmic_fast.config.run import read_config
        from diffmic_fast.training.trainer import Trainer

        trainer = Trainer(read_config(sys.argv[1]), sys.argv[2], quiet=True)
        before = random.getstate(), np.random.get_state()[1:]
        trainer.fit()
        assert "sklearn" in sys.modules and "torch.utils.tensorboard" in sys.modules
        assert random.getstate() == before[0]
        after = np.random.get_state()[1:]
        assert all(np.array_equal(a, b) for a, b in zip(before[1], after))
        """
    arguments = [str(tmp_path / "config.yml"), str(tmp_path / "run")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], check=True)
