"""How far a training run has come."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from diffmic_fast.training.steps import LOSSES

SUMS = (*LOSSES, "guidance_loss", "encoder_loss")


def _zeros() -> dict[str, float]:
    return dict.fromkeys(SUMS, 0.0)


@dataclass
class Progress:
    """How far a training run has come; part of its checkpoints.

    Attributes:
        epoch: finished epochs, those of the guidance model alone included.
        position: finished steps of the present epoch.
        step: finished steps of the denoiser.
        sums: losses of the present epoch, summed over its images.
        seconds: duration of the present epoch's steps.
        best: best validation metric so far, or None.
        is_best: whether the last finished epoch has it.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=_zeros)
    seconds: float = 0.0
    best: float | None = None
    is_best: bool = False

    def begin_epoch(self) -> None:
        """Move on to the next epoch."""
        self.epoch += 1
        self.position, self.sums, self.seconds = 0, _zeros(), 0.0

    def to_dict(self, processes: int) -> dict[str, Any]:
        """The entry "progress" of a checkpoint, which has `step` elsewhere."""
        values = dataclasses.asdict(self) | {"processes": processes}
        values["is_best"] = self.is_best and self.position == 0
        del values["step"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], step: int) -> Progress:
        """The inverse of `to_dict`."""
        return cls(step=step, **{key: value for key, value in values.items() if key != "processes"})
