"""A small model with all settings of a trained one, a calibration and a detector of unlike images."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from pathlib import Path

import torch
from training_runs import MODEL

from diffmic_fast import DiffMIC, Preprocessing
from diffmic_fast.calibration.calibration import Calibration, fit_calibration
from diffmic_fast.calibration.novelty import fit_novelty, image_statistics
from diffmic_fast.checkpoint import weights_digest
from diffmic_fast.diffusion.sampling_options import SamplingOptions

NAMES = ("no_dr", "mild <b>|*", "sévère\nNPDR")
SAMPLING = SamplingOptions("ddim", 2, eta=0.25, samples=3, seed=5, views=2)


def calibrated_model() -> DiffMIC:
    return copy.deepcopy(_calibrated_model())


@functools.cache
def _calibrated_model() -> DiffMIC:
    torch.manual_seed(3)
    model = DiffMIC(MODEL).eval()
    for norm in (model.denoiser.norm, model.denoiser.unetnorm1):
        norm.running_mean.normal_()
    model.class_names, model.sampling = NAMES, SAMPLING
    model.preprocessing = Preprocessing(False, 12, (0.1, 0.2, 1 / 3), (0.5, 0.25, 0.7))
    model.calibration = calibration_of(model)
    return model


def calibration_of(model: DiffMIC) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 32, 32, generator=generator)
    features, statistics = model.encode(images), image_statistics(images)
    labels = torch.arange(60) % 3
    return fit_calibration(
        torch.randn(60, 3, 3, generator=generator) + torch.eye(3)[labels][:, None],
        torch.rand(60, 3, generator=generator).softmax(dim=1),
        labels,
        SAMPLING,
        novelty=fit_novelty(features, statistics, features[:20] + 0.1, statistics[:20] + 0.1),
        weights=weights_digest(model),
    )


def redigest(folder: Path, **changes: object) -> None:
    """Change config.json as a writer of another program would, with its checksums."""
    tree = json.loads((folder / "config.json").read_text())
    tree |= changes
    for name in tree["files"]:
        content = (folder / name).read_bytes()
        tree["files"][name] = {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    tree.pop("digest", None)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(tree | {"digest": digest}))
