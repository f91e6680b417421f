"""Whether a checkpoint can be resumed under a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffmic_fast.checkpoint import Checkpoint, check_sizes
from diffmic_fast.config.run import RunConfig

# Keys that change neither the weights nor the rows of the log: a resumed run may set them anew.
_FREE = ("data.workers", "data.cache", "data.root", "data.duplicates", "data.scan",
         "training.checkpoint_every", "training.tensorboard")  # fmt: skip


def check_resume(checkpoint: Checkpoint, config: RunConfig, world_size: int = 1) -> None:
    """Raise ValueError unless a run that resumes from a checkpoint would end at the numbers of an unbroken run.

    The number of processes may change between two epochs, if a step takes as many images as before.
    """
    if "progress" not in checkpoint.extras:
        raise ValueError(
            f"resume: {checkpoint.path} has no training state beyond the denoiser (a published checkpoint?); it can "
            "be evaluated, not resumed"
        )
    check_sizes(checkpoint, config.model)
    stored = checkpoint.extras["config"]
    progress = checkpoint.extras["progress"]
    before = progress.get("processes", 1)
    if before != world_size:
        size = config.training.batch_size
        images = stored["training"]["batch_size"] * before
        if images != size * world_size or progress["position"]:
            raise ValueError(
                f"resume: {checkpoint.path} was trained by {before} processes with {images} images a step, these are "
                f"{world_size} with {size * world_size}; the number of processes can change between two epochs, with "
                "training.batch_size such that a step has as many images"
            )
        stored = {**stored, "training": {**stored["training"], "batch_size": size}}
    # A run of an older version lacks the options that have come since, and had their defaults.
    stored = RunConfig.from_dict(stored).to_dict()
    changed = _differences(stored, config.to_dict())
    if changed:
        raise ValueError(
            f"resume: the configuration differs from the one {checkpoint.path} was trained with: "
            f"{'; '.join(changed)}; resume with the stored one, or start anew in another folder"
        )


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    old, new = _flat(stored), _flat(current)
    return [
        f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            entries |= _flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries
