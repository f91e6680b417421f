"""Fixtures: a small data set and a configuration that train in seconds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import make_config

from diffmic_fast.config.run import RunConfig

CLASSES = ("blue", "green", "red")


def write_images(root: Path, per_class: int, size: int = 36, seed: int = 0) -> Path:
    """One folder per class of noisy images; the brightest channel is the class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[:, :, 2 - label] += 110
            Image.fromarray(pixels).save(root / name / f"{name}_{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """train with 3 x 5 images, test with 3 x 2."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 5)
    write_images(root / "test", 2, seed=1)
    return root


@pytest.fixture
def config(images) -> RunConfig:
    """One epoch of guidance, two joint epochs of 15 images in batches of 4, 4, 4 and 3."""
    return make_config(images)


@pytest.fixture(scope="module")
def shared_config(images: Path) -> RunConfig:
    return make_config(images)
