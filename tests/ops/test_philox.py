"""Philox noise: the published test vectors, and that a number depends on its key alone."""

from __future__ import annotations

import math

import pytest
import torch

from diffmic_fast.reference import philox


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # the known answers of philox4x32-10 in the Random123 distribution
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            0xFFFFFFFFFFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, seed, words):
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox.philox4x32(tensors, seed)) == words


def test_transform_is_box_muller():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 2**32, (2, 200_000), generator=generator)
    first[:3] = torch.tensor([0, 2**32 - 1, 2**31])
    second[:6] = torch.tensor([0, 2**32 - 1, 2**30, 2**31, 2**29, 3 * 2**29])
    radius = torch.sqrt(-2.0 * torch.log((first.double() + 0.5) / 2**32))
    angle = 2.0 * math.pi * second.double() / 2**32
    cos, sin = philox.box_muller(first, second)
    torch.testing.assert_close(cos, (radius * angle.cos()).float(), rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(sin, (radius * angle.sin()).float(), rtol=1e-6, atol=1e-15)


def test_numbers_are_standard_normal():
    z = philox.normal(3, torch.arange(2000), torch.zeros(2000).long(), torch.arange(50), 7).double()
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96 / count)
    columns = z.reshape(-1, 7)
    correlation = columns.T @ columns / len(columns) - torch.eye(7)
    assert float(correlation.abs().max()) < 6 / math.sqrt(len(columns))


def test_noise_depends_on_its_key_alone():
    images, samples = torch.tensor([5, -(2**63), 2**40 + 5, 5]), torch.tensor([0, 1, 0, 1])
    timesteps = torch.tensor([0, 999, 17])
    together = philox.normal(9, images, samples, timesteps, 6)
    for k in range(3):
        for m in range(4):
            alone = philox.normal(9, images[m : m + 1], samples[m : m + 1], timesteps[k : k + 1], 6)
            assert torch.equal(together[k, m], alone[0, 0])
    assert torch.equal(philox.normal(9, images, samples, timesteps, 3), together[..., :3])
    assert len(together.unique()) == together.numel()
    for seed in (8, 9 + 2**32, 9 + 2**63):
        assert not torch.equal(philox.normal(seed, images, samples, timesteps, 6), together)


def test_invalid_keys_raise():
    ids, zero = torch.arange(2), torch.zeros(2).long()
    with pytest.raises(ValueError, match="classes must be in"):
        philox.normal(0, ids, zero, ids, 0)
    with pytest.raises(ValueError, match="timesteps must be in"):
        philox.normal(0, ids, zero, torch.tensor([2**20]), 3)
    with pytest.raises(ValueError, match="sample_ids must be in"):
        philox.normal(0, ids, zero - 1, ids, 3)
    with pytest.raises(ValueError, match=r"image_ids and sample_ids must be \[M\]"):
        philox.normal(0, ids, zero[:1], ids, 3)
