"""The scan for unreadable images before training."""

import io
import os
import threading
import warnings

import numpy as np
import pytest
from data_loading.image_files import png16, tiff
from PIL import Image, ImageFile

from diffmic_fast.data import decode
from diffmic_fast.data.decode import load_image
from diffmic_fast.data.scan import describe, find_unreadable
from diffmic_fast.data.table import SyntheticImage

EXTENTS = ("quick", "full")
FORMATS = ("jpg", "png", "gif", "tif", "bmp", "ppm", "webp", "jp2")
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def saved(path, **options):
    Image.fromarray(NOISE).save(path, **options)
    return path


def names(found):
    return [path.name for path, _ in found]


@pytest.mark.parametrize("extent", EXTENTS)
def test_readable_files_are_not_reported(tmp_path, extent):
    files = [saved(tmp_path / f"whole.{suffix}") for suffix in FORMATS]
    files += [saved(tmp_path / "lzw.tif", compression="tiff_lzw")]
    files += [saved(tmp_path / "progressive.jpeg", progressive=True)]
    trailing = tmp_path / "trailing.jpg"  # some cameras append data of their own
    trailing.write_bytes(files[0].read_bytes() + b"trailer" * 20)
    deep = tmp_path / "deep.png"
    deep.write_bytes(png16(NOISE[:, :, :1].astype(np.uint16), 0))
    white = tmp_path / "white.tif"
    white.write_bytes(tiff(NOISE[:, :, 0], 16, white_is_zero=True))
    sources = [*files, trailing, deep, white, SyntheticImage(1, 0, 16, 0)]
    assert find_unreadable(sources, bit_depth=16, extent=extent) == []


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("missing", [1, 30, 0.5, 0.95])
def test_a_truncated_file_is_found_if_decoding_finds_it(tmp_path, extent, suffix, missing):
    """Pillow itself accepts a file whose last bytes hold no pixels."""
    path = saved(tmp_path / f"cut.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: -max(1, int(missing if missing >= 1 else missing * len(data)))])
    try:
        load_image(path)
        expected = []
    except decode.UnreadableImageError as error:
        expected = [(path, error.reason)]
    assert find_unreadable([path], bit_depth=16, extent=extent) == expected
    assert expected or missing == 1 or (suffix, missing) == ("png", 30)


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        ("RGB", None), ("RGB", "jpeg"), ("L", "jpeg"), ("YCbCr", "jpeg"), ("L", "tiff_lzw"), ("P", "tiff_lzw"),
        ("I;16", "tiff_adobe_deflate"), ("1", "group4"),
    ],
)  # fmt: skip
def test_the_quick_scan_finds_every_truncation_of_tiff(tmp_path, mode, compression):
    """Also within the tags, which are after the pixels in compressed files."""
    image = Image.fromarray(NOISE[:12, :12])
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    content = io.BytesIO()
    image.save(content, "TIFF", compression=compression)
    path, data = tmp_path / "cut", content.getvalue()
    for length in range(1, len(data) + 1):
        path.write_bytes(data[:length])
        quick, full = (find_unreadable([path], bit_depth=16, extent=extent) for extent in EXTENTS)
        assert quick == full, f"{length} of {len(data)} bytes"
    assert not full


def test_the_quick_scan_finds_gif_files_that_end_like_whole_ones(tmp_path):
    data = saved(tmp_path / "whole.gif").read_bytes()
    lengths = [i + 1 for i in range(len(data) // 2, len(data) - 2) if data[i] == 0x3B]
    files = [tmp_path / f"{length}.gif" for length in lengths]
    for path, length in zip(files, lengths, strict=True):
        path.write_bytes(data[:length])
    found = find_unreadable(files, bit_depth=16, extent="quick")
    assert names(found) == [path.name for path in files] and files


def test_the_quick_scan_does_not_decode_whole_files(tmp_path, monkeypatch):
    files = [saved(tmp_path / f"whole.{suffix}") for suffix in ("jpg", "png", "tif")]
    files += [saved(tmp_path / f"{c}.tif", compression=c) for c in ("tiff_lzw", "jpeg")]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert find_unreadable(files, bit_depth=16, extent="quick") == []


@pytest.mark.parametrize("extent", EXTENTS)
def test_all_unreadable_files_are_named_once_and_in_order(tmp_path, extent):
    good = saved(tmp_path / "good.png")
    bad = [tmp_path / f"{name}.png" for name in ("z", "a", "text", "empty", "gone")]
    for path in bad[:2]:
        path.write_bytes(good.read_bytes()[:-400])
    bad[2].write_text("text")
    bad[3].touch()
    found = find_unreadable([bad[0], good, *bad, good, tmp_path], bit_depth=16, extent=extent)
    assert names(found) == ["z.png", "a.png", "text.png", "empty.png", "gone.png", tmp_path.name]
    text = describe(found)
    assert text.startswith("6 images cannot be read") and len(text.splitlines()) == 7
    assert f"{bad[4]}: there is no such file" in text
    many = describe([(bad[0], "damaged")] * 250)
    assert len(many.splitlines()) == 102 and many.endswith("… and 150 more")


def test_a_full_scan_finds_what_the_ends_do_not_show(tmp_path):
    path = saved(tmp_path / "damaged.png")
    data = bytearray(path.read_bytes())
    data[300:340] = bytes(40)
    path.write_bytes(data)
    deep = tmp_path / "deep.png"
    deep.write_bytes(png16(np.full((8, 8, 1), 5000, np.uint16), 0))
    assert find_unreadable([path, deep], bit_depth=12, extent="quick") == []
    found = find_unreadable([path, deep], bit_depth=12, extent="full")
    assert names(found) == ["damaged.png", "deep.png"] and "[0, 4095]" in found[1][1]


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_named_pipe_is_not_waited_for(tmp_path, extent):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_unreadable([tmp_path / "pipe.png"], bit_depth=16, extent=extent)
    assert found == [(tmp_path / "pipe.png", "it is not a regular file")]


def test_threads_leave_warnings_and_pillow_as_they_were(tmp_path, monkeypatch):
    """Blocks of two threads that overlap: the one that began first ends first."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    began, ended = threading.Event(), threading.Event()

    def first():
        with decode.strict_pillow():
            began.set()
            second_began.wait(10)
        ended.set()

    second_began = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert began.wait(10)
    with decode.strict_pillow():
        second_began.set()
        assert ended.wait(10)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        with pytest.raises(Image.DecompressionBombWarning):
            warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)
    thread.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES and list(warnings.filters) == filters
