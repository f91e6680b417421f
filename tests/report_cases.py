"""Predictions and evaluations for tests of their reports."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report_pages import HOSTILE

from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.files import file_version
from diffmic_fast.data.table import ImageEntry, ImageTable
from diffmic_fast.data.transforms import evaluation_transform
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluation import Evaluation
from diffmic_fast.inference.predict import Heading, PredictedBatch, Row
from diffmic_fast.inference.report import Uncertainty
from diffmic_fast.inference.results import CALIBRATED, GUIDANCE, Output, make_results
from diffmic_fast.models import Prediction
from diffmic_fast.training.log import COLUMNS

CLASSES = ("dark", HOSTILE[0], HOSTILE[1])
HEADING = Heading(CLASSES, 0.9, None, "digest")


def make_batch(files, *, classes=CLASSES, size=32, noise=False, unreadable=(), calibrated=True):
    """Random predictions for files."""
    generator = torch.Generator().manual_seed(len(files))
    count, c = len(files), len(classes)
    probabilities = torch.randn(count, c, generator=generator).softmax(dim=1)
    label = probabilities.argmax(dim=1)
    images = torch.zeros(count, 3, size, size)
    if noise:
        images = 3 * torch.randn(count, 3, size, size, generator=generator)
    prediction = Prediction(
        probabilities=probabilities,
        label=label,
        spread=torch.full((count, c), 0.05),
        samples=torch.rand(count, 2, c, generator=generator),
        guidance=torch.full((count, 3, c), 1 / c),
        trajectory=torch.rand(count, 2, 41, c, generator=generator),
        saliency=torch.rand(count, c, 7, 7, generator=generator),
        boxes=torch.tensor([[[0, 0, 8, 8], [8, 0, 16, 8]]]).expand(count, -1, -1),
    )
    rows = [
        Row(
            file, int(label[i]), classes[label[i]], tuple(probabilities[i].tolist()), (0.05,) * c,
            calibrated, classes[0], 0.5, 0.1, 0.01, 1.0, classes[:2] if calibrated else None,
            0.02 if calibrated else None, True if calibrated else None,
            file_version(file) if Path(file).exists() else "",
        )
        for i, file in enumerate(files)
    ]  # fmt: skip
    if not files:
        return PredictedBatch([], list(unreadable), [], None, None)
    return PredictedBatch(rows, list(unreadable), [Path(f) for f in files], images, prediction)


METHODS = [SamplingOptions("ddim", 5, samples=3), SamplingOptions("ddim", 20, samples=3)]


def make_evaluation(labels, *, classes=("a", "b", "c"), samples=3, calibrated=True, bootstrap=20):
    """Guidance and two samplers; the images of a class have mostly its label."""
    rng = np.random.default_rng(1)
    labels = np.array(labels)
    count, c = len(labels), len(classes)

    def probabilities():
        p = rng.random((count, c)) + 0.5 * np.eye(c)[labels]
        return p / p.sum(axis=1, keepdims=True)

    by_samples = np.stack([labels] * samples, axis=1)
    by_samples[:, 0] = 0
    own = Uncertainty(prediction_set=np.ones((count, c), bool), flagged=labels == 0)
    outputs = [Output(GUIDANCE, probabilities(), 0.5)]
    outputs += [
        Output(m.method, probabilities(), 1.0, labels_by_samples=by_samples) for m in METHODS
    ]
    if calibrated:
        outputs += [
            Output(GUIDANCE + CALIBRATED, probabilities(), 0.5, True, own),
            Output(METHODS[0].method + CALIBRATED, probabilities(), 1.0, True, own),
        ]
    results = make_results(outputs, labels, np.arange(count), bootstrap)
    names = tuple(f"{i}.png" for i in range(count))
    reasons = () if calibrated else ("the model has no calibration",)
    return Evaluation(
        tuple(classes), labels, results, samples, 0, names=names, bootstrap=bootstrap,
        calibration="fitted somewhere" if calibrated else None, not_calibrated=reasons,
    )  # fmt: skip


def make_dataset(folder, evaluation, names=None):
    """An image of one colour for each of the evaluation, whose red is four times its number."""
    entries = []
    for i, label_ in enumerate(evaluation.labels.tolist()):
        path = folder / f"{i}.png"
        Image.new("RGB", (20, 20), (4 * i, 0, 0)).save(path)
        entries.append(ImageEntry(names[i] if names else f"{i}.png", label_, path))
    table = ImageTable(evaluation.classes, tuple(entries))
    return ImageDataset(table, evaluation_transform(20))


def write_run(folder, rows):
    """The log and the configuration of a training run, 100 images and 50 seconds an epoch."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(f"note: {HOSTILE[0]}\n")
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for epoch, row in enumerate(rows):
            values = {"epoch": epoch, "images": 100, "seconds": 50.0, "images_per_second": 2.0}
            writer.writerow(values | row)
    return folder
