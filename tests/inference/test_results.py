"""Results and evaluations made from arrays: pairing, order, intervals, JSON, CSV and tables."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from diffmic_fast.inference.bootstrap import MEASURES
from diffmic_fast.inference.evaluation import Evaluation
from diffmic_fast.inference.report import Uncertainty
from diffmic_fast.inference.results import CALIBRATED, GUIDANCE, Output, make_results

LONGEST = "ddpm_truncated 250"
CLASSES = ("healthy", "mild", "severe")
IMAGES = 61


def labels_and_ids(images=IMAGES):
    rng = np.random.default_rng(0)
    return np.arange(images) % 3, rng.permutation(images)


def probabilities(labels, accuracy, seed):
    rng = np.random.default_rng(seed)
    shown = np.where(rng.random(len(labels)) < accuracy, labels, (labels + 1) % 3)
    p = rng.dirichlet(np.ones(3), len(labels)) + 2 * np.eye(3)[shown]
    return p / p.sum(axis=1, keepdims=True)


def sharpened(p):
    """The calibrated probabilities of these tests."""
    return p**2 / (p**2).sum(axis=1, keepdims=True)


def uncertainty(p):
    rng = np.random.default_rng(5)
    images = len(p)
    return Uncertainty(
        width=rng.random(images),
        p_value=rng.random(images),
        agreement=rng.integers(1, 9, images) / 8,
        prediction_set=p > 0.2,
        novelty=rng.random(images),
        flagged=rng.random(images) < 0.1,
    )


def outputs(labels, calibrated=True):
    guidance, sampler = probabilities(labels, 0.7, 1), probabilities(labels, 0.85, 2)
    result = [
        Output(GUIDANCE, guidance, 1.0),
        Output(LONGEST, sampler, 3.0, uncertainty=uncertainty(sampler)),
    ]
    if calibrated:
        result += [
            Output(GUIDANCE + CALIBRATED, sharpened(guidance), 1.0, True),
            Output(
                LONGEST + CALIBRATED, sharpened(sampler), 3.0, True, uncertainty(sharpened(sampler))
            ),
        ]
    return result


def evaluation(resamples=50, calibrated=True):
    labels, ids = labels_and_ids()
    results = make_results(outputs(labels, calibrated), labels, ids, resamples)
    summary = "fitted on 30 validation images" if calibrated else None
    reasons = () if calibrated else ("there were no validation images",)
    names = tuple(f"{i}.png" for i in range(IMAGES))
    return Evaluation(CLASSES, labels, results, 8, 0, names, resamples, summary, reasons)


def test_every_method_is_compared_with_the_guidance_of_the_same_kind():
    found = evaluation().results
    assert [r.comparison and r.comparison.baseline for r in found] == [
        None, GUIDANCE, None, GUIDANCE + CALIBRATED,
    ]  # fmt: skip
    comparison = found[1].comparison
    accuracies = [r.metrics.accuracy for r in found]
    assert comparison.differences["accuracy"].value == accuracies[1] - accuracies[0]
    discordant = comparison.mcnemar.only_first - comparison.mcnemar.only_second
    assert discordant / IMAGES == pytest.approx(accuracies[1] - accuracies[0])
    assert [r.seconds_per_image for r in found[:2]] == [1.0 / IMAGES, 3.0 / IMAGES]
    assert found[3].metrics.ece != found[1].metrics.ece  # after and before


def test_intervals_contain_the_measures():
    for r in evaluation(500).results:
        for name in MEASURES:
            interval = r.intervals[name]
            assert interval.low < getattr(r.metrics, name) < interval.high, name


def test_the_order_of_the_images_changes_no_interval():
    labels, ids = labels_and_ids()
    order = np.random.default_rng(9).permutation(IMAGES)
    turned = [o._replace(probabilities=o.probabilities[order], uncertainty=None)
              for o in outputs(labels)]  # fmt: skip
    a = make_results(outputs(labels), labels, ids, 40)
    b = make_results(turned, labels[order], ids[order], 40)
    for x, y in zip(a, b, strict=True):
        for name in MEASURES:
            assert x.intervals[name] == pytest.approx(y.intervals[name], rel=1e-12)
        if x.comparison is not None:
            assert x.comparison.mcnemar == y.comparison.mcnemar
            kappa = [r.comparison.differences["kappa"].interval for r in (x, y)]
            assert kappa[0] == pytest.approx(kappa[1], rel=1e-12)
        assert x.report.risk.area == pytest.approx(y.report.risk.area)


def test_parts_are_concatenated():
    labels, _ = labels_and_ids()
    whole = outputs(labels)[1]
    cut = [
        whole._replace(
            probabilities=whole.probabilities[part],
            seconds=1.5,
            uncertainty=Uncertainty(*(column[part] for column in whole.uncertainty)),
        )
        for part in (slice(0, 7), slice(7, None))
    ]
    together = Output.concatenate(cut)
    assert together.seconds == 3.0 and together.method == LONGEST
    np.testing.assert_array_equal(together.probabilities, whole.probabilities)
    for a, b in zip(together.uncertainty, whole.uncertainty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_bootstrap_there_are_values_but_no_intervals():
    found = evaluation(0)
    assert all(r.intervals == {} for r in found.results)
    value = found.to_dict()
    assert value["bootstrap"] is None
    accuracy = value["results"][1]["comparison"]["differences"]["accuracy"]
    assert accuracy["interval"] is None and accuracy["value"] == pytest.approx(
        found.results[1].metrics.accuracy - found.results[0].metrics.accuracy
    )
    with pytest.raises(ValueError, match="resamples must be at least 1, got -1"):
        evaluation(-1)


def test_json_holds_everything_and_no_nan(tmp_path):
    found = evaluation()
    found.save(tmp_path / "e.json")
    value = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)
    assert value["bootstrap"] == {"resamples": 50, "level": 0.95}
    assert value["calibration"] == "fitted on 30 validation images"
    assert value["not_calibrated"] == [] and value["set_coverage"] == 0.9
    guidance, sampler, _, calibrated = value["results"]
    assert sampler["method"] == LONGEST and not sampler["calibrated"]
    assert calibrated["method"] == LONGEST + ", calibrated" and calibrated["calibrated"]
    assert calibrated["nll"] == found.results[3].metrics.nll
    assert calibrated["intervals"]["auc_ovo"]["resamples"] == 50
    assert calibrated["comparison"]["baseline"] == "guidance alone, calibrated"
    assert sum(group["images"] for group in calibrated["reliability"]) == IMAGES
    assert calibrated["reliability"][0]["accuracy"] is None  # no image in the first bin
    assert list(calibrated["accuracy_by"]) == [
        "confidence", "interval_width", "t_test", "agreement",
    ]  # fmt: skip
    assert set(calibrated["prediction_sets"]["by_class"]) == set(CLASSES)
    assert calibrated["risk_coverage"]["1"] == pytest.approx(1 - calibrated["accuracy"])
    assert guidance["comparison"] is None and guidance["prediction_sets"] is None


def test_a_row_for_each_image(tmp_path):
    found = evaluation()
    found.save_predictions(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == IMAGES and list(rows[0])[:3] == ["file", "truth", "class"]
    result = found.primary
    assert result.method == LONGEST + CALIBRATED
    for i, row in enumerate(rows):
        assert row["file"] == f"{i}.png" and row["truth"] == CLASSES[i % 3]
        assert row["class"] == CLASSES[result.probabilities[i].argmax()]
        assert float(row["probability_mild"]) == pytest.approx(result.probabilities[i, 1], abs=1e-6)
        members = [CLASSES[c] for c in np.flatnonzero(result.uncertainty.prediction_set[i])]
        assert row["prediction_set"] == "|".join(members)
        assert row["calibrated"] == "yes"
        assert row["flagged"] == ("yes" if result.uncertainty.flagged[i] else "no")
        assert float(row["novelty"]) == pytest.approx(result.uncertainty.novelty[i], rel=1e-5)


def test_a_separator_in_the_name_of_a_class_is_escaped():
    labels, ids = labels_and_ids()
    results = make_results(outputs(labels), labels, ids, 0)
    names = tuple(map(str, range(IMAGES)))
    found = Evaluation(("a|b", "c", "d"), labels, results, 8, 0, names)
    everything = Uncertainty(prediction_set=np.ones((IMAGES, 3), dtype=bool))
    changed = replace(found, results=(*results[:3], replace(results[3], uncertainty=everything)))
    row = next(csv.DictReader(io.StringIO(changed.to_csv())))
    assert row["prediction_set"] == "a\\|b|c|d"


def test_values_that_do_not_exist_are_empty_cells():
    labels, ids = labels_and_ids()
    published = outputs(labels, calibrated=False)
    single = Uncertainty(np.full(IMAGES, np.nan), np.full(IMAGES, np.nan), np.ones(IMAGES))
    names = tuple(map(str, range(IMAGES)))
    for methods, agreement in (
        (published[:1], ""),
        ([published[0], published[1]._replace(uncertainty=single)], "1"),
    ):
        results = make_results(methods, labels, ids, 0)
        found = Evaluation(CLASSES, labels, results, 1, 0, names)
        assert found.primary is results[-1]
        row = next(csv.DictReader(io.StringIO(found.to_csv())))
        assert row["agreement"] == agreement
        assert row["calibrated"] == "no"
        empty = ("interval_width", "t_test_p", "prediction_set", "novelty", "flagged")
        assert {row[name] for name in empty} == {""}


def printed(found):
    text = io.StringIO()
    found.print(text)
    return text.getvalue()


def test_the_tables_fit_140_columns():
    text = printed(evaluation())
    assert max(map(len, text.splitlines())) <= 140
    # Measures, intervals, and of the sampler the comparison and its sets.
    for method, tables in ((GUIDANCE, 2), (LONGEST, 4)):
        assert text.count(f"│ {method} ") == text.count(f"│ {method}{CALIBRATED} ") == tables
    assert "95 % intervals of 50 bootstrap resamples" in text
    assert "prediction sets for a coverage of 90%" in text
    assert "calibration: fitted on 30 validation images" in text


def test_a_difference_and_an_interval_are_printed_on_one_line():
    found = evaluation()
    text = printed(found)
    difference = found.results[1].comparison.differences["macro_f1"]
    low, high, _ = difference.interval
    assert f"{difference.value:+.3f} ({low:.3f}, {high:.3f})" in text
    low, high, _ = found.results[1].intervals["kappa"]
    assert f"{low:.3f}…{high:.3f}" in text


def test_an_uncalibrated_evaluation_says_why():
    text = printed(evaluation(0, calibrated=False))
    assert "not calibrated: there were no validation images" in text
    assert "bootstrap" not in text and "calibration: fitted" not in text
    assert evaluation(0, calibrated=False).primary.method == LONGEST


def test_a_missing_class_is_printed_as_undefined():
    labels, ids = labels_and_ids()
    kept = labels < 2
    few = [o._replace(probabilities=o.probabilities[kept], uncertainty=None)
           for o in outputs(labels, calibrated=False)]  # fmt: skip
    results = make_results(few, labels[kept], ids[kept], 20)
    found = Evaluation(CLASSES, labels[kept], results, 1, 0, bootstrap=20)
    text = printed(found)
    assert "- = not defined, AUC (one-vs-one): no image of class 2" in text
    assert found.to_dict()["results"][0]["intervals"]["auc_ovo"] == {
        "low": None, "high": None, "resamples": 0,
    }  # fmt: skip
    assert math.isnan(results[0].metrics.auc_ovo)
