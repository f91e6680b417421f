"""The optimizer step of each model, and all state that carries over from step to step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffmic_fast.checkpoint import load_state
from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.distributed.fsdp import full, gather_state, is_sharded, shard_like
from diffmic_fast.distributed.parallel_module import ParallelModule
from diffmic_fast.distributed.processes import Processes, current
from diffmic_fast.distributed.sync_batch_norm import synchronize_statistics
from diffmic_fast.models import BranchForward, DiffMIC, ImageEncoder, Trunk
from diffmic_fast.models.loss import antithetic_timesteps
from diffmic_fast.training.deferred_gradients import DeferredGradients
from diffmic_fast.training.encoder_classifier import EncoderClassifier
from diffmic_fast.training.learning_rates import warmup_cosine
from diffmic_fast.training.micro_batches import MicroBatch, check_batch, split_batch
from diffmic_fast.training.moving_average import MovingAverage
from diffmic_fast.training.optimizers import (
    deferrable_weights,
    denoiser_optimizer,
    guidance_optimizer,
    set_classifier_rate,
    set_denoiser_rate,
)
from diffmic_fast.training.phases import Phase, guidance_epochs
from diffmic_fast.training.precision import bfloat16_passes
from diffmic_fast.training.targets import soft_labels

LOSSES = ("loss", "noise_loss", "mmd_global", "mmd_local")


class Steps:
    """Optimizer steps of a DiffMIC (docs/algorithm.md, "Training step").

    Attributes:
        model: what is trained.
        config: rates, clipping, average, precision.
        processes: those that share each step; all of them make the same calls, with at least two images each.
        optimizer: of the denoiser.
        guidance_optimizer: of the guidance model.
        average: moving average of the denoiser's weights, or None.
        guidance_average: moving average of the guidance model until `finish_guidance`, or None.
        encoder: the denoiser's image encoder as a classifier, if it has epochs of its own.
        noise: CPU generator of timesteps and noise.
    """

    def __init__(
        self, model: DiffMIC, config: TrainingConfig, seed: int, processes: Processes | None = None
    ) -> None:
        """Prepare a model, on its device, for training in place; `seed` is that of timesteps and noise.

        Raises:
            ValueError: precision "auto", `recompute` or `encoder_epochs` with a network that does not support it, or
                several processes with epochs of a single one.
        """
        if config.precision == "auto":
            raise ValueError(
                "Steps: precision must be fp32 or bf16, got auto; Trainer chooses one of them"
            )
        self.model, self.config = model, config
        self.processes = current() if processes is None else processes
        several = self.processes.world_size > 1
        if several and (config.encoder_epochs or config.feature_epochs):
            raise ValueError(
                "Steps: encoder_epochs and feature_epochs are for a single process, got "
                f"{self.processes.world_size} processes; train jointly (epochs) with several"
            )
        if several and config.classifier_dropout:
            raise ValueError(
                "Steps: classifier_dropout must be 0 with several processes, whose masks would not be those of one "
                f"process, got {config.classifier_dropout} with {self.processes.world_size} processes"
            )
        if several and config.sync_batch_norm:
            synchronize_statistics(model)
        branches = BranchForward(model.denoiser)
        self._denoiser = ParallelModule(
            model.denoiser, self.processes, shard=config.fsdp, entry=branches
        )
        self._guidance = ParallelModule(model.guidance, self.processes, shard=config.fsdp)
        self.optimizer = denoiser_optimizer(model.denoiser, config)
        self.guidance_optimizer = guidance_optimizer(model.guidance, config)
        self.average = MovingAverage(model.denoiser, config.ema_decay) if config.ema_decay else None
        self.encoder: EncoderClassifier | None = None
        if config.encoder_epochs:
            self.encoder = EncoderClassifier(model.denoiser.encoder_x, model.config.classes, config)
        self.guidance_average: MovingAverage | None = None
        if config.classifier_ema_decay is not None and config.guidance_epochs:
            self.guidance_average = MovingAverage(
                model.guidance, config.classifier_ema_decay, buffers=True
            )
        model.guidance.dropout = config.classifier_dropout
        self.noise = torch.Generator().manual_seed(seed)
        if config.recompute:
            self._recompute_activations()
        # Several processes reduce gradients while the backward pass goes on.
        self._deferrable = [] if several else deferrable_weights(model.denoiser)

    def _recompute_activations(self) -> None:
        guidance = self.model.guidance
        for network in (self.model.denoiser.encoder_x, guidance.ds_net, guidance.dn_resnet):
            if not isinstance(network, (ImageEncoder, Trunk)):
                raise ValueError(
                    f"training.recompute: image networks must be ImageEncoder or Trunk, got {type(network).__name__}"
                )
            network.recompute = True

    def denoiser_step(self, images: Tensor, labels: Tensor, epoch: float) -> dict[str, float]:
        """One step of the denoiser and its moving average. On a GPU it waits once, for the losses and the gradient.

        Args:
            images: [B, 3, H, W], this process's part of the batch.
            labels: [B] int64.
            epoch: fractional joint epoch, which decides the learning rate.

        Returns:
            LOSSES of the whole batch.

        Raises:
            ValueError: a loss or the gradient is not finite; weights are unchanged.
        """
        rate = self._denoiser_rate(epoch, self.config.epochs)
        set_denoiser_rate(self.optimizer, rate, self.config)
        return self._update_denoiser(self._begin(self.model, images, labels))

    def feature_step(
        self, features: Tensor, prior: Tensor, labels: Tensor, epoch: float
    ) -> dict[str, float]:
        """As `denoiser_step`, on rows of `ImageEncoder.pooled` and the guidance model's label distributions.

        Args:
            features: [B, channels].
            prior: [3, B, C], of the fused, global and local branches.
            labels: [B] int64.
            epoch: fractional epoch of these steps' own.
        """
        rate = self._denoiser_rate(epoch, self.config.feature_epochs)
        # Of the encoder only its last layer takes part, which nothing has trained before.
        set_denoiser_rate(self.optimizer, rate, self.config, encoder=rate)
        (part,) = self._begin(self.model, features, labels, parts=1)
        return self._update_denoiser([dataclasses.replace(part, prior=prior)])

    def _denoiser_rate(self, epoch: float, epochs: int) -> float:
        c = self.config
        return warmup_cosine(
            epoch,
            rate=c.learning_rate,
            minimum=c.min_learning_rate,
            warmup=c.warmup_epochs,
            epochs=epochs,
        )

    def _update_denoiser(self, parts: list[MicroBatch]) -> dict[str, float]:
        """Forward and backward passes of a batch, and one step of the optimizer; returns LOSSES."""
        found: list[Tensor] = []
        for part in parts:
            deferred = DeferredGradients(self._deferrable)
            with self._denoiser.micro_batch(last=part.last):
                with self._autocast(part.images):
                    loss, values = self._losses(part, deferred)
                found.append(values)
                torch.autograd.backward(loss)
            deferred.accumulate()
        norm = self._clip(self.model.denoiser, self.config.gradient_clip)
        rows, size = _read(found, norm)
        for row in rows:
            if not all(map(math.isfinite, row)):
                described = ", ".join(f"{k} {v:g}" for k, v in zip(LOSSES, row, strict=True))
                raise ValueError(f"the denoiser's loss is not finite ({described})")
        _check_norm("denoiser", size)
        totals = {
            key: sum(column) for key, column in zip(LOSSES, zip(*rows, strict=True), strict=True)
        }
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self._end(self.model.denoiser)
        return totals

    def _clip(self, module: nn.Module, limit: float | None) -> Tensor:
        """Clip the gradient of a module to a norm, if one is given; returns the norm before, which is not checked."""
        largest = math.inf if limit is None else limit
        return full(nn.utils.clip_grad_norm_(module.parameters(), largest))

    def guidance_step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        """One step of the guidance model; errors as `denoiser_step`.

        Args:
            images: [B, 3, H, W].
            labels: [B] int64.
            progress: 0 to 1, the finished part of the epochs that train this model, which decides the learning rate.

        Returns:
            The cross-entropy over the whole batch.
        """
        c = self.config
        rate = warmup_cosine(
            progress,
            rate=c.guidance_learning_rate,
            minimum=0.0 if c.guidance_cosine else c.guidance_learning_rate,
            warmup=c.guidance_warmup_epochs / max(guidance_epochs(c), 1),
            epochs=1.0,
        )
        set_classifier_rate(self.guidance_optimizer, rate, c)
        found: list[Tensor] = []
        for part in self._begin(self.model.guidance, images, labels):
            with self._guidance.micro_batch(last=part.last):
                with self._autocast(images):
                    fused = self._guidance(part.images)[0]
                loss = self._cross_entropy(fused, part.labels)
                found.append(self.processes.all_reduce(part.share * loss.detach())[None])
                # The gradient of the batch is the sum of those of the processes.
                torch.autograd.backward(part.share * self._guidance.divisor * loss)
        norm = self._clip(self.model.guidance, c.guidance_gradient_clip)
        total = _total("guidance model", *_read(found, norm))
        self.guidance_optimizer.step()
        self._end(self.model.guidance)
        if self.guidance_average is not None:
            self.guidance_average.update()
        return total

    def drop_average(self, phase: Phase) -> None:
        """Drop the moving average of a finished phase, for a resumed run."""
        if phase.name == "guidance":
            self.guidance_average = None
        elif phase.name == "encoder" and self.encoder is not None:
            self.encoder.average = None

    def finish(self, phase: Phase) -> None:
        """At the end of a phase: assign a classifier's moving average to it, and restart averages of other models."""
        if phase.name == "guidance" and self.guidance_average is not None:
            self.guidance_average.assign()
            self.guidance_average = None
        if phase.name == "encoder" and self.encoder is not None:
            self.encoder.finish()
            if self.average is not None:
                self.average.reset("encoder_x.")
        if phase.name == "joint" and self.config.feature_epochs and self.average is not None:
            # The features that follow are those of the present encoder, and so must be those of validation.
            self.average.reset("encoder_x.f.")

    def encoder_step(self, images: Tensor, labels: Tensor, epoch: float) -> float:
        """One step of the denoiser's image encoder as a classifier; errors as `denoiser_step`.

        Args:
            images: [B, 3, H, W].
            labels: [B] int64.
            epoch: fractional epoch of the encoder's own, which decides the learning rate.

        Returns:
            The cross-entropy over the whole batch.
        """
        c = self.config
        rate = warmup_cosine(
            epoch,
            rate=c.learning_rate if c.encoder_learning_rate is None else c.encoder_learning_rate,
            minimum=0.0,
            warmup=c.warmup_epochs,
            epochs=c.encoder_epochs,
        )
        encoder = self.encoder
        assert encoder is not None
        set_classifier_rate(encoder.optimizer, rate, c)
        found: list[Tensor] = []
        for part in self._begin(encoder, images, labels):
            with self._autocast(images):
                logits = encoder(part.images)
            loss = part.share * self._cross_entropy(logits, part.labels)
            found.append(loss.detach()[None])
            torch.autograd.backward(loss)
        norm = self._clip(encoder, c.gradient_clip)
        total = _total("encoder", *_read(found, norm))
        encoder.optimizer.step()
        if encoder.average is not None:
            encoder.average.update()
        if self.average is not None:
            self.average.reset("encoder_x.")
        return total

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy with the configured targets, in float32 at least."""
        c = self.config
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not c.label_smoothing:
            return nn.functional.cross_entropy(logits, labels)
        targets = soft_labels(labels, logits.shape[1], c.label_smoothing, ordinal=c.ordinal)
        return nn.functional.cross_entropy(logits, targets.to(logits.dtype))

    def state(self) -> dict[str, Any]:
        """Collective: state dicts for a checkpoint; sharded ones are gathered on rank 0, which writes them."""
        model, average = self.model, self.average
        state: dict[str, Any] = {
            "denoiser": model.denoiser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average.values if average else {},
            "guidance": model.guidance.state_dict(),
            "guidance_optimizer": self.guidance_optimizer.state_dict(),
        }
        if self.guidance_average is not None:
            state["guidance_average"] = self.guidance_average.values
        if self.encoder is not None:
            state["encoder"] = self.encoder.state()
        return gather_state(state, self.processes) if is_sharded(model.denoiser) else state

    def load_state(self, state: dict[str, Any], what: str) -> None:
        """Collective: load what `state` returned, given on every process.

        Raises:
            ValueError: keys or shapes, of the file named `what`, that differ from the models'.
        """
        for name, module in (("denoiser", self.model.denoiser), ("guidance", self.model.guidance)):
            own = module.state_dict()
            values = {k: shard_like(v, own[k]) if k in own else v for k, v in state[name].items()}
            load_state(module, values, f"{what}, {name}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.guidance_optimizer.load_state_dict(state["guidance_optimizer"])
        if self.encoder is not None:
            self.encoder.load(state["encoder"], f"{what}, encoder")
        for optimizer in (self.optimizer, self.guidance_optimizer):
            for parameter, moments in optimizer.state.items():
                for key, value in moments.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        moments[key] = shard_like(value, parameter)
        if self.average is not None:
            self.average.load(state["average"])
        if self.guidance_average is not None:
            self.guidance_average.resume(state.get("guidance_average"))

    def _begin(
        self, module: nn.Module, images: Tensor, labels: Tensor, parts: int | None = None
    ) -> list[MicroBatch]:
        """Check a batch, set the module to training mode and free all gradients; returns the micro-batches."""
        check_batch(images, labels, self.model.config.classes, self.processes)
        module.train()
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)
        return split_batch(images, labels, parts or self.config.accumulation, self.processes)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        others = [] if self.encoder is None else [self.encoder.optimizer]
        return [self.optimizer, self.guidance_optimizer, *others]

    def _end(self, module: nn.Module) -> None:
        self._denoiser.reshard()
        self._guidance.reshard()
        if not self.config.sync_batch_norm:
            self.processes.broadcast_buffers(module)

    def _autocast(self, images: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return bfloat16_passes(images.device)
        return contextlib.nullcontext()

    def _losses(self, part: MicroBatch, deferred: DeferredGradients) -> tuple[Tensor, Tensor]:
        """The loss to differentiate on this process, and [4] float64: the micro-batch's share of LOSSES over all."""

        def denoiser(*arguments: Any) -> Any:
            with deferred:
                return self._denoiser(*arguments)

        config, processes = self.model.config, self.processes
        counts = [count * self.config.draws for count in part.counts]
        timesteps = antithetic_timesteps(sum(counts), config.timesteps, self.noise)
        noise = torch.randn(
            sum(counts), config.classes, generator=self.noise, dtype=torch.float32, device="cpu"
        )
        start = sum(counts[: processes.rank])
        own = slice(start, start + counts[processes.rank])
        hidden = None
        if self.config.prior_dropout:
            drawn = torch.rand(
                sum(part.counts), generator=self.noise, dtype=torch.float32, device="cpu"
            )
            drawn = drawn < self.config.prior_dropout
            first = sum(part.counts[: processes.rank])
            hidden = drawn[first : first + part.counts[processes.rank]]
        gather = self.config.gather_mmd and processes.world_size > 1
        losses = self.model.loss(
            part.images,
            part.labels,
            draws=self.config.draws,
            timesteps=timesteps[own],
            noise=noise[own],
            denoiser=denoiser,
            prior=part.prior,
            hidden=hidden,
            gather=functools.partial(processes.gather_rows, counts=counts) if gather else None,
        )
        share = part.share
        if processes.world_size == 1:
            return share * losses.total, share * torch.stack(list(losses)).detach().double()
        # The MMD of gathered rows has the same value on every process, and there the gradient of the process's rows.
        mmd_share = sum(part.counts) / part.total if gather else share
        mmds = mmd_share * torch.stack((losses.mmd_global, losses.mmd_local))
        noise_loss = share * losses.noise
        values = torch.cat((noise_loss.detach()[None], mmds.detach()))
        values[1:] /= processes.world_size if gather else 1
        values = processes.all_reduce(values.double())
        total = values[0] + config.mmd_weight * values[1:].sum()
        # The gradient of the batch is the sum of those of the processes.
        loss = self._denoiser.divisor * (noise_loss + config.mmd_weight * mmds.sum())
        return loss, torch.cat((total[None], values))


def _read(parts: Sequence[Tensor], norm: Tensor) -> tuple[list[list[float]], float]:
    """Read what the micro-batches of a step and its gradient gave: the one wait of a step for a GPU.

    The backward passes do not wait for it, and the optimizer's step must: it follows only if all is finite.

    Args:
        parts: [n] each, the values of a micro-batch.
        norm: of the gradient, a scalar.

    Returns:
        The values of each micro-batch, and the norm.
    """
    *numbers, last = torch.cat([values.double() for values in (*parts, norm.reshape(1))]).tolist()
    size = len(parts[0])
    return [numbers[i * size : (i + 1) * size] for i in range(len(parts))], last


def _check_norm(name: str, norm: float) -> None:
    """Raise for a gradient, of a model named `name`, that is not finite."""
    if not math.isfinite(norm):
        raise ValueError(f"the norm of the {name}'s gradient is {norm}")


def _total(name: str, rows: Sequence[Sequence[float]], norm: float) -> float:
    """The sum of one loss per micro-batch; raises if a loss or the gradient is not finite."""
    for (value,) in rows:
        if not math.isfinite(value):
            raise ValueError(f"the {name}'s loss is {value}")
    _check_norm(name, norm)
    return sum(value for (value,) in rows)
