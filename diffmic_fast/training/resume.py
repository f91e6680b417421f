"""Whether a checkpoint can be resumed under a configuration."""

from __future__ import annotations

from diffmic_fast.checkpoint import Checkpoint, check_sizes
from diffmic_fast.config.differences import differences
from diffmic_fast.config.run import RunConfig
from diffmic_fast.training.phases import phases

# Keys that change neither the weights nor the rows of the log: a resumed run may set them anew.
_FREE = ("data.workers", "data.cache", "data.root", "data.duplicates", "data.scan",
         "training.checkpoint_every", "training.tensorboard")  # fmt: skip

# The key with the number of epochs of each phase.
_LENGTHS = {
    "guidance": "guidance_epochs",
    "encoder": "encoder_epochs",
    "joint": "epochs",
    "features": "feature_epochs",
}


def check_resume(checkpoint: Checkpoint, config: RunConfig, world_size: int = 1) -> str:
    """Check that a run can resume from a checkpoint, to the numbers of an unbroken run or with more epochs.

    The number of processes may change between two epochs, if a step takes as many images as before. The last phase that
    has epochs may get more; learning rates follow the new length from then on.

    Returns:
        What the additional epochs change, or "" for none.

    Raises:
        ValueError: the checkpoint cannot be resumed under this configuration.
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
    then = RunConfig.from_dict(stored)
    last = [phase for phase in phases(then.training) if phase.epochs][-1]
    length = _LENGTHS[last.name]
    epochs = getattr(config.training, length)
    values = then.to_dict()
    if epochs > last.epochs:
        values["training"][length] = epochs
    changed = [
        f"{key}: {old!r} in the checkpoint, {new!r} now"
        for key, old, new in differences(values, config.to_dict())
        if not key.startswith(_FREE)
    ]
    if changed:
        raise ValueError(
            f"resume: the configuration differs from the one {checkpoint.path} was trained with: "
            f"{'; '.join(changed)}; resume with the stored one (training.{length} may be larger), or start anew in "
            "another folder"
        )
    if epochs <= last.epochs:
        return ""
    return (
        f"training.{length} is {epochs}, was {last.epochs}: learning rates, and the views of epochs on features, "
        "follow the new length from here on, so the result differs from that of an unbroken run of this length"
    )
