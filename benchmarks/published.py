"""The published program's training step, re-implemented in eager PyTorch from this package's modules.

Three passes of the denoiser, each with its own image encoder, of the plain modules; mean squared error and MMD by the
reference, clipping, `torch.optim.Adam` with its defaults. Timesteps, the forward process and learning rates are this
package's own functions: a fault in those would be in both ways.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmic_fast import DiffMIC
from diffmic_fast.config.run import TrainingConfig
from diffmic_fast.diffusion.schedule import q_sample
from diffmic_fast.models.loss import antithetic_timesteps
from diffmic_fast.reference.mmd import mmd
from diffmic_fast.training.learning_rates import half_cosine, warmup_cosine


def published_loss(
    model: DiffMIC, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """The loss (docs/algorithm.md, "Training step"), branch after branch; draws what `DiffMIC.loss` draws."""
    denoiser = model.denoiser
    timesteps = antithetic_timesteps(len(images), model.config.timesteps, generator)
    noise = torch.randn(len(images), model.config.classes, generator=generator).to(images.dtype)
    model.guidance.eval()
    with torch.no_grad():
        priors = [logits.softmax(dim=1) for logits in model.guidance(images)]
    y_0 = F.one_hot(labels, model.config.classes).to(images.dtype)
    found = []
    for prior in priors:
        y_t = q_sample(y_0, prior, model.schedule, timesteps, noise)
        h = denoiser.encoder_x(images)
        h = denoiser.norm(h) * _layer(denoiser, 1, torch.cat((y_t, prior), dim=1), timesteps)
        for number in (2, 3):
            h = _layer(denoiser, number, h, timesteps)
        found.append(denoiser.lin4(h))
    others = sum(mmd(noise, eps) for eps in found[1:])
    return F.mse_loss(found[0], noise) + model.config.mmd_weight * others


def _layer(denoiser: nn.Module, number: int, h: Tensor, timesteps: Tensor) -> Tensor:
    layer, norm = getattr(denoiser, f"lin{number}"), getattr(denoiser, f"unetnorm{number}")
    return F.softplus(norm(layer(h, timesteps)))


class Published:
    """Both models' steps.

    Attributes:
        model: trained in place, moved to the memory layout.
        config: rates and clipping. No moving average is kept.
        autocast: run forward passes under autocast to bfloat16.
    """

    def __init__(
        self,
        model: DiffMIC,
        config: TrainingConfig,
        seed: int,
        layout: torch.memory_format = torch.contiguous_format,
        *,
        autocast: bool = False,
    ) -> None:
        self.model, self.config, self.autocast = model.to(memory_format=layout), config, autocast
        encoder = list(model.denoiser.encoder_x.parameters())
        inside = set(map(id, encoder))
        rest = [p for p in model.denoiser.parameters() if id(p) not in inside]
        self.optimizer = torch.optim.Adam([{"params": rest}, {"params": encoder}])
        self.of_guidance = torch.optim.Adam(model.guidance.parameters(), amsgrad=True)
        self.noise = torch.Generator().manual_seed(seed)

    def step(self, images: Tensor, labels: Tensor, epoch: float) -> tuple[float, float]:
        """A joint step; the losses of the denoiser and of the guidance model."""
        loss = self.denoiser_step(images, labels, epoch)
        return loss, self.guidance_step(images, labels, epoch / self.config.epochs)

    def denoiser_step(self, images: Tensor, labels: Tensor, epoch: float) -> float:
        """A step of the denoiser at a fractional epoch; its loss."""
        c = self.config
        rate = warmup_cosine(
            epoch,
            rate=c.learning_rate,
            minimum=c.min_learning_rate,
            warmup=c.warmup_epochs,
            epochs=c.epochs,
        )
        rest, encoder = self.optimizer.param_groups
        of_encoder = c.encoder_learning_rate or c.learning_rate
        rest["lr"], encoder["lr"] = rate, rate * of_encoder / c.learning_rate
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = published_loss(self.model, images, labels, self.noise)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), c.gradient_clip or math.inf)
        self.optimizer.step()
        return float(loss.detach())

    def guidance_step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        """A step of the guidance model at `progress` (0 to 1) of the run; its loss."""
        rate = self.config.guidance_learning_rate
        if self.config.guidance_cosine:
            rate = half_cosine(progress, rate, 0.0)
        self.of_guidance.param_groups[0]["lr"] = rate
        self.model.guidance.train()
        self.of_guidance.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.model.guidance(images)[0], labels)
        torch.autograd.backward(loss)
        self.of_guidance.step()
        return float(loss.detach())
