"""Prediction of files: rows, unreadable files, formats, pictures."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.figures import (
    draw_confusion,
    draw_predictions,
    make_panels,
    save_figure,
)
from diffmic_fast.inference.output import save
from diffmic_fast.inference.pictures import Pictures
from diffmic_fast.inference.predict import (
    FilePredictor,
    ProbabilityOptions,
    collect_files,
    predict_files,
)
from diffmic_fast.models import DiffMIC

NAMES = ("blue", "green", "red")


@pytest.fixture
def model(config):
    torch.manual_seed(1)
    return DiffMIC(config.model).eval()


def run(model, config, files, samples=1, **options):
    sampling = SamplingOptions("ddim", 3, samples=samples)
    return predict_files(model, files, NAMES, config.data.augmentation, sampling, **options)


def test_rows_are_in_the_order_of_the_files_and_batch_invariant(model, config, images):
    files = collect_files([images / "test"])
    assert len(files) == 6 and files == sorted(files)
    many = run(model, config, files, samples=3, batch_size=4)
    single = [run(model, config, [f], samples=3).rows[0] for f in files]
    assert [r.file for r in many.rows] == [str(f) for f in files]
    for a, b in zip(many.rows, single, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
        assert sum(a.probabilities) == pytest.approx(1, abs=1e-5)
        assert a.name == NAMES[a.label] and a.label == int(np.argmax(a.probabilities))
        assert max(a.spread) > 0


def test_unreadable_files_are_listed(model, config, images, tmp_path):
    good = collect_files([images / "test" / "red"])
    cut = tmp_path / "cut.png"
    cut.write_bytes(good[0].read_bytes()[:200])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    files = collect_files([cut, good[0], tmp_path / "nothere.png", text, good[1]])
    result = run(model, config, files, batch_size=2)
    assert [r.file for r in result.rows] == [str(g) for g in good]
    assert [f for f, _ in result.unreadable] == [
        str(cut), str(tmp_path / "nothere.png"), str(text),
    ]  # fmt: skip
    assert "no such file" in result.unreadable[1][1]


def test_files_are_collected_once(images, tmp_path):
    twice = collect_files([images / "test" / "red", images / "test" / "red" / "red_00.png"])
    assert len(twice) == 2
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="there is no image file in"):
        collect_files([tmp_path])
    with pytest.raises(ValueError, match="no files"):
        collect_files([])


def test_csv_and_json_have_the_same_values(model, config, images, tmp_path):
    result = run(model, config, collect_files([images / "test" / "blue"]), samples=2)
    save(result, tmp_path / "p.csv")
    save(result, tmp_path / "p.json")
    with open(tmp_path / "p.csv", newline="") as file:
        table = list(csv.DictReader(file))
    value = json.loads((tmp_path / "p.json").read_text())
    assert list(table[0])[:4] == ["file", "label", "class", "probability_blue"]
    assert value["classes"] == list(NAMES) and value["unreadable"] == []
    for row, record, own in zip(table, value["predictions"], result.rows, strict=True):
        assert row["file"] == record["file"] == own.file
        assert int(row["label"]) == record["label"] == own.label
        for name in NAMES:
            assert float(row[f"probability_{name}"]) == pytest.approx(
                record["probabilities"][name], abs=1e-6
            )
            assert float(row[f"spread_{name}"]) == pytest.approx(record["spread"][name], abs=1e-6)
    with pytest.raises(ValueError, match=r"must end in \.csv or \.json, got .*p\.txt"):
        save(result, tmp_path / "p.txt")


def test_pictures_show_the_images_that_the_model_saw(model, config, images, tmp_path):
    files = collect_files([images / "test"])
    pictures = Pictures(NAMES, config.data.augmentation, tmp_path / "a.png", tmp_path / "each")
    run(model, config, files, batch_size=4, on_batch=pictures.add)
    pictures.finish()
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.format == "PNG" and sheet.height > 1000
        assert len(np.unique(np.asarray(sheet))) > 50
    each = sorted(p.name for p in (tmp_path / "each").iterdir())
    assert len(each) == 6 and each[0] == "00000_blue_00.png"
    shown = pictures.panels[0].image
    with Image.open(files[0]) as original:
        small = np.asarray(original.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(shown - small).mean() < 20
    assert shown.shape == (32, 32, 3)


def test_bad_input_is_rejected(model, config):
    plain = model.predict(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="must have trajectory, saliency and boxes"):
        make_panels(torch.zeros(1, 3, 32, 32), plain, ["a"], config.data.augmentation, [None])
    with pytest.raises(ValueError, match="must be 1 to 16 images, got 0"):
        draw_predictions([], NAMES)
    with pytest.raises(ValueError, match=r"must be 3 class names, .* got 2"):
        predict_files(model, [], NAMES[:2], config.data.augmentation, SamplingOptions("ddim", 3))


def test_confusion_matrix_is_drawn(tmp_path):
    save_figure(draw_confusion(np.array([[3, 1], [0, 4]]), ("a", "b")), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 200


def heading(model, config, **changes):
    augmentation = dataclasses.replace(config.data.augmentation, **changes)
    return FilePredictor(model, NAMES, augmentation, SamplingOptions("ddim", 3)).heading


def test_the_digest_is_of_what_decides_the_numbers(model, config):
    before = heading(model, config).digest
    assert (
        heading(model, config, rotation=77.0, brightness=0.4).digest == before
    )  # of training alone
    assert (
        heading(model, config, centre_square=not config.data.augmentation.centre_square).digest
        != before
    )
    options = SamplingOptions("ddim", 3)
    published = FilePredictor(
        model,
        NAMES,
        config.data.augmentation,
        options,
        probabilities=ProbabilityOptions("published"),
    )
    assert (
        published.heading.digest == before
    )  # without a calibration they are published ones in any case
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.numel() > 2000:
            kept = value.clone()
            value[(-1,) * value.ndim] += 1
            assert heading(model, config).digest != before, name
            value.copy_(kept)
    assert heading(model, config).digest == before


def test_files_of_the_command_itself_are_left_out(images, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(images / "test" / "red", folder)
    expected = collect_files([folder])
    (folder / "pictures" / "deep").mkdir(parents=True)
    for name in ("out.csv", "figure.png", "pictures/0.png", "pictures/deep/1.png"):
        shutil.copy(expected[0], folder / name)
    outputs = {
        "outputs": [folder / "out.csv", folder / "figure.png"],
        "output_folder": folder / "pictures",
    }
    assert collect_files([folder], **outputs) == expected
    (tmp_path / "link").symlink_to(folder)
    assert len(collect_files([tmp_path / "link"], **outputs)) == len(expected)
    assert len(collect_files([folder])) == len(expected) + 4
    with pytest.raises(ValueError, match="must be written to another folder"):
        collect_files([folder], output_folder=tmp_path / "link")
