"""What a precision changes in predictions: a trained model on a test split, in float32 and in each other precision.

    make bench RUN="benchmarks.precision_labels $PWD/runs/chest --json $PWD/labels.json"

Prints a table: images, those with the label of float32, the same among images whose two best float32 probabilities are
more than 0.01 apart, the largest and the mean difference of a probability; then the images that differ most. The data
are those of the checkpoint's configuration; --set data.root=... moves them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from diffmic_fast.checkpoint import NAME, load_model, read_checkpoint
from diffmic_fast.config.run import RunConfig
from diffmic_fast.config.yaml_reader import with_overrides
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.models import DiffMIC
from diffmic_fast.models.execution import bfloat16_obstacle
from diffmic_fast.ops.denoise import PRECISIONS_OF
from diffmic_fast.training.datasets import make_dataset

CLEAR = 0.01  # between the two best probabilities
WORST = 5


@dataclass(frozen=True)
class Agreement:
    """One precision against float32.

    Attributes:
        precision: its name.
        images, same: number of images, and of those with the same label.
        clear, same_clear: the same for images whose two best float32 probabilities are more than `CLEAR` apart.
        largest, mean: absolute difference of a probability.
        worst: (file, largest difference, float32 label, label) of the images that differ most.
    """

    precision: str
    images: int
    same: int
    clear: int
    same_clear: int
    largest: float
    mean: float
    worst: tuple[tuple[str, float, int, int], ...]


def compare(precision: str, exact: Tensor, other: Tensor, files: list[str]) -> Agreement:
    """Compare probabilities [N, C] of a precision with those of float32."""
    difference = (other.double() - exact.double()).abs()
    each = difference.amax(dim=1)
    labels, others = exact.argmax(dim=1), other.argmax(dim=1)
    best = exact.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > CLEAR
    same = labels == others
    order = each.argsort(descending=True)[:WORST].tolist()
    return Agreement(
        precision,
        len(exact),
        int(same.sum()),
        int(clear.sum()),
        int((same & clear).sum()),
        float(difference.max()),
        float(difference.mean()),
        tuple((files[i], float(each[i]), int(labels[i]), int(others[i])) for i in order),
    )


def agreements(
    model: DiffMIC,
    dataset: ImageDataset,
    options: SamplingOptions,
    *,
    batch_size: int = 32,
    precisions: tuple[str, ...] = PRECISIONS_OF["cpu"],
) -> list[Agreement]:
    """Compare each precision with the first one, float32, on the same noise."""
    rows: dict[str, list[Tensor]] = {precision: [] for precision in precisions}
    for images, _, _ in DataLoader(dataset, batch_size):
        for precision, parts in rows.items():
            prediction = model.predict(images, **asdict(replace(options, precision=precision)))
            parts.append(prediction.probabilities)
    exact, *others = (torch.cat(parts) for parts in rows.values())
    files = [entry.name for entry in dataset.table.entries]
    return [
        compare(precision, exact, other, files)
        for precision, other in zip(precisions[1:], others, strict=True)
    ]


def show(results: list[Agreement], console: Console) -> None:
    """Print the table, and the images of each precision that differ most."""
    console.print(f"convolutions in bfloat16: {_convolutions()}", soft_wrap=True)
    table = Table(title="against fp32")
    for title in ("", "images", "same label", f"{CLEAR} apart", "largest |dp|", "mean"):
        table.add_column(title, justify="right")
    for r in results:
        table.add_row(
            r.precision,
            str(r.images),
            f"{r.same} ({r.same / r.images:.2%})",
            f"{r.same_clear} of {r.clear}",
            f"{r.largest:.2e}",
            f"{r.mean:.2e}",
        )
    console.print(table)
    for r in results:
        for file, difference, label, other in r.worst:
            console.print(f"{r.precision}: {file}: {difference:.2e}, label {label} to {other}")


def _convolutions() -> str:
    obstacle = bfloat16_obstacle(torch.device("cpu"))
    return f"no, {obstacle}" if obstacle else "yes"


def main() -> None:
    """Compare the precisions of a checkpoint."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="ckpt.pth, or the folder of a run")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--sampler", help="NAME[:STEPS[:ETA]] (default: the configuration's)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    path = options.checkpoint / NAME if options.checkpoint.is_dir() else options.checkpoint
    values: Any = read_checkpoint(path, mmap=True).extras.get("config")
    if values is None:
        parser.error(f"{path} has no configuration inside")
    config = RunConfig.from_dict(with_overrides(values, options.overrides))
    model, _ = load_model(path, None, config)
    sampling = SamplingOptions.from_config(config.sampling)
    results = agreements(
        model,
        make_dataset(config, open_source(config.data, options.split), train=False),
        sampling.with_sampler(options.sampler) if options.sampler else sampling,
        batch_size=config.sampling.batch_size,
    )
    show(results, Console())
    if options.json:
        record = {"convolutions": _convolutions(), "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
