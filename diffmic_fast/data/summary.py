"""Summary of the images of a training run, printed before its first epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from PIL import Image

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.decode import check_regular
from diffmic_fast.data.duplicates import find_duplicates
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.table import ImageTable

_SHOWN = 3
_MAX_CLASSES = 100
_HEADERS = 200


def report_images(
    config: DataConfig,
    tables: Mapping[str, ImageTable],
    image_size: int,
    *,
    with_test: bool,
    say: Callable[[str], None] | None,
) -> None:
    """Print what a training run is about to use, and check it for duplicates.

    Args:
        config: Of the images; `config.duplicates` decides whether a duplicate is an error.
        tables: The images by the names of their splits.
        image_size: The side of the images as the model takes them, in pixels.
        with_test: Include the test images of `config`, where it has any.
        say: Prints a text. None prints nothing, and duplicates are searched for only if they are an error.

    Raises:
        ValueError: `config.duplicates` is "error", and there are duplicates or the test images cannot be listed.
        UnreadableImageError: A file cannot be read.
    """
    is_error = config.duplicates == "error"
    if say is None and not is_error:
        return
    tables, unlisted = dict(tables), None
    if with_test and config.has_split("test"):
        try:
            tables["test"] = open_source(config, "test")
        except (ValueError, OSError) as error:
            # Training does not need them, and they may be on another machine.
            if is_error:
                raise
            unlisted = f"test images are not listed and not compared: {error}"
    if say is not None:
        say("\n".join(summary_lines(tables, image_size)))
        if unlisted is not None:
            say(unlisted)
    duplicates = find_duplicates(tables)
    if duplicates.groups and is_error:
        raise ValueError(
            f"data: no image must be there twice (data.duplicates=error), but {duplicates.describe()}"
        )
    if say is not None:
        say(f"duplicates: {duplicates.describe()}")


def summary_lines(tables: Mapping[str, ImageTable], image_size: int) -> list[str]:
    """Lines about the classes in order, images per class and split, image size, and what was skipped.

    Args:
        tables: The images by the names of their splits, the training images first.
        image_size: The side of the images as the model takes them, in pixels.
    """
    train = next(iter(tables.values()))
    counts = {split: list(table.counts.values()) for split, table in tables.items()}
    rows = [["class", *counts]]
    rows += [
        [f"{number} {name}", *(str(column[number]) for column in counts.values())]
        for number, name in enumerate(train.classes[:_MAX_CLASSES])
    ]
    if len(train.classes) > _MAX_CLASSES:
        rows.append([f"… {len(train.classes) - _MAX_CLASSES} more", *("…" for _ in counts)])
    rows.append(["all", *(str(len(table)) for table in tables.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"images of {len(train.classes)} classes:"]
    lines += [
        "  ".join([f"  {row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip
    for split, column in counts.items():
        empty = [name for name, n in zip(train.classes, column, strict=True) if n == 0]
        if empty:
            lines.append(f"no {split} image of {_first(empty, 'class', 'classes')}")
    lines.append(f"image size: {image_size} x {image_size} pixels{_file_sizes(train)}")
    return lines + _group_lines(tables) + skipped_lines(tables.values())


def skipped_lines(tables: Iterable[ImageTable]) -> list[str]:
    """A line for each reason why files or rows were skipped, with their number and the first few names."""
    skipped: dict[str, list[str]] = {}
    for name, reason in dict.fromkeys(s for table in tables for s in table.skipped):
        skipped.setdefault(reason, []).append(name)
    return [f"skipped, {reason}: {len(n)} ({_list(n)})" for reason, n in skipped.items()]


def _group_lines(tables: Mapping[str, ImageTable]) -> list[str]:
    """The number of groups, and those with images in more than one split, where images have groups."""
    splits: dict[str, set[str]] = {}
    for split, table in tables.items():
        for entry in table.entries:
            if entry.group is not None:
                splits.setdefault(entry.group, set()).add(split)
    if not splits:
        return []
    shared = [group for group, members in splits.items() if len(members) > 1]
    named = f" ({_list(shared)})" if shared else ""
    return [f"groups: {len(splits)}, {len(shared)} of them in more than one split{named}"]


def _first(names: list[str], one: str, many: str) -> str:
    return f"{one} {names[0]}" if len(names) == 1 else f"{len(names)} {many}: {_list(names)}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _file_sizes(table: ImageTable) -> str:
    """The smallest and largest width and height in the headers of some files, evenly spaced in the table."""
    files = [entry.source for entry in table.entries if isinstance(entry.source, Path)]
    chosen = files[:: max(-(-len(files) // _HEADERS), 1)]
    sizes = [size for size in map(_header_size, chosen) if size is not None]
    if not sizes:
        return ""
    (low, high), (top, bottom) = ((min(side), max(side)) for side in zip(*sizes, strict=True))
    return (
        f", from files with widths {low} to {high} and heights {top} to {bottom} (headers of {len(sizes)} of "
        f"{len(files)} training images)"
    )


def _header_size(path: Path) -> tuple[int, int] | None:
    """Width and height, or None if the header is unreadable, which decoding reports."""
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.size
    except Exception:  # damaged files raise many types
        return None
