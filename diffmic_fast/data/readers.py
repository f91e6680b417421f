"""Readers: tables of labelled images from folders, CSV files, pickles and arrays in their published forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmic_fast.data.files import NO_IMAGE, find_file, is_image, scan_folder
from diffmic_fast.data.labels import INTEGER, check_derived_names, shown
from diffmic_fast.data.pickles import load_plain_pickle
from diffmic_fast.data.rows import TableBuilder, csv_header, csv_rows
from diffmic_fast.data.table import ArrayImage, ImageEntry, ImageTable, Skipped

HAM10000_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
APTOS2019_CLASSES = ("no_dr", "mild", "moderate", "severe", "proliferative")

_PATH_KEYS = ("img_root", "image_root", "img_path", "image_path", "image", "img", "path", "file")
_LABEL_KEYS = ("label", "target", "class")
_SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read_folder(root: str | Path, classes: Sequence[str] | None = None) -> ImageTable:
    """Read a folder that has a folder for each class, with images at any depth.

    Args:
        root: the folder of class folders.
        classes: their names in the order of the labels (default: sorted). A class without a folder keeps its number,
            so that a test set may lack one.

    Raises:
        ValueError: there is no such folder, it has no class folders, one of them is empty, or is not in `classes`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"data: {root} must have a folder of images for each class, got none")
    if set(map(str.lower, folders)) <= _SPLIT_FOLDERS:
        raise ValueError(
            f"data: the folders in {root} must be classes, got splits ({', '.join(folders)}); give train_table and "
            "test_table"
        )
    names = tuple(classes if classes is not None else folders)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [folder for folder in folders if folder not in numbers]
    if unknown:
        raise ValueError(
            f"data: the folders in {root} must be classes ({shown(names)}), got {unknown[0]}"
        )
    entries, skipped = [], _beside_class_folders(root)
    for folder in folders:
        content = scan_folder(root / folder, recursive=True)
        if not content.images:
            raise ValueError(f"data: there is no image file in {root / folder}")
        entries += [
            ImageEntry(str(path.relative_to(root)), numbers[folder], path)
            for path in content.images
        ]
        skipped += [Skipped(str(path), reason) for path, reason in content.skipped]
    if classes is None:
        check_derived_names({name: str(root / name) for name in folders}, len(entries))
    return ImageTable(names, tuple(entries), tuple(skipped))


def _beside_class_folders(root: Path) -> list[Skipped]:
    """What a folder of class folders has beside these."""
    skipped = []
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            skipped.append(Skipped(str(path), f"a hidden {'folder' if path.is_dir() else 'file'}"))
        elif not path.is_dir():
            reason = "an image outside the class folders" if is_image(path) else NO_IMAGE
            skipped.append(Skipped(str(path), reason))
    return skipped


class CsvColumns(NamedTuple):
    """Names of the columns of a CSV file. That of folds may be absent from the file.

    Attributes:
        file: Of the image files.
        label: Of the labels.
        fold: Of the folds.
        group: Of the groups, or None.
    """

    file: str = "file"
    label: str = "label"
    fold: str = "fold"
    group: str | None = None


def read_csv(
    table: str | Path,
    root: str | Path | Sequence[str | Path] | None = None,
    classes: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    columns: CsvColumns | tuple[str, str, str] = ("file", "label", "fold"),
    positions: bool = True,
    suffix: str = "",
) -> ImageTable:
    """Read a CSV file with a file, a label and possibly a fold in each row.

    Labels are class names, or numbers from 0 if every one of them is a whole number (`labels.number_labels`).

    Args:
        table: the CSV file (`rows.csv_rows`).
        root: folder that file names are relative to (default: that of `table`), or several, searched in this order.
        classes, num_classes: as in `rows.TableBuilder.build`.
        columns: names of the columns.
        positions: as in `rows.TableBuilder.build`.
        suffix: appended to the file names.

    Raises:
        ValueError: a row is invalid, by file and line, or image files are missing.
    """
    table = Path(table)
    roots = [table.parent] if root is None else [root] if isinstance(root, (str, Path)) else root
    base = Path(roots[0])
    columns = CsvColumns(*columns)
    needed = [columns.file, columns.label, *([columns.group] if columns.group else [])]
    builder = TableBuilder(table)
    for where, row in csv_rows(table, needed, builder.skipped):
        fold = row.get(columns.fold)
        if fold is not None and not INTEGER.fullmatch(fold):
            raise ValueError(f"{table}, {where}: fold must be a whole number, got {fold!r}")
        name = row[columns.file]
        if not name:
            raise ValueError(f"{table}, {where}: the file name is empty")
        number = None if fold is None else int(fold)
        builder.add(
            where,
            name,
            row[columns.label],
            find_file(roots, name + suffix) if len(roots) > 1 else base / (name + suffix),
            fold=number,
            group=_group(f"{table}, {where}", row, columns.group),
        )
    return builder.build(classes, num_classes, positions=positions)


def _group(where: str, row: Mapping[str, str], column: str | None) -> str | None:
    if column is None:
        return None
    if not row[column]:
        raise ValueError(f"{where}: the group ({column}) is empty")
    return row[column]


def read_ham10000(
    table: str | Path,
    folders: Sequence[str | Path],
    *,
    suffix: str = ".jpg",
    group_column: str | None = None,
) -> ImageTable:
    """Read HAM10000: its metadata, or its ground truth as published for ISIC 2018 (task 3), one-hot.

    Args:
        table: CSV file with the columns image, MEL, NV, BCC, AKIEC, BKL, DF, VASC, or HAM10000_metadata.csv with the
            columns lesion_id, image_id, dx.
        group_column: column of the groups (default: lesion_id of the metadata, none of the ground truth).
        folders, suffix: folders of the images, searched in this order, and the suffix of their files.

    Raises:
        ValueError: the header is another, a row is not one-hot or has another dx, or image files are missing.
    """

    def one_hot(where: str, row: Mapping[str, str]) -> str:
        hot = [name for name in HAM10000_CLASSES if _is_number(row[name], 1.0)]
        cold = [name for name in HAM10000_CLASSES if _is_number(row[name], 0.0)]
        if len(hot) != 1 or len(cold) != len(HAM10000_CLASSES) - 1:
            raise ValueError(
                f"{where}: the classes of {row['image']} must be one 1 and otherwise 0, got "
                f"{', '.join(row[name] for name in HAM10000_CLASSES)}"
            )
        return hot[0]

    def diagnosis(where: str, row: Mapping[str, str]) -> str:
        name = row["dx"].upper()
        if name not in HAM10000_CLASSES:
            raise ValueError(
                f"{where}: dx must be one of {', '.join(HAM10000_CLASSES).lower()}, got {row['dx']!r}"
            )
        return name

    if "dx" in csv_header(Path(table)):
        columns: tuple[str, ...] = ("image_id", "dx")
        label, group_column = diagnosis, group_column or "lesion_id"
    else:
        columns, label = ("image", *HAM10000_CLASSES), one_hot
    return _read_published(table, folders, suffix, columns, HAM10000_CLASSES, label, group_column)


def read_aptos2019(
    table: str | Path, folders: Sequence[str | Path], *, suffix: str = ".png"
) -> ImageTable:
    """Read train.csv of APTOS 2019: id_code and diagnosis, a grade from 0 to 4.

    Args:
        table: the CSV file.
        folders, suffix: folders of the images, searched in this order, and the suffix of their files.

    Raises:
        ValueError: a column is missing (the published test.csv has no diagnosis), a grade is invalid, or image files
            are missing.
    """

    def label(where: str, row: Mapping[str, str]) -> str:
        grade = row["diagnosis"]
        if not INTEGER.fullmatch(grade) or not 0 <= int(grade) < len(APTOS2019_CLASSES):
            raise ValueError(f"{where}: diagnosis must be a grade from 0 to 4, got {grade!r}")
        return APTOS2019_CLASSES[int(grade)]

    columns = ("id_code", "diagnosis")
    return _read_published(table, folders, suffix, columns, APTOS2019_CLASSES, label)


def _read_published(
    table: str | Path,
    folders: Sequence[str | Path],
    suffix: str,
    columns: tuple[str, ...],
    classes: tuple[str, ...],
    label: Callable[[str, Mapping[str, str]], str],
    group_column: str | None = None,
) -> ImageTable:
    """Read a CSV file; the first of `columns` names the image, without its suffix."""
    table = Path(table)
    builder = TableBuilder(table)
    needed = [*columns, *([group_column] if group_column else [])]
    for where, row in csv_rows(table, needed, builder.skipped):
        name, place = row[columns[0]], f"{table}, {where}"
        file = find_file(folders, name + suffix)
        builder.add(where, name, label(place, row), file, group=_group(place, row, group_column))
    return builder.build(classes)


def _is_number(text: str, value: float) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False


def read_pickle(
    path: str | Path,
    root: str | Path = ".",
    classes: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    positions: bool = True,
) -> ImageTable:
    """Read the published program's list of images, without running code (`pickles.load_plain_pickle`).

    Args:
        path: a pickled list of {"img_root": path, "label": number}, or of (path, number).
        root: folder that relative paths start from.
        classes, num_classes, positions: as in `rows.TableBuilder.build`.

    Raises:
        ValueError: the pickle holds something else, or image files are missing.
    """
    path = Path(path)
    content = load_plain_pickle(path)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{path}: must hold a list of images, got {type(content).__name__}")
    builder = TableBuilder(path)
    for number, item in enumerate(content):
        name, label = _pickled_pair(f"{path}, item {number}", item)
        builder.add(f"item {number}", name, label, Path(root) / name)
    return builder.build(classes, num_classes, positions=positions)


def _pickled_pair(where: str, item: Any) -> tuple[str, int | str]:
    """Path and label of an item of the list."""
    if isinstance(item, Mapping):
        name_key = next((key for key in _PATH_KEYS if key in item), None)
        label_key = next((key for key in _LABEL_KEYS if key in item), None)
        if name_key is None or label_key is None:
            raise ValueError(
                f"{where}: must have one of {', '.join(_PATH_KEYS)} and one of {', '.join(_LABEL_KEYS)}, got "
                f"{sorted(map(str, item))}"
            )
        name, label = item[name_key], item[label_key]
    elif isinstance(item, (list, tuple)) and len(item) == 2:
        name, label = item
    else:
        raise ValueError(f"{where}: must be a dict or a pair (path, label), got {item!r:.80}")
    if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"{where}: must be a path and a label, got {name!r:.60} and {label!r:.60}")
    if isinstance(label, int) and not 0 <= label < 2**63:
        raise ValueError(f"{where}: label must be a number from 0, got {_number_text(label)}")
    return name, label.strip() if isinstance(label, str) else label


def _number_text(number: int) -> str:
    # Python refuses to print numbers of thousands of digits.
    return str(number) if number.bit_length() <= 64 else f"one of {number.bit_length()} bits"


def read_medmnist(path: str | Path, split: str, classes: Sequence[str] | None = None) -> ImageTable:
    """Read one split of a MedMNIST .npz file.

    Args:
        path: the file; its arrays are {train,val,test}_images uint8 [N, H, W] or [N, H, W, 3] and
            {train,val,test}_labels [N] or [N, 1].
        split: "train", "validation" or "test".
        classes: names in the order of the labels (default: "0", "1", ...).

    Raises:
        ValueError: the file or an array is missing, the images are volumes, or an image has several labels.
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
        raise ValueError(f"{path}: must be a MedMNIST file: {error}") from None
    except Exception as error:
        # Damaged archives raise errors of zipfile, zlib and NumPy.
        raise ValueError(f"{path}: cannot be read as .npz: {error}") from error
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour):
        raise ValueError(
            f"{path}: {prefix}_images must be uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {images.shape}"
        )
    if labels.size != len(images) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: {prefix}_labels must be one whole number for each image, got {labels.dtype} {labels.shape} for "
            f"{len(images)} images"
        )
    names = tuple(classes) if classes is not None else _medmnist_classes(path, every)
    wrong = np.flatnonzero((labels.reshape(-1) < 0) | (labels.reshape(-1) >= len(names)))
    if len(wrong):
        raise ValueError(
            f"{path}: {prefix}_labels must be numbers from 0 to {len(names) - 1}, got "
            f"{labels.reshape(-1)[wrong[0]]} at {wrong[0]}"
        )
    return ImageTable(
        names,
        tuple(
            ImageEntry(f"{split}/{i}", int(label), ArrayImage(images, i))
            for i, label in enumerate(labels.reshape(-1))
        ),
    )


def _medmnist_classes(path: Path, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The numbers up to the largest label of all splits."""
    if any(part.dtype.kind not in "iu" for part in labels):
        raise ValueError(f"{path}: labels must be whole numbers in every split")
    different = set().union(*(np.unique(part).tolist() for part in labels))
    count = max(max(different, default=0) + 1, 2)
    if count > max(10, 2 * len(different)):
        raise ValueError(
            f"{path}: labels must be classes counted from 0, got {count - 1}, which makes {count} classes, and "
            f"{len(different)} different labels; name the classes in data.class_names"
        )
    return tuple(map(str, range(count)))
