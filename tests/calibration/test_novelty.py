"""Novelty detection: what is flagged, false alarms, and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmic_fast.calibration.novelty import (
    MAX_TRAINING_IMAGES,
    NoveltyDetector,
    evenly_spaced,
    fit_novelty,
    image_statistics,
)


def blobs(count: int, seed: int, size: int = 40) -> Tensor:
    """Reddish discs with shading and texture on a black ground, of varied size and colour."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    radius = 0.75 + 0.1 * torch.randn(count, 1, 1, 1, generator=generator)
    colour = torch.tensor([0.7, 0.35, 0.2])[None, :, None, None]
    colour = colour * (1 + 0.1 * torch.randn(count, 3, 1, 1, generator=generator))
    texture = 0.03 * torch.randn(count, 1, size, size, generator=generator)
    disc = torch.sigmoid(30 * (radius - (x.square() + y.square()).sqrt()))
    return (disc * (colour * (1 - 0.3 * y) + texture) - 0.45) / 0.23


def features_of(images: Tensor, width: int = 24) -> Tensor:
    """Random projections of the pixels."""
    generator = torch.Generator().manual_seed(9)
    pixels = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
    return torch.tanh(pixels @ torch.randn(pixels.shape[1], width, generator=generator) / 14)


def inputs(images: Tensor) -> tuple[Tensor, Tensor]:
    return features_of(images), image_statistics(images)


@pytest.fixture(scope="module")
def detector() -> NoveltyDetector:
    return fit_novelty(*inputs(blobs(300, 0)), *inputs(blobs(150, 1)))


def flagged(detector: NoveltyDetector, images: Tensor) -> float:
    return float((detector.p_value(detector.distance(*inputs(images))) <= 0.05).float().mean())


def test_new_images_of_the_kind_are_rarely_flagged(detector: NoveltyDetector) -> None:
    assert flagged(detector, blobs(400, 2)) <= 0.09


@pytest.mark.parametrize(
    "kind", ["black", "white", "grey", "noise", "smooth", "inverted", "shifted"]
)
def test_other_images_are_flagged(detector: NoveltyDetector, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    black, white = -0.45 / 0.23, 0.55 / 0.23
    images = {
        "black": torch.full((4, 3, 40, 40), black),
        "white": torch.full((4, 3, 40, 40), white),
        "grey": torch.zeros(4, 3, 40, 40),
        "noise": torch.randn(40, 3, 40, 40, generator=generator),
        "smooth": torch.nn.functional.interpolate(
            torch.randn(40, 3, 4, 4, generator=generator), size=40, mode="bicubic"
        ),
        "inverted": black + white - blobs(40, 4),
        "shifted": blobs(40, 4).roll(13, dims=3),
    }[kind]
    assert flagged(detector, images) >= 0.95


def test_features_that_differ_are_flagged_although_the_pixels_do_not(
    detector: NoveltyDetector,
) -> None:
    features, statistics = inputs(blobs(50, 5))
    distance = detector.distance(features + 3.0, statistics)
    assert bool((detector.p_value(distance) <= 0.05).all())


def test_collapsed_features_do_not_hide_other_images() -> None:
    """An encoder that gives every image the features of one class."""
    same = torch.zeros(300, 24)
    training, validation = image_statistics(blobs(300, 0)), image_statistics(blobs(150, 1))
    detector = fit_novelty(same, training, same[:150], validation)
    noise = torch.randn(40, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    distance = detector.distance(same[:40], image_statistics(noise))
    assert bool((detector.p_value(distance) <= 0.05).all())


def test_a_distance_does_not_depend_on_the_batch(detector: NoveltyDetector) -> None:
    images = blobs(9, 6)
    together = detector.distance(*inputs(images))
    single = torch.cat([detector.distance(*inputs(image[None])) for image in images])
    # Whitening amplifies the rounding of the statistics.
    torch.testing.assert_close(together, single, rtol=1e-3, atol=1e-3)


def test_another_reference_keeps_the_training_images(detector: NoveltyDetector) -> None:
    """A clinic whose images are all darker: they are the reference now."""
    dark = blobs(200, 7) - 0.6
    assert flagged(detector, dark) > 0.5
    own = detector.referred_to(*inputs(dark[:100]))
    assert flagged(own, dark[100:]) <= 0.15
    assert own.neighbours is detector.neighbours


def test_statistics_of_odd_and_small_images() -> None:
    for size in (2, 3, 5, 33):
        found = image_statistics(torch.randn(3, 3, size, size + 1))
        assert found.shape == (3, 103) and bool(torch.isfinite(found).all())
    for shape in ((2, 1, 8, 8), (3, 8, 8), (2, 3, 1, 8)):
        with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] with H, W >= 2"):
            image_statistics(torch.zeros(shape))


def test_few_training_images_and_wrong_features_are_rejected(detector: NoveltyDetector) -> None:
    with pytest.raises(ValueError, match="at least 50 training images, got 49"):
        fit_novelty(*inputs(blobs(49, 0)), *inputs(blobs(30, 1)))
    with pytest.raises(ValueError, match=r"features must be \[B, 24\], got \(2, 25\)"):
        detector.distance(torch.zeros(2, 25), torch.zeros(2, 103))


def test_many_training_images_are_thinned_out_evenly() -> None:
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    features = torch.randn(3000, 7, generator=torch.Generator().manual_seed(0))
    statistics = torch.randn(3000, 103, generator=torch.Generator().manual_seed(1))
    detector = fit_novelty(features, statistics, features[:30], statistics[:30])
    assert len(detector.neighbours) == MAX_TRAINING_IMAGES


def test_a_detector_of_the_widest_features_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 6144, generator=generator)
    statistics = torch.randn(600, 103, generator=generator)
    detector = fit_novelty(features, statistics, features[:30], statistics[:30])
    assert sum(4 * tensor.numel() for tensor in vars(detector).values()) < 3 * 2**20
