"""Tables of images in every published form, and their splits."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.decode import load_image
from diffmic_fast.data.readers import (
    read_aptos2019,
    read_csv,
    read_folder,
    read_ham10000,
    read_medmnist,
    read_pickle,
)
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.synthetic_fundus import GRADES


def draw(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 0, 0)).save(path)
    return path


def labels(table):
    return {entry.name: table.classes[entry.label] for entry in table.entries}


def test_folder_per_class(tmp_path):
    for name in ("b/2.PNG", "b/deep/1.jpg", "a/3.png", "a/.hidden.png", ".git/x.png"):
        draw(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    table = read_folder(tmp_path)
    assert labels(table) == {"a/3.png": "a", "b/2.PNG": "b", "b/deep/1.jpg": "b"}
    wider = read_folder(tmp_path, ["c", "b", "a"])
    assert wider.classes == ("c", "b", "a") and wider.counts == {"c": 0, "b": 2, "a": 1}
    with pytest.raises(ValueError, match=r"the folders in .* must be classes \(a, c\), got b"):
        read_folder(tmp_path, ["a", "c"])
    with pytest.raises(ValueError, match="is not a folder"):
        read_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no image file in .*empty"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="must have a folder of images for each class, got none"):
        read_folder(tmp_path / "empty")


def test_csv_with_names_numbers_and_folds(tmp_path):
    for name in "xyz":
        draw(tmp_path / "images" / f"{name}.png")
    table = tmp_path / "table.csv"
    table.write_text(
        "label,file,fold\nsick, images/x.png ,1\nfit,images/y.png,0\nsick,images/z.png,1\n\n"
    )
    read = read_csv(table)
    assert read.classes == ("fit", "sick")
    assert labels(read) == {"images/x.png": "sick", "images/y.png": "fit", "images/z.png": "sick"}
    assert [entry.fold for entry in read.split([1]).entries] == [1, 1]
    table.write_text("file,label\nx.png,2\ny.png,0\n")
    numbers = read_csv(table, tmp_path / "images")
    assert numbers.classes == ("0", "1", "2") and numbers.labels.tolist() == [2, 0]
    named = read_csv(table, tmp_path / "images", ["p", "q", "r"])
    assert labels(named) == {"x.png": "r", "y.png": "p"}
    more = read_csv(table, tmp_path / "images", num_classes=4)
    assert more.classes == ("0", "1", "2", "3")
    absolute = tmp_path / "images" / "x.png"
    table.write_text(f"\ufefffile,label\n{absolute},a\n../images/y.png,b\n", encoding="utf-8")
    assert len(read_csv(table, tmp_path / "images")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,grade\nx.png,1\n", r"column 'label' is missing; .* got file, grade"),
        ("", "column 'file' is missing; .* got nothing"),
        ("file,label\n", "lists no images"),
        ("file,label\nx.png,a\nx.png,b\n", r"line 3: x\.png is listed twice, first in line 2"),
        ("file,label\nx.png\n", "line 2: must have 2 cells as the header, got 1"),
        (
            "file,label\nx.png,a\nno1.png,b\nno2.png,b\n",
            r"2 of 3 image files are missing: .*no1\.png",
        ),
        ("file,label,fold\nx.png,a,one\n", "line 2: fold must be a whole number, got 'one'"),
        ("file,label\n,a\n", "line 2: the file name is empty"),
        ("file,label\nx.png,-1\n", "line 2: label must be a number from 0 to 1, got '-1'"),
    ],
)
def test_an_invalid_csv_is_named_by_line(tmp_path, text, message):
    draw(tmp_path / "x.png")
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(table)


def test_csv_labels_must_be_classes(tmp_path):
    draw(tmp_path / "x.png"), draw(tmp_path / "y.png")
    table = tmp_path / "t.csv"
    table.write_text("file,label\nx.png,0\ny.png,5\n")
    with pytest.raises(ValueError, match=r"line 3: label must be a number from 0 to 2, got '5'"):
        read_csv(table, num_classes=3)
    table.write_text("file,label\nx.png,a\ny.png,c\n")
    with pytest.raises(ValueError, match=r"line 3: label must be one of a, b, got 'c'"):
        read_csv(table, None, ["a", "b"])
    with pytest.raises(ValueError, match="there is no file"):
        read_csv(tmp_path / "none.csv")
    table.write_bytes(b"\xff\xfe\x00\x81\n")
    with pytest.raises(ValueError, match="must be a CSV file in UTF-8"):
        read_csv(table)


HAM_HEADER = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"


def test_ham10000_as_published(tmp_path):
    draw(tmp_path / "part1" / "ISIC_0024306.jpg")
    draw(tmp_path / "part2" / "ISIC_0024307.jpg")
    table = tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv"
    table.write_text(
        HAM_HEADER
        + "ISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0\nISIC_0024307,0.0,0.0,0.0,0.0,0.0,0.0,1.0\n"
    )
    read = read_ham10000(table, [tmp_path / "part1", tmp_path / "part2"])
    assert labels(read) == {"ISIC_0024306": "NV", "ISIC_0024307": "VASC"}
    config = DataConfig(
        kind="ham10000", root=str(tmp_path), table=table.name, image_folders=("part1", "part2")
    )
    assert open_source(config).labels.tolist() == read.labels.tolist()
    for row in ("0,0,0,0,0,0,0", "1,1,0,0,0,0,0", "0.5,0,0,0,0,0,0.5", "x,1,0,0,0,0,0"):
        table.write_text(HAM_HEADER + f"ISIC_0024306,{row}\n")
        with pytest.raises(ValueError, match="line 2: the classes of ISIC_0024306 must be one 1"):
            read_ham10000(table, [tmp_path / "part1"])
    table.write_text("image,MEL,NV\nISIC_0024306,1,0\n")
    with pytest.raises(ValueError, match="column 'BCC' is missing"):
        read_ham10000(table, [tmp_path])


def test_aptos2019_as_published(tmp_path):
    draw(tmp_path / "train_images" / "000c1434d8d7.png")
    draw(tmp_path / "train_images" / "001639a390f0.png")
    table = tmp_path / "train.csv"
    table.write_text("id_code,diagnosis\n000c1434d8d7,2\n001639a390f0,4\n")
    read = read_aptos2019(table, [tmp_path / "train_images"])
    assert len(read.classes) == 5 and read.labels.tolist() == [2, 4]
    table.write_text("id_code,diagnosis\n000c1434d8d7,5\n")
    with pytest.raises(ValueError, match="line 2: diagnosis must be a grade from 0 to 4, got '5'"):
        read_aptos2019(table, [tmp_path / "train_images"])
    table.write_text("id_code\n000c1434d8d7\n")
    with pytest.raises(ValueError, match="column 'diagnosis' is missing"):
        read_aptos2019(table, [tmp_path])
    table.write_text("id_code,diagnosis\n000c1434d8d8,1\n")
    with pytest.raises(ValueError, match=r"1 of 1 image files are missing: .*000c1434d8d8\.png"):
        read_aptos2019(table, [tmp_path])


def test_pickled_lists(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    file = tmp_path / "train.pkl"
    for content in (
        [{"img_root": "a.png", "label": 0}, {"img_root": "b.png", "label": np.int64(2)}],
        [("a.png", 0), ["b.png", 2]],
        ({"path": str(tmp_path / "a.png"), "target": 0}, {"image": "b.png", "label": 2}),
    ):
        file.write_bytes(pickle.dumps(content))
        assert read_pickle(file, tmp_path).labels.tolist() == [0, 2]
        assert read_pickle(file, tmp_path, num_classes=5).classes == ("0", "1", "2", "3", "4")
    for content, message in (
        ({"a": 1}, "must hold a list of images, got dict"),
        ([], "lists no images"),
        ([("a.png", 1.5)], "item 0: must be a path and a label"),
        ([("a.png", True)], "item 0: must be a path and a label"),
        ([{"img_root": "a.png"}], r"item 0: must have one of .* got \['img_root'\]"),
        ([7], "item 0: must be a dict or a pair"),
        ([("a.png", 7)], "item 0: label must be a number from 0 to 4, got '7'"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_pickle(file, tmp_path, num_classes=5)


def test_medmnist(tmp_path):
    file = tmp_path / "some.npz"
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 3
    np.savez(file, **arrays)
    config = DataConfig(kind="medmnist", root=str(tmp_path), table="some.npz")
    read = open_source(config, "validation")
    assert read.classes == ("0", "1", "2") and read.labels.tolist() == [0, 1]
    pixels = load_image(read.entries[1].source)
    assert pixels.shape == (8, 8, 3) and np.array_equal(pixels[..., 2], arrays["val_images"][1])
    for change, message in (
        ({"test_labels": np.zeros((3, 4), int)}, "one whole number for each image"),
        ({"test_images": np.zeros((3, 4, 4, 4), np.uint8)}, r"must be uint8 \[N, H, W\]"),
    ):
        np.savez(file, **(arrays | change))
        with pytest.raises(ValueError, match=message):
            read_medmnist(file, "test")
    np.savez(file, train_images=arrays["train_images"])
    with pytest.raises(ValueError, match=r"must be a MedMNIST file: .*test_images"):
        read_medmnist(file, "test")
    np.savez(file, **(arrays | {"test_images": np.array([{}], dtype=object)}))
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        read_medmnist(file, "test")
    file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        read_medmnist(file, "test")


def test_synthetic_splits_do_not_overlap():
    config = DataConfig(
        kind="synthetic_fundus", synthetic_size=32, synthetic_per_class=3,
        synthetic_validation_per_class=1, synthetic_test_per_class=2,
    )  # fmt: skip
    tables = {split: open_source(config, split) for split in ("train", "validation", "test")}
    assert [len(table) for table in tables.values()] == [15, 5, 10]
    assert all(table.classes == GRADES for table in tables.values())
    images = {
        load_image(entry.source).tobytes() for table in tables.values() for entry in table.entries
    }
    assert len(images) == 30


def csv_of(tmp_path, count=20):
    table = tmp_path / "t.csv"
    rows = []
    for i in range(count):
        draw(tmp_path / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{'ab'[i % 2]},{i % 4}")
    table.write_text("file,label,fold\n" + "\n".join(rows) + "\n")
    return {"kind": "csv", "root": str(tmp_path), "table": "t.csv"}


def test_splits_by_fold_are_disjoint(tmp_path):
    base = csv_of(tmp_path)
    config = DataConfig(**base, validation_folds=(2,), test_folds=(0,))
    folds = {
        s: {e.fold for e in open_source(config, s).entries} for s in ("train", "validation", "test")
    }
    assert folds == {"train": {1, 3}, "validation": {2}, "test": {0}}
    config = DataConfig(**base, train_folds=(3,), test_folds=(0,))
    assert {e.fold for e in open_source(config).entries} == {3}
    with pytest.raises(ValueError, match=r"folds must be among \[0, 1, 2, 3\], got 9"):
        open_source(DataConfig(**base, test_folds=(9,)), "test")
    with pytest.raises(ValueError, match="there is no validation split"):
        open_source(config, "validation")


def test_splits_by_fraction_are_a_partition(tmp_path):
    base = csv_of(tmp_path)
    config = DataConfig(**base, validation_fraction=0.2, test_fraction=0.2)
    names = [
        {e.name for e in open_source(config, s).entries} for s in ("train", "validation", "test")
    ]
    assert [len(part) for part in names] == [12, 4, 4] and len(set.union(*names)) == 20
    again = {e.name for e in open_source(config, "test").entries}
    assert again == names[2]
    other = DataConfig(**base, validation_fraction=0.2, test_fraction=0.2, split_seed=1)
    assert {e.name for e in open_source(other, "test").entries} != names[2]
    assert open_source(config, "test").counts == {"a": 2, "b": 2}


def test_an_image_in_two_splits_is_rejected(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png"):
        draw(tmp_path / name)
    with pytest.raises(ValueError, match=r"must be classes, got splits \(test, train\)"):
        read_folder(tmp_path)
    (tmp_path / "all").mkdir()
    for split, row in (
        ("train", "../train/a/1.png,a\n../train/b/2.png,b"),
        ("test", "../train/./b/2.png,b"),
    ):
        (tmp_path / "all" / f"{split}.csv").write_text(f"file,label\n{row}\n")
    config = DataConfig(
        kind="csv", root=str(tmp_path / "all"), train_table="train.csv", test_table="test.csv"
    )
    with pytest.raises(ValueError, match="1 of 1 test images are training images too"):
        open_source(config, "test")
    (tmp_path / "all" / "train.csv").write_text(
        "file,label\n../train/a/1.png,a\n.././train/a/1.png,b\n"
    )
    with pytest.raises(ValueError, match=r"line 3: .* is listed twice, first in line 2"):
        open_source(config)


def test_tables_of_splits_have_the_classes_of_the_training_table(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png"):
        draw(tmp_path / name)
    config = DataConfig(kind="folder", root=str(tmp_path), train_table="train", test_table="test")
    test = open_source(config, "test")
    assert test.classes == ("a", "b") and test.labels.tolist() == [1]
    wrong = DataConfig(kind="folder", root=str(tmp_path), train_table="train", num_classes=3)
    with pytest.raises(ValueError, match="num_classes is 3, but there are 2 classes: a, b"):
        open_source(wrong)
