"""Accuracy and confidence on real images: DiffMIC beside its guidance and its encoder alone, over several seeds.

    make bench RUN="benchmarks.accuracy aptos2019_small --data $PWD/data/aptos2019 --out $PWD/runs"

For each seed: trains the preset, evaluates it on its test images (validation images with `--split validation`), and
trains the denoiser's encoder alone, as a classifier with the same images, targets, augmentation and batches, for as
many epochs as give it DiffMIC's training time (ENCODER_EPOCHS). Finished rows are kept in
benchmarks/results/accuracy.json, and interrupted trainings resume. Prints mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from diffmic_fast import __version__
from diffmic_fast.checkpoint import NAME, load_model
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.comparison import mcnemar
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.inference.metrics import compute_metrics
from diffmic_fast.training.allocator import keep_freed_memory
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.trainer import Trainer

# Epochs of the encoder alone in DiffMIC's training time.
ENCODER_EPOCHS = {"aptos2019_small": 34, "isic2018_small": 20, "chest_xray_small": 42}
ENCODER = "encoder alone"
RESULTS = Path(__file__).parent / "results" / "accuracy.json"
COLUMNS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "kappa": "kappa",
    "balanced_accuracy": "balanced accuracy",
    "auc_ovo": "AUC",
    "nll": "log loss",
    "ece": "calibration error",
}

Row = dict[str, Any]


def train_diffmic(config: RunConfig, out: Path, split: str) -> tuple[dict[str, Row], Any]:
    """Train or resume in `out` and evaluate; a row for each method, and whether the first sampler is right [N]."""
    trainer = _trainer(config, out)
    model, _ = load_model(trainer.fit())
    evaluation = evaluate(
        model,
        make_dataset(config, open_source(config.data, split), train=False),
        [SamplingOptions.from_config(config.sampling)],
        batch_size=config.sampling.batch_size,
    )
    evaluation.print()
    evaluation.save(out / f"{split}.json")
    rows: dict[str, Row] = {entry["method"]: entry for entry in evaluation.to_dict()["results"]}
    return rows, evaluation.primary.probabilities.argmax(axis=1) == evaluation.labels


def train_encoder(
    config: RunConfig, epochs: int, out: Path, split: str, diffmic_right: NDArray[np.bool_]
) -> Row:
    """Train or resume the encoder alone; its row, with McNemar's test of DiffMIC against it."""
    training = dataclasses.replace(
        config.training, guidance_epochs=0, encoder_epochs=epochs, epochs=0, feature_epochs=0
    )
    trainer = _trainer(dataclasses.replace(config, training=training), out)
    trainer.fit()
    probabilities, labels = classify(trainer, config, split)
    metrics = compute_metrics(probabilities, labels)
    test = mcnemar(diffmic_right, probabilities.argmax(axis=1) == labels)
    return {"epochs": epochs, "diffmic_against_it": test._asdict()} | metrics.to_dict()


def _trainer(config: RunConfig, out: Path) -> Trainer:
    checkpoint = out / NAME
    return Trainer(config, out, resume=checkpoint if checkpoint.exists() else None)


@torch.no_grad()
def classify(trainer: Trainer, config: RunConfig, split: str) -> tuple[Any, Any]:
    """Probabilities [N, C] of the encoder's own classifier, averaged over the preset's views, and labels [N]."""
    encoder = trainer.steps.encoder
    assert encoder is not None
    encoder.eval()
    dataset = make_dataset(config, open_source(config.data, split), train=False)
    found: list[Tensor] = []
    labels: list[Tensor] = []
    for images, truth, _ in DataLoader(dataset, batch_size=config.sampling.batch_size):
        flips: list[tuple[int, ...]] = [(), (3,), (2,), (2, 3)]
        logits = [encoder(images.flip(axes)) for axes in flips[: config.sampling.views]]
        found.append(torch.stack(logits).mean(dim=0).double().softmax(dim=1))
        labels.append(truth)
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def table(rows_by_seed: dict[str, dict[str, Row]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [f"| method | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for name in dict.fromkeys(name for rows in rows_by_seed.values() for name in rows):
        cells = []
        for column in COLUMNS:
            values = [rows[name][column] for rows in rows_by_seed.values() if name in rows]
            mean = statistics.mean(values)
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{mean:.4f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "diffmic_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Complete the rows of the results file and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("preset", choices=tuple(ENCODER_EPOCHS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--without-encoder", action="store_true", help="DiffMIC's rows only")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    keep_freed_memory()
    record: dict[str, Any] = {}
    if arguments.results.exists():
        record = json.loads(arguments.results.read_text())
    seeds = record.setdefault(f"{arguments.preset}, {arguments.split}", {})
    for seed in arguments.seeds:
        override = {"data": {"root": str(arguments.data)}, "seed": seed}
        config = read_config(arguments.preset, [override])
        out = arguments.out / f"{arguments.preset}-{seed}"
        rows, right = train_diffmic(config, out, arguments.split)
        if not arguments.without_encoder:
            epochs = ENCODER_EPOCHS[arguments.preset]
            alone = out.with_name(f"{out.name}-encoder")
            rows[ENCODER] = train_encoder(config, epochs, alone, arguments.split, right)
        seeds[str(seed)] = rows
        record["machine"] = machine()
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(table(seeds))


if __name__ == "__main__":
    main()
