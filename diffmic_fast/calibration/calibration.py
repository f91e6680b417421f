"""`Calibration`: what was fitted on validation images, as one value that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from diffmic_fast.calibration.conformal import conformal_scores
from diffmic_fast.calibration.novelty import NoveltyDetector
from diffmic_fast.calibration.scaling import (
    KINDS,
    MAX_FACTOR,
    Scaling,
    check_count,
    choose_kind,
    cross_fitted_logits,
    fit_scaling,
    log_probabilities,
    negative_log_likelihood,
)
from diffmic_fast.diffusion.sampling_options import SamplingOptions

FORMAT = 1
# What the distribution of y_0 depends on.
_SAMPLING = ("sampler", "steps", "eta", "samples", "views")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration of a trained DiffMIC (docs/algorithm.md, "Calibration and confidence").

    Tensors are on the CPU. A calibration belongs to the weights and the sampling that it was fitted for: other steps or
    another number of samples change the distribution of y_0.

    Attributes:
        sampler, steps, eta, samples, views: As in `SamplingOptions`.
        images: Number of validation images.
        diffusion: Scaling of the mean of y_0, and of the guidance's logarithms of probabilities.
        guidance: Temperature of the logarithms of probabilities of the guidance's fused branch.
        scores: [n] float32 ascending, cross-fitted conformal scores of the diffusion.
        guidance_scores: [n], those of the guidance.
        losses: Mean negative log-likelihood on the validation images of the diffusion's probabilities: "published", and
            cross-validated for each kind of scaling that was compared.
        guidance_losses: Of the guidance's, "published" and "temperature".
        novelty: Detector of images unlike the training images, or None.
        weights: Digest of the weights that it was fitted for (`checkpoint.weights_digest`), or "".
    """

    sampler: str
    steps: int | None
    eta: float
    samples: int
    images: int
    diffusion: Scaling
    guidance: Scaling
    scores: Tensor
    guidance_scores: Tensor
    losses: dict[str, float] = field(default_factory=dict)
    guidance_losses: dict[str, float] = field(default_factory=dict)
    novelty: NoveltyDetector | None = None
    weights: str = ""
    views: int = 1

    @property
    def classes(self) -> int:
        """C."""
        return len(self.diffusion.bias)

    @property
    def summary(self) -> str:
        """One line about the fit."""
        detector = "" if self.novelty is not None else "; no detector of unlike images"
        return (
            f"{self.diffusion.kind} scaling, fitted on {self.images} validation images; negative log-likelihood "
            f"{self.losses['published']:.4f} published, {self.losses[self.diffusion.kind]:.4f} calibrated "
            f"(guidance {self.guidance_losses['published']:.4f}, {self.guidance_losses['temperature']:.4f}){detector}"
        )

    def mismatch(self, options: SamplingOptions) -> str | None:
        """Why the calibration does not apply to probabilities sampled in this way; None if it does."""
        differing = [
            f"{name} {getattr(self, name)}, got {getattr(options, name)}"
            for name in _SAMPLING
            if getattr(self, name) != getattr(options, name)
        ]
        return f"the calibration was fitted for {'; '.join(differing)}" if differing else None

    def probabilities(self, samples: Tensor, guidance: Tensor) -> Tensor:
        """Calibrated probabilities [B, C] of y_0 [B, S, C] and published probabilities of the fused branch [B, C]."""
        return self.diffusion.probabilities(samples.mean(dim=1), log_probabilities(guidance))

    def sample_probabilities(self, samples: Tensor, guidance: Tensor) -> Tensor:
        """[B, S, C], the scaling applied to the y_0 of each sample; their mean is not `probabilities`."""
        return self.diffusion.probabilities(samples, log_probabilities(guidance)[:, None])

    def guidance_probabilities(self, guidance: Tensor) -> Tensor:
        """Calibrated probabilities [..., C] of the guidance's published ones."""
        return self.guidance.probabilities(log_probabilities(guidance))

    def to_state(self) -> dict[str, Any]:
        """Tensors, numbers, text and dicts, which `torch.load(weights_only=True)` reads."""
        state: dict[str, Any] = {"format": FORMAT}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (Scaling, NoveltyDetector)):
                value = {part.name: getattr(value, part.name) for part in fields(value)}
            state[item.name] = dict(value) if isinstance(value, dict) else value
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], classes: int | None = None) -> Calibration:
        """The inverse of `to_state`.

        Args:
            state: From a checkpoint.
            classes: C of the model.

        Raises:
            ValueError: The state is of another format, is damaged, or is for another number of classes.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"calibration: format must be {FORMAT}, got {found!r}")
        names = {item.name for item in fields(cls)}
        if state.keys() != names | {"format"}:
            differing = sorted(state.keys() ^ (names | {"format"}))
            raise ValueError(f"calibration: entries are missing or unknown: {', '.join(differing)}")
        try:
            result = _read(state, classes)
        except (AttributeError, TypeError) as error:  # a value of another type
            raise ValueError(f"calibration: damaged content: {error}") from error
        if not result.images == len(result.scores) == len(result.guidance_scores):
            raise ValueError(
                f"calibration: there must be a score for each of the {result.images} images, got {len(result.scores)} "
                f"and {len(result.guidance_scores)}"
            )
        return result


def _read(state: Mapping[str, Any], classes: int | None) -> Calibration:
    """A calibration out of a state that has all entries."""
    options = SamplingOptions(**{name: state[name] for name in _SAMPLING})
    diffusion = _scaling("diffusion", state["diffusion"], classes)
    return Calibration(
        options.sampler,
        options.steps,
        options.eta,
        options.samples,
        int(state["images"]),
        diffusion,
        _scaling("guidance", state["guidance"], len(diffusion.bias)),
        _scores("scores", state["scores"]),
        _scores("guidance_scores", state["guidance_scores"]),
        {str(key): float(value) for key, value in state["losses"].items()},
        {str(key): float(value) for key, value in state["guidance_losses"].items()},
        None if state["novelty"] is None else _detector(state["novelty"]),
        str(state["weights"]),
        options.views,
    )


def fit_calibration(
    samples: Tensor,
    guidance: Tensor,
    labels: Tensor,
    options: SamplingOptions,
    *,
    novelty: NoveltyDetector | None = None,
    weights: str = "",
) -> Calibration:
    """Fit a calibration to what a model predicted for validation images.

    Args:
        samples: [N, S, C], y_0 of `Prediction.samples`.
        guidance: [N, C], probabilities of the guidance's fused branch, `Prediction.guidance[:, 0]`.
        labels: [N] int64. Classes may be absent.
        options: How y_0 was sampled.
        novelty: Detector to keep in the calibration.
        weights: Digest to keep in it.

    Raises:
        ValueError: Fewer than 20 images, values that are not finite, or labels that are not in [0, C).
    """
    check_count(len(labels))
    if samples.ndim != 3 or guidance.shape != (len(samples), samples.shape[2]):
        raise ValueError(
            "fit_calibration: samples must be [N, S, C] and guidance [N, C], got "
            f"{tuple(samples.shape)} and {tuple(guidance.shape)}"
        )
    means, prior = samples.double().mean(dim=1).cpu(), log_probabilities(guidance.double()).cpu()
    labels = labels.cpu()
    kind, losses = choose_kind(means, labels, prior)
    used = None if kind == "temperature" else prior
    guidance_logits = cross_fitted_logits("temperature", prior, labels)
    published = samples.double().softmax(dim=-1).mean(dim=1).cpu().clamp_min(1e-30).log()
    losses = {"published": _mean_loss(published, labels)} | losses
    guidance_losses = {
        "published": _mean_loss(prior, labels),
        "temperature": _mean_loss(guidance_logits, labels),
    }
    cross_fitted = cross_fitted_logits(kind, means, labels, used)
    return Calibration(
        options.sampler,
        options.steps,
        options.eta,
        options.samples,
        len(labels),
        fit_scaling(kind, means, labels, used),
        fit_scaling("temperature", prior, labels),
        conformal_scores(cross_fitted.softmax(dim=1), labels),
        conformal_scores(guidance_logits.softmax(dim=1), labels),
        losses,
        guidance_losses,
        novelty,
        weights,
        options.views,
    )


def _mean_loss(logits: Tensor, labels: Tensor) -> float:
    return float(negative_log_likelihood(logits, labels).mean())


def _scaling(name: str, state: Any, classes: int | None) -> Scaling:
    """A scaling out of a state; raises ValueError for damaged content."""
    values = _entries(name, state, Scaling)
    bias = _tensor(f"{name}.bias", values["bias"], 1)
    if classes is not None and len(bias) != classes:
        raise ValueError(
            f"calibration: {name} must be for the model's {classes} classes, got {len(bias)}"
        )
    if values["kind"] not in KINDS:
        raise ValueError(
            f"calibration: {name}.kind must be one of {', '.join(KINDS)}, got {values['kind']!r}"
        )
    for key in ("factor", "prior_factor"):
        if not isinstance(values[key], float) or not 0.0 <= values[key] <= MAX_FACTOR:
            raise ValueError(
                f"calibration: {name}.{key} must be in [0, {MAX_FACTOR:g}], got {values[key]!r}"
            )
    return Scaling(values["kind"], values["factor"], values["prior_factor"], bias)


def _scores(name: str, value: Any) -> Tensor:
    scores = _tensor(name, value, 1)
    if len(scores) == 0 or bool((scores.diff() < 0).any()):
        raise ValueError(f"calibration: {name} must be at least one number, in ascending order")
    return scores


def _detector(state: Any) -> NoveltyDetector:
    """A novelty detector out of a state; raises ValueError for damaged content."""
    values = _entries("novelty", state, NoveltyDetector)
    dimensions = {"whitening": 2, "neighbours": 2, "basis": 2, "residual_variance": 0}
    tensors = {
        name: _tensor(f"novelty.{name}", value, dimensions.get(name, 1))
        for name, value in values.items()
    }
    statistics, width = len(tensors["statistics_mean"]), len(tensors["feature_mean"])
    expected = {
        "statistics_scale": (statistics,),
        "whitening": (statistics, statistics),
        "neighbours": (len(tensors["neighbours"]), statistics),
        "feature_scale": (width,),
        "basis": (len(tensors["variances"]), width),
        "centre": (3,),
        "spread": (3,),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"calibration: novelty.{name} must be {shape}, got {tuple(tensors[name].shape)}"
            )
    for name in ("statistics_scale", "feature_scale", "variances", "residual_variance", "spread"):
        if bool((tensors[name] <= 0).any()):
            raise ValueError(f"calibration: novelty.{name} must be positive")
    _scores("novelty.reference", tensors["reference"])
    return NoveltyDetector(**tensors)


def _entries(name: str, state: Any, kind: type) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    if not isinstance(state, Mapping) or state.keys() != names:
        raise ValueError(
            f"calibration: {name} must have the entries {', '.join(sorted(names))}, got "
            f"{', '.join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__}"
        )
    return dict(state)


def _tensor(name: str, value: Any, dimensions: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim != dimensions:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"calibration: {name} must be a float32 tensor of {dimensions} dimensions, got {got}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"calibration: {name} must be finite, got NaN or infinity")
    return value
