"""Pages of predictions: escaping, size, several pages, continued runs, what is not known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_cases import HEADING, make_batch
from report_pages import HOSTILE, Page, assert_inert

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.reports import html, prediction_report
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
    assert len(page.all("rect", width="8", height="8")) == 2 * 2 * 2  # each box and its halo
    assert len(page.all("svg", role="img")) == 2
    assert all(image["alt"] or "heat" in image["class"] for image in page.all("img"))
    assert [item["data-label"] for item in page.all("li") if "data-name" in item][
        -1
    ] == "unreadable"


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


def test_further_pages_are_linked_and_those_of_an_earlier_report_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_report, "PAGE_IMAGES", 3)
    files = [f"{i}.png" for i in range(7)]
    write(tmp_path, make_batch(files[:4]), make_batch(files[4:]))
    pages = ["index.html", "page-0002.html", "page-0003.html"]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == pages
    found = [Page(tmp_path / name) for name in pages]
    assert [names(page) for page in found] == [files[:3], files[3:6], files[6:]]
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
