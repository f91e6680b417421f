"""Training by both ways from one seed: the loss of every step, and the time of the whole.

    make bench RUN="benchmarks.loss_curves --data $PWD/data/chest_xray"

The first joint steps of the preset `chest_xray_small`, float32, with one draw an image as published, on the same images
with the same timesteps and noise. The published way is that of `bench_training`: three passes of the denoiser with its
encoder each, plain modules, plain Adam. Both ways take their steps in turn, so a slow moment falls on both. Writes the
curves to benchmarks/results/loss_curves.json and draws them beside it.

Training from random layers magnifies the rounding of its first step. How much is told by `--control`: the published way
against itself, in another memory layout.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench_training import published_loss
from benchmarks.harness import machine
from diffmic_fast import DiffMIC
from diffmic_fast.config.run import RunConfig, TrainingConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.training.schedules import epoch_batches, half_cosine, warmup_cosine
from diffmic_fast.training.steps import Steps
from diffmic_fast.training.trainer import make_dataset

RESULTS = Path(__file__).parent / "results" / "loss_curves.json"


class Published:
    """The joint step of the published program, in plain PyTorch."""

    def __init__(
        self,
        model: DiffMIC,
        config: TrainingConfig,
        seed: int,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.model, self.config = model.to(memory_format=layout), config
        encoder = list(model.denoiser.encoder_x.parameters())
        inside = set(map(id, encoder))
        rest = [p for p in model.denoiser.parameters() if id(p) not in inside]
        self.optimizer = torch.optim.Adam([{"params": rest}, {"params": encoder}])
        self.of_guidance = torch.optim.Adam(model.guidance.parameters(), amsgrad=True)
        self.noise = torch.Generator().manual_seed(seed)

    def step(self, images: Tensor, labels: Tensor, epoch: float) -> tuple[float, float]:
        """The losses of the denoiser and of the guidance model."""
        c = self.config
        rate = warmup_cosine(
            epoch,
            rate=c.learning_rate,
            minimum=c.min_learning_rate,
            warmup=c.warmup_epochs,
            epochs=c.epochs,
        )
        rest, encoder = self.optimizer.param_groups
        rest["lr"], encoder["lr"] = rate, rate * (c.encoder_learning_rate or 0.0) / c.learning_rate
        self.model.train()
        self.optimizer.zero_grad()
        loss = published_loss(self.model, images, labels, self.noise)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), c.gradient_clip or math.inf)
        self.optimizer.step()
        self.of_guidance.param_groups[0]["lr"] = half_cosine(
            epoch / c.epochs, c.guidance_learning_rate, 0.0
        )
        self.model.guidance.train()
        self.of_guidance.zero_grad()
        guidance = nn.functional.cross_entropy(self.model.guidance(images)[0], labels)
        guidance.backward()  # type: ignore[no-untyped-call]
        self.of_guidance.step()
        return float(loss.detach()), float(guidance.detach())


def curves(config: RunConfig, count: int, *, control: bool = False) -> dict[str, Any]:
    """The losses of `count` steps by both ways, and the seconds that each took.

    control: take the published way in the place of ours, with channels last.
    """
    torch.manual_seed(config.seed)
    model = DiffMIC(config.model)
    theirs = Published(copy.deepcopy(model), config.training, config.seed)
    itself = Published(copy.deepcopy(model), config.training, config.seed, torch.channels_last)
    ours = Steps(model, config.training, config.seed)
    dataset = make_dataset(config, open_source(config.data, "train"), train=True)
    other = "published way, channels last" if control else "diffmic_fast"
    found: dict[str, list[list[float]]] = {"published way": [], other: []}
    seconds = dict.fromkeys(found, 0.0)

    def our_step(images: Tensor, labels: Tensor, epoch: float) -> tuple[float, float]:
        losses = ours.denoiser_step(images, labels, epoch)
        progress = epoch / config.training.epochs
        return losses["loss"], ours.guidance_step(images, labels, progress)

    for epoch in range(count):  # more than are needed
        batches = epoch_batches(len(dataset), config.training.batch_size, config.seed, epoch)
        dataset.set_epoch(epoch)
        for number, indices in enumerate(batches):
            if len(found[other]) == count:
                return {"losses": found, "seconds": seconds}
            items = [dataset[i] for i in indices]
            images = torch.stack([item[0] for item in items])
            labels = torch.tensor([item[1] for item in items])
            step_of_other = itself.step if control else our_step
            for name, step in (("published way", theirs.step), (other, step_of_other)):
                start = time.perf_counter()
                found[name].append(list(step(images, labels, epoch + number / len(batches))))
                seconds[name] += time.perf_counter() - start
    return {"losses": found, "seconds": seconds}


def draw(record: dict[str, Any], path: Path) -> None:
    """Both curves of the denoiser's loss, and their difference below."""
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
    override = {"data": {"root": str(arguments.data)}}
    config = read_config("chest_xray_small", [override])
    training = dataclasses.replace(config.training, draws=1, ema_decay=None)
    config = dataclasses.replace(config, training=training)
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
