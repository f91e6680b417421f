"""The published program's names, argument order and return values, for code written against it.

    from diffmic_fast.compat import *    # in place of its model, diffusion_utils and dcg modules

Noise comes from torch's own generator in the published order, so a `torch.manual_seed` that was set before the swap
gives the same labels after it. What changes is the work: under `no_grad` the image encoder runs once for a loop instead
of once a step, and `p_sample_loop` is one call of `ops.denoise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffmic_fast.diffusion.samplers import ddpm
from diffmic_fast.diffusion.schedule import Schedule, make_betas
from diffmic_fast.models import denoiser, guidance
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.reference.denoise import estimate_y0

# What `from diffmic_fast.compat import *` brings, and nothing else.
__all__ = [
    "DCG",
    "ConditionalModel",
    "compute_kernel",
    "compute_mmd",
    "extract",
    "make_beta_schedule",
    "p_sample",
    "p_sample_loop",
    "p_sample_t_1to0",
    "q_sample",
    "y_0_reparam",
]


class ConditionalModel(denoiser.ConditionalModel):
    """The denoiser, built from the published program's configuration namespace.

    Called as `model(x, y_t, t, y_0_hat)`; see `diffmic_fast.models.ConditionalModel`.
    """

    def __init__(self, config: Any, guidance: bool = True) -> None:
        """Build from a configuration.

        Args:
            config: namespace (or nested mapping) with `data.num_classes`, `model.arch`, `model.feature_dim` and
                `diffusion.timesteps`.
            guidance: condition on y_0_hat.

        Raises:
            ValueError: a setting is missing, named, or has no such value.
        """
        super().__init__(
            int(_setting(config, "data.num_classes")),
            int(_setting(config, "diffusion.timesteps")),
            int(_setting(config, "model.feature_dim")),
            str(_setting(config, "model.arch")),
            guidance=guidance,
        )


class DCG(guidance.DCG):
    """The guidance model, built from the published program's configuration namespace (`config.data.num_classes`).

    Called as `y_fusion, y_global, y_local = dcg(x)`, three tensors of logits [B, C].
    """

    def __init__(self, parameters: Any) -> None:
        """Build with the published sizes: ResNet-50 trunks, 6 patches of 32 x 32, percent_t 1."""
        super().__init__(int(_setting(parameters, "data.num_classes")))


def make_beta_schedule(
    schedule: str = "linear", num_timesteps: int = 1000, start: float = 1e-5, end: float = 1e-2
) -> Tensor:
    """[num_timesteps] float32 betas; see `diffusion.make_betas`."""
    return make_betas(schedule, num_timesteps, start, end)


def extract(input: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """input[t], shaped [len(t), 1, …] to multiply `x`.

    Args:
        input: [T] table.
        t: [B] int64 timesteps.
        x: [B, …] tensor whose number of dimensions is taken.

    Raises:
        ValueError: a timestep outside the table.
    """
    t = t.to(input.device)
    if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < len(input):
        raise ValueError(
            f"extract: t must be in [0, {len(input) - 1}], got {int(t.min())} … {int(t.max())}"
        )
    return torch.gather(input, 0, t).reshape(t.shape[0], *[1] * (x.ndim - 1))


def q_sample(
    y: Tensor,
    y_0_hat: Tensor,
    alphas_bar_sqrt: Tensor,
    one_minus_alphas_bar_sqrt: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """y_t drawn from q(y_t | y_0), with prior mean y_0_hat (spec, section 2); noise is drawn if not given."""
    if noise is None:
        noise = torch.randn_like(y)
    s = extract(alphas_bar_sqrt, t, y).to(y.device)
    q = extract(one_minus_alphas_bar_sqrt, t, y).to(y.device)
    return s * y + (1 - s) * y_0_hat + q * noise


def p_sample(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    y_0_hat: Tensor,
    y_T_mean: Tensor,
    t: int | Tensor,
    alphas: Tensor,
    one_minus_alphas_bar_sqrt: Tensor,
) -> Tensor:
    """One reverse step, y_t to y_{t-1} (spec, section 6).

    Args:
        model: called as model(x, y, t, y_0_hat); no gradient passes through it.
        x: [B, …] images.
        y: [B, C], y_t.
        y_0_hat: [B, C], guidance.
        y_T_mean: [B, C], prior mean.
        t: timestep, >= 1.
        alphas, one_minus_alphas_bar_sqrt: [T] tables.
    """
    z = torch.randn_like(y)
    t = _timestep(t, y)
    alpha = extract(alphas, t, y).to(y.device)
    q = extract(one_minus_alphas_bar_sqrt, t, y).to(y.device)
    q_next = extract(one_minus_alphas_bar_sqrt, t - 1, y).to(y.device)
    s, s_next = (1 - q.square()).sqrt(), (1 - q_next.square()).sqrt()
    gamma_0 = (1 - alpha) * s_next / q.square()
    gamma_1 = q_next.square() * alpha.sqrt() / q.square()
    gamma_2 = 1 + (s - 1) * (alpha.sqrt() + s_next) / q.square()
    y_0 = estimate_y0(y, y_T_mean, _eps(model, x, y, t, y_0_hat), s, q)
    mean = gamma_0 * y_0 + gamma_1 * y + gamma_2 * y_T_mean
    variance = q_next.square() / q.square() * (1 - alpha)
    return mean + variance.sqrt() * z


def y_0_reparam(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    y_0_hat: Tensor,
    y_T_mean: Tensor,
    t: int | Tensor,
    one_minus_alphas_bar_sqrt: Tensor,
) -> Tensor:
    """The label [B, C] that the model's noise at timestep t implies; arguments as in `p_sample`."""
    t = _timestep(t, y)
    q = extract(one_minus_alphas_bar_sqrt, t, y).to(y.device)
    s = (1 - q.square()).sqrt()
    return estimate_y0(y, y_T_mean, _eps(model, x, y, t, y_0_hat), s, q)


def p_sample_t_1to0(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    y_0_hat: Tensor,
    y_T_mean: Tensor,
    one_minus_alphas_bar_sqrt: Tensor,
) -> Tensor:
    """The last reverse step, at timestep 0, which takes no noise; arguments as in `p_sample`."""
    return y_0_reparam(model, x, y, y_0_hat, y_T_mean, 0, one_minus_alphas_bar_sqrt)


def p_sample_loop(
    model: nn.Module,
    x: Tensor,
    y_0_hat: Tensor,
    y_T_mean: Tensor,
    n_steps: int,
    alphas: Tensor,
    one_minus_alphas_bar_sqrt: Tensor,
    only_last_sample: bool = False,
) -> Tensor | list[Tensor]:
    """A reverse run over the first `n_steps` entries of the tables.

    Args:
        n_steps: in [1, T]; other arguments as in `p_sample`.
        only_last_sample: return y_0 instead of every state.

    Returns:
        [y_T, …, y_0], n_steps + 1 tensors [B, C]; or y_0.

    Raises:
        ValueError: n_steps outside the tables.
    """
    if not 1 <= n_steps <= len(alphas):
        raise ValueError(f"p_sample_loop: n_steps must be in [1, {len(alphas)}], got {n_steps}")
    wants_gradient = torch.is_grad_enabled() and (y_0_hat.requires_grad or y_T_mean.requires_grad)
    if not wants_gradient and _runs_as_one_call(model):
        states = _chain(model, x, y_0_hat, y_T_mean, n_steps, alphas, one_minus_alphas_bar_sqrt)
    else:
        states = [torch.randn_like(y_T_mean) + y_T_mean]
        for t in range(n_steps - 1, 0, -1):
            states.append(
                p_sample(
                    model, x, states[-1], y_0_hat, y_T_mean, t, alphas, one_minus_alphas_bar_sqrt
                )
            )
        states.append(
            p_sample_t_1to0(model, x, states[-1], y_0_hat, y_T_mean, one_minus_alphas_bar_sqrt)
        )
    return states[-1] if only_last_sample else states


def compute_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel matrix [n, m] of row sets [n, d] and [m, d]; see `ops.mmd.kernel_matrix`."""
    return kernel_matrix(x, y)


def compute_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Maximum mean discrepancy of row sets [n, d] and [m, d]; see `ops.mmd.mmd`."""
    return mmd(x, y)


def _runs_as_one_call(model: nn.Module) -> bool:
    """Whether a loop over the model's calls can only give what `ops.denoise` gives on its weights."""
    return (
        isinstance(model, denoiser.ConditionalModel)
        and type(model).forward is denoiser.ConditionalModel.forward
        and "forward" not in vars(model)
        and not (model._forward_hooks or model._forward_pre_hooks)
        and model.runs_on_weights
        and not any(part.training for part in model.modules())
    )


@torch.no_grad()
def _chain(
    model: nn.Module,
    x: Tensor,
    y_0_hat: Tensor,
    y_T_mean: Tensor,
    n_steps: int,
    alphas: Tensor,
    one_minus_alphas_bar_sqrt: Tensor,
) -> list[Tensor]:
    assert isinstance(model, denoiser.ConditionalModel)
    noise = torch.stack([torch.randn_like(y_T_mean) for _ in range(n_steps)])
    alphas, q = alphas.detach().cpu(), one_minus_alphas_bar_sqrt.detach().cpu()
    tables = Schedule(1 - alphas, alphas, alphas.cumprod(0), (1 - q.square()).sqrt(), q)
    states = denoise(
        model.features(x),
        y_T_mean,
        y_0_hat,
        model.weights(),
        ddpm(tables, n_steps),
        noise=noise,
        trajectory=True,
    )
    return list(states.unbind())


def _eps(model: nn.Module, x: Tensor, y: Tensor, t: Tensor, y_0_hat: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, y, t, y_0_hat)


def _timestep(t: int | Tensor, y: Tensor) -> Tensor:
    return t.to(y.device) if isinstance(t, Tensor) else torch.tensor([t], device=y.device)


def _setting(config: Any, path: str) -> Any:
    value = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if value is None:
            raise ValueError(f"the configuration has no setting {path}")
    return value
