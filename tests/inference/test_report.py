"""Reports of synthetic predictions whose reliability is known."""

import math

import numpy as np
import pytest

from diffmic_fast.inference.report import Uncertainty, make_report


def predictions(images=40):
    """Two classes; the upper half of the confidences is right, the lower half wrong."""
    confidence = np.linspace(0.55, 0.95, images)
    labels = np.where(np.arange(images) < images // 2, 1, 0)
    return np.column_stack([confidence, 1 - confidence]), labels


def uncertainty(images=40, **changed):
    rising = np.linspace(0.0, 1.0, images)
    columns = {"width": 1 - rising, "p_value": (1 - rising) / 5, "agreement": rising}
    return Uncertainty(**(columns | changed))


def test_accuracy_by_confidence_width_test_and_agreement():
    p, labels = predictions()
    report = make_report(p, labels, uncertainty())
    assert list(report.groups) == ["confidence", "interval_width", "t_test", "agreement"]
    assert [g.images for g in report.groups["confidence"]] == [8] * 5
    assert [g.accuracy for g in report.groups["confidence"]] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert [g.accuracy for g in report.groups["interval_width"]] == [1.0, 1.0, 0.0, 0.0]
    # p < 0.05 is 1 - rising < 0.25: the last ten of forty; accuracy of the others 10 / 30.
    significant, other = report.groups["t_test"]
    assert (significant.name, significant.images, significant.accuracy) == ("p < 0.05", 10, 1.0)
    assert (other.name, other.images) == ("p >= 0.05", 30)
    assert other.accuracy == pytest.approx(1 / 3)
    agreement = report.groups["agreement"]
    assert [g.name for g in agreement] == ["< 0.5", "[0.5, 0.75)", "[0.75, 1)", "1"]
    assert [g.images for g in agreement] == [20, 10, 9, 1]
    assert [g.accuracy for g in agreement] == [0.0, 1.0, 1.0, 1.0]
    assert report.risk.at(0.5) == 0.0 and report.risk.at(1.0) == 0.5
    assert sum(g.images for g in report.table) == 40


def test_a_single_sample_has_no_groups_of_samples():
    p, labels = predictions()
    nothing = np.full(40, np.nan)
    report = make_report(
        p, labels, uncertainty(width=nothing, p_value=nothing, agreement=np.ones(40))
    )
    assert list(report.groups) == ["confidence"]
    assert report.sets is None and report.flagged is None
    assert list(make_report(p, labels).groups) == ["confidence"]


def test_sets_and_flags():
    p, labels = predictions(4)
    sets = np.array([[1, 0], [1, 1], [1, 1], [1, 0]], dtype=bool)
    flagged = np.array([True, False, False, False])
    report = make_report(p, labels, uncertainty(4, prediction_set=sets, flagged=flagged))
    assert report.flagged == 0.25
    assert report.sets is not None and report.sets[0] == (4, 0.75, 1.5, 0)
    value = report.to_dict(("healthy", "ill"))
    assert value["prediction_sets"]["coverage"] == 0.75
    # Of the two images of class 1, "ill", the first has the set {0}.
    assert value["prediction_sets"]["by_class"]["ill"]["coverage"] == 0.5
    assert value["prediction_sets"]["by_class"]["healthy"]["size"] == 1.5


def test_one_image():
    report = make_report(np.array([[0.3, 0.7]]), np.array([1]))
    assert report.risk.area == 0.0
    assert [g.images for g in report.groups["confidence"]] == [1, 0, 0, 0, 0]
    assert math.isnan(report.groups["confidence"][1].accuracy)
