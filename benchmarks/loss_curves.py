"""Training by both ways from one seed: the loss of every step, and the time of all.

    make bench RUN="benchmarks.loss_curves --data $PWD/data/chest_xray"

The first joint steps on the chest X-rays of the preset `chest_xray_small`, float32, with one draw per image as
published, on the same images with the same timesteps and noise, by the published way (`benchmarks.published`) and by
`training.steps.Steps`, in turn, so that a slow moment falls on both. Writes benchmarks/results/loss_curves.json and
draws it.

Training from random layers magnifies rounding. `--control` measures by how much: the published way against itself, in
another memory layout.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine
from benchmarks.published import Published
from diffmic_fast import DiffMIC
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.training.batches import epoch_batches
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.steps import Steps

RESULTS = Path(__file__).parent / "results" / "loss_curves.json"
# Joint epochs with the published loss, which the preset does not have.
JOINT: dict[str, Any] = {
    "data": {"validation_fraction": 0.0},
    "model": {
        "image_size": 128, "feature_dim": 256, "encoder": "tf_efficientnet_lite0", "crop_size": 32,
        "crop_channels": "first", "crop_foreground": False,
    },
    "training": {
        "guidance_epochs": 4, "encoder_epochs": 0, "epochs": 7, "feature_epochs": 0, "joint_guidance": True,
        "prior_dropout": 0.0, "label_smoothing": 0.0, "draws": 1, "ema_decay": None, "precision": "fp32",
        "classifier_ema_decay": None, "classifier_dropout": 0.0, "classifier_head_factor": 1.0,
        "guidance_gradient_clip": None, "warmup_epochs": 1.0, "guidance_warmup_epochs": 0.0,
        "gradient_clip": 1.0, "learning_rate": 1e-2,
        "encoder_learning_rate": 1e-3, "guidance_learning_rate": 1e-3,
    },
}  # fmt: skip


def curves(config: RunConfig, count: int, *, control: bool = False) -> dict[str, Any]:
    """Losses of `count` steps by both ways, and the seconds that each took.

    Args:
        config: the run.
        count: number of joint steps.
        control: compare the published way with itself in channels-last layout.
    """
    torch.manual_seed(config.seed)
    model = DiffMIC(config.model)
    theirs = Published(copy.deepcopy(model), config.training, config.seed)
    itself = Published(copy.deepcopy(model), config.training, config.seed, torch.channels_last)
    ours = Steps(model, config.training, config.seed)
    other = "published way, channels last" if control else "diffmic_fast"
    found: dict[str, list[list[float]]] = {"published way": [], other: []}
    seconds = dict.fromkeys(found, 0.0)

    def our_step(images: Tensor, labels: Tensor, epoch: float) -> tuple[float, float]:
        loss = ours.denoiser_step(images, labels, epoch)["loss"]
        return loss, ours.guidance_step(images, labels, epoch / config.training.epochs)

    steps = {"published way": theirs.step, other: itself.step if control else our_step}
    for epoch, images, labels in itertools.islice(_batches(config), count):
        for name, step in steps.items():
            start = time.perf_counter()
            found[name].append(list(step(images, labels, epoch)))
            seconds[name] += time.perf_counter() - start
    return {"losses": found, "seconds": seconds}


def _batches(config: RunConfig) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Fractional epoch, images and labels of every step, without end."""
    dataset = make_dataset(config, open_source(config.data, "train"), train=True)
    for epoch in itertools.count():
        batches = epoch_batches(len(dataset), config.training.batch_size, config.seed, epoch)
        dataset.set_epoch(epoch)
        for number, indices in enumerate(batches):
            images, labels, _ = zip(*(dataset[i] for i in indices), strict=True)
            yield epoch + number / len(batches), torch.stack(images), torch.tensor(labels)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw both curves of the denoiser's loss, and their difference below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    theirs, ours = ([loss for loss, _ in each] for each in record["losses"].values())
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    steps = range(1, len(ours) + 1)
    above.plot(steps, theirs, color="#888888", linewidth=4, label="published way")
    above.plot(steps, ours, color="#0b6e99", linewidth=1.2, label="diffmic_fast")
    above.set_ylabel("denoiser's loss")
    above.legend(frameon=False)
    below.semilogy(steps, [max(abs(a - b), 1e-9) for a, b in zip(theirs, ours, strict=True)],
                   color="#0b6e99")  # fmt: skip
    below.set_ylabel("difference")
    below.set_xlabel("joint step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Take the steps, write the record, print the largest differences."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/chest_xray"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--control", action="store_true", help="the published way against itself")
    arguments = parser.parse_args()
    results = RESULTS.with_stem("loss_curves_control") if arguments.control else RESULTS
    config = read_config("chest_xray_small", [{"data": {"root": str(arguments.data)}}, JOINT])
    record = curves(config, arguments.steps, control=arguments.control)
    both = list(record["losses"].values())
    record["largest_difference"] = {
        part: max(abs(a[i] - b[i]) for a, b in zip(*both, strict=True))
        for i, part in enumerate(("denoiser", "guidance"))
    }
    record["machine"] = machine()
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not arguments.control:
        draw(record, results.with_suffix(".png"))
    print(json.dumps({key: record[key] for key in ("largest_difference", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
