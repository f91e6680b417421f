"""Shortages of memory and of file descriptors, which say nothing about the image that is being read."""

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmic_fast.data.bit_depth import depth_notice
from diffmic_fast.data.decode import UnreadableImageError, load_image
from diffmic_fast.data.identity import image_keys
from diffmic_fast.data.loading import load_batches
from diffmic_fast.data.scan import find_unreadable
from diffmic_fast.data.table import ImageEntry, ImageTable

SIDE = 8000  # 64 MB in one channel, 256 MB in Pillow's RGB


@contextmanager
def limited(kind, soft):
    """A block with another soft limit of a resource."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def without_descriptors():
    return limited(resource.RLIMIT_NOFILE, 0)


def without_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limited(resource.RLIMIT_AS, pages * resource.getpagesize() + 2**25)


SHORTAGES = [
    pytest.param(without_descriptors, OSError, "Too many open files", id="descriptors"),
    pytest.param(
        without_memory,
        MemoryError,
        None,
        id="memory",
        marks=pytest.mark.skipif(
            not Path("/proc/self/statm").is_file(), reason="needs /proc/self/statm"
        ),
    ),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("shortage") / "large.png"
    Image.new("L", (SIDE, SIDE)).save(path, compress_level=1)
    return path


class Shortage:
    """An image that is loaded under a shortage."""

    def __init__(self, path, shortage):
        self.path, self.shortage = path, shortage

    def __getitem__(self, index):
        with self.shortage():
            return load_image(self.path)


@pytest.mark.parametrize(("shortage", "kind", "text"), SHORTAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shortage_is_not_an_unreadable_image(image, shortage, kind, text, workers):
    with pytest.raises(kind, match=text) as caught:
        next(load_batches(Shortage(image, shortage), [[0]], workers=workers))
    assert not isinstance(caught.value, UnreadableImageError)


@pytest.mark.parametrize(("shortage", "kind", "text"), SHORTAGES)
def test_a_shortage_ends_the_scan(image, shortage, kind, text):
    with shortage(), pytest.raises(kind, match=text):
        find_unreadable([image], bit_depth=16, extent="full")
    assert find_unreadable([image], bit_depth=16, extent="quick") == []


def test_a_shortage_of_descriptors_ends_what_reads_parts_of_files(image):
    table = ImageTable(("a", "b"), (ImageEntry("large.png", 0, image),))
    with without_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            image_keys(table)
        with pytest.raises(OSError, match="Too many open files"):
            find_unreadable([image], bit_depth=16, extent="quick")
        with pytest.raises(OSError, match="Too many open files"):
            depth_notice([image], 16)


@pytest.mark.parametrize(
    ("number", "passes"),
    [(errno.EMFILE, True), (errno.ENFILE, True), (errno.ENOMEM, True), (errno.EIO, False)],
)
def test_an_error_of_the_disk_is_one_of_the_image(tmp_path, monkeypatch, number, passes):
    path = tmp_path / "x.png"
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(path)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError if passes else UnreadableImageError, match=os.strerror(number)):
        load_image(path)
