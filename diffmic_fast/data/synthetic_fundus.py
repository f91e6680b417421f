"""Synthetic fundus images, whose grade of diabetic retinopathy is defined by the lesions drawn.

They are for demonstrations and tests without a download, and of no clinical use. An image has a dark frame, a round
field of view, a retina with uneven light, an optic disc, vessels that branch from it round the macula, and noise. The
lesions are, by grade:

    0  none
    1  a few microaneurysms (small dark red dots)
    2  more microaneurysms, small haemorrhages (dark red blots)
    3  many of both, hard exudates (clusters of yellow specks), cotton-wool spots
    4  as 3, and new vessels (red tangles), a preretinal haemorrhage (large, dark, with a level top)

Their sizes are relative to the image, and chosen so that they stand out at 96 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffmic_fast.data.fundus_drawing import Eye

GRADES = ("0_none", "1_mild", "2_moderate", "3_severe", "4_proliferative")


def generate(grade: int, seed: int = 0, size: int = 128, index: int = 0) -> np.ndarray:
    """Draw one image, which is a function of the four arguments.

    Args:
        grade: 0 to 4.
        seed: of the data set, at least 0.
        size: side in pixels, 16 to 4096.
        index: number of the image within its grade and seed, at least 0.

    Returns:
        [size, size, 3] uint8, RGB.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= grade < len(GRADES):
        raise ValueError(f"synthetic_fundus: grade must be 0 to {len(GRADES) - 1}, got {grade}")
    if not 16 <= size <= 4096:
        raise ValueError(f"synthetic_fundus: size must be 16 to 4096, got {size}")
    if seed < 0 or index < 0:
        raise ValueError(f"synthetic_fundus: seed and index must be >= 0, got {seed}, {index}")
    rng = np.random.Generator(np.random.PCG64([seed, grade, index]))
    return Eye(rng, size).draw(grade)


def write_dataset(
    root: str | Path, per_grade: int, size: int = 128, seed: int = 0, first_index: int = 0
) -> list[Path]:
    """Write `per_grade` >= 1 PNG images of every grade, in a folder for each grade.

    Args:
        root: folder of these folders; created if it does not exist.
        per_grade: number of images of each grade.
        size, seed: as in `generate`.
        first_index: number of the first image; ranges that do not overlap give disjoint sets.

    Returns:
        The files, in the order of grade and index.

    Raises:
        ValueError: an argument is out of range.
    """
    if per_grade < 1:
        raise ValueError(f"write_dataset: per_grade must be at least 1, got {per_grade}")
    paths = []
    for grade, name in enumerate(GRADES):
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(first_index, first_index + per_grade):
            path = folder / f"eye_{seed}_{grade}_{index:05d}.png"
            Image.fromarray(generate(grade, seed, size, index)).save(path)
            paths.append(path)
    return paths
