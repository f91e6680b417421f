"""The optimizers of both models, and which of the denoiser's gradients can be deferred."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Adam

from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.models.denoiser import ConditionalModel
from diffmic_fast.models.guidance import DCG

# fused=True: one pass over each tensor, several times as fast on a CPU as the loop over them.


def denoiser_optimizer(denoiser: ConditionalModel, config: TrainingConfig) -> Adam:
    """Adam with one parameter group, as in published checkpoints, or a second one for the image encoder's own rate."""
    groups = [{"params": list(denoiser.parameters())}]
    if config.encoder_learning_rate is not None:
        encoder = list(denoiser.encoder_x.parameters())
        in_encoder = set(map(id, encoder))
        rest = [p for p in denoiser.parameters() if id(p) not in in_encoder]
        groups = [{"params": rest}, {"params": encoder}]
    return Adam(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def set_denoiser_rate(
    optimizer: Adam, rate: float, config: TrainingConfig, *, encoder: float | None = None
) -> None:
    """Set the rate of `denoiser_optimizer`; that of the encoder's group, if None, keeps its proportion to it."""
    rest, *others = optimizer.param_groups
    rest["lr"] = rate
    for group in others:
        assert config.encoder_learning_rate is not None
        proportion = config.encoder_learning_rate / config.learning_rate
        group["lr"] = rate * proportion if encoder is None else encoder


def guidance_optimizer(guidance: DCG, config: TrainingConfig) -> Adam:
    """Adam with AMSGrad and one parameter group, as published, or a second one for the rate of the last layers."""
    trunks = [*guidance.ds_net.parameters(), *guidance.dn_resnet.parameters()]
    in_trunks = set(map(id, trunks))
    head = [p for p in guidance.parameters() if id(p) not in in_trunks]
    return Adam(
        _groups(list(guidance.parameters()), trunks, head, config),
        lr=config.guidance_learning_rate,
        weight_decay=config.guidance_weight_decay,
        amsgrad=True,
        fused=True,
    )


def encoder_optimizer(trunk: nn.Module, head: nn.Module, config: TrainingConfig) -> Adam:
    """Adam for the encoder as a classifier, with a second parameter group where the last layer has its own rate."""
    both = [*trunk.parameters(), *head.parameters()]
    return Adam(
        _groups(both, list(trunk.parameters()), list(head.parameters()), config), fused=True
    )


def _groups(
    every: list[nn.Parameter],
    trunk: list[nn.Parameter],
    head: list[nn.Parameter],
    config: TrainingConfig,
) -> list[dict[str, Any]]:
    """One parameter group, or those of trunk and head where they have different rates."""
    if config.classifier_head_factor == 1.0:
        return [{"params": every}]
    return [{"params": trunk}, {"params": head}]


def set_classifier_rate(optimizer: Adam, rate: float, config: TrainingConfig) -> None:
    """Set the rate of `guidance_optimizer` or `encoder_optimizer`."""
    trunk, *head = optimizer.param_groups
    trunk["lr"] = rate
    for group in head:
        group["lr"] = config.classifier_head_factor * rate


def deferrable_weights(denoiser: ConditionalModel) -> list[Tensor]:
    """Weights of the linear layers outside the image encoder."""
    in_encoder = set(denoiser.encoder_x.modules())
    return [
        parameter
        for module in denoiser.modules()
        if isinstance(module, nn.Linear) and module not in in_encoder
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    ]
