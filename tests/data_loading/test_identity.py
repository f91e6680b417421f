"""Keys of images, and the refusal of those that a model has seen."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.decode import UnreadableImageError
from diffmic_fast.data.identity import check_unseen, image_keys
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.table import ArrayImage, ImageEntry, ImageTable


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "all" / name / f"{name}{i}.bmp")
    return tmp_path / "all"


def keys(root):
    table = open_source(DataConfig(kind="folder", root=str(root)))
    return dict(zip((e.name for e in table.entries), image_keys(table).tolist(), strict=True))


def test_a_key_is_of_name_and_content(folder, tmp_path):
    before = keys(folder)
    assert len(set(before.values())) == 8
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert keys(moved) == before
    (moved / "b" / "deep").mkdir()
    (moved / "a" / "a0.bmp").rename(moved / "b" / "deep" / "a0.bmp")
    assert keys(moved)["b/deep/a0.bmp"] == before["a/a0.bmp"]
    (moved / "a" / "a1.bmp").rename(moved / "a" / "renamed.bmp")
    assert keys(moved)["a/renamed.bmp"] not in before.values()
    for place in (60, 400, -1):  # headers of bitmaps of one size are the same
        content = bytearray((folder / "a" / "a2.bmp").read_bytes())
        content[place] ^= 1
        (moved / "a" / "a2.bmp").write_bytes(content)
        assert keys(moved)["a/a2.bmp"] not in before.values()


def test_arrays_and_synthetic_images_have_keys():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    entries = tuple(ImageEntry(f"test/{i}", i % 2, ArrayImage(images, i)) for i in range(4))
    table = ImageTable(("a", "b"), entries)
    assert len(set(image_keys(table).tolist())) == 4
    synthetic = DataConfig(kind="synthetic_fundus", synthetic_per_class=3)
    train, test = (open_source(synthetic, split) for split in ("train", "test"))
    assert len(torch.cat((image_keys(train), image_keys(test))).unique()) == len(train) + len(test)
    check_unseen("evaluate", "test", test, {"training": image_keys(train)})


def test_seen_images_are_counted_and_named(folder):
    table = open_source(DataConfig(kind="folder", root=str(folder)))
    seen = {"training": image_keys(table)[[2, 5]], "validation": image_keys(table)[:0]}
    with pytest.raises(
        ValueError, match=r"^evaluate: 2 of 8 test images were training images .* a/a2\.bmp for one"
    ):
        check_unseen("evaluate", "test", table, seen)
    line = check_unseen("evaluate", "test", table, seen, allow=True)
    assert line.startswith("--allow-seen: 2 of 8 test images were training images")
    assert not check_unseen("evaluate", "test", table, {"training": seen["training"] + 1})
    check_unseen("evaluate", "test", table, {})


def test_a_missing_image_is_named(folder):
    table = open_source(DataConfig(kind="folder", root=str(folder)))
    (folder / "b" / "b1.bmp").unlink()
    with pytest.raises(UnreadableImageError, match=r"b1\.bmp: there is no such file$") as caught:
        image_keys(table)
    assert caught.value.path == str(folder / "b" / "b1.bmp")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(folder):
    table = open_source(DataConfig(kind="folder", root=str(folder)))
    (folder / "a" / "a2.bmp").unlink()
    os.mkfifo(folder / "a" / "a2.bmp")
    # With an open writing end a reader does not block: a missing check fails the test, and does not hang it.
    end = os.open(folder / "a" / "a2.bmp", os.O_RDWR | os.O_NONBLOCK)
    try:
        with pytest.raises(UnreadableImageError, match=r"a2\.bmp: it is not a regular file$"):
            image_keys(table)
    finally:
        os.close(end)
