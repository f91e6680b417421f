"""Keys of images: of each image's pixels alone, for any number of threads."""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch

from diffmic_fast.models.image_ids import image_ids


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_key_is_the_hash_of_an_image(images):
    expected = [
        int.from_bytes(
            hashlib.blake2b(i.numpy().tobytes(), digest_size=8).digest(), "little", signed=True
        )
        for i in images
    ]
    assert image_ids(images).tolist() == expected
    assert image_ids(images.to(memory_format=torch.channels_last)).tolist() == expected
    assert image_ids(images[2:3]).tolist() == expected[2:3]


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
