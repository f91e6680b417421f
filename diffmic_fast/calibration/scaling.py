"""Post-hoc scaling of logits, fitted on validation images (docs/algorithm.md, "Calibration and confidence").

Temperature scaling, and its extension by a second score and by a bias per class (Guo et al. 2017, Platt 1999).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmic_fast.ops._transfer import to_device

# In the order of their number of parameters.
KINDS = ("temperature", "stacked", "vector")
# Fewer images leave the error of a temperature above its effect.
MIN_IMAGES = 20
# From here on the kind is chosen by cross-validation; fewer images do not tell the kinds apart.
MIN_IMAGES_FOR_CHOICE = 100
FOLDS = 5
# Upper bound of the factors. A factor of 100 on a one-hot vector is certainty in float32; only scores that hardly
# differ between the classes could ask for more.
MAX_FACTOR = 100.0
# Standard deviation of the normal prior of a bias.
_BIAS_DEVIATION = 1.0
_SMALLEST_PROBABILITY = 1e-30
_ITERATIONS = 100
_TOLERANCE = 1e-10


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logarithms of probabilities [..., C], which are clamped at 1e-30."""
    return probabilities.clamp_min(_SMALLEST_PROBABILITY).log()


@dataclass(frozen=True, eq=False)
class Scaling:
    """Calibrated logits: factor * scores + prior_factor * prior + bias.

    Attributes:
        kind: One of KINDS: which of the parameters were fitted.
        factor: Of the scores, in [0, 100]; for logarithms of probabilities the inverse temperature.
        prior_factor: Of the logarithms of the guidance's probabilities, in [0, 100]; 0 for "temperature".
        bias: [C] float32; 0 except for "vector".
    """

    kind: str
    factor: float
    prior_factor: float
    bias: Tensor

    def logits(self, scores: Tensor, prior: Tensor | None = None) -> Tensor:
        """Calibrated logits.

        Args:
            scores: [..., C], y_0 or logarithms of probabilities.
            prior: Logarithms of the guidance's probabilities, of a shape that broadcasts to that of `scores`. May be
                None for the kind "temperature".

        Raises:
            ValueError: `prior` is missing.
        """
        result = self.factor * scores
        if self.kind != "temperature":
            if prior is None:
                raise ValueError(f"Scaling: prior must be given for the kind {self.kind!r}")
            result = result + self.prior_factor * prior
        if self.kind == "vector":
            result = result + to_device(self.bias, scores.device).to(scores.dtype)
        return result

    def probabilities(self, scores: Tensor, prior: Tensor | None = None) -> Tensor:
        """Softmax of `logits`, of the shape and dtype of `scores`."""
        return self.logits(scores, prior).softmax(dim=-1)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """[N], of labels [N] under logits [N, C]."""
    return -logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]


def fit_scaling(kind: str, scores: Tensor, labels: Tensor, prior: Tensor | None = None) -> Scaling:
    """Fit a scaling by maximum likelihood.

    Minimises, in float64 and by a projected Newton method, the cross-entropy with smoothed labels: the right class of
    an image has 1 - 1 / (N + 2), the others share the rest (Platt 1999). N right answers in N trials support no more
    certainty than that, and separable labels have a finite minimum. For "vector" ||bias||^2 / (2 N) is added, a normal
    prior of standard deviation 1. The problem is convex; the result depends on the arguments alone.

    Args:
        kind: One of KINDS.
        scores: [N, C].
        labels: [N] int64 in [0, C). Classes may be absent.
        prior: [N, C], logarithms of the guidance's probabilities; not used for "temperature".

    Raises:
        ValueError: An argument does not fit this description or is not finite.
    """
    scores, labels, prior = _checked(kind, scores, labels, prior)
    inputs = [scores] if prior is None else [scores, prior]
    problem = _Problem(torch.stack(inputs), labels, bias=kind == "vector")
    solution = _minimise(problem)
    bias = torch.zeros(scores.shape[1], dtype=torch.float32, device="cpu")
    if kind == "vector":
        bias = solution[2:].float()
    factor = float(solution[0])
    return Scaling(kind, factor, 0.0 if prior is None else float(solution[1]), bias)


def fold_numbers(labels: Tensor, folds: int = FOLDS) -> Tensor:
    """[N] int64, the fold of each image: every class is spread evenly over the folds, in the order of the images."""
    order = labels.argsort(stable=True)
    numbers = torch.empty_like(labels)
    numbers[order] = torch.arange(len(labels), device=labels.device) % folds
    return numbers


def cross_fitted_logits(
    kind: str, scores: Tensor, labels: Tensor, prior: Tensor | None = None, folds: int = FOLDS
) -> Tensor:
    """[N, C] float64: each image's calibrated logits by a scaling that was fitted on the other folds."""
    numbers = fold_numbers(labels, folds)
    result = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    for fold in range(folds):
        inside, outside = numbers == fold, numbers != fold
        if not inside.any():
            continue
        given, held = (None, None) if prior is None else (prior[outside], prior[inside])
        scaling = fit_scaling(kind, scores[outside], labels[outside], given)
        result[inside] = scaling.logits(
            scores[inside].double(), None if held is None else held.double()
        )
    return result


def choose_kind(
    scores: Tensor, labels: Tensor, prior: Tensor, kinds: Sequence[str] = KINDS
) -> tuple[str, dict[str, float]]:
    """Choose the kind of scaling by cross-validated negative log-likelihood.

    A richer kind replaces a simpler one only if it is better by more than one standard error of the paired difference.
    A bias per class must keep accuracy and macro F1 besides: likelihood favours frequent classes. Fewer than 100 images
    are scaled by a temperature alone; a bias per class is considered if every fold can have an image of every class.

    Args:
        scores: [N, C].
        labels: [N] int64.
        prior: [N, C], logarithms of the guidance's probabilities.
        kinds: Those to compare, in the order of KINDS.

    Returns:
        The kind, and the mean cross-validated negative log-likelihood of each kind that was compared.

    Raises:
        ValueError: Fewer than 20 images, or as `fit_scaling`.
    """
    check_count(len(labels))
    _checked(KINDS[-1], scores, labels, prior)
    counts = torch.bincount(labels, minlength=scores.shape[1])
    candidates = list(kinds)
    if len(labels) < MIN_IMAGES_FOR_CHOICE:
        candidates = candidates[:1]
    elif int(counts.min()) < FOLDS:
        candidates = [kind for kind in candidates if kind != "vector"]
    logits = {
        kind: cross_fitted_logits(kind, scores, labels, None if kind == "temperature" else prior)
        for kind in candidates
    }
    losses = {kind: negative_log_likelihood(each, labels) for kind, each in logits.items()}
    chosen = candidates[0]
    for kind in candidates[1:]:
        gain = losses[chosen] - losses[kind]
        likelier = float(gain.mean()) > float(gain.std()) / math.sqrt(len(labels))
        if likelier and (kind != "vector" or _keeps_labels(logits[chosen], logits[kind], labels)):
            chosen = kind
    return chosen, {kind: float(loss.mean()) for kind, loss in losses.items()}


def _keeps_labels(before: Tensor, after: Tensor, labels: Tensor) -> bool:
    """Whether neither accuracy nor macro F1 falls."""
    pairs = zip(_accuracy_and_f1(before, labels), _accuracy_and_f1(after, labels), strict=True)
    return all(then <= now for then, now in pairs)


def _accuracy_and_f1(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and F1 averaged over the classes that occur among labels or predictions."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    right = torch.bincount(labels[predicted == labels], minlength=classes).double()
    either = torch.bincount(labels, minlength=classes) + torch.bincount(
        predicted, minlength=classes
    )
    f1 = 2 * right[either > 0] / either[either > 0]
    return float(right.sum()) / len(labels), float(f1.mean())


def check_count(count: int) -> None:
    """Raise a ValueError unless there are enough validation images for a calibration."""
    if count < MIN_IMAGES:
        raise ValueError(
            f"calibration: there must be at least {MIN_IMAGES} validation images, got {count}"
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """Cross-entropy as a function of theta = (factor of each input, and the C biases if there are any).

    Attributes:
        inputs: [P, N, C] float64.
        labels: [N].
        bias: Whether there is one.
    """

    inputs: Tensor
    labels: Tensor
    bias: bool

    @property
    def targets(self) -> Tensor:
        count, classes = self.inputs.shape[1:]
        rest = 1.0 / (count + 2)
        targets = torch.full((count, classes), rest / (classes - 1), dtype=torch.float64)
        return targets.scatter_(1, self.labels[:, None], 1.0 - rest)

    def logits(self, theta: Tensor) -> Tensor:
        number = len(self.inputs)
        logits = torch.einsum("p,pnc->nc", theta[:number], self.inputs)
        return logits + theta[number:] if self.bias else logits

    def value(self, theta: Tensor) -> float:
        loss = -(self.targets * self.logits(theta).log_softmax(dim=1)).sum(dim=1).mean()
        return float(loss + self._weight * theta[len(self.inputs) :].square().sum() / 2)

    @property
    def _weight(self) -> float:
        return 1.0 / (self.inputs.shape[1] * _BIAS_DEVIATION**2)

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian."""
        inputs, count, number = self.inputs, self.inputs.shape[1], len(self.inputs)
        p = self.logits(theta).softmax(dim=1)
        error = p - self.targets
        means = torch.einsum("pnc,nc->pn", inputs, p)
        gradient = torch.einsum("pnc,nc->p", inputs, error) / count
        hessian = (torch.einsum("pnc,nc,qnc->pq", inputs, p, inputs) - means @ means.T) / count
        if not self.bias:
            return gradient, hessian
        biases = theta[number:]
        gradient = torch.cat([gradient, error.mean(dim=0) + self._weight * biases])
        mixed = torch.einsum("nc,pnc->pc", p, inputs - means[:, :, None]) / count
        own = torch.diag(p.mean(dim=0) + self._weight) - p.T @ p / count
        return gradient, torch.cat(
            [torch.cat([hessian, mixed], dim=1), torch.cat([mixed.T, own], dim=1)]
        )


def _minimise(problem: _Problem) -> Tensor:
    """The minimum with factors in [0, MAX_FACTOR] (Bertsekas 1982, projected Newton method)."""
    number = len(problem.inputs)
    classes = problem.inputs.shape[2]
    size = number + (classes if problem.bias else 0)
    low = torch.full((size,), -math.inf, dtype=torch.float64)
    high = -low
    low[:number], high[:number] = 0.0, MAX_FACTOR
    theta = torch.zeros(size, dtype=torch.float64)
    theta[0] = 1.0
    value = problem.value(theta)
    for _ in range(_ITERATIONS):
        gradient, hessian = problem.derivatives(theta)
        # A parameter at a bound stays there if descent, or the Newton step, would cross the bound.
        fixed = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        if float(gradient[~fixed].abs().sum()) < _TOLERANCE:
            break
        step = _newton_step(gradient, hessian, ~fixed)
        fixed = fixed | ((theta <= low) & (step > 0)) | ((theta >= high) & (step < 0))
        step = _newton_step(gradient, hessian, ~fixed)
        moved, lower = _line_search(problem, theta, step, value, low, high)
        if not lower < value:
            break
        theta, value = moved, lower
    return theta


def _newton_step(gradient: Tensor, hessian: Tensor, free: Tensor) -> Tensor:
    """Solution of hessian @ step = gradient in the free parameters, 0 in the others."""
    part = hessian[free][:, free]
    # A small ridge: scores that are equal for all classes leave their factor undetermined.
    ridge = 1e-12 * (1.0 + hessian.diagonal().max())
    step = torch.zeros_like(gradient)
    step[free] = torch.linalg.solve(part + torch.diag(ridge.expand(len(part))), gradient[free])
    return step


def _line_search(
    problem: _Problem, theta: Tensor, step: Tensor, value: float, low: Tensor, high: Tensor
) -> tuple[Tensor, float]:
    """The first of the halved steps, projected on the bounds, that lowers the value."""
    length = 1.0
    for _ in range(50):
        moved = torch.minimum(torch.maximum(theta - length * step, low), high)
        found = problem.value(moved)
        if found < value:
            return moved, found
        length /= 2
    return theta, value


def _checked(
    kind: str, scores: Tensor, labels: Tensor, prior: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of `fit_scaling` in float64, on the CPU."""
    if kind not in KINDS:
        raise ValueError(f"fit_scaling: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) == 0:
        raise ValueError(
            f"fit_scaling: scores must be [N, C] with N >= 1 and C >= 2, got {tuple(scores.shape)}"
        )
    if labels.shape != scores.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"fit_scaling: labels must be int64 [N={len(scores)}], got {labels.dtype} {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
        raise ValueError(
            f"fit_scaling: labels must be in [0, {scores.shape[1] - 1}], got {int(labels.min())} … {int(labels.max())}"
        )
    if kind == "temperature":
        prior = None
    elif prior is None or prior.shape != scores.shape:
        got = "None" if prior is None else str(tuple(prior.shape))
        raise ValueError(f"fit_scaling: prior must be {tuple(scores.shape)}, got {got}")
    for name, value in (("scores", scores), ("prior", prior)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(f"fit_scaling: {name} must be finite, got NaN or infinity")
    return (
        scores.detach().double().cpu(),
        labels.detach().cpu(),
        None if prior is None else prior.detach().double().cpu(),
    )
