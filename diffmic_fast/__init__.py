"""DiffMIC, a diffusion model that classifies medical images, made fast.

    from diffmic_fast import DiffMIC, DiffMICConfig

    model = DiffMIC(DiffMICConfig(classes=3)).eval()
    result = model.predict(images, sampler="ddim", steps=20, samples=8)

`diffmic_fast.compat` has the names and signatures of the published program, `diffmic_fast.ops` the operations.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmic_fast.estimator import DiffMICClassifier
    from diffmic_fast.models import (
        DCG,
        ConditionalModel,
        DiffMIC,
        DiffMICConfig,
        DiffMICLoss,
        Prediction,
        Preprocessing,
    )

__version__ = "0.1.0"

__all__ = [
    "DCG",
    "ConditionalModel",
    "DiffMIC",
    "DiffMICClassifier",
    "DiffMICConfig",
    "DiffMICLoss",
    "Prediction",
    "Preprocessing",
    "__version__",
]


def __getattr__(name: str) -> object:
    # The models import torchvision, which `info` must be able to do without.
    if name in __all__:
        module = "estimator" if name == "DiffMICClassifier" else "models"
        return getattr(importlib.import_module(f"diffmic_fast.{module}"), name)
    raise AttributeError(f"module 'diffmic_fast' has no attribute {name!r}")
