"""Classify the images of a folder with a trained model, and write a CSV file.

    python examples/classify_folder.py MODEL FOLDER --out predictions.csv

MODEL is a folder of `DiffMIC.save_pretrained`, an id of the Hugging Face hub, or a checkpoint (`ckpt.pth`) of
`diffmic-fast train`. For each image the script prints the class, its probability and whether the image is unlike the
images of the training, which is known where the model has a calibration (docs/usage.md, "Calibration").

The command `diffmic-fast predict` does the same with more columns, a report, and several processes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from diffmic_fast import DiffMIC
from diffmic_fast.calibration import confidence
from diffmic_fast.checkpoint import load_model
from diffmic_fast.data.decode import UnreadableImageError
from diffmic_fast.data.files import scan_folder


def load(name: str) -> DiffMIC:
    """The model of a checkpoint, a folder or the hub, in evaluation mode."""
    return load_model(name)[0] if name.endswith(".pth") else DiffMIC.from_pretrained(name)


def classify(model: DiffMIC, files: Sequence[Path], batch_size: int) -> Iterator[dict[str, object]]:
    """A row per readable image."""
    names = model.class_names or [str(label) for label in range(model.config.classes)]
    for start in range(0, len(files), batch_size):
        readable, tensors = [], []
        for path in files[start : start + batch_size]:
            try:
                tensors.append(model.preprocess(path))
                readable.append(path)
            except UnreadableImageError as error:
                print(f"unreadable: {error}")
        if not readable:
            continue
        images = torch.cat(tensors)
        prediction = model.predict(images)
        prediction.check()  # raises where a result is not finite; on a GPU it waits for the device
        flagged = confidence(prediction, model.calibration, images=images).flagged
        for i, path in enumerate(readable):
            probabilities = prediction.probabilities[i].tolist()
            label = int(prediction.label[i])
            yield {
                "file": path,
                "class": names[label],
                "probability": probabilities[label],
                "unlike_training": "" if flagged is None else "yes" if flagged[i] else "no",
                **{f"probability_{n}": p for n, p in zip(names, probabilities, strict=True)},
            }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Classify the images of a folder.")
    parser.add_argument("model", help="folder, id on the hub, or checkpoint (.pth)")
    parser.add_argument("folder", help="folder with images, at any depth")
    parser.add_argument("--out", default="predictions.csv", help="CSV file to write")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    model = load(args.model).to(args.device)
    files = sorted(scan_folder(Path(args.folder), recursive=True).images)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = None
        for row in classify(model, files, args.batch_size):
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)
            unlike = ", unlike the training images" if row["unlike_training"] == "yes" else ""
            print(f"{row['file']}: {row['class']} ({row['probability']:.3f}){unlike}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
