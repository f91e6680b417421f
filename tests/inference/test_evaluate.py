"""Evaluation: the guidance model and samplers side by side, batch invariance, outputs."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmic_fast.calibration import (
    confidence,
    fit_calibration,
    fit_novelty,
    image_statistics,
    prediction_sets,
)
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluate import CALIBRATED, GUIDANCE, evaluate
from diffmic_fast.inference.metrics import compute_metrics
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.datasets import make_dataset

METHODS = [
    SamplingOptions("ddpm"),
    SamplingOptions("ddpm_truncated", 5),
    SamplingOptions("ddim", 3, 0.5),
]


@pytest.fixture
def model(config):
    torch.manual_seed(1)
    return DiffMIC(config.model).eval()


@pytest.fixture
def dataset(config):
    return make_dataset(config, open_source(config.data, "validation"), train=False)


def stack(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def calibrate(model, method):
    """A calibration fitted to random outputs, and a detector fitted to random images."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(60) % 3
    y_0 = torch.nn.functional.one_hot(labels, 3)[:, None] + 0.7 * torch.randn(
        60, method.samples, 3, generator=generator
    )
    guidance = torch.randn(60, 3, generator=generator).softmax(dim=1)
    size = model.config.image_size
    images = torch.randn(60, 3, size, size, generator=generator)
    features = model.encode(images)
    statistics = image_statistics(images)
    novelty = fit_novelty(features, statistics, features[:20], statistics[:20])
    model.calibration = fit_calibration(y_0, guidance, labels, method, novelty=novelty)


def test_guidance_and_samplers_side_by_side(model, dataset):
    result = evaluate(
        model, dataset, [replace(m, samples=2, seed=3) for m in METHODS], batch_size=4
    )
    assert [r.method for r in result.results] == [
        GUIDANCE, "ddpm", "ddpm_truncated 5", "ddim 3 eta 0.5",
    ]  # fmt: skip
    assert result.labels.tolist() == [0, 0, 1, 1, 2, 2]
    images = stack(dataset)
    with torch.no_grad():
        guidance = model.guidance(images)[0].softmax(dim=1)
    np.testing.assert_allclose(result.results[0].probabilities, guidance.numpy(), atol=1e-5)
    direct = model.predict(images, sampler="ddpm_truncated", steps=5, samples=2, seed=3)
    np.testing.assert_allclose(
        result.results[2].probabilities, direct.probabilities.numpy(), atol=1e-5
    )
    expected = compute_metrics(result.results[2].probabilities, result.labels)
    assert result.results[2].metrics.accuracy == expected.accuracy
    assert all(r.seconds_per_image > 0 for r in result.results)


def test_views_hold_for_guidance_and_samplers(model, dataset):
    method = SamplingOptions("ddim", 3, views=2)
    calibrate(model, replace(method, views=1))  # not for these views
    found = evaluate(model, dataset, [method])
    assert [r.method for r in found.results] == [GUIDANCE, "ddim 3"]
    assert "views 1, got 2" in str(found.not_calibrated)
    images = stack(dataset)
    guide = model.guide(images, views=2)
    assert not torch.equal(guide.logits.fused, model.guide(images).logits.fused)
    expected = (guide.logits.fused.softmax(dim=1), model.predict(
        images, sampler="ddim", steps=3, views=2, probability="published").probabilities)  # fmt: skip
    for result, probabilities in zip(found.results, expected, strict=True):
        np.testing.assert_allclose(result.probabilities, probabilities.numpy(), atol=1e-5)


def test_results_do_not_depend_on_the_batch_size(model, dataset):
    one, three = (evaluate(model, dataset, METHODS, batch_size=b) for b in (1, 4))
    for a, b in zip(one.results, three.results, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
    other = evaluate(model, dataset, [SamplingOptions("ddpm", seed=1)])
    assert not np.allclose(other.results[1].probabilities, one.results[1].probabilities)


def test_an_uncalibrated_model_says_so_and_still_measures_its_samples(model, dataset):
    method = replace(METHODS[2], samples=4)
    result = evaluate(model, dataset, [method], resamples=20)
    assert result.not_calibrated == ("the model has no calibration",)
    assert [r.calibrated for r in result.results] == [False, False]
    images = stack(dataset)
    expected = confidence(model.predict(images, sampler="ddim", steps=3, eta=0.5, samples=4))
    uncertainty = result.results[1].uncertainty
    np.testing.assert_allclose(uncertainty.width, expected.width.numpy(), atol=1e-5)
    np.testing.assert_array_equal(uncertainty.agreement, expected.agreement.numpy())
    assert uncertainty.prediction_set is None and uncertainty.novelty is None
    assert set(result.results[1].report.groups) == {
        "confidence", "interval_width", "t_test", "agreement",
    }  # fmt: skip
    assert result.results[1].intervals["accuracy"].resamples == 20


def test_published_and_calibrated_probabilities_side_by_side(model, dataset):
    fitted, other = replace(METHODS[2], samples=4), replace(METHODS[1], samples=4)
    before = evaluate(model, dataset, [other, fitted], resamples=0)
    calibrate(model, fitted)
    result = evaluate(model, dataset, [other, fitted], resamples=0)
    assert [r.method for r in result.results] == [
        GUIDANCE, "ddpm_truncated 5", "ddim 3 eta 0.5",
        GUIDANCE + CALIBRATED, "ddim 3 eta 0.5" + CALIBRATED,
    ]  # fmt: skip
    assert [r.calibrated for r in result.results] == [False, False, False, True, True]
    for a, b in zip(before.results, result.results[:3], strict=True):
        np.testing.assert_array_equal(a.probabilities, b.probabilities)
    assert before.calibration is None and "fitted on 60" in result.calibration
    (reason,) = result.not_calibrated
    assert reason.startswith("ddpm_truncated 5: the calibration was fitted for sampler ddim")
    images = stack(dataset)
    arguments = {"sampler": "ddim", "steps": 3, "eta": 0.5, "samples": 4}
    direct = model.predict(images, probability="calibrated", **arguments)
    found = result.results[4]
    np.testing.assert_allclose(found.probabilities, direct.probabilities.numpy(), atol=1e-5)
    expected = confidence(direct, model.calibration, images=images)
    for name in ("prediction_set", "flagged", "novelty", "width"):
        np.testing.assert_allclose(
            getattr(found.uncertainty, name), getattr(expected, name).numpy(), atol=1e-5
        )
    guidance = model.calibration.guidance_probabilities(direct.guidance[:, 0])
    np.testing.assert_allclose(result.results[3].probabilities, guidance.numpy(), atol=1e-5)
    sets = prediction_sets(guidance, model.calibration.guidance_scores, 0.9)
    np.testing.assert_array_equal(result.results[3].uncertainty.prediction_set, sets.numpy())
    assert found.comparison.baseline == GUIDANCE + CALIBRATED
    assert found.report.flagged == expected.flagged.float().mean()
    assert found.report.sets[0].images == 6


def test_the_whole_report_does_not_depend_on_batches_or_order(model, dataset, config):
    method = replace(METHODS[2], samples=4)
    calibrate(model, method)
    table = open_source(config.data, "validation")
    turned = make_dataset(config, table.select([4, 2, 0, 5, 3, 1]), train=False)
    reports = [
        evaluate(model, data, [method], batch_size=size, resamples=50)
        for data, size in ((dataset, 6), (dataset, 4), (turned, 6))
    ]
    for other in reports[1:]:
        for a, b in zip(reports[0].results, other.results, strict=True):
            for name, interval in a.intervals.items():
                assert b.intervals[name] == pytest.approx(interval, abs=1e-9, nan_ok=True), name
            assert a.report.risk.area == pytest.approx(b.report.risk.area)
            assert a.metrics.nll == pytest.approx(b.metrics.nll, abs=1e-5)
            assert (a.comparison and a.comparison.mcnemar) == (
                b.comparison and b.comparison.mcnemar
            )
            assert a.report.flagged == b.report.flagged
    assert list(reports[2].names) == [reports[0].names[i] for i in (4, 2, 0, 5, 3, 1)]


def test_rows_of_images(model, dataset, tmp_path):
    method = replace(METHODS[2], samples=4)
    calibrate(model, method)
    result = evaluate(model, dataset, [method], resamples=0)
    assert result.primary.method == "ddim 3 eta 0.5" + CALIBRATED
    result.save_predictions(tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[1].startswith(dataset.table.entries[0].name + ",blue,")


def test_without_a_sampler_the_guidance_is_evaluated(model, dataset):
    result = evaluate(model, dataset, [], resamples=0)
    assert [r.method for r in result.results] == [GUIDANCE]
    assert result.primary is result.results[0]


def test_json_and_table(model, dataset, tmp_path):
    result = evaluate(model, dataset, METHODS[:1])
    result.save(tmp_path / "e.json")
    value = json.loads((tmp_path / "e.json").read_text())
    assert value["images"] == 6 and value["calibration_bins"] == 15
    assert [r["method"] for r in value["results"]] == [GUIDANCE, "ddpm"]
    assert np.sum(value["results"][1]["confusion"]) == 6
    text = io.StringIO()
    result.print(text)
    assert "guidance alone" in text.getvalue() and "kappa (quadratic)" in text.getvalue()


def test_a_missing_class_is_explained_in_the_table(model, dataset, config):
    table = open_source(config.data, "validation").select(range(4))
    result = evaluate(model, make_dataset(config, table, train=False), METHODS[:1])
    text = io.StringIO()
    result.print(text)
    assert "AUC (one-vs-one): no image of class 2" in text.getvalue()
    assert result.to_dict()["results"][0]["auc_ovo"] is None


def test_methods_must_fit_the_model_and_each_other(model, dataset):
    with pytest.raises(ValueError, match="evaluate: resamples must be at least 0, got -1"):
        evaluate(model, dataset, METHODS, resamples=-1)
    with pytest.raises(ValueError, match=r"steps must be in \[1, 12\] .* got 13"):
        evaluate(model, dataset, [SamplingOptions("ddim", 13)])
    with pytest.raises(ValueError, match="walks all 12 timesteps, got steps=5"):
        evaluate(model, dataset, [SamplingOptions("ddpm", 5)])
    for name, value in (("samples", 2), ("seed", 1), ("precision", "bf16"), ("compile", True)):
        other = replace(METHODS[1], **{name: value})
        with pytest.raises(
            ValueError, match="must have the same samples, seed, precision, compile and views"
        ):
            evaluate(model, dataset, [METHODS[0], other])
