"""Chest X-rays: DiffMIC beside plain networks of the same budget, over several seeds.

    make bench RUN="benchmarks.chest_xray --data $PWD/data/chest_xray --out $PWD/runs"

Trains the preset `chest_xray_small` (folds 1 to 3), tests it on fold 0 with the guidance alone and with each sampler,
and trains plain networks on the same images with the same augmentation and batch size: a ResNet-18 from random weights
for as many epochs and for as much time as DiffMIC, and DiffMIC's own image encoder, from the same ImageNet weights, for
as much time. Every finished row is kept in benchmarks/results/chest_xray.json, so an interrupted run resumes there;
prints the table at the end.

Accuracies may be collected on a busy machine; times may not. `--timings` takes them alone: one epoch of everything and
the milliseconds per image of every method. The table's training minutes are epochs times seconds per epoch.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffmic_fast import __version__
from diffmic_fast.checkpoint import NAME, load_model
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.inference.metrics import NAMES, Metrics, compute_metrics
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.training.batches import epoch_batches
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.learning_rates import half_cosine
from diffmic_fast.training.trainer import Trainer

METHODS = ("ddpm_truncated:60", "ddpm", "ddim:20")
# Network and epochs. The larger numbers give it DiffMIC's time, by the seconds per epoch of --timings.
PLAIN = {
    "ResNet-18, same epochs": ("resnet18", 11),
    "ResNet-18, more time": ("resnet18", 24),
    "EfficientNet-Lite0, more time": ("encoder", 38),
}
RESULTS = Path(__file__).parent / "results" / "chest_xray.json"
COLUMNS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "kappa": "kappa",
    "ece": "calibration error",
    "milliseconds": "ms / image",
    "minutes": "training, min",
}

Row = dict[str, Any]


def run_diffmic(config: RunConfig, out: Path) -> dict[str, Row]:
    """Train or resume the run in `out`; a row for the guidance alone and one for each sampler."""
    checkpoint = out / NAME
    trainer = Trainer(config, out, resume=checkpoint if checkpoint.exists() else None)
    model, _ = load_model(trainer.fit())
    options = SamplingOptions.from_config(config.sampling)
    evaluation = evaluate(
        model,
        make_dataset(config, open_source(config.data, "test"), train=False),
        [options.with_sampler(name) for name in METHODS],
        batch_size=config.sampling.batch_size,
    )
    evaluation.print()
    return {
        result.method: _row(result.metrics, result.seconds_per_image)
        for result in evaluation.results
    }


def _row(metrics: Metrics, seconds: float) -> Row:
    row = {name: getattr(metrics, name) for name in NAMES}
    return row | {"milliseconds": 1000 * seconds, "confusion": metrics.confusion.tolist()}


def make_plain(network_name: str, config: RunConfig) -> nn.Module:
    """A plain network in channels-last layout."""
    torch.manual_seed(config.seed)
    classes = config.model.classes
    network: nn.Module
    if network_name == "resnet18":
        network = torchvision.models.resnet18(num_classes=classes)
    else:
        network = ImageEncoder(config.model.encoder, classes, config.model.encoder_weights)
    return network.to(memory_format=torch.channels_last)


def train_plain(network: nn.Module, config: RunConfig, epochs: int) -> list[float]:
    """Train by cross-entropy, Adam 1e-3 with a half-cosine to 0; the seconds of every epoch."""
    dataset = make_dataset(config, open_source(config.data, "train"), train=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    seconds = []
    network.train()
    for epoch in range(epochs):
        start = time.perf_counter()
        batches = epoch_batches(len(dataset), config.training.batch_size, config.seed, epoch)
        dataset.set_epoch(epoch)
        for number, (images, labels, _) in enumerate(DataLoader(dataset, batch_sampler=batches)):
            for group in optimizer.param_groups:
                group["lr"] = half_cosine((epoch + number / len(batches)) / epochs, 1e-3, 0.0)
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(images), labels))
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def test_plain(network: nn.Module, config: RunConfig) -> Row:
    """Metrics on the test images, and milliseconds per image of the network alone."""
    dataset = make_dataset(config, open_source(config.data, "test"), train=False)
    network.eval()
    probabilities: list[Tensor] = []
    labels: list[Tensor] = []
    seconds = 0.0
    for images, truth, _ in DataLoader(dataset, batch_size=config.sampling.batch_size):
        if not labels:
            network(images[:1])
        start = time.perf_counter()
        probabilities.append(network(images).softmax(dim=1))
        seconds += time.perf_counter() - start
        labels.append(truth)
    truth = torch.cat(labels)
    metrics = compute_metrics(torch.cat(probabilities).double().numpy(), truth.numpy())
    return _row(metrics, seconds / len(truth))


def measure_times(config: RunConfig) -> dict[str, Any]:
    """Training minutes and milliseconds per image of everything in the table.

    The first epoch of each pays for decoding the images, so the second one is taken.
    """
    training = config.training
    brief = dataclasses.replace(training, guidance_epochs=2, epochs=1, warmup_epochs=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        rows = run_diffmic(dataclasses.replace(config, training=brief), out)
        with (out / "log.csv").open(newline="") as log:
            epochs = [float(row["seconds"]) for row in csv.DictReader(log)]
    whole = training.guidance_epochs * epochs[1] + training.epochs * epochs[2]
    times: dict[str, Any] = {
        name: {"minutes": whole / 60, "milliseconds": row["milliseconds"]}
        for name, row in rows.items()
    }
    for name, (network_name, count) in PLAIN.items():
        network = make_plain(network_name, config)
        epoch = train_plain(network, config, 2)[1]
        milliseconds = test_plain(network, config)["milliseconds"]
        times[name] = {"minutes": count * epoch / 60, "milliseconds": milliseconds}
    return times


def table(record: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds, and times where they were taken."""
    seeds, times = record["seeds"], record.get("times", {}).get("methods", {})
    lines = [f"| method | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for name in dict.fromkeys(name for rows in seeds.values() for name in rows):
        cells = []
        for column in COLUMNS:
            if column in ("milliseconds", "minutes"):
                cells.append(f"{times[name][column]:.1f}" if name in times else "")
                continue
            values = [rows[name][column] for rows in seeds.values() if name in rows]
            mean = statistics.mean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            if column == "accuracy":
                cells.append(f"{100 * mean:.2f} ± {100 * spread:.2f} %")
            else:
                cells.append(f"{mean:.3f} ± {spread:.3f}")
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
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Complete the rows of the results file, or take its times; then print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/chest_xray"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", choices=("diffmic", "plain"), help="only these rows")
    parser.add_argument("--timings", action="store_true", help="take the times alone")
    parser.add_argument("--out", type=Path, default=Path("runs/chest_xray"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"seeds": {}}
    if arguments.results.exists():
        record = json.loads(arguments.results.read_text())

    def settings(seed: int) -> RunConfig:
        override = {"data": {"root": str(arguments.data)}, "seed": seed}
        return read_config("chest_xray_small", [override])

    def write() -> None:
        record["config"] = read_config("chest_xray_small").to_dict()
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(record, indent=1) + "\n")

    def keep(seed: int, rows: dict[str, Row]) -> None:
        record["seeds"].setdefault(str(seed), {}).update(rows)
        record["machine"] = machine()
        write()

    if arguments.timings:
        record["times"] = {"machine": machine(), "methods": measure_times(settings(0))}
        write()
    for seed in arguments.seeds if not arguments.timings else ():
        config = settings(seed)
        done = record["seeds"].get(str(seed), {})
        if arguments.only != "plain" and not any(name.startswith("ddpm") for name in done):
            keep(seed, run_diffmic(config, arguments.out / f"seed{seed}"))
        for name, (network_name, epochs) in PLAIN.items() if arguments.only != "diffmic" else ():
            if name not in done:
                network = make_plain(network_name, config)
                train_plain(network, config, epochs)
                keep(seed, {name: test_plain(network, config)})
    print(table(record))


if __name__ == "__main__":
    main()
