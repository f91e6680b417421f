"""One optimizer step of each model, with all that carries over from step to step (spec 5)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffmic_fast.models import DiffMIC, ImageEncoder, Trunk
from diffmic_fast.training.config import TrainingConfig
from diffmic_fast.training.optimize import MovingAverage, half_cosine, warmup_cosine

LOSSES = ("loss", "noise_loss", "mmd_global", "mmd_local")


class Steps:
    """The optimizers of a DiffMIC, the moving average and the generator of training noise.

    model: on the device it trains on.
    config, seed: rates, clipping, average, precision; seed of timesteps and noise.
    """

    def __init__(self, model: DiffMIC, config: TrainingConfig, seed: int) -> None:
        self.model, self.config = model, config
        # One group, as in published checkpoints, unless the encoder has a rate of its own.
        groups = [{"params": list(model.denoiser.parameters())}]
        self._relative_rates = [1.0]
        if config.encoder_learning_rate is not None:
            of_encoder = list(model.denoiser.encoder_x.parameters())
            inside = set(map(id, of_encoder))
            rest = [p for p in model.denoiser.parameters() if id(p) not in inside]
            groups = [{"params": rest}, {"params": of_encoder}]
            self._relative_rates.append(config.encoder_learning_rate / config.learning_rate)
        # fused: one pass over each tensor, several times as fast as the plain loop on a CPU.
        self.optimizer = torch.optim.Adam(
            groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.guidance_optimizer = torch.optim.Adam(
            model.guidance.parameters(),
            lr=config.guidance_learning_rate,
            weight_decay=config.guidance_weight_decay,
            amsgrad=True,
            fused=True,
        )
        self.average = MovingAverage(model.denoiser, config.ema_decay) if config.ema_decay else None
        self.noise = torch.Generator().manual_seed(seed)
        if config.recompute:
            guidance = model.guidance
            for part in (model.denoiser.encoder_x, guidance.ds_net, guidance.dn_resnet):
                if not isinstance(part, (ImageEncoder, Trunk)):
                    raise ValueError(
                        f"training.recompute: a {type(part).__name__}, which is in the place of an "
                        "image network, would have to recompute by itself"
                    )
                part.recompute = True

    def _autocast(self, images: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(images.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _portions(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The batch in `accumulation` parts of nearly equal size, of two images at least, with each one's share."""
        count = max(min(self.config.accumulation, len(images) // 2), 1)
        parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
        for some, their_labels in parts:
            yield some, their_labels, len(some) / len(images)

    def denoiser_step(self, images: Tensor, labels: Tensor, epoch: float) -> dict[str, float]:
        """A step of the denoiser and its average at a fractional joint epoch; returns LOSSES.

        Raises ValueError, weights untouched, if a loss or the gradient is not finite.
        """
        c = self.config
        rate = warmup_cosine(
            epoch,
            rate=c.learning_rate,
            minimum=c.min_learning_rate,
            warmup=c.warmup_epochs,
            epochs=c.epochs,
        )
        for group, relative in zip(self.optimizer.param_groups, self._relative_rates, strict=True):
            group["lr"] = rate * relative
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = dict.fromkeys(LOSSES, 0.0)
        for some, their_labels, share in self._portions(images, labels):
            with self._autocast(images):
                losses = self.model.loss(some, their_labels, draws=c.draws, generator=self.noise)
            values = torch.stack(list(losses)).tolist()
            if not all(map(math.isfinite, values)):
                described = ", ".join(f"{k} {v:g}" for k, v in zip(LOSSES, values, strict=True))
                raise ValueError(f"the denoiser's loss is not finite ({described})")
            torch.autograd.backward(share * losses.total)
            for key, value in zip(LOSSES, values, strict=True):
                parts[key] += share * value
        limit = c.gradient_clip if c.gradient_clip is not None else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), limit))
        if not math.isfinite(norm):
            raise ValueError(f"the norm of the denoiser's gradient is {norm}")
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return parts

    def guidance_step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        """A step of the guidance model at `progress` (0 to 1) of the run; returns its loss.

        Raises ValueError, weights untouched, if the loss is not finite.
        """
        rate = self.config.guidance_learning_rate
        if self.config.guidance_cosine:
            rate = half_cosine(progress, rate, 0.0)
        for group in self.guidance_optimizer.param_groups:
            group["lr"] = rate
        self.model.guidance.train()
        self.guidance_optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for some, their_labels, share in self._portions(images, labels):
            with self._autocast(images):
                fused = self.model.guidance(some)[0]
            loss = nn.functional.cross_entropy(fused.float(), their_labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"the guidance model's loss is {value}")
            torch.autograd.backward(share * loss)
            total += share * value
        self.guidance_optimizer.step()
        return total
