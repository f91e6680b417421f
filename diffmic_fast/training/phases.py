"""The phases of a training run, each a range of its epochs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from diffmic_fast.config.training import TrainingConfig


class Phase(NamedTuple):
    """A range of epochs that train the same models.

    Attributes:
        name: What is trained: the guidance model, the denoiser's encoder as a classifier, both models, or the
            denoiser's layers on cached features.
        first: The first epoch's number, from 0.
        epochs: The number of epochs.
    """

    name: Literal["guidance", "encoder", "joint", "features"]
    first: int
    epochs: int

    @property
    def trains_denoiser(self) -> bool:
        """Whether the diffusion is trained, and so validated."""
        return self.name in ("joint", "features")


def phases(config: TrainingConfig) -> tuple[Phase, ...]:
    """All phases of a run in order; some may have no epochs."""
    guidance, encoder, joint = config.guidance_epochs, config.encoder_epochs, config.epochs
    return (
        Phase("guidance", 0, guidance),
        Phase("encoder", guidance, encoder),
        Phase("joint", guidance + encoder, joint),
        Phase("features", guidance + encoder + joint, config.feature_epochs),
    )


def phase_at(config: TrainingConfig, epoch: int) -> Phase:
    """The phase of an epoch; the last one with epochs for an epoch after the end."""
    with_epochs = [phase for phase in phases(config) if phase.epochs]
    return next((p for p in with_epochs if epoch < p.first + p.epochs), with_epochs[-1])


def guidance_epochs(config: TrainingConfig) -> int:
    """The number of epochs that train the guidance model."""
    return config.guidance_epochs + (config.epochs if config.joint_guidance else 0)
