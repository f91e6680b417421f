"""Random splits keep groups whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.summary import summary_lines
from diffmic_fast.data.table import ImageEntry, ImageTable


def grouped(rows, classes=("a", "b")):
    """A table of (group, label)."""
    entries = [
        ImageEntry(f"{i:04d}", k, Path(f"{i}.png"), None, g) for i, (g, k) in enumerate(rows)
    ]
    return ImageTable(classes, tuple(entries))


def groups(table):
    return {entry.group for entry in table.entries}


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.9])
def test_groups_are_whole_and_classes_keep_their_shares(fraction):
    rng = np.random.default_rng(0)
    rows = [
        (f"P{i}", label)
        for i in range(300)
        for label in [int(rng.random() < 0.2)]
        for _ in range(rng.integers(1, 6))
    ]
    table = grouped(rows)
    rest, share = table.random_split(fraction, seed=3)
    assert not groups(rest) & groups(share) and len(rest) + len(share) == len(table)
    for name, count in table.counts.items():
        # A group has at most 5 images, so that the last one taken or left out errs by 2.5.
        assert abs(share.counts[name] - fraction * count) <= 2.5


def test_patients_with_images_of_several_classes():
    rng = np.random.default_rng(1)
    rows = [(f"P{i}", int(k)) for i in range(200) for k in rng.integers(0, 3, rng.integers(1, 5))]
    table = grouped(rows, ("a", "b", "c"))
    rest, share = table.random_split(0.2, seed=0)
    assert not groups(rest) & groups(share)
    for name, count in table.counts.items():
        assert abs(share.counts[name] / count - 0.2) <= 0.03


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    rows = [(f"P{i // 3}", i // 3 % 2) for i in range(120)]
    table = grouped(rows)
    first = groups(table.random_split(0.25, seed=0)[1])
    order = np.random.default_rng(0).permutation(len(table))
    assert groups(table.select(order).random_split(0.25, seed=0)[1]) == first
    assert groups(table.random_split(0.25, seed=1)[1]) != first


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_every_class_with_two_groups_is_on_both_sides(fraction, seed):
    rows = [("L0", 0)] * 10 + [("L1", 0)] * 12 + [(f"K{i}", 1) for i in range(9)]
    rest, share = grouped(rows).random_split(fraction, seed)
    assert min(rest.counts.values()) > 0 and min(share.counts.values()) > 0


def test_the_only_group_of_a_class_stays_in_training():
    rows = [("L0", 0)] * 4 + [(f"K{i}", 1) for i in range(9)]
    for seed in range(5):
        rest, share = grouped(rows).random_split(0.5, seed)
        assert rest.counts["a"] == 4 and share.counts["a"] == 0
    with pytest.raises(ValueError, match="every class has fewer than two groups"):
        grouped([("L0", 0)] * 4 + [("L1", 1)] * 4).random_split(0.5, 0)


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


def test_the_column_of_groups_in_a_csv(tmp_path):
    rows = [(f"x{i}", "ab"[i // 2 % 2], f"P{i // 2}") for i in range(40)]
    for name, _, _ in rows:
        draw(tmp_path / "images" / f"{name}.png")
    text = "file,label,patient\n" + "".join(f"{','.join(row)}\n" for row in rows)
    (tmp_path / "t.csv").write_text(text)
    data = {
        "kind": "csv", "root": str(tmp_path), "table": "t.csv", "image_folders": ("images",),
        "image_suffix": ".png", "validation_fraction": 0.2, "test_fraction": 0.3,
    }  # fmt: skip
    config = DataConfig(**data, group_column="patient")
    tables = {split: open_source(config, split) for split in ("train", "validation", "test")}
    assert [len(table) for table in tables.values()] == [20, 8, 12]
    assert sum(len(groups(table)) for table in tables.values()) == 20
    assert "groups: 20, 0 of them in more than one split" in summary_lines(tables, 8)
    apart = {"train": tables["train"], "test": tables["train"].select([0])}
    assert any("1 of them in more than one split (P" in line for line in summary_lines(apart, 8))
    with pytest.raises(ValueError, match="column 'clinic' is missing"):
        open_source(DataConfig(**data, group_column="clinic"))
    (tmp_path / "t.csv").write_text("file,label,patient\nx0,a,P1\nx1,b,\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 3: the group \(patient\) is empty"):
        open_source(config)
    with pytest.raises(ValueError, match="group_column needs kind csv or ham10000, got kind pkl"):
        DataConfig(kind="pkl", group_column="patient")


def test_the_metadata_of_ham10000_has_lesions_as_groups(tmp_path):
    text = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
    kinds = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    for i in range(56):
        draw(tmp_path / f"part_{i % 2 + 1}" / f"ISIC_{i:07d}.jpg")
        text += f"HAM_{i // 2:07d},ISIC_{i:07d},{kinds[i // 2 % 7]},histo,,male,back\n"
    (tmp_path / "HAM10000_metadata.csv").write_text(text)
    config = DataConfig(
        kind="ham10000", root=str(tmp_path), table="HAM10000_metadata.csv",
        image_folders=("part_1", "part_2"), test_fraction=0.25,
    )  # fmt: skip
    train, test = open_source(config), open_source(config, "test")
    assert train.classes == ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    assert set(train.counts.values()) == {6} and set(test.counts.values()) == {2}
    assert len(groups(train)) == 21 and not groups(train) & groups(test)
    (tmp_path / "HAM10000_metadata.csv").write_text(text.replace("vasc", "scc"))
    with pytest.raises(ValueError, match=r"line 14: dx must be one of mel, .*, vasc, got 'scc'"):
        open_source(config)
