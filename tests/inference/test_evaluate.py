"""Evaluation: the guidance model and samplers side by side, batch invariance, outputs."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluate import GUIDANCE, evaluate
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


def test_guidance_and_samplers_side_by_side(model, dataset):
    result = evaluate(
        model, dataset, [replace(m, samples=2, seed=3) for m in METHODS], batch_size=4
    )
    assert [r.method for r in result.results] == [
        GUIDANCE, "ddpm", "ddpm_truncated 5", "ddim 3 eta 0.5",
    ]  # fmt: skip
    assert result.labels.tolist() == [0, 0, 1, 1, 2, 2]
    images = torch.stack([dataset[i][0] for i in range(6)])
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


def test_results_do_not_depend_on_the_batch_size(model, dataset):
    one, three = (evaluate(model, dataset, METHODS, batch_size=b) for b in (1, 4))
    for a, b in zip(one.results, three.results, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
    other = evaluate(model, dataset, [SamplingOptions("ddpm", seed=1)])
    assert not np.allclose(other.results[1].probabilities, one.results[1].probabilities)


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
    with pytest.raises(ValueError, match=r"steps must be in \[1, 12\] .* got 13"):
        evaluate(model, dataset, [SamplingOptions("ddim", 13)])
    with pytest.raises(ValueError, match="walks all 12 timesteps, got steps=5"):
        evaluate(model, dataset, [SamplingOptions("ddpm", 5)])
    for name, value in (("samples", 2), ("seed", 1), ("precision", "bf16"), ("compile", True)):
        other = replace(METHODS[1], **{name: value})
        with pytest.raises(
            ValueError, match="must have the same samples, seed, precision and compile"
        ):
            evaluate(model, dataset, [METHODS[0], other])
