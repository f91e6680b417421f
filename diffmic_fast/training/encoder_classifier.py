"""The denoiser's image encoder as a classifier, which pretrains it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffmic_fast.checkpoint import load_state
from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.training.moving_average import MovingAverage
from diffmic_fast.training.optimizers import encoder_optimizer


class EncoderClassifier(nn.Module):
    """Pooled features of an image encoder and a linear layer: [B, 3, H, W] to logits [B, C].

    Attributes:
        encoder: The encoder, shared with the denoiser. Its layer `g` takes no part.
        classifier: Linear, the encoder's channels to C.
        optimizer: Adam, of all parameters that take part.
        average: Moving average of their values and of the running statistics, until `finish`; or None.
    """

    def __init__(self, encoder: nn.Module, classes: int, config: TrainingConfig) -> None:
        """Build the classifier.

        Args:
            encoder: An `ImageEncoder`.
            classes: C.
            config: Rates, dropout and average.

        Raises:
            ValueError: `encoder` is of another type.
        """
        super().__init__()
        if not isinstance(encoder, ImageEncoder):
            raise ValueError(
                f"training.encoder_epochs: the denoiser's encoder must be an ImageEncoder, got {type(encoder).__name__}"
            )
        self.encoder = encoder
        device = next(encoder.parameters()).device
        self.classifier = nn.Linear(encoder.g.in_features, classes, device=device)
        self.optimizer = encoder_optimizer(encoder.f, self.classifier, config)
        self._dropout = config.classifier_dropout
        self.average: MovingAverage | None = None
        if config.classifier_ema_decay is not None:
            averaged = nn.ModuleDict({"f": encoder.f, "classifier": self.classifier})
            self.average = MovingAverage(averaged, config.classifier_ema_decay, buffers=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        features = self.encoder.pooled(images)
        return self.classifier(nn.functional.dropout(features, self._dropout, self.training))

    def finish(self) -> None:
        """Replace the values by their average, if there is one, after the last step."""
        if self.average is not None:
            self.average.assign()
            self.average = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the encoder's own weights."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({} if self.average is None else {"average": self.average.values}),
        }

    def load(self, state: dict[str, Any], what: str) -> None:
        """Load what `state` returned; raises ValueError, naming `what`, where it does not fit."""
        load_state(self.classifier, state["classifier"], what)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.resume(state.get("average"))
