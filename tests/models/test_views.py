"""Averages over mirror images: of the guidance model's logits and the encoder's features."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.models import DiffMIC


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return DiffMIC(config.model).eval()


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FLIPS = {1: [()], 2: [(), (3,)], 4: [(), (3,), (2,), (2, 3)]}


@pytest.mark.parametrize("views", [1, 2, 4])
def test_guidance_and_features_are_averages_over_the_mirror_images(model, views):
    mirrored = [IMAGES.flip(axes) if axes else IMAGES for axes in FLIPS[views]]
    with torch.no_grad():
        logits = torch.stack([torch.stack(model.guidance(view)) for view in mirrored]).mean(dim=0)
        features = torch.stack([model.denoiser.encode(view) for view in mirrored]).mean(dim=0)
    guide = model.guide(IMAGES, views=views)
    torch.testing.assert_close(torch.stack(guide.logits), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(IMAGES, views=views), features, rtol=1e-4, atol=1e-5)
    assert torch.equal(guide.saliency, model.guide(IMAGES).saliency)

    options = {"sampler": "ddim", "steps": 3, "seed": 2}
    found = model.predict(IMAGES, views=views, **options)
    expected = model.predict(
        IMAGES, guidance=guide, features=model.encode(IMAGES, views=views), **options
    )
    assert torch.equal(found.probabilities, expected.probabilities)
    assert torch.equal(found.guidance, expected.guidance)
    if views == 1:
        assert torch.equal(found.samples, model.predict(IMAGES, **options).samples)
    else:
        assert not torch.equal(found.samples, model.predict(IMAGES, **options).samples)


@pytest.mark.parametrize(("views", "axes"), [(2, (3,)), (4, (3,)), (4, (2,)), (4, (2, 3))])
def test_a_mirror_image_has_the_same_guidance_and_features(model, views, axes):
    flipped = IMAGES.flip(axes)
    for call in (model.encode, lambda x, views: torch.stack(model.guide(x, views=views).logits)):
        one, other = call(IMAGES, views=views), call(flipped, views=views)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_other_numbers_are_rejected(model):
    for views in (0, 3, 8, True):
        with pytest.raises((ValueError, TypeError), match="views must be"):
            model.predict(IMAGES, views=views)
    for call in (model.guide, model.encode):
        with pytest.raises(ValueError, match="views must be 1, 2 or 4, got 3"):
            call(IMAGES, views=3)
    with pytest.raises(ValueError, match="views must be 1, 2 or 4, got 3"):
        SamplingOptions(views=3)
