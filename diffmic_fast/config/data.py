"""Settings of the section ``data``: where images come from, how they are split and augmented."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

KINDS = ("folder", "csv", "ham10000", "aptos2019", "pkl", "medmnist", "synthetic_fundus")
SPLITS = ("train", "validation", "test")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class AugmentationConfig:
    """What happens to an image between its file and the model (spec section 5).

    The first group applies to every image, the second to training images only. The defaults are
    the published ones; everything can be switched off or down to its neutral value.

    Attributes:
        centre_square: cut the largest centred square before resizing. False resizes the whole
            image to a square, which changes its proportions.
        bit_depth: bits in use of 16-bit gray images (12 for most radiography and CT). Pixels are
            scaled by ``2**bit_depth - 1``; a larger pixel makes the image unreadable, it is never
            clipped. 8-bit images are not concerned.
        mean, std: subtracted from and divided into pixels in [0, 1], per channel.
        horizontal_flip, vertical_flip: each with probability 1/2.
        rotation: largest angle in degrees, drawn evenly from [-rotation, rotation]; corners that
            come into view are black. 0 is off.
        translate: largest shift as a share of the side, in both directions. 0 is off.
        scale: zoom drawn evenly from [1 - scale, 1 + scale]. 0 is off.
        brightness, contrast: factors drawn evenly from [1 - v, 1 + v]. 0 is off.

    Raises:
        ValueError: from the constructor, for a value out of its range.
    """

    centre_square: bool = True
    bit_depth: int = 16
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    horizontal_flip: bool = True
    vertical_flip: bool = True
    rotation: float = 30.0
    translate: float = 0.0
    scale: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges; lists, as YAML gives them, become tuples."""
        self.mean = _triple("mean", self.mean)
        self.std = _triple("std", self.std)
        if min(self.std) <= 0:
            raise ValueError(f"augmentation: std must be positive, got {self.std}")
        for name in ("centre_square", "horizontal_flip", "vertical_flip"):
            _check_bool("augmentation", name, getattr(self, name))
        _check_int("augmentation", "bit_depth", self.bit_depth, 8, 16)
        _check_number("augmentation", "rotation", self.rotation, 0.0, 180.0)
        for name in ("translate", "scale", "brightness", "contrast"):
            _check_number("augmentation", name, getattr(self, name), 0.0, 0.99)


@dataclass
class DataConfig:
    """Where images and labels come from, and which of them train, validate and test.

    Examples (YAML)::

        data: {kind: csv, root: data/chest_xray, table: folds.csv,
               train_folds: [1, 2, 3], test_folds: [0]}
        data: {kind: folder, root: data/mine, validation_fraction: 0.1, test_fraction: 0.2}
        data: {kind: folder, root: data/mine, train_table: train, test_table: test}
        data: {kind: ham10000, root: data/ham, table: ISIC2018_Task3_Training_GroundTruth.csv,
               image_folders: [HAM10000_images_part_1, HAM10000_images_part_2], test_fraction: 0.3}
        data: {kind: aptos2019, root: data/aptos, table: train.csv, image_folders: [train_images],
               test_fraction: 0.2}
        data: {kind: pkl, root: data/aptos, train_table: train.pkl, test_table: test.pkl,
               num_classes: 5}
        data: {kind: medmnist, root: data, table: pathmnist.npz}
        data: {kind: synthetic_fundus, synthetic_size: 128, synthetic_per_class: 200}

    How a split is found: (1) by its own table (``train_table`` ...), MedMNIST's own arrays or the
    synthetic generator; else (2) by its folds; else (3) for validation and test, by its fraction,
    drawn at random from the training images, class by class (``split_seed``). With a single
    ``table`` and no ``train_folds``, training gets every image that no other split takes.
    `diffmic_fast.data.sources.open_source(config, split)` reads one; `has_split` says whether there
    is such a split at all.

    Attributes:
        kind: one of ``folder`` (a folder per class), ``csv`` (columns file, label and perhaps
            fold), ``ham10000`` (ISIC 2018 task 3 ground truth), ``aptos2019`` (train.csv),
            ``pkl`` (the published program's lists), ``medmnist`` (.npz), ``synthetic_fundus``.
        root: folder that other paths start from; itself relative to the working directory.
        table: the one table with all images: a CSV, .pkl or .npz file, or, for kind ``folder``, the
            folder that holds the class folders (default: root itself). Relative to root.
        train_table, validation_table, test_table: a table for each split, instead of ``table``.
        image_folders: folders with the images of ``ham10000`` and ``aptos2019``, searched in this
            order; relative to root (default: root itself).
        image_suffix: ending of image names for these two (default: .jpg and .png as published).
        file_column, label_column, fold_column: columns of kind ``csv``.
        class_names: classes in the order of their numbers. Default: sorted folder or label names;
            the published order for ham10000 and aptos2019; "0", "1", ... for number labels. When
            split tables are separate, all take the classes of the training table.
        num_classes: number of classes to insist on, for number labels without names.
        train_folds, validation_folds, test_folds: fold numbers (kind ``csv``).
        validation_fraction, test_fraction: shares of the training images, in [0, 1).
        split_seed: seed of the random fractions; not of the training.
        augmentation: what happens to images on their way to the model.
        cache: keep decoded, cropped and resized images in memory (3 bytes a pixel), so that files
            are decoded once and not in every epoch.
        workers: processes that load training images beside the training process (0: none).
        synthetic_size: side of synthetic images in pixels.
        synthetic_per_class, synthetic_validation_per_class, synthetic_test_per_class: number of
            synthetic images of each grade in each split; 0 leaves a split out.
        synthetic_seed: seed of the synthetic images.

    Raises:
        ValueError: from the constructor, for a value out of its range or a contradiction.
    """

    kind: str = "folder"
    root: str = "."
    table: str | None = None
    train_table: str | None = None
    validation_table: str | None = None
    test_table: str | None = None
    image_folders: tuple[str, ...] = ()
    image_suffix: str | None = None
    file_column: str = "file"
    label_column: str = "label"
    fold_column: str = "fold"

    class_names: tuple[str, ...] | None = None
    num_classes: int | None = None

    train_folds: tuple[int, ...] = ()
    validation_folds: tuple[int, ...] = ()
    test_folds: tuple[int, ...] = ()
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    split_seed: int = 0

    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    cache: bool = True
    workers: int = 0

    synthetic_size: int = 128
    synthetic_per_class: int = 200
    synthetic_validation_per_class: int = 0
    synthetic_test_per_class: int = 50
    synthetic_seed: int = 0

    def __post_init__(self) -> None:
        """Check values; lists and mappings, as YAML gives them, become tuples and dataclasses."""
        if self.kind not in KINDS:
            raise ValueError(f"data: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        self.image_folders = _strings("image_folders", self.image_folders)
        if self.class_names is not None:
            self.class_names = check_class_names(_strings("class_names", self.class_names))
        for name in ("train_folds", "validation_folds", "test_folds"):
            setattr(self, name, _integers(name, getattr(self, name)))
        if isinstance(self.augmentation, Mapping):
            known = {f.name for f in fields(AugmentationConfig)}
            unknown = sorted(str(key) for key in self.augmentation if key not in known)
            if unknown:
                raise ValueError(
                    f"data: unknown augmentation setting {unknown[0]!r}; known: {sorted(known)}"
                )
            self.augmentation = AugmentationConfig(**self.augmentation)
        if not isinstance(self.augmentation, AugmentationConfig):
            raise TypeError(
                f"data: augmentation must be a mapping, got {type(self.augmentation).__name__}"
            )
        _check_bool("data", "cache", self.cache)
        for name in ("split_seed", "workers", "synthetic_seed", "synthetic_per_class",
                     "synthetic_validation_per_class", "synthetic_test_per_class"):  # fmt: skip
            _check_int("data", name, getattr(self, name), 0, 2**63 - 1)
        _check_int("data", "synthetic_size", self.synthetic_size, 16, 4096)
        if self.num_classes is not None:
            _check_int("data", "num_classes", self.num_classes, 2, 2**31 - 1)
            if self.class_names is not None and len(self.class_names) != self.num_classes:
                raise ValueError(
                    f"data: num_classes is {self.num_classes}, but class_names has "
                    f"{len(self.class_names)} names"
                )
        self._check_splits()

    def _check_splits(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            _check_number("data", name, getattr(self, name), 0.0, 0.99)
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError("data: validation_fraction and test_fraction must add to less than 1")
        split_tables = [s for s in SPLITS if getattr(self, f"{s}_table") is not None]
        if self.table is not None and split_tables:
            raise ValueError(
                f"data: give either table or {split_tables[0]}_table, not both: images of one "
                "would be counted twice"
            )
        if split_tables and self.train_table is None:
            raise ValueError(f"data: {split_tables[0]}_table is given, so give train_table too")
        owner: dict[int, str] = {}
        for split in SPLITS:
            folds = getattr(self, f"{split}_folds")
            if folds and self.kind != "csv":
                raise ValueError(f"data: {split}_folds needs kind csv, got kind {self.kind}")
            for fold in folds:
                if fold in owner:
                    raise ValueError(
                        f"data: fold {fold} is in both {owner[fold]}_folds and {split}_folds"
                    )
                owner[fold] = split
        for split in ("validation", "test"):
            ways = [way for way in ("table", "folds") if getattr(self, f"{split}_{way}")]
            ways += ["fraction"] if getattr(self, f"{split}_fraction") > 0 else []
            if ways and self.kind == "medmnist":
                raise ValueError(
                    f"data: medmnist files have their own splits: no {split}_{ways[0]}"
                )
            if len(ways) > 1:
                raise ValueError(
                    f"data: the {split} images are defined twice, by {split}_{ways[0]} and "
                    f"{split}_{ways[1]}: leave one out"
                )

    def has_split(self, split: str) -> bool:
        """Whether this configuration defines ``split``: "train", "validation" or "test".

        Raises:
            ValueError: for another name.
        """
        if split not in SPLITS:
            raise ValueError(f"data: split must be one of {', '.join(SPLITS)}, got {split!r}")
        if split == "train":
            return True
        if getattr(self, f"{split}_fraction") > 0 or self.kind == "medmnist":
            return True
        if self.kind == "synthetic_fundus":
            return bool(getattr(self, f"synthetic_{split}_per_class") > 0)
        return bool(getattr(self, f"{split}_table") or getattr(self, f"{split}_folds"))


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` as a tuple.

    Raises:
        ValueError: for fewer than two names, an empty or a repeated one.
    """
    if len(names) < 2:
        raise ValueError(f"class names: at least two are needed, got {list(names)}")
    for i, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"class names: name {i} is empty")
        if name in names[:i]:
            raise ValueError(f"class names: {name!r} is there twice")
    return tuple(names)


def _triple(name: str, value: Sequence[float]) -> tuple[float, float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError(f"augmentation: {name} must be three numbers, got {value!r}")
    for number in value:
        _check_number("augmentation", name, number, -math.inf, math.inf)
    return (float(value[0]), float(value[1]), float(value[2]))


def _strings(name: str, value: object) -> tuple[str, ...]:
    # YAML reads an unquoted class name 0 as a number; it is meant as a name.
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"data: {name} must be a list, got {value!r}")
    for item in value:
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            raise ValueError(
                f"data: {name} must hold text, got {item!r} (yes, no, on and off have to be "
                "quoted in YAML)"
            )
    return tuple(str(item) for item in value)


def _integers(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"data: {name} must be a list of whole numbers, got {value!r}")
    for item in value:
        _check_int("data", name, item, 0, 2**31 - 1)
    return tuple(value)


def _check_bool(where: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, got {value!r}")


def _check_int(where: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{where}: {name} must be a whole number from {low} to {high}, got {value!r}"
        )


def _check_number(where: str, name: str, value: object, low: float, high: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{where}: {name} must be a number from {low} to {high}, got {value!r}")
