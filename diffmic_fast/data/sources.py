"""Tables of labelled images from the forms that they are published in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmic_fast.config.data import SPLITS, DataConfig, check_class_names
from diffmic_fast.data.decode import list_images
from diffmic_fast.data.pickles import load_plain_pickle
from diffmic_fast.data.rows import (
    INTEGER,
    TableBuilder,
    csv_rows,
    find_file,
    is_number,
    number_labels,
)
from diffmic_fast.data.synthetic_fundus import GRADES
from diffmic_fast.data.table import ArrayImage, ImageEntry, ImageTable, SyntheticImage

HAM10000_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
APTOS2019_CLASSES = ("no_dr", "mild", "moderate", "severe", "proliferative")

_PATH_KEYS = ("img_root", "image_root", "img_path", "image_path", "image", "img", "path", "file")
_LABEL_KEYS = ("label", "target", "class")
_SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_source(config: DataConfig, split: str = "train") -> ImageTable:
    """The images of one split, as `DataConfig` describes them.

    Args:
        config: where they come from.
        split: "train", "validation" or "test".

    Raises:
        ValueError: there is no such split; the table or folder is not as it should be, by file and
            row; image files are missing, with the first few names.
    """
    if not config.has_split(split):
        raise ValueError(
            f"data: there is no {split} split; give {split}_table, {split}_folds or "
            f"{split}_fraction"
        )
    if config.kind == "synthetic_fundus":
        return _synthetic(config, split)
    if config.kind == "medmnist":
        table = read_medmnist(_table_path(config, config.table), split, config.class_names)
        _check_num_classes(config, table)
        return table
    if config.train_table is not None:
        train = _read(config, config.train_table, config.class_names)
        own = getattr(config, f"{split}_table")
        if split != "train" and own is not None:
            return _apart(_read(config, own, train.classes), train, split)
    else:
        every = _read(config, config.table, config.class_names)
        folds = getattr(config, f"{split}_folds")
        if split != "train" and folds:
            return every.split(folds)
        train = _training_images(config, every)
    return _draw(config, train)[split]


def _training_images(config: DataConfig, every: ImageTable) -> ImageTable:
    """Training folds, or what no other split's folds take."""
    if config.train_folds:
        return every.split(config.train_folds)
    taken = (*config.validation_folds, *config.test_folds)
    if not taken:
        return every
    every.split(taken)  # every image has a fold, and these exist
    return every.select(i for i, entry in enumerate(every.entries) if entry.fold not in taken)


def _draw(config: DataConfig, train: ImageTable) -> dict[str, ImageTable]:
    """The training images and the random shares of them that other splits take."""
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
    """One table of any kind that has files."""
    root = Path(config.root)
    if config.kind == "folder":
        result = read_folder(root / table if table else root, classes)
    elif config.kind == "csv":
        result = read_csv(
            _table_path(config, table),
            root,
            classes,
            num_classes=config.num_classes,
            columns=(config.file_column, config.label_column, config.fold_column),
        )
    elif config.kind == "pkl":
        result = read_pickle(
            _table_path(config, table), root, classes, num_classes=config.num_classes
        )
    else:
        reader = read_ham10000 if config.kind == "ham10000" else read_aptos2019
        folders = [root / folder for folder in config.image_folders] or [root]
        suffix = config.image_suffix or (".jpg" if config.kind == "ham10000" else ".png")
        result = reader(_table_path(config, table), folders, suffix=suffix)
        if classes is not None and tuple(classes) != result.classes:
            raise ValueError(
                f"data: kind {config.kind} has the classes {', '.join(result.classes)}, "
                f"class_names says {', '.join(classes)}"
            )
    _check_num_classes(config, result)
    return result


def _check_num_classes(config: DataConfig, table: ImageTable) -> None:
    if config.num_classes not in (None, len(table.classes)):
        raise ValueError(
            f"data: num_classes is {config.num_classes}, but there are {len(table.classes)} "
            f"classes: {', '.join(table.classes)}"
        )


def _apart(table: ImageTable, train: ImageTable, split: str) -> ImageTable:
    """The table, none of whose images may be one that the model is trained on."""
    seen = {entry.source.resolve() for entry in train.entries if isinstance(entry.source, Path)}
    shared = [
        entry.name
        for entry in table.entries
        if isinstance(entry.source, Path) and entry.source.resolve() in seen
    ]
    if shared:
        raise ValueError(
            f"data: {len(shared)} of {len(table)} {split} images are training images too, "
            f"{shared[0]} for one; results on them would say nothing"
        )
    return table


def read_folder(root: str | Path, classes: Sequence[str] | None = None) -> ImageTable:
    """A folder per class, images at any depth inside it.

    Args:
        root: the folder of class folders.
        classes: their names in the order of the labels (default: sorted). A class without a folder
            keeps its number, so that a test set may lack one.

    Raises:
        ValueError: no such folder, no class folders, an empty one, or one that is no class.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"data: {root} is empty: it holds no folder of a class with images")
    if set(map(str.lower, folders)) <= _SPLIT_FOLDERS:
        raise ValueError(
            f"data: the folders in {root} are splits, not classes ({', '.join(folders)}); give "
            "train_table and test_table"
        )
    names = check_class_names(classes if classes is not None else folders)
    unknown = [folder for folder in folders if folder not in names]
    if unknown:
        raise ValueError(
            f"data: {root / unknown[0]} is the folder of no class; classes are {', '.join(names)}"
        )
    entries = [
        ImageEntry(str(path.relative_to(root)), names.index(folder), path)
        for folder in folders
        for path in list_images(root / folder, recursive=True)
    ]
    return ImageTable(names, tuple(entries))


def read_csv(
    table: str | Path,
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    columns: tuple[str, str, str] = ("file", "label", "fold"),
) -> ImageTable:
    """A CSV with a file and a label a row, and perhaps a fold.

    Labels are class names, or numbers from 0 if every one of them is a whole number.

    Args:
        table: the CSV, UTF-8, comma separated, with a header.
        root: folder that file names start from (default: the table's).
        classes: names in the order of the labels (default: sorted; "0", "1", … for numbers).
        num_classes: number of classes, for number labels without names.
        columns: names of the columns of file, label and fold; the last may be absent.

    Raises:
        ValueError: by file and row, for what is not as it should be; missing image files.
    """
    table = Path(table)
    root = table.parent if root is None else Path(root)
    file_column, label_column, fold_column = columns
    builder = TableBuilder(table)
    labels = []
    for line, row in csv_rows(table, (file_column, label_column)):
        fold = row.get(fold_column)
        if fold is not None and not INTEGER.fullmatch(fold):
            raise ValueError(f"{table}, line {line}: fold must be a whole number, got {fold!r}")
        name = row[file_column]
        if not name:
            raise ValueError(f"{table}, line {line}: the file name is empty")
        builder.add(f"line {line}", name, root / name, int(fold) if fold is not None else None)
        labels.append(row[label_column])
    return builder.table(*number_labels(builder, labels, classes, num_classes))


def read_ham10000(
    table: str | Path, folders: Sequence[str | Path], *, suffix: str = ".jpg"
) -> ImageTable:
    """HAM10000's ground truth as ISIC 2018 (task 3) publishes it: a one-hot row an image.

    Args:
        table: CSV with the columns image, MEL, NV, BCC, AKIEC, BKL, DF, VASC.
        folders: where the images are, searched in this order.
        suffix: ending of their names.

    Raises:
        ValueError: another header, a row that is not one-hot, missing image files.
    """
    table = Path(table)
    builder = TableBuilder(table)
    labels = []
    for line, row in csv_rows(table, ("image", *HAM10000_CLASSES)):
        values = [row[name] for name in HAM10000_CLASSES]
        hot = [i for i, value in enumerate(values) if is_number(value, 1.0)]
        if len(hot) != 1 or not all(is_number(v, 0.0) or i in hot for i, v in enumerate(values)):
            raise ValueError(
                f"{table}, line {line}: the classes of {row['image']} must be one 1 and otherwise "
                f"0, got {', '.join(values)}"
            )
        builder.add(f"line {line}", row["image"], find_file(folders, row["image"] + suffix))
        labels.append(hot[0])
    return builder.table(HAM10000_CLASSES, labels)


def read_aptos2019(
    table: str | Path, folders: Sequence[str | Path], *, suffix: str = ".png"
) -> ImageTable:
    """APTOS 2019's train.csv: id_code and diagnosis, a grade from 0 to 4.

    Args:
        table: the CSV.
        folders: where the images are, searched in this order.
        suffix: ending of their names.

    Raises:
        ValueError: missing columns (the published test.csv has no diagnosis), a grade that is
            none, missing image files.
    """
    table = Path(table)
    builder = TableBuilder(table)
    labels = []
    for line, row in csv_rows(table, ("id_code", "diagnosis")):
        grade = row["diagnosis"]
        if not INTEGER.fullmatch(grade) or not 0 <= int(grade) < len(APTOS2019_CLASSES):
            raise ValueError(
                f"{table}, line {line}: diagnosis must be a grade from 0 to 4, got {grade!r}"
            )
        builder.add(f"line {line}", row["id_code"], find_file(folders, row["id_code"] + suffix))
        labels.append(int(grade))
    return builder.table(APTOS2019_CLASSES, labels)


def read_pickle(
    path: str | Path,
    root: str | Path = ".",
    classes: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
) -> ImageTable:
    """The published program's list of images, read without running anything (`pickles`).

    Args:
        path: a pickled list of {"img_root": path, "label": number}, or of (path, number).
        root: folder that relative paths start from.
        classes: names in the order of the labels (default: "0", "1", …).
        num_classes: number of classes, where there are no names.

    Raises:
        ValueError: a pickle that wants to run code, another content, missing image files.
    """
    path = Path(path)
    content = load_plain_pickle(path)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{path}: must hold a list of images, got {type(content).__name__}")
    builder = TableBuilder(path)
    labels = []
    for number, item in enumerate(content):
        name, label = _pickled_pair(f"{path}, item {number}", item)
        builder.add(f"item {number}", name, Path(root) / name)
        labels.append(str(label))
    return builder.table(*number_labels(builder, labels, classes, num_classes))


def _pickled_pair(where: str, item: Any) -> tuple[str, Any]:
    if isinstance(item, Mapping):
        name_key = next((key for key in _PATH_KEYS if key in item), None)
        label_key = next((key for key in _LABEL_KEYS if key in item), None)
        if name_key is None or label_key is None:
            raise ValueError(
                f"{where}: must have one of {', '.join(_PATH_KEYS)} and one of "
                f"{', '.join(_LABEL_KEYS)}, got {sorted(map(str, item))}"
            )
        name, label = item[name_key], item[label_key]
    elif isinstance(item, (list, tuple)) and len(item) == 2:
        name, label = item
    else:
        raise ValueError(f"{where}: must be a dict or a pair (path, label), got {item!r:.80}")
    if isinstance(label, (np.ndarray, np.generic)) and label.size == 1:
        label = label.item()
    if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"{where}: must be a path and a label, got {name!r:.60} and {label!r:.60}")
    return name, label


def read_medmnist(path: str | Path, split: str, classes: Sequence[str] | None = None) -> ImageTable:
    """One split of a MedMNIST .npz file.

    Args:
        path: the file; its arrays are {train,val,test}_images uint8 [N, H, W] or [N, H, W, 3] and
            {train,val,test}_labels [N] or [N, 1].
        split: "train", "validation" or "test".
        classes: names in the order of the labels (default: "0", "1", …).

    Raises:
        ValueError: no such file or array, volumes, several labels an image.
    """
    path = Path(path)
    prefix = {"train": "train", "validation": "val", "test": "test"}[split]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"{prefix}_images"], arrays[f"{prefix}_labels"]
            every = [arrays[key] for key in arrays.files if key.endswith("_labels")]
    except FileNotFoundError:
        raise ValueError(f"data: there is no file {path}") from None
    except KeyError as error:
        raise ValueError(f"{path}: is no MedMNIST file, it lacks {error}") from None
    except Exception as error:
        # Damaged archives raise zipfile's, zlib's and NumPy's errors of many types.
        raise ValueError(f"{path}: cannot be read as .npz: {error}") from error
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour):
        raise ValueError(
            f"{path}: {prefix}_images must be uint8 [N, H, W] or [N, H, W, 3], got "
            f"{images.dtype} {images.shape}"
        )
    if labels.size != len(images) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: {prefix}_labels must be one whole number an image, got {labels.dtype} "
            f"{labels.shape} for {len(images)} images"
        )
    if classes is None:
        top = max(int(part.max(initial=0)) for part in every)
        classes = tuple(str(i) for i in range(max(top + 1, 2)))
    return ImageTable(
        check_class_names(classes),
        tuple(
            ImageEntry(f"{split}/{i}", int(label), ArrayImage(images, i))
            for i, label in enumerate(labels.reshape(-1))
        ),
    )


def _synthetic(config: DataConfig, split: str) -> ImageTable:
    """Images are numbered over the splits, so that no two of them are the same."""
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
