"""Pictures of images whose names and classes are hard to draw, and pictures that cannot be written."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.inference import figures
from diffmic_fast.inference.figures import draw_confusion, draw_to
from diffmic_fast.inference.pictures import Pictures
from diffmic_fast.models import Prediction

pytest.importorskip("matplotlib")

NAMES = [
    r"$\frac{$.png", "$a_{b$", "$", "$$", "a\nb\tc.png", "\x1b[31m.png", "\udce9.png", r"\$x$.png",
    "片 מבחן.png", "x" * 250 + ".png", "片" * 80 + ".png", "100%_&#{}^~.png",
]  # fmt: skip


@pytest.fixture
def prediction():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(1, 2, generator=generator).softmax(dim=1)
    return Prediction(
        probabilities=probabilities,
        label=probabilities.argmax(dim=1),
        spread=torch.zeros(1, 2),
        samples=torch.rand(1, 1, 2, generator=generator),
        guidance=torch.full((1, 3, 2), 0.5),
        trajectory=torch.rand(1, 1, 4, 2, generator=generator),
        saliency=torch.rand(1, 2, 4, 4, generator=generator),
        boxes=torch.tensor([[[0, 0, 8, 8]]]),
    )


IMAGES = torch.zeros(1, 3, 32, 32)


def drawn_texts(figure):
    """What the figure shows, as matplotlib has prepared it."""
    found = []
    for text in figure.findobj(lambda artist: hasattr(artist, "_preprocess_math")):
        shown, is_math = text._preprocess_math(text.get_text())
        assert not is_math or "y_t" in shown, shown
        found.append(shown)
    return found


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_drawn(tmp_path, prediction, name):
    pictures = Pictures(
        ["$a$", "b$_{"], AugmentationConfig(), tmp_path / "sheet.png", tmp_path / "each", title=name
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the figure")
        pictures.add([Path(name)], IMAGES, prediction)
        pictures.finish()
    (picture,) = (tmp_path / "each").iterdir()
    for path in (picture, tmp_path / "sheet.png"):
        with Image.open(path) as image:
            image.load()


def test_dollars_are_shown_and_control_characters_escaped(monkeypatch):
    shown = []
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, path: shown.extend(drawn_texts(figure))
    )
    classes = ["$a$", "two\nlines", "plain"]
    assert draw_to("x.png", lambda: draw_confusion(np.eye(3, dtype=np.int64), classes, "ddim $5$"))
    assert {"$a$", r"two\nlines", "plain", "ddim $5$"} <= set(shown)


def test_pictures_that_cannot_be_written_are_one_warning_and_a_count(
    tmp_path, prediction, monkeypatch
):
    def full(figure, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "save_figure", full)
    pictures = Pictures(["a", "b"], AugmentationConfig(), tmp_path / "s.png", tmp_path / "each")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            pictures.add([Path(f"{number}.png")], IMAGES, prediction)
        pictures.finish()
    first, last = (str(warning.message) for warning in caught)
    assert first.startswith(f"the figure {tmp_path / 'each' / '00000_0.png'} was not drawn: ")
    assert first.endswith("No space left on device")
    assert last == "4 figures were not drawn"


def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Pictures(["a", "b"], AugmentationConfig(), folder=tmp_path / "file")


def test_names_of_pictures_fit_the_file_system(tmp_path, prediction):
    pictures = Pictures(["a", "b"], AugmentationConfig(), folder=tmp_path / "each")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the figure")
        pictures.add([Path("y" * 100 + "x" * 150 + ".png")], IMAGES, prediction)
    (picture,) = (tmp_path / "each").iterdir()
    assert picture.stem.startswith("00000_y") and picture.stem.endswith("x" * 150)
    assert len(os.fsencode(picture.name)) <= 200
