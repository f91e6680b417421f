"""What training says about its images before the first epoch."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.decode import UnreadableImageError
from diffmic_fast.data.duplicates import find_duplicates
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.summary import report_images, summary_lines
from diffmic_fast.data.table import ArrayImage, ImageEntry, ImageTable


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table_of(files, classes=("fit", "sick")):
    """A table of (path, label)."""
    return ImageTable(classes, tuple(ImageEntry(p.name, label, p) for p, label in files))


def names(group):
    return [(member.split, member.name) for member in group]


@pytest.mark.parametrize("size", [1, 4096, 9999, 3 * 2**20 + 1])
def test_files_with_identical_bytes_are_found_and_others_are_not(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    # Differs in one byte that no sample of a long file covers.
    changed = bytearray(content)
    changed[size // 4] ^= 1
    a, b = write(tmp_path / "a.png", content), write(tmp_path / "b.png", content)
    c, d = write(tmp_path / "c.png", bytes(changed)), write(tmp_path / "d.png", content + b"0")
    found = find_duplicates(
        {"train": table_of([(a, 0), (c, 0), (d, 1)]), "test": table_of([(b, 0)])}
    )
    assert list(map(names, found.groups)) == [[("train", "a.png"), ("test", "b.png")]]
    assert found.compared == 4 and found.across_splits == 1 and found.with_different_labels == 0


def test_groups_with_different_labels_come_first(tmp_path):
    files = [write(tmp_path / f"{i}.png", b"ABBCCAAA"[i : i + 1]) for i in range(8)]
    labels = [0, 0, 0, 0, 1, 0, 0, 0]
    entries = list(zip(files, labels, strict=True))
    found = find_duplicates({"train": table_of(entries[:5]), "test": table_of(entries[5:])})
    assert [[int(m.name[0]) for m in group] for group in found.groups] == [
        [3, 4], [0, 5, 6, 7], [1, 2],
    ]  # fmt: skip
    text = found.describe()
    assert text.startswith(
        "5 of 8 images have the bytes of another one; of 3 groups, 1 are across splits and 1 have different labels: "
        "train 3.png (fit) = train 4.png (sick); train 0.png (fit) = test 5.png (fit) = test 6.png (fit) = … (4 images)"
    )


def test_images_of_arrays_are_compared_by_their_pixels():
    images = np.random.default_rng(0).integers(0, 255, (4, 28, 28), dtype=np.uint8)
    images[2] = images[0]
    images[3] = images[0]
    images[3, 27, 27] ^= 1
    entries = tuple(ImageEntry(f"train/{i}", 0, ArrayImage(images, i)) for i in range(4))
    found = find_duplicates({"train": ImageTable(("a", "b"), entries)})
    assert list(map(names, found.groups)) == [[("train", "train/0"), ("train", "train/2")]]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone\.png: there is no such file"):
        find_duplicates({"train": table_of([(tmp_path / "gone.png", 0)])})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_are_not_waited_for(tmp_path):
    """Two, since the content of a file is read if another one has its size."""
    pipes = [tmp_path / "1.png", tmp_path / "2.png"]
    for path in pipes:
        os.mkfifo(path)
    # With an open writing end a reader does not block: a missing check fails the test, and does not hang it.
    ends = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in pipes]
    try:
        with pytest.raises(UnreadableImageError, match=r"1\.png: it is not a regular file"):
            find_duplicates({"train": table_of([(path, 0) for path in pipes])})
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_the_header_of_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    table, said = table_of([(tmp_path / "1.png", 0)]), []
    thread = threading.Thread(
        target=lambda: said.extend(summary_lines({"train": table}, 32)), daemon=True
    )
    thread.start()
    thread.join(20)
    assert "image size: 32 x 32 pixels" in said


@pytest.fixture
def images(tmp_path):
    """Two classes with 3 and 1 training images, 0 and 1 test images, one of them a training image too."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("train/b/1", "train/b/2", "train/b/3", "train/a/4", "test/b/5")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (7 + i, 9), dtype=np.uint8)).save(path)
    (tmp_path / "test" / "b" / "6.png").write_bytes((tmp_path / "train/a/4.png").read_bytes())
    (tmp_path / "train" / "b" / "scan.xyz").write_bytes(b"DICM")
    return tmp_path


def report(config, **tables):
    said = []
    tables = {"train": open_source(config)} | tables
    report_images(config, tables, 32, with_test=True, say=said.append)
    return "\n".join(said).splitlines()


def test_the_summary_of_a_training_run(images):
    config = DataConfig(
        kind="folder", root=str(images), train_table="train", test_table="test",
        class_names=("b", "a", "none"),
    )  # fmt: skip
    lines = report(config)
    assert [line.split() for line in lines[:6]] == [
        ["images", "of", "3", "classes:"],
        ["class", "train", "test"],
        ["0", "b", "3", "2"],
        ["1", "a", "1", "0"],
        ["2", "none", "0", "0"],
        ["all", "4", "2"],
    ]
    assert lines[6:] == [
        "no train image of class none",
        "no test image of 2 classes: a, none",
        "image size: 32 x 32 pixels, from files with widths 9 to 9 and heights 7 to 10 (headers of 4 of 4 training "
        "images)",
        f"skipped, not an image: 1 ({images}/train/b/scan.xyz)",
        "duplicates: 1 of 6 images have the bytes of another one; of 1 groups, 1 are across splits and 1 have "
        "different labels: train a/4.png (a) = test b/6.png (b)",
    ]


def test_duplicates_are_an_error_on_request(images):
    config = DataConfig(
        kind="folder", root=str(images), train_table="train", test_table="test", duplicates="error"
    )
    with pytest.raises(
        ValueError, match=r"data\.duplicates=error.* train a/4\.png \(a\) = test b/6"
    ):
        report(config)
    train = {"train": open_source(config)}
    with pytest.raises(ValueError, match=r"data\.duplicates=error"):
        report_images(config, train, 32, with_test=True, say=None)
    report_images(config, train, 32, with_test=False, say=None)  # none among the training images


def test_missing_test_images_are_said_or_an_error(images):
    config = DataConfig(
        kind="folder", root=str(images), train_table="train", test_table="elsewhere"
    )
    lines = report(config)
    assert lines[-1] == "duplicates: none among 4 images, byte by byte"
    assert lines[-2].startswith("test images are not listed and not compared: ")
    assert "elsewhere is not a folder" in lines[-2]
    config = DataConfig(
        kind="folder", root=str(images), train_table="train", test_table="elsewhere",
        duplicates="error",
    )  # fmt: skip
    with pytest.raises(ValueError, match="elsewhere is not a folder"):
        report(config)


def test_a_thousand_classes_are_cut_short():
    images = np.zeros((1000, 1, 1), np.uint8)
    entries = tuple(ImageEntry(str(i), i, ArrayImage(images, i)) for i in range(1000))
    lines = summary_lines({"train": ImageTable(tuple(map(str, range(1000))), entries)}, 8)
    assert len(lines) == 105 and lines[102].split() == ["…", "900", "more", "…"]
