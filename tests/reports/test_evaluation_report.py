"""The page of an evaluation: its content, names that are markup, classes without images, one sample."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from report_cases import METHODS, make_dataset, make_evaluation
from report_pages import HOSTILE, Page, assert_inert

from diffmic_fast.inference.evaluate import _labels_by_samples
from diffmic_fast.inference.results import GUIDANCE, Output, make_results
from diffmic_fast.reports.evaluation_figures import draw_curves, draw_samples
from diffmic_fast.reports.evaluation_report import find_mistakes, write_evaluation_report
from diffmic_fast.reports.svg import label, new_figure, style, to_svg


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
