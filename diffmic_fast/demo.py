"""The demonstration: draw synthetic fundus images, train on them, evaluate, predict and draw the results."""

from __future__ import annotations

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
from diffmic_fast.inference.evaluate import Evaluation, evaluate
from diffmic_fast.inference.figures import draw_confusion, save_figure
from diffmic_fast.inference.output import save
from diffmic_fast.inference.pictures import Pictures
from diffmic_fast.inference.predict import collect_files, predict_files
from diffmic_fast.models import DiffMIC
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
    }
    say(WARNING)
    config, text = _draw_images(preset, paths["images"])
    say(text)
    resume = paths["checkpoint"] if paths["checkpoint"].exists() else None
    trainer = Trainer(config, out / "run", device=device, resume=resume, quiet=quiet)
    model, classes = load_model(trainer.fit())
    chosen = choose_device(device)
    evaluation = _evaluate(model, config, chosen)
    if not quiet:
        evaluation.print()
    evaluation.save(paths["measures"])
    shown = evaluation.primary
    figure = draw_confusion(shown.metrics.confusion, evaluation.classes, shown.method)
    save_figure(figure, paths["confusions"])
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


def _evaluate(model: DiffMIC, config: RunConfig, device: torch.device) -> Evaluation:
    """Measure the configured sampler, the published truncation and a short respaced chain."""
    options = SamplingOptions.from_config(config.sampling)
    return evaluate(
        model,
        make_dataset(config, open_source(config.data, "test"), train=False),
        [options, options.with_sampler("ddpm_truncated:60"), options.with_sampler("ddim:20")],
        batch_size=config.sampling.batch_size,
        device=device,
    )


def _predict(
    model: DiffMIC,
    config: RunConfig,
    classes: tuple[str, ...],
    paths: dict[str, Path],
    device: torch.device,
) -> None:
    """Write the predictions for the test images, and a picture of a few of them."""
    augmentation, sampling = config.data.augmentation, config.sampling
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
    predict = partial(
        predict_files,
        model,
        classes=classes,
        augmentation=augmentation,
        options=SamplingOptions.from_config(sampling),
        batch_size=sampling.batch_size,
        device=device,
    )
    save(predict(files), paths["predictions"])
    predict(few, on_batch=pictures.add)
    pictures.finish()
