"""The demonstration: synthetic fundus images, from drawing them to pictures of the diagnosis."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from diffmic_fast.checkpoint import NAME, load_model
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.synthetic_fundus import write_dataset
from diffmic_fast.inference import evaluate as ev
from diffmic_fast.inference import predict as pr
from diffmic_fast.inference.figures import draw_confusion, save
from diffmic_fast.training.trainer import Trainer, choose_device, make_dataset

WARNING = (
    "These are synthetic images, drawn by a program. What is learned and measured here shows that "
    "the parts work; it says nothing about patients."
)
_SHEET = 6  # images on the demonstration's picture


def demo_config(out: Path, preset: str = "demo") -> RunConfig:
    """The demo preset, with the images as folders of classes below `out`/images."""
    config = read_config(preset)
    data = dataclasses.replace(
        config.data,
        kind="folder",
        root=str(out / "images"),
        train_table="train",
        test_table="test",
        synthetic_per_class=0,
        synthetic_test_per_class=0,
    )
    return dataclasses.replace(config, data=data)


def run_demo(
    out: str | Path, *, device: str = "auto", preset: str = "demo", quiet: bool = False
) -> dict[str, Path]:
    """Draw images, train, evaluate, predict a folder, draw the picture; returns what it wrote.

    A second run in the same folder takes up the first where it stopped. Raises what Trainer does.
    """
    from diffmic_fast.data.sources import open_source

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    start = time.perf_counter()
    out = Path(out)
    say(WARNING)
    source = read_config(preset).data
    config = demo_config(out, preset)
    images = out / "images"
    first = 0
    for split, count in (
        ("train", source.synthetic_per_class),
        ("test", source.synthetic_test_per_class),
    ):
        write_dataset(
            images / split, count, source.synthetic_size, source.synthetic_seed, first_index=first
        )
        first += count
    say(f"drew {source.synthetic_per_class} training and {source.synthetic_test_per_class} test "
        f"images of each grade in {images}")  # fmt: skip

    run = out / "run"
    resume = run / NAME if (run / NAME).exists() else None
    trainer = Trainer(config, run, device=device, resume=resume, quiet=quiet)
    checkpoint = trainer.fit()

    model, names = load_model(checkpoint)
    table = open_source(config.data, "test")
    classes = names or table.classes
    chosen = choose_device(device)
    s = config.sampling
    # The configured sampler first, then the published truncation and a short respaced chain.
    methods = [ev.Method.of(s), ev.Method("ddpm_truncated", 60), ev.Method("ddim", 20)]
    evaluation = ev.evaluate(
        model,
        make_dataset(config, table, train=False),
        methods,
        samples=s.samples,
        seed=s.seed,
        batch_size=s.batch_size,
        device=chosen,
    )
    if not quiet:
        evaluation.print()
    paths = {
        "images": images,
        "checkpoint": checkpoint,
        "log": run / "log.csv",
        "measures": out / "evaluation.json",
        "confusions": out / "confusion.png",
        "predictions": out / "predictions.csv",
        "picture": out / "picture.png",
    }
    evaluation.save(paths["measures"])
    shown = evaluation.results[1]
    save(draw_confusion(shown.metrics.confusion, classes, shown.method), paths["confusions"])

    files = pr.collect_files([images / "test"])
    # The picture shows files from all over the folder, not the first ones of one class.
    chosen_files = files[len(files) // (2 * _SHEET) :: max(len(files) // _SHEET, 1)][:_SHEET]
    predictions = pr.predict_files(
        model, files, classes, config.data.augmentation, methods[0],
        samples=s.samples, seed=s.seed, batch_size=s.batch_size, device=chosen,
    )  # fmt: skip
    pr.save(predictions, paths["predictions"])
    pictures = pr.Pictures(
        classes,
        config.data.augmentation,
        paths["picture"],
        None,
        truth={path: classes.index(path.parent.name) for path in chosen_files},
        title="DiffMIC on synthetic fundus images (drawn by a program, not patients)",
    )
    pr.predict_files(
        model, chosen_files, classes, config.data.augmentation, methods[0],
        samples=s.samples, seed=s.seed, batch_size=s.batch_size, device=chosen,
        explain=True, on_batch=pictures.add,
    )  # fmt: skip
    pictures.finish()
    say(f"done in {time.perf_counter() - start:.0f} seconds; everything is in {out}:")
    for name, path in paths.items():
        say(f"  {name:<12} {path}")
    say(WARNING)
    return paths
