"""The section `data` of a configuration: where images come from, how they are split and augmented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.fields import (
    SECTION,
    Flag,
    Folds,
    Fraction,
    Name,
    Natural,
)
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.limits import MAX_WORKERS

SPLITS = ("train", "validation", "test")


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple.

    Raises:
        ValueError: fewer than two names, an empty or a duplicate one.
    """
    if len(names) < 2:
        raise ValueError(f"class names: at least two are needed, got {list(names)}")
    seen: set[str] = set()
    for i, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"class names: name {i} is empty")
        if name in seen:
            raise ValueError(f"class names: {name!r} is there twice")
        seen.add(name)
    return tuple(names)


@dataclass(config=SECTION)
class AugmentationConfig(Preprocessing):
    """What happens to an image between its file and the model (docs/algorithm.md, "Training step").

    The entries of `Preprocessing` apply to every image, those below to training images only. The defaults are the
    published settings; each can be switched off or set to its neutral value.

    Attributes:
        centre_square, bit_depth, mean, std: see `Preprocessing`.
        horizontal_flip: with probability 1/2.
        vertical_flip: with probability 1/2.
        rotation: largest angle in degrees, uniform in [-rotation, rotation]; exposed corners are black. 0 is off.
        translate: largest shift as a fraction of the side, in both directions. 0 is off.
        scale: zoom factor, uniform in [1 - scale, 1 + scale]. 0 is off.
        brightness: factor, uniform in [1 - brightness, 1 + brightness]. 0 is off.
        contrast: factor, uniform in [1 - contrast, 1 + contrast]. 0 is off.

    Raises:
        ValueError: from the constructor, for a value of another type or out of its range.
    """

    horizontal_flip: Flag = True
    vertical_flip: Flag = True
    rotation: Annotated[float, Strict(), Field(ge=0, le=180)] = 30.0
    translate: Fraction = 0.0
    scale: Fraction = 0.0
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0


@dataclass(config=SECTION)
class DataConfig:
    """Where images and labels come from, and which of them train, validate and test.

    Examples (YAML)::

        data: {kind: csv, root: data/chest_xray, table: folds.csv, train_folds: [1, 2, 3], test_folds: [0]}
        data: {kind: folder, root: data/mine, validation_fraction: 0.1, test_fraction: 0.2}
        data: {kind: folder, root: data/mine, train_table: train, test_table: test}
        data: {kind: ham10000, root: data/ham, table: ISIC2018_Task3_Training_GroundTruth.csv,
               image_folders: [HAM10000_images_part_1, HAM10000_images_part_2], test_fraction: 0.3}
        data: {kind: aptos2019, root: data/aptos, table: train.csv, image_folders: [train_images], test_fraction: 0.2}
        data: {kind: pkl, root: data/aptos, train_table: train.pkl, test_table: test.pkl, num_classes: 5}
        data: {kind: medmnist, root: data, table: pathmnist.npz}
        data: {kind: synthetic_fundus, synthetic_size: 128, synthetic_per_class: 200}

    A split comes from (1) its own table (`train_table` ...), MedMNIST's own arrays or the synthetic generator; else
    (2) its folds; else (3), for validation and test, its fraction, drawn at random from the training images, class by
    class (`split_seed`). With a single `table` and no `train_folds`, training gets every image that no other split
    takes. `data.sources.open_source(config, split)` reads a split; `has_split` tells whether it is defined.

    Attributes:
        kind: "folder" (a folder per class), "csv" (columns file, label and optionally fold), "ham10000" (ISIC 2018
            task 3 ground truth), "aptos2019" (train.csv), "pkl" (the published program's lists), "medmnist" (.npz) or
            "synthetic_fundus". Kind "ham10000" reads HAM10000_metadata.csv (lesion_id, image_id, dx) too.
        root: folder that other paths are relative to; itself relative to the working directory.
        table: one table with all images: a CSV, .pkl or .npz file, or, for kind "folder", the folder that holds the
            class folders (default: root).
        train_table: table of the training images, instead of `table`.
        validation_table: table of the validation images.
        test_table: table of the test images.
        image_folders: folders with the images of "csv", "ham10000" and "aptos2019", searched in this order (default:
            root).
        image_suffix: ending that is appended to the image names of these three (default: none, and .jpg and .png as
            published).
        file_column: column of the file names, kind "csv".
        label_column: column of the labels, kind "csv".
        fold_column: column of the fold numbers, kind "csv".
        group_column: column of groups, such as patients, whose images no random fraction separates; kinds "csv" and
            "ham10000". HAM10000_metadata.csv has the groups lesion_id by default.
        class_names: classes in the order of their numbers. Default: sorted folder or label names; the published order
            for ham10000 and aptos2019; "0", "1", ... for number labels. Separate split tables all take the classes of
            the training table.
        num_classes: required number of classes, for number labels without names.
        train_folds: fold numbers of the training images, kind "csv".
        validation_folds: fold numbers of the validation images.
        test_folds: fold numbers of the test images.
        validation_fraction: fraction of the training images that validate.
        test_fraction: fraction of the training images that test.
        split_seed: seed of the random fractions; not of the training.
        duplicates: "report" prints images with identical bytes, within and across splits, before training; "error"
            makes them an error.
        scan: before training, "quick" finds truncated and other unreadable images by their headers and ends; "full"
            decodes every image.
        augmentation: what happens to images on their way to the model.
        cache: keep decoded, cropped and resized images in memory (3 bytes per pixel), so that files are decoded once
            and not in every epoch.
        workers: processes that load training images beside the training process (0: none), at most 1024.
        synthetic_size: side of synthetic images in pixels.
        synthetic_per_class: synthetic training images per grade.
        synthetic_validation_per_class: synthetic validation images per grade; 0 for no validation split.
        synthetic_test_per_class: synthetic test images per grade; 0 for no test split.
        synthetic_seed: seed of the synthetic images.

    Raises:
        ValueError: from the constructor, for a value of another type or out of its range, or a contradiction.
    """

    kind: Literal[
        "folder", "csv", "ham10000", "aptos2019", "pkl", "medmnist", "synthetic_fundus"
    ] = "folder"
    root: str = "."
    table: str | None = None
    train_table: str | None = None
    validation_table: str | None = None
    test_table: str | None = None
    image_folders: tuple[Name, ...] = ()
    image_suffix: str | None = None
    file_column: str = "file"
    label_column: str = "label"
    fold_column: str = "fold"
    group_column: str | None = None

    class_names: Annotated[tuple[Name, ...], AfterValidator(check_class_names)] | None = None
    num_classes: Annotated[int, Strict(), Field(ge=2, le=2**31 - 1)] | None = None

    train_folds: Folds = ()
    validation_folds: Folds = ()
    test_folds: Folds = ()
    validation_fraction: Fraction = 0.0
    test_fraction: Fraction = 0.0
    split_seed: Natural = 0
    duplicates: Literal["report", "error"] = "report"
    scan: Literal["quick", "full"] = "quick"

    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    cache: Flag = True
    workers: Annotated[int, Strict(), Field(ge=0, le=MAX_WORKERS)] = 0

    synthetic_size: Annotated[int, Strict(), Field(ge=16, le=4096)] = 128
    synthetic_per_class: Natural = 200
    synthetic_validation_per_class: Natural = 0
    synthetic_test_per_class: Natural = 50
    synthetic_seed: Natural = 0

    def __post_init__(self) -> None:
        names = self.class_names
        if names is not None and self.num_classes not in (None, len(names)):
            raise ValueError(
                f"num_classes is {self.num_classes}, but class_names has {len(names)} names"
            )
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError("the sum of validation_fraction and test_fraction must be less than 1")
        tables = [f"{split}_table" for split in SPLITS]
        tables = [name for name in tables if getattr(self, name) is not None]
        if self.table is not None and tables:
            raise ValueError(
                f"give either table or {tables[0]}, not both: images of one would be counted twice"
            )
        if tables and self.train_table is None:
            raise ValueError(f"{tables[0]} is given, so train_table must be given too")
        if self.group_column is not None and self.kind not in ("csv", "ham10000"):
            raise ValueError(f"group_column needs kind csv or ham10000, got kind {self.kind}")
        self._check_folds()
        for split in ("validation", "test"):
            ways = [f"{split}_{way}" for way in ("table", "folds", "fraction")]
            ways = [way for way in ways if getattr(self, way)]
            if ways and self.kind == "medmnist":
                raise ValueError(
                    f"medmnist files define their own splits; {ways[0]} must be left out"
                )
            if len(ways) > 1:
                raise ValueError(
                    f"the {split} images are defined twice, by {ways[0]} and {ways[1]}; leave one out"
                )

    def _check_folds(self) -> None:
        owner: dict[int, str] = {}
        for split in SPLITS:
            folds = getattr(self, f"{split}_folds")
            if folds and self.kind != "csv":
                raise ValueError(f"{split}_folds needs kind csv, got kind {self.kind}")
            for fold in folds:
                if fold in owner:
                    raise ValueError(
                        f"fold {fold} is in both {owner[fold]}_folds and {split}_folds"
                    )
                owner[fold] = split

    def has_split(self, split: str) -> bool:
        """Whether this configuration defines a split.

        Args:
            split: "train", "validation" or "test".

        Raises:
            ValueError: another name.
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
