"""The page of an evaluation: its content, names that are markup, classes without images, one sample."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from report_cases import METHODS, make_dataset, make_evaluation
from report_pages import HOSTILE, Page, assert_inert

from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.table import ImageEntry, ImageTable
from diffmic_fast.data.transforms import evaluation_transform
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluate import _labels_by_samples
from diffmic_fast.inference.evaluation import Evaluation
from diffmic_fast.inference.report import Uncertainty
from diffmic_fast.inference.results import CALIBRATED, GUIDANCE, Output, make_results
from diffmic_fast.reports import evaluation_figures
from diffmic_fast.reports.evaluation_figures import (
    draw_curves,
    draw_reliability,
    draw_risk,
    draw_samples,
    draw_steps,
)
from diffmic_fast.reports.evaluation_report import find_mistakes, write_evaluation_report
from diffmic_fast.reports.svg import label, new_figure, style, to_svg

CHAIN = [SamplingOptions("ddim", 5, samples=2), SamplingOptions(samples=2)]


def write(folder, evaluation, dataset, split="test", settings=()):
    return write_evaluation_report(
        folder / "report", evaluation, dataset, METHODS, timesteps=100, split=split,
        settings=settings,
    )  # fmt: skip


def test_a_page_has_measures_curves_and_mistakes(tmp_path):
    evaluation = make_evaluation([0, 1, 2] * 8)
    path = write(tmp_path, evaluation, make_dataset(tmp_path, evaluation))
    page = Page(path)
    assert_inert(page)
    for text in (
        "24 test images of 3 classes", "Difference from the guidance alone", "McNemar's exact p",
        "Before calibration", "After calibration", "Error rate among the most confident images",
        "Accuracy by the number of samples", "Accuracy by the number of steps", "Prediction sets",
        "images per second", "Most confident mistakes", "fitted somewhere",
    ):  # fmt: skip
        assert text in page.text, text
    primary = evaluation.primary
    interval = primary.intervals["accuracy"]
    assert f"{100 * primary.metrics.accuracy:.1f} %" in page.text
    assert f"{100 * interval.low:.1f} % to {100 * interval.high:.1f} %" in page.text
    figures = page.all("svg", role="img")
    assert len(figures) == 7 and all(figure["aria-labelledby"] for figure in figures)
    assert {f["aria-labelledby"] for f in figures} <= {t["id"] for t in page.all("title") if t}
    headers = page.all("th")
    assert headers and all(header["scope"] in ("col", "row") for header in headers)
    wrong = (primary.probabilities.argmax(axis=1) != evaluation.labels).sum()
    assert wrong and len(page.all("img")) == wrong


def test_identifiers_of_several_figures_are_unique(tmp_path):
    evaluation = make_evaluation([0, 1, 2] * 8)
    page = Page(write(tmp_path, evaluation, make_dataset(tmp_path, evaluation)))
    found = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(found) == len(set(found)) > 50


def test_mistakes_are_the_most_confident_ones_in_order(tmp_path):
    labels = [0, 1, 2] * 20
    evaluation = make_evaluation(labels)
    p = np.full((60, 3), 0.1)
    predicted = (np.array(labels) + 1) % 3  # every label is wrong
    confidence = np.linspace(0.4, 0.9, 60)
    p[np.arange(60), predicted] = confidence
    p /= p.sum(axis=1, keepdims=True)
    outputs = [Output(GUIDANCE, p, 1.0), Output(METHODS[0].method, p, 1.0)]
    results = make_results(outputs, evaluation.labels, np.arange(60), 0)
    evaluation = replace(evaluation, results=results)
    found = find_mistakes(evaluation, make_dataset(tmp_path, evaluation))
    assert [m.name for m in found] == [f"{i}.png" for i in range(59, 39, -1)]
    assert (found[0].predicted, found[0].truth) == ("a", "c")
    assert found[0].confidence == pytest.approx(p[59].max())
    assert found[0].of_truth == pytest.approx(p[59, 2])
    assert len({m.picture for m in found}) > 15


def known_evaluation():
    """Ten images of three classes, of which the guidance has 8 right, ddim 5 has 6 and the whole chain 7."""
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    predicted = {
        GUIDANCE: [0, 0, 0, 0, 1, 1, 1, 1, 2, 0],
        CHAIN[0].method: [0, 0, 0, 1, 1, 1, 1, 2, 0, 2],
        CHAIN[1].method: [0, 0, 0, 1, 1, 1, 1, 1, 0, 2],
    }
    rng = np.random.default_rng(0)

    def probabilities(method):
        p = 0.5 * rng.dirichlet(np.ones(3), 10)
        p[np.arange(10), predicted[method]] += 0.5
        return p

    sets = np.eye(3, dtype=bool)[predicted[CHAIN[0].method]]
    sets[3:5, 0] = True  # both right
    sets[8] = False
    own = Uncertainty(prediction_set=sets, flagged=labels == 2)
    by_samples = np.stack([labels, predicted[CHAIN[0].method]], axis=1)
    outputs = [
        Output(GUIDANCE, probabilities(GUIDANCE), 0.1),
        Output(CHAIN[0].method, probabilities(CHAIN[0].method), 0.5, labels_by_samples=by_samples),
        Output(CHAIN[1].method, probabilities(CHAIN[1].method), 4.0),
        Output(GUIDANCE + CALIBRATED, probabilities(GUIDANCE), 0.1, True),
        Output(CHAIN[0].method + CALIBRATED, probabilities(CHAIN[0].method), 0.5, True, own),
    ]
    results = make_results(outputs, labels, np.arange(10), 50)
    names = tuple(f"{i}.png" for i in range(10))
    return Evaluation(("a", "b", "c"), labels, results, 2, 0, names=names, bootstrap=50)


def test_numbers_stand_in_their_rows_and_columns(tmp_path):
    evaluation = known_evaluation()
    path = write_evaluation_report(
        tmp_path / "report", evaluation, make_dataset(tmp_path, evaluation), CHAIN, timesteps=100, split="test",
    )  # fmt: skip
    page = Page(path)
    guidance, first, chain, _, calibrated = evaluation.results
    assert evaluation.primary is calibrated
    rows = [
        "a 3 2 0 60.0 %", "b 0 2 1 66.7 %", "c 1 0 1 50.0 %",  # confusion: recall of the true class
        "ddim 5 5 60.0 %", f"{CHAIN[1].method} 100 70.0 %",  # steps
        "ddim 5, calibrated 1 3 0.62",  # only this one right, only the guidance right
        "ddim 5 100.0 % 60.0 %",  # by samples
        "all 10 80.0 % 1.10 1", "a 5 100.0 % 1.40 0", "b 3 66.7 % 1.00 0", "c 2 50.0 % 0.50 1",  # sets
        "Unlike the training images: 20.0 %", "4 of 4 images with a wrong label", "a 5 b 3 c 2 ",
        f"Before calibration: calibration error {first.metrics.ece:.3f}",
        f"After calibration: calibration error {calibrated.metrics.ece:.3f}",
    ]  # fmt: skip
    for result, speed in ((first, "50.0 20.0"), (chain, "400.0 2.5")):
        m = result.metrics
        rows.append(
            f"{result.method} {m.ece:.3f} {m.nll:.3f} {m.brier:.3f} {result.report.risk.area:.3f} {speed}"
        )
    for title, result in (("accuracy", calibrated), (guidance.method, guidance)):
        ends = result.intervals["accuracy"]
        assert ends.low < ends.high
        rows.append(
            f"{title} {100 * result.metrics.accuracy:.1f} % {100 * ends.low:.1f} % to {100 * ends.high:.1f} %"
        )
    balanced = calibrated.intervals["balanced_accuracy"]
    rows.append(
        f"balanced accuracy 58.9 % {100 * balanced.low:.1f} % to {100 * balanced.high:.1f} %"
    )
    for result in (evaluation.results[3], calibrated):
        risk = [f"{100 * result.report.risk.at(c):.1f} %" for c in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)]
        rows.append(f"{result.method} {' '.join(risk)} {100 - 100 * result.metrics.accuracy:.1f} %")
    groups = [g for g in calibrated.report.table if g.images]
    groups += calibrated.report.groups["confidence"]
    for g in groups:
        rows.append(f"{g.name} {g.images} {100 * g.accuracy:.1f} % {100 * g.confidence:.1f} %")
    p = calibrated.probabilities[3]
    rows.append(f"predicted b, {100 * p[1]:.1f} % true class a, {100 * p[0]:.1f} % 3.png")
    for row in rows:
        assert row in page.text, row
    cells = [a["class"] for a in page.all("td") if a.get("class", "").startswith("shade")]
    assert cells == [
        "shade6 right", "shade4", "shade0", "shade0", "shade6 right", "shade3", "shade5", "shade0", "shade5 right",
    ]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """The figures of a report, by their prefix, before they become text."""
    figures = {}

    def keep(figure, name, title):
        figures[name] = figure
        return ""

    monkeypatch.setattr(evaluation_figures, "to_svg", keep)
    return figures


def test_curves_are_those_of_each_class(drawn):
    evaluation = known_evaluation()
    roc, _ = draw_curves(evaluation.primary, evaluation)
    areas = {row[0]: row[2:] for row in roc.table.rows}
    (axis,) = drawn["roc"].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("false positives", "sensitivity")
    diagonal, *lines = axis.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    for line in lines:
        x, y = line.get_xydata().T
        area = ((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum()
        assert f"{area:.3f}" == areas[line.get_label()][0]
    assert [line.get_label() for line in lines] == ["a", "b", "c"]
    (axis,) = drawn["pr"].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("recall", "precision")
    for line in axis.lines:
        x, y = line.get_xydata().T
        assert f"{((x[:-1] - x[1:]) * y[:-1]).sum():.3f}" == areas[line.get_label()][1]
    assert len(axis.lines) == 3


def test_reliability_risk_samples_and_steps_are_drawn_to_scale(drawn):
    evaluation = known_evaluation()
    guidance, first, chain, *_ = evaluation.results
    draw_reliability(first, "reliability", "x")
    axis, below = drawn["reliability"].axes
    groups = [g for g in first.report.table if g.images]
    assert axis.lines[1].get_xydata().tolist() == [[g.confidence, g.accuracy] for g in groups]
    bars = [bar for bar in below.patches if bar.get_height()]
    assert [bar.get_height() for bar in bars] == [g.images for g in groups]
    for bar, g in zip(bars, groups, strict=True):
        assert bar.get_x() < g.confidence < bar.get_x() + bar.get_width()
    draw_risk([guidance, first])
    (axis,) = drawn["risk"].axes
    assert [line.get_label() for line in axis.lines] == [GUIDANCE, "ddim 5"]
    for line, error in zip(axis.lines, (0.2, 0.4), strict=True):
        assert line.get_xydata()[-1].tolist() == pytest.approx([1, error])
    draw_samples(evaluation)
    samples, level = drawn["samples"].axes[0].lines
    assert samples.get_xydata().tolist() == [[1, 1], [2, 0.6]]
    assert list(level.get_ydata()) == [0.8, 0.8] and level.get_label() == GUIDANCE
    draw_steps([("ddim", 5, first), ("ddim", 100, chain)])
    (bars,) = drawn["steps"].axes[0].containers
    line, _, (ranges,) = bars.lines
    assert line.get_xydata().tolist() == [[5, 0.6], [100, 0.7]]
    ends = [result.intervals["accuracy"] for result in (first, chain)]
    np.testing.assert_allclose(
        [segment[:, 1] for segment in ranges.get_segments()], [[e.low, e.high] for e in ends]
    )


def test_long_lines_keep_their_shape_and_ends(drawn):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1500)
    p = rng.random(1500)
    p = np.stack([1 - p, p], axis=1)
    (result,) = make_results([Output(GUIDANCE, p, 1.0)], labels, np.arange(1500), 0)
    draw_risk([result])
    x, y = drawn["risk"].axes[0].lines[0].get_xydata().T
    risk = result.report.risk
    assert len(x) < 500 and x[-1] == risk.coverage[-1] and y[-1] == risk.risk[-1]
    np.testing.assert_array_equal(y, np.interp(x, risk.coverage, risk.risk))


def test_a_mistake_of_more_than_8_bits_is_shown_as_the_model_saw_it(tmp_path):
    """A grey of 4,095 is white where the images have 12 bits."""
    p = np.array([[0.1, 0.9], [0.2, 0.8]])
    labels = np.array([0, 1])
    results = make_results([Output(GUIDANCE, p, 1.0)], labels, np.arange(2), 0)
    evaluation = Evaluation(("a", "b"), labels, results, 1, 0)
    Image.fromarray(np.full((20, 20), 4095, np.uint16)).save(tmp_path / "a.png")
    entry = ImageEntry("a.png", 0, tmp_path / "a.png")
    transform = evaluation_transform(20, AugmentationConfig(bit_depth=12))
    (found,) = find_mistakes(evaluation, ImageDataset(ImageTable(("a", "b"), (entry,)), transform))
    picture = Image.open(io.BytesIO(base64.b64decode(found.picture.partition(",")[2])))
    assert picture.size == (20, 20) and np.asarray(picture).min() > 240


def test_names_are_text_alone(tmp_path):
    evaluation = make_evaluation([0, 1, 2] * 4, classes=(HOSTILE[0], HOSTILE[1], "$x_{$"))
    names = [HOSTILE[i % len(HOSTILE)] + str(i) for i in range(12)]
    dataset = make_dataset(tmp_path, evaluation, names)
    path = write(tmp_path, evaluation, dataset, settings=[("Checkpoint", HOSTILE[3])])
    page = Page(path)
    assert_inert(page)
    assert HOSTILE[0] in page.text and "$x_{$" in page.text
    assert "<script>document" not in path.read_text() and "<img src=x" not in path.read_text()


def test_a_class_without_images_one_sample_and_no_calibration(tmp_path):
    evaluation = make_evaluation([0, 1] * 6, samples=1, calibrated=False, bootstrap=0)
    page = Page(write(tmp_path, evaluation, make_dataset(tmp_path, evaluation), split="train"))
    assert "The probabilities are not calibrated: the model has no calibration." in page.text
    assert "AUC (one-vs-one): no image of class 2" in page.text
    assert "These images trained the model" in page.text
    assert "Published probabilities, not calibrated" in page.text
    for text in (
        "number of samples per image",
        "Before calibration",
        "bootstrap",
        "Prediction sets for",
    ):
        assert text not in page.text


def test_areas_of_curves_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score, roc_auc_score

    evaluation = make_evaluation([0, 1, 1] * 5)
    roc, _ = draw_curves(evaluation.primary, evaluation)
    first, _, absent = roc.table.rows
    p = evaluation.primary.probabilities[:, 0]
    truth = evaluation.labels == 0
    assert first == [
        "a",
        "5",
        f"{roc_auc_score(truth, p):.3f}",
        f"{average_precision_score(truth, p):.3f}",
    ]
    assert absent == ["c", "0", "-", "-"]


def test_labels_by_the_first_samples():
    """The label of the mean probability over the first k samples."""
    samples = torch.tensor(
        [[[2.0, 0.0], [0.0, 9.0], [0.0, 9.0]], [[0.0, 1.0], [0.0, 1.0], [3.0, 0.0]]]
    )
    assert _labels_by_samples(samples).tolist() == [[0, 1, 1], [1, 1, 1]]
    evaluation = make_evaluation([0, 1, 2] * 4)
    drawing = draw_samples(evaluation)
    assert drawing is not None
    assert drawing.table.columns == ("method", "1", "2", "3")
    assert drawing.table.rows[0] == ["ddim 5", "33.3 %", "100.0 %", "100.0 %"]


def test_figures_take_colours_from_the_page_and_have_no_style_sheet():
    with new_figure(3, 2) as figure:
        axis = figure.add_subplot()
        axis.plot([0, 1], [0, 1], **style(0), label=label("$a$\n" + "b" * 40))
        axis.legend()
        svg = to_svg(figure, "one", 'a "title" <b>')
    root = ET.fromstring(svg)
    tags = {element.tag for element in root.iter()}
    assert "svg" in tags and not tags & {"style", "metadata", "script"}
    assert root[0].tag == "title" and root[0].text == 'a "title" <b>'
    attributes = [(k, v) for element in root.iter() for k, v in element.attrib.items()]
    assert "style" not in {key for key, _ in attributes}
    assert ("stroke", "var(--s0)") in attributes and ("fill", "var(--ink)") in attributes
    ids = {value for key, value in attributes if key == "id"}
    used = [v for _, value in attributes for v in re.findall(r"url\(#(.+?)\)", value)]
    used += [value[1:] for key, value in attributes if key == "href"]
    assert used and set(used) <= ids and all(name.startswith("one-") for name in ids)
    assert "".join(root.itertext()).count("b" * 20)
