"""Measures on labelled images: the guidance model alone and each sampler, side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

from diffmic_fast.checkpoint import atomic_file
from diffmic_fast.config.run import SAMPLERS, SamplingConfig, check_steps
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.metrics import ECE_BINS, NAMES, TITLES, Metrics, compute_metrics
from diffmic_fast.models import DiffMIC

GUIDANCE = "guidance alone"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Method:
    """A sampler with its steps (None: the whole chain) and, for ddim, eta."""

    sampler: str
    steps: int | None = None
    eta: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Method:
        """'ddpm', 'ddpm_truncated:60', 'ddim:20' or 'ddim:20:0.5' (eta)."""
        parts = text.split(":")
        if parts[0] not in SAMPLERS or len(parts) > 3:
            raise ValueError(
                f"sampler wants NAME[:STEPS[:ETA]] with NAME one of {', '.join(SAMPLERS)}, "
                f"got {text!r}"
            )
        try:
            steps = int(parts[1]) if len(parts) > 1 else None
            eta = float(parts[2]) if len(parts) > 2 else 0.0
        except ValueError:
            raise ValueError(f"sampler: STEPS and ETA want numbers, got {text!r}") from None
        if eta and parts[0] != "ddim":
            raise ValueError(f"sampler: only ddim has an eta, got {text!r}")
        return cls(parts[0], steps, eta)

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Method:
        """The method that a configuration's sampling section asks for."""
        return cls(sampling.sampler, sampling.steps, sampling.eta)

    @property
    def name(self) -> str:
        """As in tables: 'ddim 20'."""
        eta = f" eta {self.eta:g}" if self.eta else ""
        return f"{self.sampler} {self.steps}{eta}" if self.steps else f"{self.sampler}{eta}"


@dataclass(frozen=True)
class Result:
    """What one method gave: measures, seconds an image, and probabilities float64 [N, C]."""

    method: str
    metrics: Metrics
    seconds_per_image: float
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Results of all methods on the same images, the guidance model alone first."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    results: tuple[Result, ...]
    samples: int
    seed: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "images": len(self.labels),
            "classes": list(self.classes),
            "samples": self.samples,
            "seed": self.seed,
            "calibration_bins": ECE_BINS,
            "notes": self.notes,
            "results": [
                {
                    "method": r.method,
                    "seconds_per_image": r.seconds_per_image,
                    **r.metrics.to_dict(),
                }
                for r in self.results
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with atomic_file(path) as file:
            file.write((text + "\n").encode())

    def print(self, file: Any = None) -> None:
        """Print a table of methods and measures, with the reasons for measures that are missing."""
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
        # Outside a terminal rich assumes 80 columns and would fold the cells.
        console = Console(file=file)
        if not console.is_terminal:
            console = Console(file=file, width=140)
        console.print(table)
        reasons = {f"{TITLES[k]}: {v}" for r in self.results for k, v in r.metrics.notes.items()}
        for reason in sorted(reasons):
            console.print(f"- = not defined, {reason}", markup=False)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, call: Callable[[], _T]) -> tuple[_T, float]:
    """What a call gives, and its seconds."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


@torch.no_grad()
def evaluate(
    model: DiffMIC,
    dataset: ImageDataset,
    methods: Sequence[Method],
    *,
    samples: int = 1,
    seed: int = 0,
    precision: str = "fp32",
    compile: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Classify every image of `dataset` with the guidance model alone and with each method.

    The noise of an image follows from its pixels, `seed` and the sample number, so results depend
    neither on the batch size nor on the order of images. Guidance and encoder run once an image for
    all methods. Times are of the model alone, images already loaded and on the device; a method's
    time includes guidance and encoder as if it were the only one.
    precision, compile: as in `DiffMIC.predict`.
    on_batch: called with the number of images after each batch; may raise to stop.

    Several processes of a `torch.distributed` group take a contiguous shard each, and all get the whole result.
    """
    device = torch.device(device)
    timesteps = model.config.timesteps
    for method in methods:
        check_steps(method.sampler, method.steps, timesteps)
    classes = dataset.table.classes
    if len(classes) != model.config.classes:
        raise ValueError(
            f"evaluate: the images have {len(classes)} classes ({', '.join(classes)}), the model "
            f"{model.config.classes}"
        )
    model.eval()
    # Where it is there, not even asked: that would divide weights which `undivided` has made whole.
    if next(model.parameters()).device != torch.empty(0, device=device).device:
        model.to(device)
    # A generator of its own: creating a loader would otherwise draw from the global one.
    processes = current()
    own = processes.shard(range(len(dataset)))
    loader = DataLoader(
        Subset(dataset, own),
        batch_size,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
    networks: dict[str, Any] = {"precision": precision, "compile": compile}
    names = [GUIDANCE, *(m.name for m in methods)]
    rows: list[list[NDArray[np.float64]]] = [[] for _ in names]
    seconds = [0.0] * len(names)
    labels: list[NDArray[np.int64]] = []
    for number, (images, batch_labels, _) in enumerate(loader):
        images = images.to(device)
        if number == 0:  # first calls allocate and choose algorithms; that is not the model's time
            few = images if compile else images[:1]
            model.guide(few, **networks)
            if methods:
                model.predict(few, sampler="ddim", steps=1, seed=seed, **networks)
        guidance, guiding = _timed(device, partial(model.guide, images, **networks))
        rows[0].append(guidance.logits.fused.float().softmax(dim=1).double().cpu().numpy())
        seconds[0] += guiding
        if methods:
            features, encoding = _timed(device, partial(model.encode, images, **networks))
        for i, method in enumerate(methods, start=1):
            sample = partial(
                model.predict,
                images,
                sampler=method.sampler,
                steps=method.steps,
                eta=method.eta,
                samples=samples,
                seed=seed,
                guidance=guidance,
                features=features,
                **networks,
            )
            prediction, sampling = _timed(device, sample)
            rows[i].append(prediction.probabilities.double().cpu().numpy())
            seconds[i] += guiding + encoding + sampling
        labels.append(np.asarray(batch_labels, dtype=np.int64))
        if on_batch is not None:
            on_batch(len(images))
    found = processes.all_of((labels, rows, seconds))
    truth = np.concatenate([batch for theirs, _, _ in found for batch in theirs])
    results = []
    for i, name in enumerate(names):
        joined = np.concatenate([batch for _, theirs, _ in found for batch in theirs[i]])
        spent = sum(theirs[i] for _, _, theirs in found)
        metrics = compute_metrics(joined, truth)
        results.append(Result(name, metrics, spent / len(truth), joined))
    return Evaluation(classes, truth, tuple(results), samples, seed)
