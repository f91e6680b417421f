"""Images of other depths than 8 bits: scaling, declared depths, WhiteIsZero, transparency."""

from __future__ import annotations

import numpy as np
import pytest
from data_loading.image_files import png, png16, ramp, scaled, tiff
from PIL import Image

from diffmic_fast.data.bit_depth import depth_notice
from diffmic_fast.data.decode import UnreadableImageError, load_image


@pytest.fixture
def write(tmp_path):
    def save(content, name="x.png"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return save


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16, 32])
def test_white_is_zero_is_inverted_once_at_every_depth(write, bits, order):
    depth = min(bits, 16)
    samples = ramp(2**depth - 1)
    expected = scaled(samples, 2**depth - 1)
    black, white = (
        write(tiff(samples, bits, white_is_zero=inverted, order=order), f"{inverted}.tif")
        for inverted in (False, True)
    )
    if order == ">" and bits in (12, 32):  # Pillow has no decoder
        for path in (black, white):
            with pytest.raises(
                UnreadableImageError, match="a kind of pixels that is not supported"
            ):
                load_image(path)
        return
    assert np.array_equal(load_image(black)[..., 2], expected)
    assert np.array_equal(load_image(white), 255 - load_image(black))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_compressed_white_is_zero_is_inverted(write, bits, order):
    if order == ">" and bits == 12:
        pytest.skip("Pillow has no decoder")
    samples = ramp(2**bits - 1)
    content = tiff(samples, bits, white_is_zero=True, order=order, deflate=True)
    expected = 255 - scaled(samples, 2**bits - 1)
    assert np.array_equal(load_image(write(content, "x.tif"))[..., 0], expected)


def test_white_is_zero_uses_bit_depth(write):
    path = write(tiff(ramp(4095), 16, white_is_zero=True), "x.tif")
    assert np.array_equal(load_image(path, bit_depth=12)[..., 1], 255 - scaled(ramp(4095), 4095))


@pytest.mark.parametrize("bit_depth", [12, 14, 16])
@pytest.mark.parametrize(
    "kind",
    [
        "grey", "rgb", "la", "rgba", "tiff", "tiff>", "tiff deflate", "tiff> deflate", "tiff rgba", "ppm",
    ],
)  # fmt: skip
def test_bit_depth_holds_for_grey_and_colour(write, kind, bit_depth):
    top = 2**bit_depth - 1
    grey = ramp(top)
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=2)
    opaque = np.full_like(grey, 65535)[..., None]
    samples, content = {
        "grey": (np.repeat(grey[..., None], 3, 2), png16(grey[..., None], 0)),
        "rgb": (colour, png16(colour, 2)),
        "la": (np.repeat(grey[..., None], 3, 2), png16(np.dstack([grey, opaque]), 4)),
        "rgba": (colour, png16(np.dstack([colour, opaque]), 6)),
        "tiff": (colour, tiff(colour, 16, channels=3)),
        "tiff>": (colour, tiff(colour, 16, channels=3, order=">")),
        "tiff deflate": (colour, tiff(colour, 16, channels=3, deflate=True)),
        "tiff> deflate": (colour, tiff(colour, 16, channels=3, order=">", deflate=True)),
        "tiff rgba": (colour, tiff(np.dstack([colour, opaque]), 16, channels=4)),
        "ppm": (colour, b"P6 7 5 65535\n" + colour.astype(">u2").tobytes()),
    }[kind]
    path = write(content)
    assert np.array_equal(load_image(path, bit_depth=bit_depth), scaled(samples, top))
    if bit_depth > 12:
        with pytest.raises(
            UnreadableImageError, match=r"must be in \[0, 4095\] .* bit_depth is 12"
        ):
            load_image(path, bit_depth=12)


def test_the_orientation_holds_for_16_bit_colour(tmp_path):
    colour = np.stack([ramp(65535)] * 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.png"
    path.write_bytes(png16(colour, 2, exif=exif.tobytes()[6:]))
    turned = np.rot90(scaled(colour, 65535), -1)
    assert np.array_equal(load_image(path), turned)


def test_half_transparent_16_bit_pixels_are_composited_over_black(write):
    pixels = np.array([[[65535, 65535], [65535, 32768], [65535, 0], [4095, 65535]]])
    assert load_image(write(png16(pixels, 4)))[0, :, 0].tolist() == [255, 128, 0, 16]


def test_an_alpha_of_unknown_range_is_refused(write):
    pixels = np.array([[[4095, 4095], [100, 4095]]])
    with pytest.raises(UnreadableImageError, match="largest alpha is 4095"):
        load_image(write(png16(pixels, 4)), bit_depth=12)


def test_a_transparent_colour_is_black_at_every_depth(write):
    grey = np.array([[0, 1000, 65535]])
    path = write(png16(grey[..., None], 0, transparent=[65535]))
    assert load_image(path)[0, :, 0].tolist() == [0, 4, 0]
    # The marker may be outside the range of the pixels.
    path = write(png16(np.array([[[4095], [65535]]]), 0, transparent=[65535]))
    assert load_image(path, bit_depth=12)[0, :, 0].tolist() == [255, 0]
    colour = np.array([[[65535, 257, 257], [65535, 257, 258]]])
    path = write(png16(colour, 2, transparent=[65535, 257, 257]))
    assert load_image(path).tolist() == [[[0, 0, 0], [255, 1, 1]]]
    for bits, top in ((1, 1), (2, 3), (4, 15)):
        row = np.packbits([int(digit) for digit in f"{top:0{bits}b}{0:0{bits}b}"]).tobytes()
        assert load_image(write(png(2, 1, bits, 0, b"\0" + row)))[0, :, 0].tolist() == [255, 0]
        path = write(png(2, 1, bits, 0, b"\0" + row, transparent=[top]))
        assert load_image(path)[0, :, 0].tolist() == [0, 0]


@pytest.mark.parametrize("setting", [10, 12, 16])
def test_a_declared_depth_takes_the_place_of_the_setting(write, setting):
    samples = ramp(4095)
    expected = scaled(samples, 4095)
    packed = write(tiff(samples, 12), "x.tif")
    lower = write(png16(samples[..., None], 0, significant=[12]), "lower.png")
    colour = np.repeat(samples[..., None], 3, axis=2)
    rgb = write(png16(colour, 2, significant=[12, 12, 12]), "rgb.png")
    upper = write(png16((samples << 4)[..., None], 0, significant=[12]), "upper.png")
    linear = write(
        png16((samples * (65535 / 4095)).round()[..., None], 0, significant=[12]), "linear.png"
    )
    pgm = write(b"P5 7 5 4095\n" + samples.astype(">u2").tobytes(), "x.pgm")
    for path in (packed, lower, rgb, linear, pgm):
        assert np.array_equal(load_image(path, bit_depth=setting)[..., 0], expected), path
    shifted = load_image(upper, bit_depth=setting)[..., 0].astype(int)
    assert np.abs(shifted - expected).max() <= 1


def test_a_dark_image_with_upper_significant_bits_stays_dark(write):
    samples = np.array([[0, 16, 4080]])
    path = write(png16(samples[..., None], 0, significant=[12]))
    assert load_image(path)[0, :, 0].tolist() == [0, 0, 16]


def test_jpeg_2000_uses_its_precision(tmp_path):
    samples = ramp(65535)
    Image.fromarray(samples.astype(np.uint16)).save(tmp_path / "x.jp2", irreversible=False)
    assert np.array_equal(load_image(tmp_path / "x.jp2")[..., 0], scaled(samples, 65535))
    with pytest.raises(UnreadableImageError, match="bit_depth is 12"):
        load_image(tmp_path / "x.jp2", bit_depth=12)


def test_small_32_bit_and_signed_integers_are_refused(write):
    for top, bits, signed in (
        (255, 32, False),
        (16383, 32, True),
        (4095, 16, True),
        (0, 32, False),
    ):
        path = write(tiff(ramp(top), bits, signed=signed), "x.tif")
        with pytest.raises(UnreadableImageError, match=f"at most {top}, whose range is not known"):
            load_image(path)
    path = write(tiff(ramp(4095), 32), "x.tif")
    assert np.array_equal(load_image(path, bit_depth=12)[..., 0], scaled(ramp(4095), 4095))
    for samples in (ramp(65536), ramp(60000) - 1):
        with pytest.raises(UnreadableImageError, match=r"must be in \[0, 65535\]"):
            load_image(write(tiff(samples, 32, signed=True), "x.tif"))


def test_few_bits_in_use_are_noticed_over_all_images(write):
    twelve = [write(png16(ramp(4095)[..., None], 0), f"{i}.png") for i in range(3)]
    bright = write(png16(ramp(40000)[..., None], 0), "bright.png")
    dark = write(png16(ramp(4095 >> 4)[..., None], 0), "dark.png")
    eight = write(tiff(ramp(3), 8), "eight.tif")
    text = depth_notice(twelve, 16)
    assert text is not None and "data.augmentation.bit_depth=12" in text and "6.2 %" in text
    assert depth_notice(twelve, 12) is None
    assert depth_notice([*twelve, bright], 16) is None
    assert "=8" in depth_notice([dark, eight], 16)
    assert depth_notice([eight], 16) is None and depth_notice([], 16) is None
    colour = write(png16(np.repeat(ramp(4095)[..., None], 3, axis=2), 2), "colour.png")
    assert "=12" in depth_notice([colour], 16)
    declared = write(tiff(ramp(100), 12), "declared.tif")
    assert depth_notice([declared], 16) is None
    broken = write(b"", "broken.png")
    assert "in 3 images" in depth_notice([*twelve, broken], 16)
    assert "1 of 3 images were" in depth_notice(twelve, 16, limit=1)
