"""A label is the name of a class, or an error that names file and line."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.labels import LabelledRow, number_labels
from diffmic_fast.data.readers import read_csv, read_folder, read_medmnist, read_pickle
from diffmic_fast.data.sources import open_source


def named(labels, classes=None, **options):
    """The class name of each label, in rows "line 2", "line 3", ..."""
    rows = [LabelledRow(f"line {i}", label) for i, label in enumerate(labels, 2)]
    names, numbers = number_labels(rows, classes, **options)
    return [names[number] for number in numbers]


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (["p", "q", "r"], ["2", "0"], ["r", "p"]),
        (["normal", "covid-19"], ["1", "0"], ["covid-19", "normal"]),
        (["grade 0", "grade 1"], ["1", "0"], ["grade 1", "grade 0"]),
        (["1", "2", "3"], ["3", "1", "2"], ["3", "1", "2"]),
        (["4", "2", "0"], ["0", "4"], ["0", "4"]),
        (["00", "01"], ["01", "00"], ["01", "00"]),
        (["1.0", "2.5"], ["2.5", "1.0"], ["2.5", "1.0"]),
        (None, ["2", "0"], ["2", "0"]),
        (None, ["b", "a", "4A"], ["b", "a", "4A"]),
        (["p", "q"], [1, 0], ["q", "p"]),
        (["1", "2", "3"], [1, 0], ["2", "1"]),
    ],
)
def test_names_and_positions(classes, labels, expected):
    assert named(labels, classes) == expected


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (["1", "2", "3"], ["1", "0"], "line 3: label must be one of 1, 2, 3, got '0'"),
        (["0", "2", "4"], ["0", "1"], "line 3: label must be one of 0, 2, 4, got '1'"),
        (["2", "1", "0"], ["3"], "line 2: label must be one of 2, 1, 0, got '3'"),
        (["0.5", "1.5"], ["0"], "line 2: label must be one of 0.5, 1.5, got '0'"),
        (["none", "4", "5"], ["0"], "line 2: label must be one of none, 4, 5, got '0'"),
        (["grade 1", "grade 2"], ["1"], "line 2: label must be one of grade 1, grade 2, got '1'"),
        (["pT1", "pT2", "nx"], ["1", "2"], "line 2: label must be one of pT1, pT2, nx, got '1'"),
        (["p", "q"], ["0", "q"], "line 2: label must be one of p, q, got '0'"),
        (["p", "q"], ["2"], "line 2: label must be a number from 0 to 1, got '2'"),
        (["p", "q"], ["01"], "line 2: label must be a number from 0 to 1, got '01'"),
        (["p", "q"], ["+1"], "line 2: label must be a number from 0 to 1, got '\\+1'"),
        (["p", "q"], ["1.0"], "line 2: label must be one of p, q, got '1.0'"),
        (["p", "q"], ["Q"], "line 2: label must be one of p, q, got 'Q'"),
        (["p", "q"], [2], "line 2: label must be a number from 0 to 1, got '2'"),
        (["p", "q"], ["p", ""], "line 3: the label is empty"),
    ],
)
def test_a_label_outside_the_class_names_is_an_error(classes, labels, message):
    with pytest.raises(ValueError, match=message):
        named(labels, classes)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", ""], "line 3: the label is empty"),
        (["0", "1", " \u200b\u00a0"], "line 4: the label is empty"),
        (["1.0", "2.5", "1.0"], "line 2: .* got the decimal number '1.0'"),
        (["0", "1", "2,5"], "line 4: .* got the decimal number '2,5'"),
        (["0", "1e0"], "line 3: .* got the decimal number '1e0'"),
        (["0", "1", "NaN"], "line 4: .* got the decimal number 'NaN'"),
        (["2019-01-31", "2019-02-01"], "line 2: .* got the date '2019-01-31'"),
        (["sick", "31.01.2019"], "line 3: .* got the date '31.01.2019'"),
        (["sick", "2019/1/31 08:00"], "line 3: .* got the date"),
        (["20190131", "20190201"] * 2, "line 3: number labels must be classes counted from 0"),
        (["1000000000000", "0", "1"], "line 2: .* makes 1000000000001 classes"),
        (["0", "9" * 5000], "line 3: label must be a number from 0 to 1"),
        (["0", "01"], "line 3: label must be a number from 0 to 1, got '01'"),
        (["0", "\u0661"], "line 3: label must be a number from 0 to 1"),
        ([f"case{i}" for i in range(30)], "line 2: .* got 30 different labels for 30 images"),
        ([str(i) for i in range(30)], "line 2: .* got 30 different labels for 30 images"),
        (["Benign", "sick", "benign"], r"line 4: .* got 'benign' and 'Benign' \(first in line 2\)"),
        (["no dr", "no  dr"], "line 3: labels must differ in more than case, spaces"),
        (["a", "a\nb"], "line 3: the label must be one line of text"),
        (["a", 1], "line 3: labels must be all numbers or all names, got the number 1 beside 'a'"),
    ],
)
def test_labels_that_cannot_define_classes(labels, message):
    with pytest.raises(ValueError, match=message):
        named(labels)


def test_num_classes_bounds_the_classes_of_number_labels():
    assert number_labels([LabelledRow("line 2", "1")], num_classes=4)[0] == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match=r"line 2: label must be a number from 0 to 3, got '4'"):
        named(["4"], num_classes=4)
    with pytest.raises(ValueError, match="num_classes must be at most 1000 for 2 images"):
        named(["0", "1"], num_classes=2**31 - 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: f"case {i}",
        lambda i: str(i),
        lambda i: str(20190101 + i % 365),
        lambda i: f"c{i // 2}",
        lambda i: f"c{i % 7}" if i < 99_999 else "1.5",
    ],
    ids=["identifiers", "numbers", "dates", "pairs", "last"],
)
def test_a_hundred_thousand_labels_take_linear_time(make):
    rows = [LabelledRow(f"line {i}", make(i)) for i in range(100_000)]

    def seconds(part):
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()
            try:
                number_labels(part)
            except ValueError as error:
                assert str(error).startswith("line ")
            best = min(best, time.thread_time() - began)
        return best

    # Quadratic time would be 16 times as long for 4 times as many rows.
    assert seconds(rows) < 8 * seconds(rows[-25_000:]) + 0.05


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate("uvwxyz"):
        write(tmp_path / f"{name}.png", i)
    return tmp_path


def table_of(folder, **tables):
    """A configuration of kind csv with these tables, each a text."""
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text)
    names = {f"{name}_table": f"{name}.csv" for name in tables}
    return {"kind": "csv", "root": str(folder), **names}


@pytest.mark.parametrize("code", ["0", "1"])
def test_codes_do_not_meet_the_alphabet_of_names_in_the_training_table(folder, code):
    config = table_of(
        folder,
        train="file,label\nu.png,no_dr\nv.png,mild\n",
        test=f"file,label\nw.png,{code}\n",
    )
    with pytest.raises(
        ValueError, match=rf"test\.csv, line 2: label must be one of mild, no_dr, got '{code}'"
    ):
        open_source(DataConfig(**config), "test")
    classes = ("no_dr", "mild")  # the order that the codes count
    read = open_source(DataConfig(**config, class_names=classes), "test")
    assert read.classes[read.entries[0].label] == classes[int(code)]


def test_number_labels_of_two_tables_are_the_same_classes(folder):
    config = table_of(
        folder,
        train="file,label\nu.png,0\nv.png,1\nz.png,2\n",
        test="file,label\nw.png,2\nx.png,0\n",
    )
    assert open_source(DataConfig(**config), "test").labels.tolist() == [2, 0]
    (folder / "test.csv").write_text("file,label\nw.png,3\n")
    with pytest.raises(ValueError, match=r"test\.csv, line 2: label must be a number from 0 to 2"):
        open_source(DataConfig(**config), "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label,label\nu.png,a,b\nv.png,b,a\n", "line 1: every column .* got 'label' twice"),
        ("file, file ,label\nu.png,v.png,b\n", "line 1: every column .* got 'file' twice"),
        ('file,label\nu.png,"a\nv.png,b\nw.png,a\n', "line 4: must be a CSV file"),
        ('file,label\nu.png,"a\nv.png,b"\nw.png,a\n', "line 3: the label must be one line"),
        ("file,label\nu.png,a\nv.png,  \n", "line 3: the label is empty"),
        ("file,label\nu.png,a\nv.png,\n", "line 3: the label is empty"),
    ],
)
def test_tables_that_say_two_things(folder, text, message):
    config = DataConfig(**table_of(folder, train=text))
    with pytest.raises(ValueError, match=rf"train\.csv, {message}"):
        open_source(config)


def test_one_column_cannot_be_file_and_label(folder):
    (folder / "t.csv").write_text("file,label\nu.png,a\nv.png,b\n")
    with pytest.raises(ValueError, match="columns must be different ones, got 'file' twice"):
        read_csv(folder / "t.csv", columns=("file", "file", "fold"))


def test_an_error_in_a_label_comes_before_missing_images(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\nno.png,a\nno2.png,1.5\n")
    with pytest.raises(ValueError, match=r"line 3: .* decimal number"):
        read_csv(tmp_path / "t.csv")


def test_pickled_numbers_are_class_numbers(folder):
    file = folder / "train.pkl"
    file.write_bytes(pickle.dumps([("u.png", 1), ("v.png", 0), ("w.png", 2)]))
    assert read_pickle(file, folder, ["a", "b", "c"]).labels.tolist() == [1, 0, 2]
    assert read_pickle(file, folder, ["1", "2", "3"]).labels.tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match="item 2: label must be a number from 0 to 1, got '2'"):
        read_pickle(file, folder, ["a", "b"])
    for label, text in ((10**12, "item 0: number labels"), (-1, "item 0: .* got -1"),
                        (10**5000, "item 0: .* bits"), ("", "item 0: the label is empty")):  # fmt: skip
        file.write_bytes(pickle.dumps([("u.png", label), ("v.png", 0)]))
        with pytest.raises(ValueError, match=text):
            read_pickle(file, folder)


def test_pickled_numbers_need_number_classes_in_the_training_list(folder):
    (folder / "train.pkl").write_bytes(pickle.dumps([("u.png", "sick"), ("v.png", "fit")]))
    (folder / "test.pkl").write_bytes(pickle.dumps([("w.png", 0)]))
    config = DataConfig(
        kind="pkl", root=str(folder), train_table="train.pkl", test_table="test.pkl"
    )
    with pytest.raises(ValueError, match=r"test\.pkl, item 0: label must be one of fit, sick"):
        open_source(config, "test")


def test_medmnist_labels_are_class_numbers(tmp_path):
    file = tmp_path / "m.npz"
    images = {
        f"{split}_images": np.zeros((3, 4, 4), np.uint8) for split in ("train", "val", "test")
    }

    def write_labels(train):
        labels = {"val_labels": np.array([0, 1, 2]), "test_labels": np.array([0, 1, 2])}
        np.savez(file, **images, **labels, train_labels=np.array(train))

    write_labels([1, 2, 3])
    assert read_medmnist(file, "train").counts == {"0": 0, "1": 1, "2": 1, "3": 1}
    assert read_medmnist(file, "train", ["a", "b", "c", "d"]).labels.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"m\.npz: train_labels .* from 0 to 2, got 3 at 2"):
        read_medmnist(file, "train", ["a", "b", "c"])
    for labels, message in (
        ([0, 1, 10**12], "makes 1000000000001 classes"),
        ([0, 1, -1], "train_labels must be numbers from 0 to 2, got -1 at 2"),
        ([0.0, 1.0, 2.5], "train_labels must be one whole number for each image"),
    ):
        write_labels(labels)
        with pytest.raises(ValueError, match=message):
            read_medmnist(file, "train")


def test_folders_that_cannot_be_classes(tmp_path):
    for i in range(12):
        write(tmp_path / "patients" / f"P{i}" / "1.png")
    with pytest.raises(ValueError, match="got 12 different labels for 12 images, such as 'P0'"):
        read_folder(tmp_path / "patients")
    for name in ("2019-01-31", "2019-02-01"):
        write(tmp_path / "dates" / name / "1.png")
    with pytest.raises(ValueError, match="got the date '2019-01-31'"):
        read_folder(tmp_path / "dates")
    classes = ("2019-01-31", "2019-02-01")
    assert read_folder(tmp_path / "dates", classes).classes == classes


def test_what_was_skipped_is_kept_with_the_reason(folder):
    write(folder / "all" / "a" / "1.png")
    write(folder / "all" / "b" / "2.png")
    write(folder / "all" / "stray.png")
    for name in ("a/scan.xyz", "a/deep/notes.txt", "b/.hidden.png", "b/.git/x.png", "labels.csv"):
        path = folder / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    (folder / "all" / "b" / "link").symlink_to(folder)
    table = read_folder(folder / "all")
    skipped = {path.removeprefix(f"{folder}/all/"): reason for path, reason in table.skipped}
    assert skipped == {
        "a/scan.xyz": "not an image",
        "a/deep/notes.txt": "not an image",
        "b/.hidden.png": "a hidden file",
        "b/.git": "a hidden folder",
        "b/link": "a link to a folder",
        "labels.csv": "not an image",
        "stray.png": "an image outside the class folders",
    }
    assert len(table) == 2
    config = table_of(folder, train="file,label\nu.png,a\n,,\nv.png,b\n\n".replace(",,", " ,"))
    read = open_source(DataConfig(**config))
    assert read.skipped == ((f"{folder}/train.csv, line 3", "a row without content"),)
