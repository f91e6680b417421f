"""A small data set and configuration that train in seconds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.data.config import DataConfig
from diffmic_fast.models import DiffMICConfig
from diffmic_fast.training.config import RunConfig, SamplingConfig, TrainingConfig

CLASSES = ("blue", "green", "red")


def write_images(root: Path, per_class: int, size: int = 36, seed: int = 0) -> Path:
    """A folder a class of noisy images whose brightest channel tells the class."""
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
    return RunConfig(
        data=DataConfig(
            kind="folder", root=str(images), train_table="train", validation_table="test"
        ),
        model=DiffMICConfig(
            classes=3,
            image_size=32,
            timesteps=12,
            feature_dim=32,
            encoder="test_resnet",
            guidance_trunk="test_resnet",
            crops=2,
            crop_size=16,
        ),
        training=TrainingConfig(
            batch_size=4,
            epochs=2,
            guidance_epochs=1,
            warmup_epochs=1,
            ema_decay=0.9,
            tensorboard=False,
        ),
        sampling=SamplingConfig(sampler="ddim", steps=2, batch_size=4),
        seed=7,
    )
