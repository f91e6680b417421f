"""Paths and Pillow images as a tensor: the bits of the command line's data set, and what is rejected."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_loading.image_files import png16, ramp, tiff
from PIL import Image, ImageDraw

from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.decode import UnreadableImageError
from diffmic_fast.data.inputs import load_images
from diffmic_fast.data.table import ImageEntry, ImageTable
from diffmic_fast.data.transforms import evaluation_transform

SIZE = 12
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (17, 23, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (17, 23, 3)).astype(np.uint16)


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def oriented() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FILES = {
    "colour.png": saved(COLOUR, "PNG"),
    "grey.png": saved(COLOUR[:, :, 0], "PNG"),
    "turned.jpg": saved(COLOUR, "JPEG", exif=oriented(), quality=90),
    "grey.jpg": saved(COLOUR[:, :, 0], "JPEG"),
    "grey16.png": png16(DEEP[:, :, :1], 0),
    "grey16_12.png": png16(DEEP[:, :, :1], 0, significant=[12]),
    "colour16.png": png16(DEEP, 2),
    "alpha16.png": png16(np.dstack([DEEP, np.full((17, 23), 65535, np.uint16)]), 6),
    "colour.tif": saved(COLOUR, "TIFF"),
    "grey12.tif": tiff(ramp(4095, 17, 23), 12),
    "white16.tif": tiff(ramp(60000, 17, 23), 16, white_is_zero=True),
    "alpha.webp": saved(np.dstack([COLOUR, COLOUR[:, :, 0]]), "WEBP", lossless=True),
}
SETTINGS = Preprocessing(bit_depth=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def of_the_dataset(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    """As `evaluate` of the command line makes it."""
    table = ImageTable(("a", "b"), (ImageEntry("x", 0, path), ImageEntry("x", 1, path)))
    return ImageDataset(table, evaluation_transform(SIZE, preprocessing))[0][0]


@pytest.fixture
def write(tmp_path: Path):
    def make(name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(FILES[name])
        return path

    return make


@pytest.mark.filterwarnings("ignore:the largest value")
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("depth", [16, 12])
@pytest.mark.parametrize("name", FILES)
def test_paths_and_opened_images_give_the_bits_of_the_data_set(write, name, depth, square):
    path = write(name)
    settings = Preprocessing(square, depth, SETTINGS.mean, SETTINGS.std)
    try:
        expected = of_the_dataset(path, settings)
    except UnreadableImageError as error:  # a sample above 12 bits
        assert (depth, name) == (12, "white16.tif")
        for image in (path, Image.open(path)):
            with pytest.raises(UnreadableImageError) as found:
                load_images("test", image, SIZE, settings)
            assert found.value.reason == error.reason and found.value.path == str(path)
        return
    with Image.open(path) as opened, Image.open(io.BytesIO(FILES[name])) as in_memory:
        for image in (path, str(path), [path], opened, opened, [in_memory], (in_memory,)):
            found = load_images("test", image, SIZE, settings)
            assert found.shape == (1, 3, SIZE, SIZE) and found.dtype == torch.float32
            assert torch.equal(found[0], expected)
        opened.load()  # it can still be used


@pytest.mark.parametrize("name", ["colour.png", "grey.jpg", "turned.jpg", "alpha.webp"])
def test_loaded_images_of_8_bits_give_the_same_bits(write, name):
    path = write(name)
    with Image.open(path) as image:
        image.load()
        found = load_images("test", image, SIZE, SETTINGS)
    assert torch.equal(found[0], of_the_dataset(path, SETTINGS))


@pytest.mark.parametrize("name", ["grey16.png", "grey16_12.png", "colour16.png", "grey12.tif"])
def test_loaded_images_of_more_bits_are_rejected(write, name):
    """Pillow has reduced them, or their depth is forgotten."""
    with Image.open(write(name)) as image:
        image.load()
        with pytest.raises(
            UnreadableImageError, match=rf"{name}.*Pillow has loaded it.*give the path"
        ):
            load_images("test", image, SIZE, SETTINGS)


def test_transparent_grey_of_a_loaded_file_is_rejected(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(COLOUR[:, :, 0]).save(path, transparency=3)
    with Image.open(path) as image:
        assert torch.equal(
            load_images("test", image, SIZE, SETTINGS), load_images("test", path, SIZE, SETTINGS)
        )
        image.load()
        with pytest.raises(UnreadableImageError, match="Pillow has loaded it"):
            load_images("test", image, SIZE, SETTINGS)


def test_pixels_in_memory(tmp_path):
    """Images that are not of a file, or were changed, count as they are."""
    path = tmp_path / "a.png"
    image = Image.fromarray(COLOUR)
    image.save(path)
    expected = load_images("test", path, SIZE, SETTINGS)
    assert torch.equal(load_images("test", image, SIZE, SETTINGS), expected)
    with Image.open(path) as opened:
        ImageDraw.Draw(opened).rectangle((0, 0, 9, 9), "red")
        changed = load_images("test", opened, SIZE, SETTINGS)
        opened.save(tmp_path / "b.png")
    assert torch.equal(changed, load_images("test", tmp_path / "b.png", SIZE, SETTINGS))
    assert not torch.equal(changed, expected)
    deep = Image.fromarray(DEEP[:, :, 0])
    (tmp_path / "c.png").write_bytes(FILES["grey16.png"])
    twelve = Preprocessing(bit_depth=12)
    assert torch.equal(
        load_images("test", deep, SIZE, twelve),
        load_images("test", tmp_path / "c.png", SIZE, twelve),
    )
    for pixels, message in (
        (np.full((5, 5), 5000, np.uint16), r"image 0: its samples must be in \[0, 4095\]"),
        (np.full((5, 5), 7, np.int32), "image 0: its pixels are 32-bit or signed integers"),
        (np.zeros((5, 5), np.float32), "image 0: its pixels are floating-point numbers"),
    ):
        with pytest.raises(UnreadableImageError, match=message):
            load_images("test", Image.fromarray(pixels), SIZE, twelve)


def test_a_draft_and_another_frame_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    with Image.open(path) as image:
        image.draft("L", (32, 32))
        found = load_images("test", image, SIZE, SETTINGS)
        assert image.size == (32, 32)
    assert not torch.equal(found, load_images("test", path, SIZE, SETTINGS))
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.tif") as image:
        image.seek(1)
        assert torch.equal(
            load_images("test", image, SIZE, SETTINGS), load_images("test", second, SIZE, SETTINGS)
        )


def test_another_frame_of_more_bits_is_rejected(tmp_path):
    """Pillow alone would decode it, without the depth of its file."""
    frames = [Image.fromarray(DEEP[:, :, channel]) for channel in (0, 1)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.tif") as image:
        image.seek(1)
        with pytest.raises(
            UnreadableImageError, match=r"a\.tif: .*frame 1 of a file of more than 8"
        ):
            load_images("test", image, SIZE, Preprocessing(bit_depth=12))


def test_the_order_is_that_of_the_list(write):
    paths = [write("colour.png"), write("grey.jpg"), write("turned.jpg")]
    together = load_images("test", paths, SIZE, SETTINGS)
    for path, image in zip(paths, together, strict=True):
        assert torch.equal(load_images("test", path, SIZE, SETTINGS)[0], image)


def test_inputs_of_another_type(write):
    path = write("colour.png")
    image = Image.open(path)
    for inputs, message in (
        ([path, image], "all be paths or all Pillow images, got .*Path at 0 and PngImageFile at 1"),
        ([image, str(path)], "got PngImageFile at 0 and str at 1"),
        ([torch.zeros(3, 4, 4)], r"got Tensor at 0; stack tensors to \[B, 3, H, W\]"),
        ([path, COLOUR], "got ndarray at 1"),
        (COLOUR, "a path, a Pillow image, or a list of .*, got ndarray"),
        (None, "got NoneType"),
    ):
        with pytest.raises(TypeError, match=f"^test: .*{message}"):
            load_images("test", inputs, SIZE, SETTINGS)
    with pytest.raises(ValueError, match="test: images must not be empty"):
        load_images("test", [], SIZE, SETTINGS)


def test_unreadable_images_are_named(tmp_path, write):
    cut = tmp_path / "cut.png"
    cut.write_bytes(FILES["colour.png"][:200])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for path, reason in (
        (cut, "truncated"),
        (text, "it is not an image"),
        (tmp_path / "nothere.png", "there is no such file"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(UnreadableImageError, match=rf"{path.name}: .*{reason}"):
            load_images("test", [write("grey.png"), path], SIZE, SETTINGS)
    with pytest.raises(UnreadableImageError, match=r"image 0: .*truncated"):
        load_images("test", Image.open(io.BytesIO(FILES["colour.png"][:200])), SIZE, SETTINGS)


def test_unused_bits_are_a_warning(write):
    path = write("grey16.png")
    with pytest.warns(UserWarning, match=r"preprocessing\.bit_depth is 16.*bit_depth=12 if"):
        load_images("test", path, SIZE, SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images("test", path, SIZE, Preprocessing(bit_depth=12))
        load_images("test", write("colour.png"), SIZE, SETTINGS)


def test_unused_bits_are_those_of_all_images_together(write):
    dim, white, colour = (write(name) for name in ("grey16.png", "white16.tif", "colour.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images("test", [white, dim], SIZE, SETTINGS)
    with pytest.warns(UserWarning, match=r"preprocessing\.bit_depth is 16"):
        load_images("test", [dim, colour], SIZE, SETTINGS)


def test_preprocessing_is_the_part_of_the_augmentation_for_every_image():
    augmentation = AugmentationConfig(bit_depth=12, centre_square=False, rotation=5.0)
    settings = Preprocessing.from_augmentation(augmentation)
    assert type(settings) is Preprocessing
    assert settings == Preprocessing(centre_square=False, bit_depth=12)
    with pytest.raises(ValueError, match="bit_depth"):
        Preprocessing(bit_depth=17)
    with pytest.raises(ValueError, match="std"):
        Preprocessing(std=(0.5, 0.0, 0.5))
    pixels = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    whole = AugmentationConfig(mean=pixels.mean, std=pixels.std, rotation=5.0)
    assert Preprocessing.from_augmentation(whole) == pixels
