"""csrc/include/philox.h is bitwise identical to the reference, for keys of any strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.reference import philox

_C = _native.extension()


def native(
    seed: int, images: Tensor, samples: Tensor, timesteps: Tensor, classes: int, threads: int = 1
) -> Tensor:
    out = torch.full((len(timesteps), len(images), classes), torch.nan)
    _C.philox_normal(out, seed, images, samples, timesteps, threads)
    return out


def keys(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    images = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    samples = torch.randint(0, 2**32, (rows,), generator=generator)
    timesteps = torch.tensor([0, 1, 999, philox.MAX_TIMESTEP])
    return images, samples, timesteps


def assert_same_bits(first: Tensor, second: Tensor) -> None:
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("classes", [1, 3, 4, 5, 7, 130, philox.MAX_CLASSES])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 1, 2**70 + 5])
def test_bitwise_identical_to_the_reference(seed: int, classes: int) -> None:
    images, samples, timesteps = keys(2 if classes > 1000 else 129)
    expected = philox.normal(seed, images, samples, timesteps, classes)
    assert_same_bits(native(seed, images, samples, timesteps, classes), expected)


def test_a_million_words_are_bitwise_identical_to_the_reference() -> None:
    # A million words reach every exponent of likely size.
    images, samples, timesteps = keys(62_500)
    expected = philox.normal(3, images, samples, timesteps, 4)
    found = native(3, images, samples, timesteps, 4)
    assert_same_bits(found, expected)
    assert abs(found.mean()) < 0.005 and abs(found.std() - 1) < 0.005


def test_result_does_not_depend_on_threads_or_strides() -> None:
    images, samples, timesteps = keys(5001)
    expected = native(1, images, samples, timesteps, 3)
    assert_same_bits(native(1, images, samples, timesteps, 3, threads=3), expected)
    reversed_twice = native(
        1,
        images.flip(0).contiguous().numpy()[::-1],
        torch.stack([samples, samples], dim=1)[:, 1],
        timesteps,
        3,
    )
    assert_same_bits(reversed_twice, expected)
    constant = torch.zeros(1, dtype=torch.int64).expand(5001)
    assert_same_bits(
        native(1, images, constant, timesteps, 3),
        native(1, images, torch.zeros_like(samples), timesteps, 3),
    )


def test_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert native(0, none, none, torch.tensor([1]), 3).shape == (1, 0, 3)
    assert native(0, torch.tensor([1]), torch.tensor([1]), none, 3).shape == (0, 1, 3)


@pytest.mark.parametrize(
    ("samples", "timesteps", "classes", "message"),
    [
        ([0, -1], [0], 3, r"sample_ids must be in \[0, 4294967295\], got -1"),
        ([0, 2**32], [0], 3, "sample_ids must be in"),
        ([0, 0], [2**20], 3, r"timesteps must be in \[0, 1048575\], got 1048576"),
        ([0, 0], [-1], 3, "timesteps must be in"),
        ([0, 0], [0], 0, r"classes must be in \[1, 16384\], got 0"),
        ([0, 0], [0], 16385, r"classes must be in \[1, 16384\], got 16385"),
        ([0], [0], 3, r"sample_ids must have shape \(2,\), got \(1,\)"),
    ],
)
def test_invalid_arguments_are_rejected(
    samples: list[int], timesteps: list[int], classes: int, message: str
) -> None:
    images = torch.tensor([5, 6])
    with pytest.raises(ValueError, match="^philox_normal: " + message):
        native(0, images, torch.tensor(samples), torch.tensor(timesteps), classes)


def test_zero_threads_are_rejected() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        native(0, *keys(1), 1, threads=0)
