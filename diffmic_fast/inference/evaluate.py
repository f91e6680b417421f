"""Evaluation on labelled images: the guidance model alone and each sampler, side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from diffmic_fast._optional import require
from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.metrics import ECE_BINS, NAMES, TITLES, Metrics, compute_metrics
from diffmic_fast.models import DiffMIC

GUIDANCE = "guidance alone"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Result:
    """Results of one method.

    Attributes:
        method: `GUIDANCE` or `SamplingOptions.method`.
        metrics: against the labels.
        seconds_per_image: time of the model alone.
        probabilities: [N, C].
    """

    method: str
    metrics: Metrics
    seconds_per_image: float
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Results of all methods on the same N images.

    Attributes:
        classes: names of the C classes.
        labels: [N].
        results: one for each method, the guidance model alone first.
        samples, seed: of all samplers.
        notes: remarks for the JSON file.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    results: tuple[Result, ...]
    samples: int
    seed: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text, lists and dicts for JSON; without the probabilities."""
        return {
            "images": len(self.labels),
            "classes": list(self.classes),
            "samples": self.samples,
            "seed": self.seed,
            "calibration_bins": ECE_BINS,
            "notes": self.notes,
            "results": [
                {"method": r.method, "seconds_per_image": r.seconds_per_image} | r.metrics.to_dict()
                for r in self.results
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the results as JSON; an interrupted write leaves no file."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with atomic_file(path) as file:
            file.write((text + "\n").encode())

    def print(self, file: Any = None) -> None:
        """Print a table of methods and measures to `file` (default: standard output)."""
        require("rich", extra="evaluate", purpose="printing an evaluation")
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{len(self.labels)} images, {len(self.classes)} classes")
        table.add_column("method", no_wrap=True)
        for name in NAMES:
            table.add_column(TITLES[name], justify="right")
        table.add_column("ms / image", justify="right")
        for r in self.results:
            cells = [f"{getattr(r.metrics, name):.4f}" for name in NAMES]
            cells = ["-" if cell == "nan" else cell for cell in cells]
            table.add_row(r.method, *cells, f"{1000 * r.seconds_per_image:.2f}")
        console = Console(file=file)
        if not console.is_terminal:  # rich would assume 80 columns and fold the cells
            console = Console(file=file, width=140)
        console.print(table)
        reasons = {f"{TITLES[k]}: {v}" for r in self.results for k, v in r.metrics.notes.items()}
        for reason in sorted(reasons):
            console.print(f"- = not defined, {reason}", markup=False)


def evaluate(
    model: DiffMIC,
    dataset: ImageDataset,
    methods: Sequence[SamplingOptions],
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Classify every image with the guidance model alone and with each sampler.

    The noise of an image is addressed by its pixels, the seed and the sample number, so results depend neither on the
    batch size nor on the order of the images. Guidance and encoder run once per image for all samplers. Times are of
    the model alone, with images loaded and on the device; a sampler's time includes guidance and encoder, as if it
    were the only one.

    The processes of a `torch.distributed` group take a contiguous shard of the images each; all return the whole
    result.

    Args:
        model: moved to `device` and set to evaluation mode.
        dataset: images and labels.
        methods: samplers, with the same `samples`, `seed`, `precision` and `compile`. May be empty.
        batch_size: images at a time.
        workers: processes that load images; 0 loads them in this one.
        device: where the model runs.
        on_batch: called with the number of images after each batch. May raise to stop the evaluation.

    Raises:
        ValueError: the classes of the images and of the model differ in number, or a sampler does not fit.
    """
    classes = dataset.table.classes
    if len(classes) != model.config.classes:
        raise ValueError(
            f"evaluate: the images must have the {model.config.classes} classes of the model, got {len(classes)} "
            f"({', '.join(classes)})"
        )
    for method in methods:
        method.check(model.config.timesteps)
    options = _shared_options(methods)
    device = torch.device(device)
    model.eval()
    # A module that is on the device is not asked to move: that would shard weights that are gathered for this call.
    if next(model.parameters()).device != torch.empty(0, device=device).device:
        model.to(device)
    processes = current()
    loader = DataLoader(
        Subset(dataset, processes.shard(range(len(dataset)))),
        batch_size,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),  # else creating the loader draws from torch's
    )
    labels: list[NDArray[np.int64]] = []
    batches: list[list[_Timed]] = []
    for images, batch_labels, _ in loader:
        images = images.to(device)
        if not batches:
            _warm_up(model, images, options, sample=bool(methods))
        batches.append(_classify(model, images, methods, options))
        labels.append(np.asarray(batch_labels, dtype=np.int64))
        if on_batch is not None:
            on_batch(len(images))
    found = processes.all_gather((labels, batches))
    truth = np.concatenate([batch for theirs, _ in found for batch in theirs])
    every = [batch for _, theirs in found for batch in theirs]
    results = []
    for i, name in enumerate([GUIDANCE, *(m.method for m in methods)]):
        probabilities = np.concatenate([batch[i][0] for batch in every])
        seconds = sum(batch[i][1] for batch in every) / len(truth)
        results.append(Result(name, compute_metrics(probabilities, truth), seconds, probabilities))
    return Evaluation(classes, truth, tuple(results), options.samples, options.seed)


def _shared_options(methods: Sequence[SamplingOptions]) -> SamplingOptions:
    """What all methods have in common, with the default sampler."""
    shared = {replace(m, sampler="ddpm", steps=None, eta=0.0) for m in methods}
    if len(shared) > 1:
        raise ValueError(
            "evaluate: all methods must have the same samples, seed, precision and compile, got "
            f"{', '.join(map(repr, methods))}"
        )
    return shared.pop() if shared else SamplingOptions()


def _warm_up(model: DiffMIC, images: Tensor, options: SamplingOptions, sample: bool) -> None:
    """Make the first calls, which allocate memory and choose algorithms, outside the timed ones."""
    few = images if options.compile else images[:1]
    model.guide(few, precision=options.precision, compile=options.compile)
    if sample:
        model.predict(few, **asdict(replace(options, sampler="ddim", steps=1, samples=1)))


_Timed = tuple[NDArray[np.float64], float]


def _classify(
    model: DiffMIC, images: Tensor, methods: Sequence[SamplingOptions], options: SamplingOptions
) -> list[_Timed]:
    """Probabilities [B, C] and seconds of the guidance model alone and of each method."""
    networks: dict[str, Any] = {"precision": options.precision, "compile": options.compile}
    guidance, guiding = _time(images.device, partial(model.guide, images, **networks))
    found = [(_to_numpy(guidance.logits.fused.float().softmax(dim=1)), guiding)]
    if methods:
        features, encoding = _time(images.device, partial(model.encode, images, **networks))
    for method in methods:
        predict = partial(
            model.predict, images, guidance=guidance, features=features, **asdict(method)
        )
        prediction, sampling = _time(images.device, predict)
        found.append((_to_numpy(prediction.probabilities), guiding + encoding + sampling))
    return found


def _to_numpy(probabilities: Tensor) -> NDArray[np.float64]:
    return probabilities.double().cpu().numpy()


def _time(device: torch.device, call: Callable[[], _T]) -> tuple[_T, float]:
    """The result of a call and its seconds, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
