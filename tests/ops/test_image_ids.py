"""Keys of images: the hash of each image's pixels alone, in every backend and for any number of threads."""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds

from diffmic_fast import _native
from diffmic_fast.ops._backend import BackendError
from diffmic_fast.ops.image_ids import image_ids

BACKENDS = ["reference", *CUDA_BACKENDS]


def hashes(images):
    """Python's BLAKE2b of the bytes of each image."""
    return [
        int.from_bytes(
            hashlib.blake2b(i.numpy().tobytes(), digest_size=8).digest(), "little", signed=True
        )
        for i in images.float()
    ]


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_is_the_hash_of_an_image(images, backend):
    expected, there = hashes(images), images.to(device_of(backend))
    assert image_ids(there, backend=backend).tolist() == expected
    last = there.to(memory_format=torch.channels_last)
    assert image_ids(last, backend=backend).tolist() == expected
    assert image_ids(there[2:3], backend=backend).tolist() == expected[2:3]
    assert image_ids(there[:0], backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 11), (4, 8), (5, 13), (32, 33)])
def test_messages_of_every_length(backend, height, width):
    """Of less than a block of 128 bytes, of whole blocks, and with a part of one at the end."""
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(width))
    images[1, 0, 0, 0] = float("nan")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        typed = images.to(dtype)
        found = image_ids(typed.to(device_of(backend)), backend=backend)
        assert found.tolist() == hashes(typed)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_bits_do_not_depend_on_the_schedule(images, backend):
    there = images[:2].to(device_of(backend))
    for seed in seeds(backend, 20):
        schedule(backend, seed)
        assert image_ids(there, backend=backend).tolist() == hashes(images[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise(images, backend):
    there = images.to(device_of(backend))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \(5, 2, 16, 16\)"):
        image_ids(there[:, :2], backend=backend)
    with pytest.raises(ValueError, match="images must have pixels"):
        image_ids(there[..., :0], backend=backend)
    with pytest.raises(TypeError, match="images must be a floating-point tensor"):
        image_ids(there.byte(), backend=backend)
    with pytest.raises(BackendError, match="it has no cpu implementation"):
        image_ids(there, backend="cpu")


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_the_extension_validates_its_arguments(backend):
    module, device = _native.cuda(backend), device_of(backend)
    keys = torch.empty(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="images must have pixels"):
        module.image_ids(torch.empty(2, 0, device=device), keys, 0)
    with pytest.raises(ValueError, match="keys must have shape"):
        module.image_ids(torch.empty(3, 4, device=device), keys, 0)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_keys_do_not_depend_on_the_number_of_threads(threads, monkeypatch):
    """For images of more than a megabyte, which several threads hash."""
    images = torch.randn(5, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    expected = [int(image_ids(image[None])) for image in images]
    hashing, original = set(), hashlib.blake2b

    def recorded(*arguments, **options):
        hashing.add(threading.get_ident())
        return original(*arguments, **options)

    monkeypatch.setattr(hashlib, "blake2b", recorded)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert image_ids(images).tolist() == expected
    assert (hashing == {threading.get_ident()}) is (threads == 1)
