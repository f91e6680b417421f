"""The demonstration: draw synthetic fundus images, train on them, evaluate, predict and write reports."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path

import torch

from diffmic_fast.checkpoint import NAME, load_model
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.synthetic_fundus import write_dataset
from diffmic_fast.devices import choose_device
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.inference.figures import draw_confusion, save_figure
from diffmic_fast.inference.output import save
from diffmic_fast.inference.pictures import Pictures
from diffmic_fast.inference.predict import (
    FilePredictor,
    Predictions,
    Row,
    collect_files,
    predict_files,
)
from diffmic_fast.models import DiffMIC
from diffmic_fast.reports.evaluation_report import write_evaluation_report
from diffmic_fast.reports.prediction_report import PredictionReport
from diffmic_fast.reports.settings import sampling_settings
from diffmic_fast.reports.training_report import PAGE, write_training_report
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.trainer import Trainer

WARNING = (
    "These are synthetic images, drawn by a program. What is learned and measured here shows that "
    "the parts work; it says nothing about patients."
)
_SHEET = 6  # images on the picture


def run_demo(
    out: str | Path, *, device: str = "auto", preset: str = "demo", quiet: bool = False
) -> dict[str, Path]:
    """Run the demonstration.

    A second run in the same folder resumes the training of the first.

    Args:
        out: folder for everything that is written.
        device: as in `devices.choose_device`.
        preset: preset or YAML file with the sizes.
        quiet: print nothing.

    Returns:
        The files and folders written, by name.

    Raises:
        TrainingError, Interrupted: as `Trainer.fit`.
    """
    say = (lambda text: None) if quiet else partial(print, flush=True)
    start = time.perf_counter()
    out = Path(out)
    paths = {
        "images": out / "images",
        "checkpoint": out / "run" / NAME,
        "log": out / "run" / "log.csv",
        "measures": out / "evaluation.json",
        "confusions": out / "confusion.png",
        "predictions": out / "predictions.csv",
        "picture": out / "picture.png",
        "training": out / "run" / PAGE,
        "evaluation": out / "evaluation" / "index.html",
        "report": out / "report" / "index.html",
    }
    say(WARNING)
    config, text = _draw_images(preset, paths["images"])
    say(text)
    resume = paths["checkpoint"] if paths["checkpoint"].exists() else None
    trainer = Trainer(config, out / "run", device=device, resume=resume, quiet=quiet)
    model, classes = load_model(trainer.fit())
    chosen = choose_device(device)
    write_training_report(out / "run", trainer.classes)
    dataset = make_dataset(config, open_source(config.data, "test"), train=False)
    methods = _methods(config)
    evaluation = evaluate(
        model, dataset, methods, batch_size=config.sampling.batch_size, device=chosen
    )
    if not quiet:
        evaluation.print()
    evaluation.save(paths["measures"])
    shown = evaluation.primary
    figure = draw_confusion(shown.metrics.confusion, evaluation.classes, shown.method)
    save_figure(figure, paths["confusions"])
    write_evaluation_report(
        paths["evaluation"].parent,
        evaluation,
        dataset,
        methods,
        timesteps=config.model.timesteps,
        split="test",
        settings=sampling_settings(methods[0], paths["checkpoint"]),
    )
    _predict(model, config, classes or evaluation.classes, paths, chosen)
    say(f"done in {time.perf_counter() - start:.0f} seconds; everything is in {out}:")
    for name, path in paths.items():
        say(f"  {name:<12} {path}")
    say(WARNING)
    return paths


def _draw_images(preset: str, folder: Path) -> tuple[RunConfig, str]:
    """Draw the images; returns the preset with these folders as its data, and a sentence about them."""
    data = read_config(preset).data
    counts = {
        "train": data.synthetic_per_class,
        "validation": data.synthetic_validation_per_class,
        "test": data.synthetic_test_per_class,
    }
    counts = {split: count for split, count in counts.items() if count}
    first = 0
    for split, count in counts.items():
        write_dataset(
            folder / split, count, data.synthetic_size, data.synthetic_seed, first_index=first
        )
        first += count
    drawn: dict[str, object] = {"kind": "folder", "root": str(folder), "synthetic_per_class": 0,
             "synthetic_validation_per_class": 0, "synthetic_test_per_class": 0}  # fmt: skip
    drawn |= {f"{split}_table": split for split in counts}
    text = ", ".join(f"{count} {split}" for split, count in counts.items())
    return read_config(preset, [{"data": drawn}]), f"drew {text} images of each grade in {folder}"


def _methods(config: RunConfig) -> list[SamplingOptions]:
    """The configured sampler, the published truncation and a short respaced chain."""
    options = SamplingOptions.from_config(config.sampling)
    return [options, options.with_sampler("ddpm_truncated:60"), options.with_sampler("ddim:20")]


def _predict(
    model: DiffMIC,
    config: RunConfig,
    classes: tuple[str, ...],
    paths: dict[str, Path],
    device: torch.device,
) -> None:
    """Write the predictions for the test images, their report, and a picture of a few of them."""
    augmentation = config.data.augmentation
    options = SamplingOptions.from_config(config.sampling)
    files = collect_files([paths["images"] / "test"])
    # Evenly spaced, so that the picture shows every class.
    few = files[len(files) // (2 * _SHEET) :: max(len(files) // _SHEET, 1)][:_SHEET]
    pictures = Pictures(
        classes,
        augmentation,
        paths["picture"],
        truth={path: classes.index(path.parent.name) for path in few},
        title="DiffMIC on synthetic fundus images (drawn by a program, not patients)",
    )
    predictor = FilePredictor(model, classes, augmentation, options, device=device)
    report = PredictionReport(
        paths["report"].parent,
        predictor.heading,
        augmentation,
        sampling_settings(options, paths["checkpoint"]),
    )
    report.begin()
    rows: list[Row] = []
    with contextlib.closing(report):
        for batch in predictor.batches(files, batch_size=config.sampling.batch_size, explain=True):
            report.add(batch)
            rows += batch.rows
        report.finish()
    save(Predictions(predictor.heading, tuple(rows), ()), paths["predictions"])
    predict_files(
        model, few, classes, augmentation, options, device=device, on_batch=pictures.add
    )  # fmt: skip
    pictures.finish()
