"""Patches that avoid the background of an image."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.models.guidance import DCG, foreground


def disc(size: int, radius: float, inside: float, outside: float, noise: float = 0.0):
    """[1, 3, size, size], a textured disc on an even ground, as in a fundus image."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(size) - (size - 1) / 2
    within = axis[:, None].square() + axis.square() < radius**2
    texture = inside + 0.3 * torch.randn(3, size, size, generator=generator)
    ground = outside + noise * torch.randn(3, size, size, generator=generator)
    return torch.where(within, texture, ground)[None]


@pytest.mark.parametrize(("inside", "outside"), [(1.0, -2.0), (-1.0, 2.5)])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_cells_of_a_disc_on_an_even_ground(inside, outside, noise):
    found = foreground(disc(112, 40.0, inside, outside, noise), (7, 7))[0]
    centre = torch.arange(7) - 3.0
    distance = 16 * (centre[:, None].square() + centre.square()).sqrt()
    assert found.dtype == torch.bool
    assert bool(found[distance < 32].all())  # cells wholly inside
    assert not bool(found[distance > 51].any())  # cells wholly outside


def test_even_areas_of_middle_grey_are_foreground():
    """A ground that is neither the darkest nor the lightest part may be tissue."""
    images = disc(64, 20.0, 0.0, 0.5)
    images[0, :, 30, 30], images[0, :, 34, 34] = -3.0, 3.0
    assert bool(foreground(images, (4, 4)).all())


@pytest.mark.parametrize(("blocks", "expected"), [(0, True), (3, True), (4, False), (16, False)])
def test_a_cell_with_a_quarter_of_background_is_background(blocks, expected):
    """A cell of 4 x 4 blocks beside one without background."""
    images = 1.0 + 0.3 * torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    for i in range(blocks):
        row, column = 16 * (i // 4), 16 * (i % 4)
        images[:, :, row : row + 16, column : column + 16] = -2.0
    assert foreground(images, (1, 2)).tolist() == [[[expected, True]]]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 7)])
def test_grids_of_any_size(size):
    images = torch.randn(2, 3, 45, 70, generator=torch.Generator().manual_seed(0))
    found = foreground(images, size)
    assert found.shape == (2, *size) and bool(found.all())
    assert not bool(foreground(torch.zeros(1, 3, 45, 70), size).any())


def test_patches_lie_in_the_foreground():
    """Although the corners are the most salient."""
    torch.manual_seed(0)
    options = {"trunk": "test_resnet", "crops": 4, "crop_size": 32}
    avoiding = DCG(3, crop_foreground=True, **options).eval()
    published = DCG(3, **options).eval()
    published.load_state_dict(avoiding.state_dict())
    images = torch.cat([disc(256, 90.0, 1.0, -2.0), torch.zeros(1, 3, 256, 256)])
    cells = published.detail(images).saliency.shape[2:]
    corner = torch.zeros(1, 3, *cells)
    corner[:, :, :2, :2] = 10.0
    for model in (avoiding, published):
        model.left_postprocess_net.register_forward_hook(lambda *arguments: arguments[2] + corner)
    with torch.no_grad():
        found, other = avoiding.detail(images), published.detail(images)
    assert torch.equal(found.saliency, other.saliency)  # what is shown is unchanged
    assert torch.equal(found.logits.global_, other.logits.global_)
    assert bool((other.origins[0] < 96).all(dim=1).any())
    middle = found.origins[0].float() + 16 - 128
    assert bool((middle.norm(dim=1) < 100).all())
    assert found.origins[1].shape == (4, 2)  # an image without foreground has patches too
