"""Keys of images: of each image's pixels alone, by any number of threads."""

from __future__ import annotations

import hashlib

import pytest
import torch

from diffmic_fast.models import image_ids as module
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
def test_threads_change_nothing(threads, images, monkeypatch):
    expected = image_ids(images)
    started = []

    class Pool(module.ThreadPoolExecutor):
        def __init__(self, count):
            started.append(count)
            super().__init__(count)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(module, "_THREADED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(image_ids(images), expected)
    assert started == ([] if threads == 1 else [min(threads, 5)])
