"""Pages of predictions: escaping, size, several pages, continued runs, what is not known."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_cases import CLASSES, HEADING, make_batch
from report_pages import HOSTILE, Page, assert_inert

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.inference.figures import Panel
from diffmic_fast.reports import html, prediction_report
from diffmic_fast.reports.cards import MAX_CLASSES, MAX_POINTS, Card
from diffmic_fast.reports.prediction_report import CARDS, PredictionReport, check_folder
from diffmic_fast.reports.thumbnails import MAX_BYTES, heat_map, thumbnail


def write(folder, *batches, heading=HEADING, done=None, settings=()):
    report = PredictionReport(folder, heading, Preprocessing(), settings)
    report.begin(done)
    for batch in batches:
        report.add(batch)
    page = report.finish()
    report.close()
    return page


def names(page):
    return [item["data-name"] for item in page.all("li") if "data-name" in item]


def test_a_page_shows_what_is_known_of_each_image(tmp_path):
    batch = make_batch(["a/one.png", "a/two.png"], unreadable=[("a/bad.png", "it is truncated")])
    page = Page(write(tmp_path, batch, settings=[("Sampler", "ddim 20")]))
    assert_inert(page)
    assert names(page) == ["one.png", "two.png", "bad.png"]
    for text in ("ddim 20", "it is truncated", "Unlike the training images", "Not read", "digest"):
        assert text in page.text
    row = batch.rows[0]
    assert f"{100 * row.probabilities[row.label]:.1f} %" in page.text
    for text in (
        "Guidance alone dark 50.0 %", f"Prediction set dark, {CLASSES[1]} ",
        "Interval width 0.100 Samples that agree 100 % Novelty 0.02 ",
    ):  # fmt: skip
        assert page.text.count(text) == 2, text
    (card,) = page.all("li", **{"data-name": "one.png"})
    assert (card["data-spread"], card["data-novelty"]) == ("0.050000", "0.020000")
    assert len(page.all("rect", width="8", height="8")) == 2 * 2 * 2  # each box and its halo
    assert len(page.all("svg", role="img")) == 2
    pictures = page.all("img")
    assert len(pictures) == 4 and all(p["alt"] or "heat" in p["class"] for p in pictures)
    assert [item["data-label"] for item in page.all("li") if "data-name" in item][
        -1
    ] == "unreadable"


def test_the_summary_counts_images_by_class_and_what_is_doubtful(tmp_path):
    batch = make_batch([f"{i}.png" for i in range(4)], unreadable=[("bad.png", "damaged")])
    classes = ("dark", "mid", "light")
    labels, sets, flags = (2, 0, 2, 2), ((), ("mid",), classes[:2], ("mid",)), (False, True, False, False)  # fmt: skip
    rows = [
        replace(
            row, label=labels[i], name=classes[labels[i]], guidance_name=classes[2],
            prediction_set=sets[i], flagged=flags[i],
        )
        for i, row in enumerate(batch.rows)
    ]  # fmt: skip
    heading = replace(HEADING, classes=classes)
    page = Page(write(tmp_path, batch._replace(rows=rows), heading=heading))
    for text in (
        "dark 1 25.0 %", "mid 0 0.0 %", "light 3 75.0 %", "Images read 4", "Unreadable 1",
        "Unlike the training images 1", "More than one class in the prediction set 1",
    ):  # fmt: skip
        assert text in page.text, text
    marks = ("data-flagged", "data-undecided", "data-disagree")
    cards = [item for item in page.all("li") if "data-name" in item]
    assert [tuple(name in card for name in marks) for card in cards] == [
        (False, False, False), (True, False, True), (False, True, False), (False, False, False), (False,) * 3,
    ]  # fmt: skip
    for card, row in zip(cards, rows, strict=False):
        assert float(card["data-confidence"]) == pytest.approx(
            row.probabilities[row.label], abs=1e-6
        )


def test_bars_are_the_most_probable_classes_in_the_order_of_the_model(tmp_path):
    """With the ends of the spread cut off at 0 and 1."""
    classes = tuple(f"class {c}" for c in range(MAX_CLASSES + 2))
    p = [0.01, 0.1, 0.02, 0.11, 0.12, 0.03, 0.97, 0.14, 0.15]
    batch = make_batch(["a.png"], classes=classes)
    row = replace(batch.rows[0], label=6, name=classes[6], probabilities=tuple(p))
    heading = replace(HEADING, classes=classes)
    page = Page(write(tmp_path, batch._replace(rows=[row]), heading=heading))
    _, _, bars = page.text.partition("Probability and spread")
    order = [1, 3, 4, 5, 6, 7, 8]  # the least probable ones are 0 and 2
    assert re.findall(r"class (\d) (\S+) % ± 5\.0", bars) == [
        (f"{c}", f"{100 * p[c]:.1f}") for c in order
    ]
    own = [a.get("class") == "own" for a in page.all("tr")]
    assert own[-len(order) - 1 : -1] == [c == 6 for c in order]
    fills = [a["width"] for a in page.all("rect", **{"class": "fill"})]
    assert fills[-len(order) :] == [f"{100 * p[c]:.2f}" for c in order]
    whiskers = [(a["x"], a["width"]) for a in page.all("rect", **{"class": "whisker"})]
    assert whiskers[0] == ("5.00", "10.00")
    assert whiskers[3] == ("0.00", "8.00") and whiskers[4] == ("92.00", "8.00")


def test_the_path_has_the_most_probable_classes_at_evenly_spaced_steps():
    """Two chains: class c goes from 0 to c + 1, with a deviation of 0.1 (c + 1)."""
    states, slope = np.linspace(0, 1, 101)[:, None], np.arange(1, MAX_CLASSES + 3)
    trajectory = np.stack([(states + 0.1) * slope, (states - 0.1) * slope]).astype(np.float32)
    probabilities = np.array([0.1, 0.02, 0.12, 0.01, 0.2, 0.11, 0.13, 0.15, 0.16], np.float32)
    order = [4, 8, 7, 6, 2, 5, 0]
    image = np.zeros((6, 10, 3), np.uint8)
    image[..., 0] = 200
    boxes, saliency = np.array([[1, 2, 3, 5]]), np.zeros((2, 2), np.float32)
    panel = Panel("a", image, saliency, boxes, trajectory, probabilities, probabilities)
    row = make_batch(["a.png"]).rows[0]
    card = Card.from_panel(row, panel)
    assert (card.width, card.height, card.boxes) == (10, 6, ((1, 2, 3, 5),))
    assert card.path.steps == 100
    mean = np.array(card.path.mean)
    assert mean.shape == (MAX_CLASSES, MAX_POINTS)
    np.testing.assert_allclose(mean[:, -1], slope[order], atol=1e-4)
    even = np.linspace(0, 1, MAX_POINTS) * slope[order][:, None]
    np.testing.assert_allclose(mean, even, atol=0.005 * slope.max() + 1e-4)
    np.testing.assert_allclose(card.path.deviation, 0.1 * slope[4], atol=1e-4)
    short = Card.from_panel(row, replace(panel, trajectory=trajectory[:, :3]))
    assert short.path.steps == 2 and len(short.path.deviation) == 3


def test_the_plot_of_a_path_is_to_scale(tmp_path):
    """Two chains of two steps: 0 is 6 from the lower edge, 1 is 6 from the upper one."""
    mean = torch.tensor([[0.125, 0.5, 0.875], [0.25, 0.5, 0.75], [0.875, 0.5, 0.125]]).T
    shift = torch.tensor([0.0, 0.125, 0.0])
    batch = make_batch(["a.png"])
    prediction = batch.prediction._replace(
        probabilities=torch.tensor([[0.3, 0.5, 0.2]]),
        label=torch.tensor([1]),
        trajectory=torch.stack([mean + shift, mean - shift])[None],
    )
    page = Page(write(tmp_path, batch._replace(prediction=prediction)))
    low, high = page.all("line", **{"class": "rule"})
    assert (float(low["y1"]), float(high["y2"])) == (90.0, 6.0)  # zero, one
    *others, own = page.all("polyline")
    assert own["class"] == "own" and not any("class" in line for line in others)
    assert own["points"] == "0.0,69.0 120.0,48.0 240.0,27.0"
    assert {line["points"] for line in others} == {
        "0.0,79.5 120.0,48.0 240.0,16.5", "0.0,16.5 120.0,48.0 240.0,79.5",
    }  # fmt: skip
    (band,) = page.all("polygon")
    assert band["points"] == (
        "0.0,58.5 120.0,37.5 240.0,16.5 240.0,37.5 120.0,58.5 0.0,79.5"
    )  # there and back
    (plot,) = page.all("svg", role="img")
    assert plot["aria-label"].endswith("in 2 steps: the predicted class goes from 0.25 to 0.75")


def test_names_of_files_and_classes_are_text_alone(tmp_path):
    files = [f"folder/{name.replace('/', '_')}.png" for name in HOSTILE]
    files += ["x\n\x1b[31m\u202egnp.exe.png", "caf\udce9.png"]
    batch = make_batch(files, unreadable=[(f"{HOSTILE[1]}.png", HOSTILE[0])])
    path = write(tmp_path, batch, settings=[("Checkpoint", HOSTILE[0])])
    page = Page(path)
    assert_inert(page)
    assert names(page)[: len(HOSTILE)] == [Path(file).name for file in files[: len(HOSTILE)]]
    assert names(page)[-3:-1] == [r"x\x0a\x1b[31m\u202egnp.exe.png", r"caf\xe9.png"]
    for text in (HOSTILE[0], "{{ 7 * 7 }}", "${7*7}"):
        assert text in page.text
    assert "<script>document" not in path.read_text() and "<img src=x" not in path.read_text()


def test_a_policy_allows_this_style_and_script_alone(tmp_path):
    """The hashes are of the elements as the page has them."""
    text = write(tmp_path, make_batch(["a.png"])).read_text()
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{tag}-src &#39;{html._hash(content)}&#39;" in text


def test_a_thousand_images_of_noise_are_below_50_megabytes(tmp_path):
    """Noise is what compresses worst; every image of a page takes the same markup."""
    classes = tuple(f"{'a long name of a class ' * 2}{c}" for c in range(12))
    files = [f"{'folder ' * 10}/{'image ' * 10}{i}.png" for i in range(12)]
    heading = replace(HEADING, classes=classes)
    batches = [make_batch(files[:n], classes=classes, size=224, noise=True) for n in (2, 12)]
    small, large = (
        write(tmp_path / str(i), batch, heading=heading).stat().st_size
        for i, batch in enumerate(batches)
    )
    each = (large - small) / 10
    assert each > MAX_BYTES / 2 and small + 1000 * each < 50e6


def test_pictures_keep_to_their_size():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (600, 300, 3), dtype=np.uint8)
    assert len(thumbnail(noise)) < MAX_BYTES * 4 / 3 + 100
    assert len(heat_map(rng.random((50, 50), dtype=np.float32))) < 8000
    assert heat_map(np.zeros((3, 5), np.float32)).startswith("data:image/png;base64,")


def test_pictures_show_the_image_and_where_saliency_is_high():
    image = np.zeros((40, 20, 3), np.uint8)
    image[:20, :, 0], image[20:, :, 2] = 255, 255
    picture = decoded(thumbnail(image)).convert("RGB")
    assert picture.size == (20, 40)
    for y, expected in ((5, (255, 0, 0)), (35, (0, 0, 255))):
        np.testing.assert_allclose(picture.getpixel((10, y)), expected, atol=30)
    alpha = np.asarray(decoded(heat_map(np.array([[0, 0], [3, 0]], np.float32))).convert("RGBA"))[
        ..., 3
    ]
    assert alpha[-1, 0] > 150 and alpha[0, 0] == alpha[0, -1] == alpha[-1, -1] == 0


def test_pictures_have_the_best_quality_that_fits():
    flat = thumbnail(np.zeros((224, 224, 3), np.uint8))
    tables = decoded(flat).quantization
    noise = decoded(thumbnail(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)))
    assert max(tables[0]) < max(noise.quantization[0])


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_further_pages_are_linked_and_those_of_an_earlier_report_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_report, "PAGE_IMAGES", 3)
    files = [f"{i}.png" for i in range(7)]
    write(tmp_path, make_batch(files[:4]), make_batch(files[4:]))
    pages = ["index.html", "page-0002.html", "page-0003.html"]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == pages
    found = [Page(tmp_path / name) for name in pages]
    assert [names(page) for page in found] == [files[:3], files[3:6], files[6:]]
    for page, first, last in zip(found, (1, 4, 7), (3, 6, 7), strict=True):
        assert f"7 images, of which this page has {first} to {last}" in page.text
        numbers = [item["data-number"] for item in page.all("li") if "data-name" in item]
        assert numbers == [str(n) for n in range(first, last + 1)]
    for name, page in zip(pages, found, strict=True):
        assert_inert(page)
        assert {link["href"] for link in page.all("a")} >= set(pages)
        assert {link["href"] for link in page.all("a", **{"aria-current": "page"})} == {name}
        assert "7 images" in page.text
    (tmp_path / "page-0009.html").write_text("of something else")
    write(tmp_path, make_batch(files[:2]))
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["index.html", "page-0009.html"]
    assert names(Page(tmp_path / "index.html")) == files[:2]


def test_an_interrupted_run_is_continued_to_the_same_page(tmp_path):
    """The last card is incomplete, and the row of the one before was not written."""
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file in files:
        Path(file).touch()
    batches = [make_batch([file]) for file in files]
    bad = make_batch([], unreadable=[("bad.png", "damaged")])
    whole = write(tmp_path / "whole", batches[0], batches[1], bad, batches[2], batches[3])

    report = PredictionReport(tmp_path / "cut", HEADING, Preprocessing())
    report.begin()
    for batch in (batches[0], batches[1], bad, batches[2]):
        report.add(batch)
    report.close()
    cards = tmp_path / "cut" / CARDS
    cards.write_bytes(cards.read_bytes()[:-100])
    cut = write(tmp_path / "cut", bad, batches[2], batches[3], done=files[:2])
    assert cut.read_bytes() == whole.read_bytes()
    again = write(tmp_path / "cut", bad, done=files)  # the incomplete card is gone
    assert names(Page(again)) == [*(Path(file).name for file in files), "bad.png"]


def test_a_continued_run_takes_the_last_card_of_each_row_in_the_order_of_the_rows(tmp_path):
    """A row that was not written is classified again."""
    first, second = (make_batch([name, "b.png"]) for name in ("a.png", "a.png"))
    again = replace(second.rows[0], label=1 - min(first.rows[0].label, 1))
    second = second._replace(rows=[again, second.rows[1]])
    for batch in (first, second):
        report = PredictionReport(tmp_path, HEADING, Preprocessing())
        report.begin(["b.png"] if batch is second else None)
        report.add(batch)
        report.close()
    page = Page(write(tmp_path, make_batch(["c.png"]), done=["b.png", "a.png"]))
    assert names(page) == ["b.png", "a.png", "c.png"]
    assert [item["data-label"] for item in page.all("li") if "data-name" in item][1] == str(
        again.label
    )


def test_rows_without_a_card_of_this_run_are_an_error(tmp_path):
    file = str(tmp_path / "a.png")
    Path(file).write_bytes(b"1")
    folder = tmp_path / "report"
    with pytest.raises(ValueError, match="were written without"):
        write(folder, done=[file])
    write(folder, make_batch([file]))
    before = (folder / CARDS).read_bytes()
    with pytest.raises(ValueError, match=r"got none for 1 of 2 rows, b\.png"):
        write(folder, done=[file, "b.png"])
    with pytest.raises(ValueError, match="of another model or other options"):
        write(folder, done=[file], heading=replace(HEADING, digest="other"))
    Path(file).write_bytes(b"another image")
    with pytest.raises(ValueError, match="got none for 1 of 1 rows"):
        write(folder, done=[file])
    assert (folder / CARDS).read_bytes() == before


def test_a_report_is_written_by_one_process_at_a_time(tmp_path):
    first = PredictionReport(tmp_path, HEADING, Preprocessing())
    first.begin()
    with pytest.raises(ValueError, match="is being written by another process"):
        PredictionReport(tmp_path, HEADING, Preprocessing()).begin()
    first.close()
    write(tmp_path, make_batch(["a.png"]))


def test_probabilities_that_are_not_calibrated_are_named_on_the_page_and_each_image(tmp_path):
    heading = replace(HEADING, obstacle="the model has no calibration")
    page = Page(write(tmp_path, make_batch(["a.png", "b.png"], calibrated=False), heading=heading))
    assert "The probabilities are not calibrated: the model has no calibration" in page.text
    assert page.text.count("Not calibrated") == 2
    assert "Prediction set" not in page.text.partition("Images")[2].partition("cards")[2]
    assert not page.all("input", id="flagged") and not page.all("input", id="undecided")
    calibrated = Page(write(tmp_path, make_batch(["a.png"])))
    assert "not calibrated" not in calibrated.text.lower()


def test_a_single_sample_and_many_classes(tmp_path):
    classes = tuple(map(str, range(30)))
    batch = make_batch(["a.png"], classes=classes)
    single = replace(batch.rows[0], interval_width=None, p_value=None)
    page = Page(
        write(tmp_path, batch._replace(rows=[single]), heading=replace(HEADING, classes=classes))
    )
    assert "Interval width" not in page.text and "and 23 less probable classes" in page.text
    assert len(page.all("polyline")) == 7


def test_a_page_without_an_image_that_was_read(tmp_path):
    page = Page(write(tmp_path, make_batch([], unreadable=[("a.png", "damaged")])))
    assert names(page) == ["a.png"] and "1 image" in page.text


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("<title>My page</title>")
    with pytest.raises(
        ValueError, match=r"must not contain an index\.html that is not of a report"
    ):
        check_folder(tmp_path)
    (tmp_path / "index.html").unlink()
    assert check_folder(tmp_path) == []
    write(tmp_path, make_batch(["a.png"]))
    assert check_folder(tmp_path) == [tmp_path / CARDS, tmp_path / "index.html"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_folder(tmp_path / "file")


def test_cards_are_lines_of_json_that_are_read_back_as_they_were(tmp_path):
    batch = make_batch(["caf\udce9.png"])
    write(tmp_path, batch)
    first, line = (tmp_path / CARDS).read_bytes().splitlines()
    assert json.loads(first)["digest"] == "digest"
    card = prediction_report.Card.from_json(line)
    assert card.row == batch.rows[0] and card.boxes == ((0, 0, 8, 8), (8, 0, 16, 8))
    assert card.to_json() == line + b"\n"
