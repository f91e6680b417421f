"""Calibration as one value: what it does to probabilities, its state, and damaged states."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmic_fast.calibration import Calibration, fit_calibration, fit_novelty
from diffmic_fast.calibration.scaling import log_probabilities, negative_log_likelihood
from diffmic_fast.diffusion.sampling_options import SamplingOptions

OPTIONS = SamplingOptions("ddim", 20, 0.5, samples=6)


def predicted(count: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y_0 of 6 samples, probabilities of the guidance and labels, with a known calibration of means and guidance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    one_hot = torch.eye(classes)[labels]
    means = one_hot + 0.7 * torch.randn(count, classes, generator=generator)
    samples = means[:, None] + 0.3 * torch.randn(count, 6, classes, generator=generator)
    guidance = (4 * (one_hot + torch.randn(count, classes, generator=generator))).softmax(dim=1)
    return samples, guidance, labels


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, width, generator=generator) for n in (60, 30) for width in (8, 103)]
    return fit_calibration(*predicted(400), OPTIONS, novelty=fit_novelty(*rows), weights="abc")


def test_probabilities_fit_new_images_better(calibration: Calibration) -> None:
    samples, guidance, labels = predicted(2000, seed=1)

    def loss(p: Tensor) -> float:
        return float(negative_log_likelihood(log_probabilities(p), labels).mean())

    published = samples.softmax(dim=-1).mean(dim=1)
    calibrated = calibration.probabilities(samples, guidance)
    torch.testing.assert_close(calibrated.sum(dim=1), torch.ones(2000))
    assert loss(calibrated) < loss(published) - 0.1
    assert loss(calibration.guidance_probabilities(guidance)) < loss(guidance) - 0.1
    confidence, label = calibrated.max(dim=1)
    assert float(confidence.mean()) == pytest.approx(
        float((label == labels).float().mean()), abs=0.03
    )
    for name, losses in (
        ("diffusion", calibration.losses),
        ("guidance", calibration.guidance_losses),
    ):
        assert losses["temperature"] < losses["published"], name
    assert calibration.losses.keys() == {"published", "temperature", "stacked", "vector"}


def test_one_sample_of_the_mean_has_the_same_probabilities(calibration: Calibration) -> None:
    samples, guidance, _ = predicted(5)
    single = samples.mean(dim=1, keepdim=True)
    torch.testing.assert_close(
        calibration.sample_probabilities(single, guidance)[:, 0],
        calibration.probabilities(samples, guidance),
    )


def test_the_guidance_keeps_its_labels(calibration: Calibration) -> None:
    _, guidance, _ = predicted(50)
    assert torch.equal(calibration.guidance_probabilities(guidance).argmax(1), guidance.argmax(1))


def test_a_fit_is_deterministic(calibration: Calibration) -> None:
    again = fit_calibration(*predicted(400), OPTIONS)
    assert again.diffusion.factor == calibration.diffusion.factor
    assert torch.equal(again.scores, calibration.scores)


def test_other_sampling_does_not_fit(calibration: Calibration) -> None:
    assert (
        calibration.mismatch(SamplingOptions("ddim", 20, 0.5, 6, seed=9, precision="bf16")) is None
    )
    assert "views 1, got 2" in str(
        calibration.mismatch(SamplingOptions("ddim", 20, 0.5, 6, views=2))
    )
    reason = calibration.mismatch(SamplingOptions("ddim", 10, 0.5, 8))
    assert reason == "the calibration was fitted for steps 20, got 10; samples 6, got 8"


def test_a_state_survives_a_file(calibration: Calibration) -> None:
    file = io.BytesIO()
    torch.save(calibration.to_state(), file)
    assert file.tell() < 2**18
    file.seek(0)
    found = Calibration.from_state(torch.load(file, weights_only=True), 3)
    samples, guidance, _ = predicted(7, seed=2)
    assert torch.equal(
        found.probabilities(samples, guidance), calibration.probabilities(samples, guidance)
    )
    assert (found.images, found.classes, found.weights, found.losses) == (
        400, 3, "abc", calibration.losses,
    )  # fmt: skip
    assert found.novelty is not None and calibration.novelty is not None
    rows = torch.randn(4, 8), torch.randn(4, 103)
    assert torch.equal(found.novelty.distance(*rows), calibration.novelty.distance(*rows))
    plain = fit_calibration(*predicted(30), OPTIONS)
    assert Calibration.from_state(plain.to_state()).novelty is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "format must be 1, got 2"),
        ("scores", None, "scores must be a float32 tensor"),
        ("scores", torch.tensor([0.5, 0.4]), "in ascending order"),
        ("scores", torch.tensor([0.4, float("nan")]), "scores must be finite"),
        ("scores", torch.tensor([0.4]), "a score for each of the 400 images, got 1"),
        ("samples", "six", "damaged content"),
        ("sampler", "euler", "sampler must be one of"),
        ("losses", 3, "damaged content"),
        ("diffusion.kind", "isotonic", "diffusion.kind must be one of temperature"),
        ("diffusion.factor", -1.0, r"diffusion.factor must be in \[0, 100\], got -1\.0"),
        ("diffusion.factor", float("nan"), "diffusion.factor must be in"),
        ("diffusion.bias", torch.zeros(4), "the model's 3 classes, got 4"),
        ("guidance.bias", torch.zeros(2), "guidance must be for the model's 3 classes, got 2"),
        ("guidance", {}, "guidance must have the entries bias, factor"),
        ("novelty.basis", torch.zeros(2, 5), r"novelty.basis must be \(7, 8\), got \(2, 5\)"),
        ("novelty.spread", torch.tensor([1.0, 0.0, 1.0]), "novelty.spread must be positive"),
        ("novelty.reference", torch.zeros(0), "novelty.reference must be at least one number"),
        ("extra", 1, "entries are missing or unknown: extra"),
    ],
)
def test_damaged_states_are_named(
    calibration: Calibration, path: str, value: Any, message: str
) -> None:
    state = copy.deepcopy(calibration.to_state())
    *outer, name = path.split(".")
    for key in outer:
        state = state[key]
    whole = state if not outer else copy.deepcopy(calibration.to_state())
    if outer:
        whole[outer[0]][name] = value
    else:
        whole[name] = value
    with pytest.raises(ValueError, match=message):
        Calibration.from_state(whole, 3)


def test_missing_entries_and_other_values_are_rejected(calibration: Calibration) -> None:
    state = calibration.to_state()
    del state["scores"]
    with pytest.raises(ValueError, match="missing or unknown: scores"):
        Calibration.from_state(state)
    with pytest.raises(ValueError, match="format must be 1, got 'list'"):
        Calibration.from_state([])  # type: ignore[arg-type]


def test_few_images_and_wrong_shapes_are_rejected() -> None:
    samples, guidance, labels = predicted(19)
    with pytest.raises(ValueError, match="at least 20 validation images, got 19"):
        fit_calibration(samples, guidance, labels, OPTIONS)
    samples, guidance, labels = predicted(30)
    with pytest.raises(ValueError, match=r"samples must be \[N, S, C\] and guidance \[N, C\]"):
        fit_calibration(samples[:, 0], guidance, labels, OPTIONS)
    samples[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores must be finite"):
        fit_calibration(samples, guidance, labels, OPTIONS)


def test_two_classes_that_are_all_right() -> None:
    labels = torch.arange(40) % 2
    one_hot = torch.eye(2)[labels]
    found = fit_calibration(one_hot[:, None], one_hot, labels, SamplingOptions())
    p = found.probabilities(one_hot[:, None], one_hot)
    assert 0.95 < float(p.amax(dim=1).min()) < 1.0
