"""The denoiser's image encoder as a classifier, which pretrains it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Adam

from diffmic_fast.checkpoint import load_state
from diffmic_fast.models.encoders import ImageEncoder


class EncoderClassifier(nn.Module):
    """Pooled features of an image encoder and a linear layer: [B, 3, H, W] to logits [B, C].

    Attributes:
        encoder: The encoder, shared with the denoiser. Its layer `g` takes no part.
        classifier: Linear, the encoder's channels to C.
        optimizer: Adam, of all parameters that take part.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        """Build the classifier.

        Args:
            encoder: An `ImageEncoder`.
            classes: C.

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
        parameters = [*encoder.f.parameters(), *self.classifier.parameters()]
        self.optimizer = Adam(parameters, fused=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(self.encoder.pooled(images))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the encoder's own weights."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any], what: str) -> None:
        """Load what `state` returned; raises ValueError, naming `what`, where it does not fit."""
        load_state(self.classifier, state["classifier"], what)
        self.optimizer.load_state_dict(state["optimizer"])
