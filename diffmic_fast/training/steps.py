"""One optimizer step of each model, with all that carries over from step to step (spec 5)."""

from __future__ import annotations

import contextlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffmic_fast.checkpoint import check_state
from diffmic_fast.config.run import TrainingConfig
from diffmic_fast.distributed.fsdp import divide, is_divided, share_of, whole
from diffmic_fast.distributed.processes import Processes, current, sizes
from diffmic_fast.distributed.sync_batch_norm import synchronize_statistics
from diffmic_fast.models import BranchForward, DiffMIC, ImageEncoder, Trunk
from diffmic_fast.models.loss import antithetic_timesteps
from diffmic_fast.training.deferred_gradients import LaterGradients
from diffmic_fast.training.precision import bfloat16_passes
from diffmic_fast.training.schedules import MovingAverage, half_cosine, warmup_cosine

LOSSES = ("loss", "noise_loss", "mmd_global", "mmd_local")


def _parallel(module: nn.Module) -> nn.Module:
    """The module with gradients that meet, and buffers that are left alone (by the newer name, where there is one)."""
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device = next(module.parameters()).device
    how: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
    if device.type == "cuda":
        how["device_ids"] = [device]
    return DistributedDataParallel(module, **how)


@dataclass(frozen=True)
class _Portion:
    """What goes through a model at once.

    Attributes:
        images, labels: this process's.
        counts: images of every process in this part.
        whole: images of all processes in all parts.
        last: whether it is the step's last part.
    """

    images: Tensor
    labels: Tensor
    counts: list[int]
    whole: int
    last: bool


class Steps:
    """The optimizers of a DiffMIC, the moving average and the generator of training noise.

    model: on the device it trains on.
    config, seed: rates, clipping, average, precision; seed of timesteps and noise.
    processes: those that share each step; all of them make the same calls, with at least two images each.
    """

    def __init__(
        self, model: DiffMIC, config: TrainingConfig, seed: int, processes: Processes | None = None
    ) -> None:
        if config.precision == "auto":
            raise ValueError(
                "Steps: precision must be fp32 or bf16, got auto; Trainer chooses one of them"
            )
        self.model, self.config = model, config
        self.processes = current() if processes is None else processes
        several = self.processes.count > 1
        if several and config.sync_batch_norm:
            synchronize_statistics(model)
        if several and config.fsdp:
            divide(model.denoiser)
            divide(model.guidance)
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

        # Weights whose gradients can wait: with several processes they meet while the backward pass goes on.
        self._later: list[Tensor] = []
        if not several:
            inside = set(map(id, model.denoiser.encoder_x.modules()))
            for part in model.denoiser.modules():
                weight = part._parameters.get("weight")
                if isinstance(part, nn.Linear) and weight is not None and id(part) not in inside:
                    self._later.append(weight)

        # Last: they read the modules as they are now, and give every process the first one's weights.
        self._denoiser: nn.Module = BranchForward(model.denoiser)
        self._guidance: nn.Module = model.guidance
        if several and not config.fsdp:
            self._denoiser, self._guidance = _parallel(self._denoiser), _parallel(model.guidance)

    def _autocast(self, images: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return bfloat16_passes(images.device)
        return contextlib.nullcontext()

    def _portions(self, images: Tensor, labels: Tensor) -> list[_Portion]:
        """The batch in `accumulation` parts of nearly equal size, of two images of each process at least."""
        counts = self.processes.all_of(len(images))
        parts = max(min(self.config.accumulation, min(counts) // 2), 1)
        split = [sizes(count, parts) for count in counts]
        own = split[self.processes.rank]
        whole, last = sum(counts), parts - 1
        return [
            _Portion(some, theirs, [each[i] for each in split], whole, i == last)
            for i, (some, theirs) in enumerate(
                zip(images.split(own), labels.split(own), strict=True)
            )
        ]

    def _agree(self, refused: str) -> None:
        """Raise ValueError on every process if one of them has a reason to."""
        reasons = self.processes.all_of(refused) if self.processes.count > 1 else [refused]
        if refused:
            raise ValueError(refused)
        for rank, reason in enumerate(reasons):
            if reason:
                raise ValueError(f"process {rank}: {reason}")

    def _check(self, images: Tensor, labels: Tensor) -> None:
        """Several processes: look at a batch before a process waits for one that has refused its part."""
        if self.processes.count == 1:
            return
        reason = ""
        if not bool(torch.isfinite(images).all()):
            reason = "the images hold not-a-number or infinity"
        elif not 0 <= int(labels.min()) <= int(labels.max()) < self.model.config.classes:
            reason = f"labels must be in [0, {self.model.config.classes - 1}]"
        self._agree(reason)

    def denoiser_step(self, images: Tensor, labels: Tensor, epoch: float) -> dict[str, float]:
        """A step of the denoiser and its average at a fractional joint epoch; returns LOSSES.

        Of several processes each gives its part of the batch, and gets the losses of the whole.

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
        self._check(images, labels)
        self.model.train()
        self._forget_gradients()
        totals = dict.fromkeys(LOSSES, 0.0)
        for part in self._portions(images, labels):
            later = LaterGradients(self._later)
            with self._autocast(images), self._last_alone(self._denoiser, part):
                losses, values = self._losses(part, later)
                for key, value in zip(LOSSES, values, strict=True):
                    totals[key] += value
                if not all(map(math.isfinite, values)):
                    described = ", ".join(f"{k} {v:g}" for k, v in zip(LOSSES, values, strict=True))
                    raise ValueError(f"the denoiser's loss is not finite ({described})")
            with self._last_alone(self._denoiser, part):
                torch.autograd.backward(losses)
            later.add()
        limit = c.gradient_clip if c.gradient_clip is not None else math.inf
        found: Any = nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), limit)
        norm = float(found.full_tensor() if is_divided(found) else found)
        if not math.isfinite(norm):
            raise ValueError(f"the norm of the denoiser's gradient is {norm}")
        self.optimizer.step()
        self._divide_again()
        if self.average is not None:
            self.average.update()
        self._share_statistics(self.model.denoiser)
        return totals

    def _divide_again(self) -> None:
        """Also a model that was called for its answer alone, which has no backward pass to end with."""
        for module in (self.model.denoiser, self.model.guidance):
            if is_divided(module):
                module.reshard()  # type: ignore[operator]

    def state(self) -> dict[str, Any]:
        """Whole, for a checkpoint; of several processes every one has to call it, and the first one gets it."""
        model, average = self.model, self.average
        found: dict[str, Any] = {
            "denoiser": model.denoiser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average.values if average else {},
            "guidance": model.guidance.state_dict(),
            "guidance_optimizer": self.guidance_optimizer.state_dict(),
        }
        if is_divided(model.denoiser):
            found = whole(found, self.processes)
        return found

    def load_state(self, state: dict[str, Any], what: str) -> None:
        """Set what `state` gave, on every process; ValueError, naming `what`, where it does not fit the models."""
        for module, name in ((self.model.denoiser, ""), (self.model.guidance, ", guidance")):
            values = state["guidance" if name else "denoiser"]
            own = module.state_dict()
            check_state(module, values, what + name)
            module.load_state_dict({key: share_of(values[key], own[key]) for key in own})
        for optimizer, name in (
            (self.optimizer, "optimizer"),
            (self.guidance_optimizer, "guidance_optimizer"),
        ):
            optimizer.load_state_dict(state[name])
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        values[key] = share_of(value, parameter)
        if self.average is not None:
            self.average.load(state["average"])

    def _forget_gradients(self) -> None:
        """Those of both models: they are as large as the weights, and the other one's have been used."""
        for optimizer in (self.optimizer, self.guidance_optimizer):
            optimizer.zero_grad(set_to_none=True)

    def _losses(self, part: _Portion, later: LaterGradients) -> tuple[Tensor, list[float]]:
        """What to differentiate on this process, and the part's share of LOSSES over all processes."""

        def denoiser(*arguments: Any) -> Any:
            with later:
                return self._denoiser(*arguments)

        config, processes = self.model.config, self.processes
        rows = sum(part.counts) * self.config.draws
        timesteps = antithetic_timesteps(rows, config.timesteps, self.noise)
        noise = torch.randn(rows, config.classes, generator=self.noise)
        start = sum(part.counts[: processes.rank]) * self.config.draws
        own = slice(start, start + len(part.images) * self.config.draws)
        gather = self.config.gather_mmd and processes.count > 1
        losses = self.model.loss(
            part.images,
            part.labels,
            draws=self.config.draws,
            timesteps=timesteps[own],
            noise=noise[own],
            denoiser=denoiser,
            gather=processes.gather_rows if gather else None,
        )
        share = len(part.images) / part.whole
        if processes.count == 1:
            return share * losses.total, [share * v for v in torch.stack(list(losses)).tolist()]
        # All processes have the value of gathered rows, and each the gradient of its own.
        of_mmd = sum(part.counts) / part.whole if gather else share
        mmds = of_mmd * torch.stack((losses.mmd_global, losses.mmd_local))
        noise_loss = share * losses.noise
        values = torch.cat((noise_loss.detach()[None], mmds.detach()))
        values[1:] /= processes.count if gather else 1
        values = processes.sum(values.double())
        all_of_it = values[0] + config.mmd_weight * values[1:].sum()
        # DistributedDataParallel takes the mean of the processes' gradients, and the batch's is their sum.
        total = processes.count * (noise_loss + config.mmd_weight * mmds.sum())
        return total, [float(all_of_it), *values.tolist()]

    def _share_statistics(self, module: nn.Module) -> None:
        """Where processes have batch statistics of their own, let the first one's running ones be everybody's."""
        if not self.config.sync_batch_norm:
            self.processes.share_buffers(module)

    def _last_alone(
        self, module: nn.Module, part: _Portion
    ) -> contextlib.AbstractContextManager[Any]:
        """Gradients of several processes meet once a step, behind its last part."""
        if isinstance(module, DistributedDataParallel) and not part.last:
            return module.no_sync()
        module = module.denoiser if isinstance(module, BranchForward) else module
        if is_divided(module):
            module.set_requires_gradient_sync(part.last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def guidance_step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        """A step of the guidance model at `progress` (0 to 1) of the run; returns its loss.

        Of several processes each gives its part of the batch, and gets the loss of the whole.

        Raises ValueError, weights untouched, if the loss is not finite.
        """
        rate = self.config.guidance_learning_rate
        if self.config.guidance_cosine:
            rate = half_cosine(progress, rate, 0.0)
        for group in self.guidance_optimizer.param_groups:
            group["lr"] = rate
        self._check(images, labels)
        self.model.guidance.train()
        self._forget_gradients()
        total = 0.0
        for part in self._portions(images, labels):
            with self._last_alone(self._guidance, part):
                with self._autocast(images):
                    fused = self._guidance(part.images)[0]
                fused = fused.to(torch.promote_types(fused.dtype, torch.float32))
                loss = nn.functional.cross_entropy(fused, part.labels)
                share = len(part.images) / part.whole
                value = float(self.processes.sum(share * loss.detach()))
                if not math.isfinite(value):
                    raise ValueError(f"the guidance model's loss is {value}")
                torch.autograd.backward(share * self.processes.count * loss)
            total += value
        self.guidance_optimizer.step()
        self._divide_again()
        self._share_statistics(self.model.guidance)
        return total
