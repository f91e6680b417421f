"""A configuration that trains in seconds, and comparison of the files of two training runs."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch

from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.run import RunConfig, SamplingConfig, TrainingConfig
from diffmic_fast.models import DiffMICConfig

# Batch statistics and MMD over all processes, as of one process with the global batch.
TOGETHER = {"sync_batch_norm": True, "gather_mmd": True}

MODEL = DiffMICConfig(
    classes=3,
    image_size=32,
    timesteps=12,
    feature_dim=32,
    encoder="test_resnet",
    guidance_trunk="test_resnet",
    crops=2,
    crop_size=16,
)


def make_config(images: Path) -> RunConfig:
    """One epoch of guidance, two joint epochs; with 15 images, batches of 4, 4, 4 and 3."""
    return RunConfig(
        data=DataConfig(
            kind="folder", root=str(images), train_table="train", validation_table="test"
        ),
        model=dataclasses.replace(MODEL),
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


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def flat(value, prefix=""):
    """The tensors and numbers of a nested checkpoint by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}/{key}").items()}


def assert_same_values(one, other):
    """Nested values are equal bit by bit."""
    a, b = flat(one), flat(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]) and value.dtype == b[key].dtype, key
        else:
            assert value == b[key], key


def assert_same_run(one, other):
    """Checkpoints are equal bit by bit, logs except for the times."""
    a, b = (flat(torch.load(p / "ckpt.pth", weights_only=True)) for p in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        elif not key.endswith("seconds"):
            assert a[key] == b[key], key
    timed = ("seconds", "images_per_second")
    logs = [[{k: v for k, v in r.items() if k not in timed} for r in rows(p)]
            for p in (one, other)]  # fmt: skip
    assert logs[0] == logs[1]


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))
