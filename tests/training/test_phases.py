"""Epochs of the encoder alone and of the layers on cached features, prior dropout, targets and class balance."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import signal

import pytest
import torch
from torch import nn

from diffmic_fast.checkpoint import read_checkpoint
from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.batches import epoch_batches
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.phases import guidance_epochs, phase_at, phases
from diffmic_fast.training.steps import Steps
from diffmic_fast.training.targets import class_weights, soft_labels
from diffmic_fast.training.trainer import Trainer
from diffmic_fast.training.validation import validate
from tests.training_runs import assert_same_run, rows, with_training

PHASED = {
    "encoder_epochs": 2,
    "epochs": 1,
    "feature_epochs": 2,
    "feature_views": 2,
    "feature_batch_size": 6,
    "joint_guidance": False,
    "prior_dropout": 0.5,
    "label_smoothing": 0.1,
    "balance": 0.5,
    "encoder_learning_rate": 1e-3,
    "guidance_warmup_epochs": 0.5,
    "guidance_epochs": 2,
    "classifier_ema_decay": 0.6,
    "classifier_dropout": 0.2,
    "classifier_head_factor": 5.0,
    "guidance_gradient_clip": 2.0,
}


def batch(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


def test_phases_follow_each_other_without_gaps():
    config = TrainingConfig(guidance_epochs=2, encoder_epochs=0, epochs=3, feature_epochs=4)
    assert [(p.name, p.first, p.epochs) for p in phases(config)] == [
        ("guidance", 0, 2), ("encoder", 2, 0), ("joint", 2, 3), ("features", 5, 4),
    ]  # fmt: skip
    names = [phase_at(config, epoch).name for epoch in range(10)]
    assert names == ["guidance"] * 2 + ["joint"] * 3 + ["features"] * 5
    assert guidance_epochs(config) == 5
    assert guidance_epochs(TrainingConfig(guidance_epochs=2, epochs=3, joint_guidance=False)) == 2


def changed(before, after):
    """The parts of a model whose parameters differ."""
    parts = {
        "guidance": "guidance.", "encoder": "denoiser.encoder_x.f.", "projection": "denoiser.encoder_x.g.",
        "layers": "denoiser.lin",
    }  # fmt: skip
    return {
        part
        for part, prefix in parts.items()
        if any(
            not torch.equal(value, after[key])
            for key, value in before.items()
            if key.startswith(prefix)
        )
    }


def test_what_each_phase_trains(config, tmp_path):
    states = []

    def keep(epoch, step):
        if step == 1 or len(states) <= epoch:
            states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})

    trainer = Trainer(with_training(config, **PHASED), tmp_path, quiet=True, on_step=keep)
    trainer.fit()
    log = rows(tmp_path)
    assert [row["phase"] for row in log] == [
        "guidance", "guidance", "encoder", "encoder", "joint", "features", "features",
    ]  # fmt: skip
    n, y = False, True
    assert [row["encoder_loss"] != "" for row in log] == [n, n, y, y, n, n, n]
    assert [row["loss"] != "" for row in log] == [n, n, n, n, y, y, y]
    # From the first step of an epoch to that of the next one, both of the same phase.
    assert changed(states[0], states[1]) == {"guidance"}
    assert changed(states[2], states[3]) == {"encoder"}
    assert changed(states[5], states[6]) == {"projection", "layers"}
    last = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert changed(states[4], last) == {"encoder", "projection", "layers"}


def test_the_average_of_the_encoder_is_what_the_features_are_of(config, tmp_path):
    """After joint epochs the features are the present encoder's, and so is what is validated and saved."""
    trainer = Trainer(with_training(config, **PHASED, ema_decay=0.99), tmp_path, quiet=True)
    trainer.fit()
    encoder = dict(trainer.model.denoiser.named_parameters())
    average = trainer.steps.average.values
    inside = [name for name in average if name.startswith("encoder_x.f.")]
    assert inside and all(torch.equal(average[name], encoder[name]) for name in inside)
    assert not torch.equal(average["lin4.weight"], encoder["lin4.weight"])


def floats(module, prefix=""):
    """Parameters and running statistics, in float64."""
    state = module.state_dict().items()
    return {k: v.double() for k, v in state if v.is_floating_point() and k.startswith(prefix)}


@pytest.mark.parametrize("phase", ["guidance", "encoder"])
def test_a_classifier_ends_as_its_average(config, tmp_path, monkeypatch, phase):
    """Weights and running statistics, from those before its first step; also after an interruption."""
    first = {"guidance": 0, "encoder": 2}[phase]
    observed, ends = [], []
    finish = Steps.finish

    def part(steps):
        if phase == "guidance":
            return floats(steps.model.guidance)
        return floats(steps.model.denoiser, "encoder_x.f.")

    def finish_and_look(self, finished):
        finish(self, finished)
        if finished.name == phase:
            ends.append(part(self))

    def keep(epoch, step):
        if epoch in (first, first + 1):
            observed.append(part(trainer.steps))
            if step == 1 and epoch == first + 1 and trainer is broken:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Steps, "finish", finish_and_look)
    phased = with_training(config, **PHASED)
    trainer = broken = Trainer(phased, tmp_path, quiet=True, on_step=keep)
    average = part(trainer.steps)
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer = Trainer(phased, tmp_path, quiet=True, on_step=keep, resume=tmp_path / "ckpt.pth")
    trainer.fit()
    for values in observed:
        average = {k: 0.6 * average[k] + 0.4 * values[k] for k in average}
    (end,) = ends
    assert any("running_var" in name for name in end)
    for name, value in average.items():
        torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.allclose(end[k], observed[-1][k], atol=1e-4) for k in end)
    if phase == "guidance":  # no later step changes it
        last = floats(trainer.model.guidance)
        assert all(torch.equal(value, last[name]) for name, value in end.items())


def test_more_epochs_of_a_finished_classifier_are_averaged_too(config, tmp_path):
    """From the end of the run before, which is its average."""
    alone = {**PHASED, "encoder_epochs": 0, "epochs": 0, "feature_epochs": 0, "guidance_epochs": 1}
    Trainer(with_training(config, **alone), tmp_path, quiet=True).fit()
    observed = []
    longer = with_training(config, **{**alone, "guidance_epochs": 2})
    trainer = Trainer(
        longer, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth",
        on_step=lambda epoch, step: observed.append(floats(trainer.model.guidance)),
    )  # fmt: skip
    average = floats(trainer.model.guidance)
    trainer.fit()
    for values in observed:
        average = {k: 0.6 * average[k] + 0.4 * values[k] for k in average}
    assert observed
    for name, value in floats(trainer.model.guidance).items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_average_of_the_guidance_model_is_validated(config):
    """With a decay near 1 it is the model before the steps."""
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    start = copy.deepcopy(model.state_dict())
    training = with_training(config, joint_guidance=False, guidance_learning_rate=0.1).training
    averaged = dataclasses.replace(training, classifier_ema_decay=0.9999)
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)

    def probabilities(training, count):
        model.load_state_dict(start)
        steps = Steps(model, training, seed=3)
        for _ in range(count):
            steps.guidance_step(*batch(6), 0.0)
        weights = copy.deepcopy(model.state_dict())
        found, _ = validate(steps, dataset, config, torch.device("cpu"), False, lambda images: None)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        return found.results[0].probabilities

    before = probabilities(training, 0)
    assert abs(probabilities(averaged, 2) - before).max() < 0.01
    assert abs(probabilities(training, 2) - before).max() > 0.05


def test_the_rate_of_the_last_layers_is_a_multiple(config):
    torch.manual_seed(0)
    models = [DiffMIC(config.model) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    moved = []
    for model, factor in zip(models, (1.0, 8.0), strict=True):
        before = floats(model)
        training = with_training(config, classifier_head_factor=factor, encoder_epochs=2).training
        steps = Steps(model, training, seed=3)
        head = steps.encoder.classifier.weight.detach().clone()
        torch.manual_seed(1)
        steps.guidance_step(*batch(6), 0.5)
        steps.encoder_step(*batch(6), 1.0)
        change = {k: float((v - before[k]).abs().mean()) for k, v in floats(model).items()}
        change["classifier"] = float((steps.encoder.classifier.weight.detach() - head).abs().mean())
        moved.append(change)
    same = ["guidance.ds_net.f.0.weight", "denoiser.encoder_x.f.0.weight"]
    same = [next(k for k in moved[0] if k.startswith(p.rsplit(".", 2)[0])) for p in same]
    for name in same:
        assert moved[1][name] == pytest.approx(moved[0][name], rel=1e-3)
    # Adam's first step is the rate times a sign.
    larger = ["guidance.left_postprocess_net.gn_conv_last.weight", "guidance.mil_attn_V.weight"]
    larger += ["guidance.classifier_linear.weight"]
    for name in larger:
        assert moved[1][name] == pytest.approx(8 * moved[0][name], rel=0.1)


def test_dropout_of_the_classifiers_is_of_training_alone(config):
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    images = batch(6)[0]
    model.eval()
    expected = model.guidance(images)
    steps = Steps(
        model, with_training(config, classifier_dropout=0.5, encoder_epochs=1).training, seed=3
    )
    for a, b in zip(model.guidance(images), expected, strict=True):
        assert torch.equal(a, b)
    model.guidance.train()
    torch.manual_seed(1)
    one, other = model.guidance(images), model.guidance(images)
    assert not torch.equal(one.global_, other.global_)
    assert not torch.equal(one.local, other.local)
    steps.encoder.train()
    assert not torch.equal(steps.encoder(images), steps.encoder(images))
    steps.encoder.eval()
    assert torch.equal(steps.encoder(images), steps.encoder(images))


def test_the_gradient_of_the_guidance_model_is_clipped(config):
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    training = with_training(config, guidance_gradient_clip=1e-3).training
    steps = Steps(model, training, seed=3)
    steps.guidance_step(*batch(6), 0.5)
    norm = torch.stack([p.grad.norm() for p in model.guidance.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_the_average_of_the_encoder_restarts_in_each_of_its_steps(config):
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    steps = Steps(model, with_training(config, encoder_epochs=1).training, seed=3)
    before = {name: value.clone() for name, value in steps.average.values.items()}
    for _ in range(2):
        steps.encoder_step(*batch(6), 0.5)
    for name, parameter in model.denoiser.named_parameters():
        trained = name.startswith("encoder_x.f.")
        assert torch.equal(steps.average.values[name], parameter), name
        assert trained or torch.equal(parameter, before[name]), name
    trained = [name for name in before if name.startswith("encoder_x.f.")]
    assert any(not torch.equal(before[name], steps.average.values[name]) for name in trained)


@pytest.fixture(scope="module")
def whole(shared_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    Trainer(with_training(shared_config, **PHASED), out, quiet=True).fit()
    return out


@pytest.mark.parametrize(
    ("epoch", "step"), [(1, 1), (2, 2), (3, 4), (4, 1), (5, 1), (5, 3), (6, 2)],
    ids=["guidance", "encoder", "end of the encoder", "joint", "features", "end of an epoch", "last epoch"],
)  # fmt: skip
def test_an_interrupted_run_resumes_bit_for_bit(config, whole, tmp_path, epoch, step):
    def strike(e, s):
        if (e, s) == (epoch, step):
            os.kill(os.getpid(), signal.SIGTERM)

    phased = with_training(config, **PHASED)
    with pytest.raises(Interrupted):
        Trainer(phased, tmp_path, quiet=True, on_step=strike).fit()
    torch.manual_seed(99)
    Trainer(phased, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth").fit()
    assert_same_run(whole, tmp_path)


def test_a_run_without_the_new_options_in_its_checkpoint_resumes(config, tmp_path):
    """Checkpoints from before these options lack them."""
    Trainer(config, tmp_path, quiet=True).fit()
    path = tmp_path / "ckpt.pth"
    parts = torch.load(path, weights_only=True)
    for key in PHASED.keys() - {"epochs", "guidance_epochs", "encoder_learning_rate"}:
        del parts[1]["diffmic_fast"]["config"]["training"][key]
    torch.save(parts, path)
    before = read_checkpoint(path).denoiser
    Trainer(config, tmp_path, quiet=True, resume=path).fit()
    assert all(torch.equal(v, before[k]) for k, v in read_checkpoint(path).denoiser.items())


def test_a_feature_step_is_a_step_on_the_images_with_the_encoder_frozen(config):
    """On the rows of a batch: the losses of a joint step, and the same updates of the layers."""
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    model.denoiser.encoder_x.f.eval()
    images, labels = batch(8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        features = model.pool(images)
        prior = torch.stack(model.guide(images).logits).softmax(dim=-1)
    training = with_training(config, feature_epochs=2, epochs=2, draws=3).training
    found = Steps(model, training, seed=3).feature_step(features, prior, labels, 1.0)

    steps = Steps(other, training, seed=3)
    encoder = other.denoiser.encoder_x.f
    encoder.requires_grad_(False)
    encoder.train = lambda mode=True: encoder  # its statistics stay those of evaluation mode
    expected = steps.denoiser_step(images, labels, 1.0)
    assert found == pytest.approx(expected, rel=1e-4)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        # Adam's first step is the learning rate times a sign, which rounding decides for gradients of 0.
        moved = (a.double() - b.double()).abs() > 1e-5
        assert float(moved.double().mean()) < 0.02, name


@pytest.mark.parametrize("hidden", [[True, False, True, False], [True] * 4, [False] * 4])
def test_hidden_images_have_the_uniform_distribution(config, hidden):
    torch.manual_seed(0)
    model = DiffMIC(config.model).eval()
    images, labels = batch(4)
    seen = []

    def denoiser(*arguments):
        seen.append(arguments[3])
        return model.denoiser.forward_branches(*arguments)

    arguments = {"draws": 2, "timesteps": torch.arange(8), "noise": torch.randn(8, 3)}
    found = model.loss(
        images, labels, hidden=torch.tensor(hidden), denoiser=denoiser, **arguments
    ).total
    prior = torch.stack(model.guidance(images)).softmax(dim=-1)
    prior = torch.where(torch.tensor(hidden)[None, :, None], torch.full((3,), 1 / 3), prior)
    assert torch.equal(seen[0], prior.repeat_interleave(2, dim=1))
    expected = model.loss(images, labels, prior=prior, **arguments).total
    assert float(found.detach()) == float(expected.detach())
    with pytest.raises(ValueError, match=r"hidden must be \[B=4\]"):
        model.loss(images, labels, hidden=torch.tensor([True]), **arguments)
    with pytest.raises(TypeError, match="hidden must be bool"):
        model.loss(images, labels, hidden=torch.zeros(4), **arguments)
    with pytest.raises(ValueError, match="prior must be"):
        model.loss(images, labels, prior=prior[:, :2], **arguments)


def test_prior_dropout_hides_a_share_of_the_images(config, monkeypatch):
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    images, labels = batch(32)
    seen = []
    loss = model.loss

    def spy(*arguments, **options):
        seen.append(options["hidden"])
        return loss(*arguments, **options)

    monkeypatch.setattr(model, "loss", spy)
    for share in (0.0, 0.25, 1.0):
        steps = Steps(model, with_training(config, prior_dropout=share).training, seed=3)
        steps.denoiser_step(images, labels, 0.5)
    assert seen[0] is None and seen[1].shape == (32,) and bool(seen[2].all())
    assert 2 <= int(seen[1].sum()) <= 14  # 8 expected, within two and a half standard deviations


def test_soft_labels():
    labels = torch.tensor([0, 2, 3])
    even = soft_labels(labels, 4, 0.3, ordinal=False)
    torch.testing.assert_close(even[0], torch.tensor([0.7, 0.1, 0.1, 0.1]))
    graded = soft_labels(labels, 4, 0.3, ordinal=True)
    expected = [[0.7, 0.3, 0, 0], [0, 0.15, 0.7, 0.15], [0, 0, 0.3, 0.7]]
    torch.testing.assert_close(graded, torch.tensor(expected))
    for ordinal in (False, True):
        assert torch.equal(soft_labels(labels, 4, 0.0, ordinal=ordinal), torch.eye(4)[labels])
        torch.testing.assert_close(
            soft_labels(torch.tensor([1]), 2, 0.2, ordinal=ordinal), torch.tensor([[0.2, 0.8]])
        )


def test_label_smoothing_in_the_guidance_step(config):
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    other = copy.deepcopy(model)
    images, labels = batch(6)
    training = with_training(config, label_smoothing=0.2, ordinal=True).training
    found = Steps(model, training, seed=3).guidance_step(images, labels, 0.0)
    logits = other.train().guidance(images).fused
    targets = soft_labels(labels, 3, 0.2, ordinal=True)
    expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)


def test_balance_draws_the_classes_by_their_weights():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    for balance in (0.5, 1.0):
        weights = class_weights(labels, balance)
        drawn = torch.tensor(list(itertools.chain(*epoch_batches(1000, 32, 0, 0, weights=weights))))
        share = torch.bincount(labels[drawn], minlength=3).double() / 1000
        powers = torch.tensor([900.0, 90.0, 10.0]).double() ** (1 - balance)
        assert (share - powers / powers.sum()).abs().max() < 0.06
    assert epoch_batches(1000, 32, 0, 0, weights=weights) == epoch_batches(
        1000, 32, 0, 0, weights=weights
    )
    assert epoch_batches(1000, 32, 0, 1, weights=weights) != epoch_batches(
        1000, 32, 0, 0, weights=weights
    )


def test_warmup_of_the_guidance_model(config):
    training = with_training(
        config, guidance_epochs=4, epochs=0, guidance_warmup_epochs=2.0, guidance_cosine=True
    ).training
    torch.manual_seed(0)
    steps = Steps(DiffMIC(config.model), training, seed=3)
    rates = []
    for progress in (0.0, 0.25, 0.5, 0.75):
        steps.guidance_step(*batch(4), progress)
        rates.append(steps.guidance_optimizer.param_groups[0]["lr"] / 2e-4)
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5])


def test_networks_that_the_encoder_phase_does_not_support(config):
    model = DiffMIC(config.model)
    model.denoiser.encoder_x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 32))
    with pytest.raises(
        ValueError, match=r"encoder_epochs: .* must be an ImageEncoder, got Sequential"
    ):
        Steps(model, with_training(config, encoder_epochs=1).training, seed=3)
    with pytest.raises(TypeError, match="must be an ImageEncoder"):
        model.pool(batch(2)[0])


def test_no_epochs_at_all(config):
    with pytest.raises(ValueError, match="must not all be 0"):
        TrainingConfig(epochs=0, guidance_epochs=0)
    assert TrainingConfig(epochs=0, guidance_epochs=0, feature_epochs=1).feature_epochs == 1
