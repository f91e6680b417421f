"""Scaling of logits: known answers, bounds, absent classes, and the choice of the kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffmic_fast.calibration.scaling import (
    KINDS,
    MAX_FACTOR,
    Scaling,
    choose_kind,
    cross_fitted_logits,
    fit_scaling,
    fold_numbers,
    log_probabilities,
    negative_log_likelihood,
)


def drawn(logits: Tensor, seed: int = 0) -> Tensor:
    """Labels drawn from the distributions of the logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def scores_of(count: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("classes", [2, 5])
def test_the_factors_that_drew_the_labels_are_found(classes: int) -> None:
    scores, prior = scores_of(20_000, classes), scores_of(20_000, classes, 1)
    bias = torch.linspace(-0.5, 0.5, classes).double()
    labels = drawn(3.0 * scores + 0.7 * prior + bias)
    found = fit_scaling("vector", scores, labels, prior)
    assert found.factor == pytest.approx(3.0, rel=0.05)
    assert found.prior_factor == pytest.approx(0.7, rel=0.1)
    torch.testing.assert_close(found.bias.double(), bias, atol=0.08, rtol=0)
    temperature = fit_scaling("temperature", scores, drawn(0.25 * scores))
    assert temperature.factor == pytest.approx(0.25, rel=0.15)
    assert temperature.prior_factor == 0.0 and not temperature.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_is_a_minimum_of_the_smoothed_loss(kind: str) -> None:
    """Compared with changed parameters, and with an optimizer of torch."""
    scores, prior = scores_of(61, 3), scores_of(61, 3, 1)
    labels = drawn(2.0 * scores + prior)
    found = fit_scaling(kind, scores, labels, prior)
    rest = 1.0 / (61 + 2)
    targets = torch.full((61, 3), rest / 2).double().scatter(1, labels[:, None], 1 - rest)

    def loss(theta: Tensor) -> Tensor:
        logits = theta[0] * scores
        if kind != "temperature":
            logits = logits + theta[1] * prior
        if kind == "vector":
            logits = logits + theta[2:]
        value = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        return value + (theta[2:].square().sum() / (2 * 61) if kind == "vector" else 0.0)

    theta = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )
    optimizer.step(lambda: (optimizer.zero_grad(), (value := loss(theta)).backward(), value)[2])
    own = torch.tensor([found.factor, found.prior_factor, *found.bias.tolist()]).double()
    assert float(loss(own)) <= float(loss(theta.detach())) + 1e-9
    torch.testing.assert_close(own[0], theta.detach()[0], rtol=1e-4, atol=1e-4)


def test_separable_labels_have_a_finite_scale() -> None:
    """All right: the mean probability of the right class is the rule of succession, (n + 1) / (n + 2)."""
    labels = torch.arange(40) % 4
    scores = torch.eye(4)[labels]
    found = fit_scaling("temperature", scores, labels)
    p = found.probabilities(scores).gather(1, labels[:, None])
    torch.testing.assert_close(p, torch.full_like(p, 41 / 42), rtol=1e-5, atol=0)
    tiny = fit_scaling("temperature", 1e-6 * scores, labels)
    assert tiny.factor == MAX_FACTOR


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_mislead_get_the_factor_zero(kind: str) -> None:
    labels = torch.arange(60) % 3
    wrong = torch.eye(3)[(labels + 1) % 3]
    found = fit_scaling(kind, wrong, labels, wrong)
    assert found.factor == 0.0 and found.prior_factor == 0.0
    assert float(found.probabilities(wrong, wrong).max()) == pytest.approx(1 / 3, abs=1e-5)


def test_scores_that_are_equal_for_all_classes_change_nothing() -> None:
    labels = torch.arange(30) % 3
    found = fit_scaling("stacked", torch.ones(30, 3), labels, torch.zeros(30, 3))
    assert math.isfinite(found.factor) and math.isfinite(found.prior_factor)
    p = found.probabilities(torch.ones(2, 3), torch.zeros(2, 3))
    torch.testing.assert_close(p, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_class_keeps_a_probability(kind: str) -> None:
    scores, prior = scores_of(50, 4), scores_of(50, 4, 1)
    labels = drawn(scores) % 3
    p = fit_scaling(kind, scores, labels, prior).probabilities(scores, prior)
    assert bool(torch.isfinite(p).all()) and float(p[:, 3].min()) > 1e-6


def test_folds_spread_every_class_evenly() -> None:
    labels = torch.tensor([2] * 11 + [0] * 7 + [1] * 5)
    numbers = fold_numbers(labels, 5)
    for label in range(3):
        counts = torch.bincount(numbers[labels == label], minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(numbers, fold_numbers(labels, 5))


def test_cross_fitting_does_not_use_an_images_own_label() -> None:
    scores, labels = scores_of(40, 3), drawn(scores_of(40, 3))
    before = cross_fitted_logits("temperature", scores, labels)
    fold = fold_numbers(labels) == 2
    # Fold numbers stay: two labels of the fold are exchanged with those of the same class.
    changed = scores.clone()
    changed[fold] = 5 * changed[fold]
    after = cross_fitted_logits("temperature", changed, labels)
    torch.testing.assert_close(after[fold], 5 * before[fold])
    assert not torch.allclose(after[~fold], before[~fold])


def test_the_simplest_kind_that_suffices_is_chosen() -> None:
    scores, prior = scores_of(2000, 3), scores_of(2000, 3, 1)
    kind, losses = choose_kind(scores, drawn(2.0 * scores), prior)
    assert kind == "temperature" and list(losses) == list(KINDS)
    kind, losses = choose_kind(scores, drawn(2.0 * scores + prior), prior)
    assert kind == "stacked" and losses["stacked"] < losses["temperature"]
    bias = torch.tensor([-1.0, 0.0, 1.0]).double()
    assert choose_kind(scores, drawn(2.0 * scores + prior + bias), prior)[0] == "vector"


def test_a_likelihood_that_gives_up_a_rare_class_is_not_chosen() -> None:
    """With weak scores and a quarter of one class, biases answer the frequent class nearly always."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(600, generator=generator) < 0.25).long()
    signal = 0.4 * torch.stack([1.0 - labels, labels.double()], dim=1)
    scores = signal + torch.randn(600, 2, generator=generator).double()
    prior = torch.zeros(600, 2, dtype=torch.float64)
    kind, losses = choose_kind(scores, labels, prior)
    assert losses["vector"] < 0.9 * losses["temperature"]
    assert kind == "temperature"


def test_stacked_is_chosen_though_its_accuracy_is_slightly_lower() -> None:
    """Means of y_0 that are nearly one-hot, 85 % of them right, and a weak guidance that is informative where not."""
    generator = torch.Generator().manual_seed(3)
    prior = 0.8 * torch.randn(300, 3, generator=generator).double()
    labels = torch.multinomial(prior.softmax(1), 1, generator=generator)[:, 0]
    wrong = torch.rand(300, generator=generator) < 0.15
    other = (labels + 1 + torch.randint(0, 2, (300,), generator=generator)) % 3
    scores = one_hot(torch.where(wrong, other, labels), 3).double()
    scores += 0.02 * torch.randn(300, 3, generator=generator)
    prior = prior.log_softmax(1)
    kind, losses = choose_kind(scores, labels, prior)
    assert kind == "stacked" and losses["stacked"] < 0.9 * losses["temperature"]
    right = [
        int((cross_fitted_logits(kind, scores, labels, used).argmax(1) == labels).sum())
        for kind, used in (("temperature", None), ("stacked", prior))
    ]
    assert right[0] - 3 < right[1] < right[0]


def test_a_gain_within_one_standard_error_changes_nothing() -> None:
    scores, prior = scores_of(200, 3), scores_of(200, 3, 10)
    kind, losses = choose_kind(scores, drawn(scores + 0.15 * prior), prior)
    assert kind == "temperature" and losses["stacked"] < losses["temperature"]


def test_few_images_and_absent_classes_limit_the_kinds() -> None:
    scores, prior = scores_of(300, 4), scores_of(300, 4, 1)
    labels = drawn(scores + prior)
    assert list(choose_kind(scores[:99], labels[:99], prior[:99])[1]) == ["temperature"]
    assert list(choose_kind(scores, labels % 3, prior)[1]) == ["temperature", "stacked"]
    with pytest.raises(ValueError, match="at least 20 validation images, got 19"):
        choose_kind(scores[:19], labels[:19], prior[:19])


def test_a_prior_is_needed_where_the_kind_has_one() -> None:
    scaling = Scaling("stacked", 1.0, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="prior must be given for the kind 'stacked'"):
        scaling.logits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"prior must be \(4, 3\), got None"):
        fit_scaling("vector", torch.zeros(4, 3), torch.zeros(4).long())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "isotonic"}, "kind must be one of temperature, stacked, vector, got 'isotonic'"),
        ({"scores": torch.zeros(4)}, r"scores must be \[N, C\] with N >= 1 and C >= 2, got \(4,\)"),
        ({"labels": torch.zeros(4)}, r"labels must be int64 \[N=4\], got torch.float32"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"labels must be in \[0, 2\], got 0 … 3"),
        ({"scores": torch.full((4, 3), math.nan)}, "scores must be finite"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    good = {"kind": "temperature", "scores": torch.zeros(4, 3), "labels": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=message):
        fit_scaling(**{**good, **changes})  # type: ignore[arg-type]


def test_probabilities_of_zero_have_a_finite_logarithm() -> None:
    logs = log_probabilities(torch.tensor([1.0, 0.0]))
    assert bool(torch.isfinite(logs).all())
    assert float(negative_log_likelihood(logs[None], torch.tensor([0]))) == pytest.approx(0.0)
