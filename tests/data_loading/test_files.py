"""Files of folders: which are images, which are reported."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.decode import UnreadableImageError, load_image
from diffmic_fast.data.files import list_images, scan_folder
from diffmic_fast.data.sources import open_source
from diffmic_fast.inference.predict import collect_files


@pytest.fixture
def folder(tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    for name in ("a.jfif", "b.jp2", "c.PNG", "d.JPG", "e.Tiff"):
        with open(tmp_path / name, "wb") as file:
            image.save(
                file, {"a": "JPEG", "b": "JPEG2000", "c": "PNG", "d": "JPEG", "e": "TIFF"}[name[0]]
            )
    (tmp_path / "plain").write_bytes((tmp_path / "c.PNG").read_bytes())
    return tmp_path


def test_images_are_found_by_suffix_content_and_link(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "target.png"
    elsewhere.write_bytes((folder / "c.PNG").read_bytes())
    (folder / "link.png").symlink_to(elsewhere)
    found = list_images(folder)
    assert [path.name for path in found] == [
        "a.jfif", "b.jp2", "c.PNG", "d.JPG", "e.Tiff", "link.png", "plain",
    ]  # fmt: skip
    for path in found:
        assert abs(int(load_image(path).mean()) - 200) <= 2


def test_other_files_are_listed_and_litter_is_not(folder):
    for name in (".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "labels.csv"):
        (folder / name).write_text("text")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    others = [path.name for path in scan_folder(folder, recursive=True).others]
    assert others == ["circle", "labels.csv", "notes.txt", "pipe"]
    names = [path.name for path in collect_files([folder])]
    assert names == sorted(names) and len(names) == 6 + 4
    reasons = {}
    for name in others:
        with pytest.raises(UnreadableImageError) as caught:
            load_image(folder / name)
        reasons[name] = caught.value.reason
    assert reasons == {
        "circle": "it is a link to a folder, which is not followed",
        "labels.csv": "it is not an image",
        "notes.txt": "it is not an image",
        "pipe": "it is not a regular file",
    }


def test_a_training_folder_keeps_what_it_leaves_out(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.jfif", "JPEG")
    config = DataConfig(kind="folder", root=str(tmp_path))
    assert open_source(config).skipped == ()
    (tmp_path / "dogs" / "scan.xyz").write_text("text")
    (tmp_path / "dogs" / "Thumbs.db").write_text("text")
    Image.new("RGB", (4, 4)).save(tmp_path / "stray.png")
    table = open_source(config)
    assert len(table) == 2
    found = {Path(what).name: reason for what, reason in table.skipped}
    assert found == {
        "scan.xyz": "not an image",
        "Thumbs.db": "a file of the operating system",
        "stray.png": "an image outside the class folders",
    }
