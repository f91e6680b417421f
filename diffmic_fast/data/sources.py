"""Sources: the images of each split, as `DataConfig` describes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffmic_fast.config.data import SPLITS, DataConfig
from diffmic_fast.data.labels import shown
from diffmic_fast.data.readers import (
    CsvColumns,
    read_aptos2019,
    read_csv,
    read_folder,
    read_ham10000,
    read_medmnist,
    read_pickle,
)
from diffmic_fast.data.synthetic_fundus import GRADES
from diffmic_fast.data.table import ImageEntry, ImageTable, SyntheticImage


def open_source(config: DataConfig, split: str = "train") -> ImageTable:
    """The images of one split.

    Args:
        config: where they come from.
        split: "train", "validation" or "test".

    Raises:
        ValueError: there is no such split; a table or folder is invalid, by file and row; image files are missing, by
            the first few names; an image belongs to training and to another split.
    """
    if not config.has_split(split):
        raise ValueError(
            f"data: there is no {split} split; give {split}_table, {split}_folds or {split}_fraction"
        )
    if config.kind == "synthetic_fundus":
        return _synthetic(config, split)
    if config.kind == "medmnist":
        path = _table_path(config, config.table)
        return _checked(config, read_medmnist(path, split, config.class_names))
    if config.train_table is not None:
        train = _read(config, config.train_table, config.class_names)
        own = getattr(config, f"{split}_table")
        if split != "train" and own is not None:
            return _disjoint(_read(config, own, train.classes), train, split)
    else:
        every = _read(config, config.table, config.class_names)
        folds = getattr(config, f"{split}_folds")
        if split != "train" and folds:
            return every.split(folds)
        train = _training_images(config, every)
    return _random_splits(config, train)[split]


def _training_images(config: DataConfig, every: ImageTable) -> ImageTable:
    """The images of the training folds; by default those of folds that no other split has."""
    if config.train_folds:
        return every.split(config.train_folds)
    taken = (*config.validation_folds, *config.test_folds)
    if not taken:
        return every
    every.split(taken)  # checks that every image has a fold, and that these exist
    return every.select(i for i, entry in enumerate(every.entries) if entry.fold not in taken)


def _random_splits(config: DataConfig, train: ImageTable) -> dict[str, ImageTable]:
    """The training images, without the random fractions of them that are the other splits."""
    splits: dict[str, ImageTable] = {}
    if config.test_fraction > 0:
        train, splits["test"] = train.random_split(config.test_fraction, config.split_seed)
    if config.validation_fraction > 0:
        share = config.validation_fraction / (1.0 - config.test_fraction)
        train, splits["validation"] = train.random_split(share, config.split_seed)
    return splits | {"train": train}


def _table_path(config: DataConfig, table: str | None) -> Path:
    if table is None:
        raise ValueError(f"data: kind {config.kind} needs table, the file that lists the images")
    return Path(config.root) / table


def _read(config: DataConfig, table: str | None, classes: Sequence[str] | None) -> ImageTable:
    """Read one table of a kind that has files."""
    root, count = Path(config.root), config.num_classes
    # Names that are the labels of the training table have no order of their own.
    positions = config.class_names is not None
    if config.kind == "folder":
        return _checked(config, read_folder(root / table if table else root, classes))
    path = _table_path(config, table)
    if config.kind == "csv":
        columns = CsvColumns(
            config.file_column, config.label_column, config.fold_column, config.group_column
        )
        result = read_csv(
            path,
            [root / folder for folder in config.image_folders] or root,
            classes,
            num_classes=count,
            columns=columns,
            positions=positions,
            suffix=config.image_suffix or "",
        )
    elif config.kind == "pkl":
        result = read_pickle(path, root, classes, num_classes=count, positions=positions)
    else:
        folders = [root / folder for folder in config.image_folders] or [root]
        if config.kind == "ham10000":
            suffix = config.image_suffix or ".jpg"
            result = read_ham10000(path, folders, suffix=suffix, group_column=config.group_column)
        else:
            result = read_aptos2019(path, folders, suffix=config.image_suffix or ".png")
        if classes is not None and tuple(classes) != result.classes:
            raise ValueError(
                f"data: class_names must be {', '.join(result.classes)} for kind {config.kind}, got "
                f"{', '.join(classes)}"
            )
    return _checked(config, result)


def _checked(config: DataConfig, table: ImageTable) -> ImageTable:
    if config.num_classes not in (None, len(table.classes)):
        raise ValueError(
            f"data: num_classes is {config.num_classes}, but there are {len(table.classes)} classes: "
            f"{shown(table.classes)}"
        )
    return table


def _disjoint(table: ImageTable, train: ImageTable, split: str) -> ImageTable:
    """The table of a split, if it has no image of the training."""
    folders: dict[Path, str] = {}
    seen = {_real_path(e.source, folders) for e in train.entries if isinstance(e.source, Path)}
    shared = [
        entry.name
        for entry in table.entries
        if isinstance(entry.source, Path) and _real_path(entry.source, folders) in seen
    ]
    if shared:
        raise ValueError(
            f"data: {len(shared)} of {len(table)} {split} images are training images too, {shared[0]} for one; "
            "results on them would say nothing"
        )
    return table


def _real_path(path: Path, folders: dict[Path, str]) -> str:
    """The path without links; `folders` caches the paths of the folders, which images share."""
    if path.name in ("", "..") or os.path.islink(path):
        return os.path.realpath(path)
    parent = path.parent
    if parent not in folders:
        folders[parent] = os.path.realpath(parent)
    return os.path.join(folders[parent], path.name)


def _synthetic(config: DataConfig, split: str) -> ImageTable:
    """Synthetic images, numbered over the splits so that no two are the same."""
    counts = [
        config.synthetic_per_class,
        config.synthetic_validation_per_class,
        config.synthetic_test_per_class,
    ]
    position = SPLITS.index(split)
    first = sum(counts[:position])
    entries = [
        ImageEntry(
            f"{split}/{name}/{first + i}",
            grade,
            SyntheticImage(grade, config.synthetic_seed, config.synthetic_size, first + i),
        )
        for grade, name in enumerate(GRADES)
        for i in range(counts[position])
    ]
    return ImageTable(GRADES, tuple(entries))
