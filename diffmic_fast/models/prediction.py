"""`Prediction`: the result of `DiffMIC.predict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffmic_fast.checks import check_finite

if TYPE_CHECKING:
    from diffmic_fast.calibration import Calibration


class Prediction(NamedTuple):
    """What `DiffMIC.predict` returns for B images.

    Attributes:
        probabilities: [B, C] float32. Published: softmax of y_0, mean over the samples. Calibrated:
            `Calibration.probabilities`.
        label: [B] int64, argmax of `probabilities`; -1 where these are not finite, which only a GPU or a compiled model
            returns (`check`).
        spread: [B, C], standard deviation of the samples' own probabilities (0 for one sample), which are the softmax
            of y_0, or calibrated by the same scaling.
        samples: [B, S, C], y_0 of every sample.
        guidance: [B, 3, C], probabilities of the guidance's fused, global and local branches, never calibrated.
        trajectory: [B, S, n + 1, C], the states of each chain from the initial one to y_0, or None.
        saliency: [B, C, h, w], or None.
        boxes: [B, K, 4] int64 patches in pixels (top, left, bottom, right; the last two exclusive), or None.
        calibrated: Whether the probabilities are.
        features: [B, F] float32 of the image encoder.
    """

    probabilities: Tensor
    label: Tensor
    spread: Tensor
    samples: Tensor
    guidance: Tensor
    trajectory: Tensor | None = None
    saliency: Tensor | None = None
    boxes: Tensor | None = None
    calibrated: bool = False
    features: Tensor | None = None

    @classmethod
    def from_states(
        cls, states: Tensor, guidance: Tensor, samples: int, *, trajectory: bool = False
    ) -> Prediction:
        """The prediction that chains lead to, without saliency and boxes.

        Args:
            states: [n, B * S, C], the samples of an image one after another; states[-1] is y_0.
            guidance: [B, 3, C].
            samples: S.
            trajectory: Keep all states.
        """
        states = states.unflatten(1, (guidance.shape[0], samples))
        y_0 = states[-1]
        each = y_0.softmax(dim=-1)
        probabilities = each.mean(dim=1)
        return cls(
            probabilities=probabilities,
            label=_labels(probabilities),
            spread=each.std(dim=1, correction=0),
            samples=y_0,
            guidance=guidance,
            trajectory=states.permute(1, 2, 0, 3) if trajectory else None,
        )

    def calibrate(self, calibration: Calibration) -> Prediction:
        """The prediction with calibrated probabilities, label and spread."""
        fused = self.guidance[:, 0]
        probabilities = calibration.probabilities(self.samples, fused)
        each = calibration.sample_probabilities(self.samples, fused)
        return self._replace(
            probabilities=probabilities,
            label=_labels(probabilities),
            spread=each.std(dim=1, correction=0),
            calibrated=True,
        )

    def check(self) -> None:
        """Wait for the result; raise FloatingPointError, with their indices, where images' results are not finite."""
        check_finite("the model's result", self.samples, FloatingPointError)


def _labels(probabilities: Tensor) -> Tensor:
    """[B], argmax of [B, C]; -1, which no index is, where a probability is NaN: argmax would say 0."""
    label = probabilities.argmax(dim=-1)
    return label.masked_fill(~torch.isfinite(probabilities).all(dim=-1), -1)
