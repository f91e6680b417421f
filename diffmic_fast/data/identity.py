"""Which images a model has seen: keys that are kept in its checkpoint and compared with those of other tables."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import torch
from torch import Tensor

from diffmic_fast.data.duplicates import content_sample
from diffmic_fast.data.table import ImageEntry, ImageTable, SyntheticImage


def image_keys(table: ImageTable) -> Tensor:
    """A number for each image, of its file name without folders, its size and three samples of its bytes.

    A file that was moved to another folder or table keeps its key; one that was renamed or written anew has another, as
    has a copy with another name. Files are not read whole: 100,000 keys take 0.8 MB and some seconds.

    Args:
        table: the images.

    Returns:
        [N] int64, in the order of the table.

    Raises:
        UnreadableImageError: a file cannot be read.
    """
    # Reading waits for the disk or a network.
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        return torch.tensor(list(pool.map(_key, table.entries)), dtype=torch.int64)


def _key(entry: ImageEntry) -> int:
    hashed = hashlib.sha256(PurePath(entry.name).name.encode("utf-8", "surrogateescape") + b"\0")
    if isinstance(entry.source, SyntheticImage):
        hashed.update(repr(entry.source).encode())
    else:
        hashed.update(content_sample(entry.source))
    return int.from_bytes(hashed.digest()[:8], "little", signed=True)


def missing_keys(tables: Iterable[ImageTable], keys: Tensor) -> int:
    """How many of the keys are not those of images of the tables.

    Args:
        tables: the images.
        keys: [N] int64, of `image_keys`.
    """
    present = torch.cat([image_keys(table) for table in tables])
    return int(torch.isin(keys, present, invert=True).sum())


def check_unseen(
    command: str, split: str, table: ImageTable, seen: Mapping[str, Tensor], *, allow: bool = False
) -> str:
    """Raise ValueError if a table has images that a model has seen, or if they are allowed return a line on them.

    Args:
        command: for the error.
        split: name of the table's split, likewise.
        table: the images.
        seen: keys of the images that the model has seen, by the names of their splits.
        allow: whether they are allowed.

    Returns:
        The line, "" if there are none.
    """
    lines = []
    keys = image_keys(table)
    for name, theirs in seen.items():
        common = torch.isin(keys, theirs).nonzero()[:, 0].tolist()
        if not common:
            continue
        found = (
            f"{len(common)} of {len(table)} {split} images were {name} images when the model was trained, "
            f"{table.entries[common[0]].name} for one"
        )
        if not allow:
            raise ValueError(
                f"{command}: {found}; results on them would say nothing. Have files, a table or settings of the split "
                "changed since (data.split_seed, a fraction)? Restore them, or name images that the model has not seen "
                "(--set data....). Duplicates that are meant to be in both are allowed with --allow-seen"
            )
        lines.append(f"--allow-seen: {found}")
    return "\n".join(lines)
