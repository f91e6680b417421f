"""The published program's names, argument order and return values, for code written against it.

    from diffmic_fast.compat import *    # in place of its model, diffusion_utils and dcg modules

Noise is drawn from torch's own generator in the published order, so that a seed gives the same labels as before. Under
`no_grad` the image encoder runs once per loop instead of once per step, and `p_sample_loop` is one call of
`ops.denoise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffmic_fast.diffusion.samplers import ddpm
from diffmic_fast.diffusion.schedule import Schedule, make_betas
from diffmic_fast.models import denoiser, guidance
from diffmic_fast.models._torch_internals import has_hooks
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.reference.denoise import estimate_y0

# All that `from diffmic_fast.compat import *` imports.
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
            config: Namespace (or nested mapping) with `data.num_classes`, `model.arch`, `model.feature_dim` and
                `diffusion.timesteps`.
            guidance: Condition on y_0_hat.

        Raises:
            ValueError: A setting is missing or out of range; the message names it.
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

    Called as `y_fusion, y_global, y_local = dcg(x)`, three tensors of logits [B, C]. The attributes below are those of
    the last call and do not exist before it. The tensors are part of its autograd graph, as in the published program,
    which is freed with the next call; copies and pickles carry them detached. A call inside `torch.compile` or
    `torch.export` sets no attributes and removes those of the call before.

    Attributes:
        saliency_map: [B, C, h, w].
        patch_locations: int64 array [B, K, 2], upper-left pixel (row, column) of each patch; copied when read.
        patches: Array [B, K, 3, h, w] of the dtype of the images; copied when read.
        patch_attns: [B, K], weight of each patch.
        y_fusion, y_global, y_local: The logits.
    """

    _last: guidance.GuidanceDetail | None = None

    def __init__(self, parameters: Any) -> None:
        """Build with the published sizes: ResNet-50 trunks, 6 patches of 32 x 32, percent_t 1."""
        super().__init__(int(_setting(parameters, "data.num_classes")))

    def forward(self, images: Tensor) -> guidance.Guidance:
        """Logits y_fusion, y_global, y_local for images [B, 3, H, W]."""
        detail = self.detail(images)
        self._last = None if torch.compiler.is_compiling() else detail
        return detail.logits

    def __getattr__(self, name: str) -> Any:
        # Called for names that are found nowhere else.
        if name in _OF_LAST_CALL and self._last is not None:
            return _OF_LAST_CALL[name](self._last)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        last = self._last
        if last is not None:
            logits = guidance.Guidance(*(each.detach() for each in last.logits))
            last = guidance.GuidanceDetail(logits, *(each.detach() for each in last[1:]))
        return {**vars(self), "_last": last}


_OF_LAST_CALL: dict[str, Callable[[guidance.GuidanceDetail], Tensor | np.ndarray]] = {
    "saliency_map": lambda last: last.saliency,
    "patch_locations": lambda last: _copied(last.origins),
    "patches": lambda last: _copied(last.crops),
    "patch_attns": lambda last: last.attention,
    "y_fusion": lambda last: last.logits.fused,
    "y_global": lambda last: last.logits.global_,
    "y_local": lambda last: last.logits.local,
}


def _copied(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()


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
        x: [B, …] tensor, of which only the number of dimensions is used.

    Raises:
        ValueError: A timestep is outside the table.
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
    """y_t from q(y_t | y_0) with prior mean y_0_hat (docs/algorithm.md, "Forward process"); draws noise if None."""
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
    """One reverse step, y_t to y_{t-1} (docs/algorithm.md, "Sampling").

    Args:
        model: Called as model(x, y, t, y_0_hat); no gradient passes through it.
        x: [B, …] images.
        y: [B, C], y_t.
        y_0_hat: [B, C], guidance.
        y_T_mean: [B, C], prior mean.
        t: Timestep, >= 1.
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
    """The label [B, C] estimated from the model's noise at timestep t; arguments as in `p_sample`."""
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
    """The last reverse step, at timestep 0, which adds no noise; arguments as in `p_sample`."""
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
    """A reverse chain over the first `n_steps` entries of the tables; arguments as in `p_sample`.

    Args:
        n_steps: In [1, T].
        only_last_sample: Return y_0 instead of every state.

    Returns:
        [y_T, …, y_0], n_steps + 1 tensors [B, C]; or y_0.

    Raises:
        ValueError: n_steps is outside the tables.
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
    """Whether calling the model in a loop must give what `ops.denoise` computes from its weights."""
    return (
        isinstance(model, denoiser.ConditionalModel)
        and type(model).forward is denoiser.ConditionalModel.forward
        and not has_hooks(model)
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
