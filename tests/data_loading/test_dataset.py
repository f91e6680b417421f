"""Decoding, transforms and the data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from diffmic_fast.config.data import AugmentationConfig, DataConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.decode import UnreadableImageError, load_image
from diffmic_fast.data.files import list_images
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.synthetic_fundus import GRADES, generate, write_dataset
from diffmic_fast.data.transforms import evaluation_transform, training_transform


@pytest.fixture(scope="module")
def table():
    config = DataConfig(kind="synthetic_fundus", synthetic_size=40, synthetic_per_class=2)
    return open_source(config)


def images(dataset, workers=0, order=None):
    order = list(range(len(dataset))) if order is None else order
    loader = DataLoader(dataset, batch_size=3, sampler=order, num_workers=workers)
    found = {}
    for batch, _, indices in loader:
        found.update({int(i): image for i, image in zip(indices, batch, strict=True)})
    return torch.stack([found[i] for i in sorted(found)])


@pytest.mark.parametrize("cache", [False, True])
def test_augmentation_is_a_function_of_seed_epoch_and_index(table, cache):
    def make(seed=3):
        return ImageDataset(table, training_transform(32), seed=seed, cache=cache)

    dataset = make()
    first = images(dataset)
    torch.manual_seed(99)
    assert torch.equal(images(dataset), first)
    assert torch.equal(images(dataset, order=list(range(9, -1, -1))), first)
    assert torch.equal(images(dataset, workers=2), first)
    dataset.set_epoch(1)
    second = images(dataset)
    assert not torch.equal(second, first)
    resumed = make()
    resumed.set_epoch(1)
    assert torch.equal(images(resumed, workers=1), second)
    assert not torch.equal(images(make(seed=4)), first)


def test_the_global_generator_is_unchanged(table):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    ImageDataset(table, training_transform(32))[0]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluation_transform_crops_resizes_and_normalises():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 5:25, 0] = 255
    image = evaluation_transform(10)(pixels)
    assert image.shape == (3, 10, 10) and image.dtype == torch.float32
    torch.testing.assert_close(image[0], torch.full((10, 10), (1 - 0.485) / 0.229))
    torch.testing.assert_close(image[2], torch.full((10, 10), -0.406 / 0.225))
    squeezed = evaluation_transform(10, AugmentationConfig(centre_square=False))(pixels)
    assert float(squeezed[0].min()) < 0


@pytest.mark.parametrize(
    "setting",
    [
        {"horizontal_flip": True},
        {"vertical_flip": True},
        {"rotation": 30.0},
        {"translate": 0.2},
        {"scale": 0.3},
        {"brightness": 0.5},
        {"contrast": 0.5},
    ],
)
def test_every_augmentation_can_be_switched_on(table, setting):
    off = {"horizontal_flip": False, "vertical_flip": False, "rotation": 0.0}
    plain = images(ImageDataset(table, evaluation_transform(32)))
    none = ImageDataset(table, training_transform(32, AugmentationConfig(**off)))
    assert torch.equal(images(none), plain)
    one = ImageDataset(table, training_transform(32, AugmentationConfig(**(off | setting))))
    assert not torch.equal(images(one), plain)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 65535], [32768, 257]], np.uint16)).save(path)
    assert load_image(path)[..., 1].tolist() == [[0, 255], [128, 1]]
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(path)
    assert load_image(path, bit_depth=12)[..., 0].tolist() == [[0, 255]]
    Image.fromarray(np.array([[0, 4096]], np.uint16)).save(path)
    with pytest.raises(
        UnreadableImageError,
        match=r"must be in \[0, 4095\] \(the setting bit_depth is 12\), got 0 … 4096",
    ):
        load_image(path, bit_depth=12)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_is_converted_to_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(path)
    pixels = load_image(path)
    assert pixels.shape == (3, 4, 3) and pixels.dtype == np.uint8 and int(pixels.min()) == 255


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").shape == (8, 4, 3)


def test_damaged_files_are_named_and_not_read_in_part(tmp_path, monkeypatch):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(generate(3, size=64)).save(whole)
    data = whole.read_bytes()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name, content in (
        ("cut.jpg", data[: len(data) // 2]),
        ("empty.png", b""),
        ("text.png", b"not an image at all"),
        ("zeros.jpg", bytes(500)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match=name) as caught:
            load_image(path)
        assert caught.value.path == str(path) and caught.value.reason
    with pytest.raises(UnreadableImageError, match="there is no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImageError, match="it is a folder"):
        load_image(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_damaged_training_image_raises_its_name(tmp_path):
    paths = write_dataset(tmp_path, 1, size=32)
    paths[3].write_bytes(b"gone")
    table = open_source(DataConfig(kind="folder", root=str(tmp_path)))
    for workers in (0, 1):
        with pytest.raises(ValueError, match=paths[3].name):
            images(ImageDataset(table, evaluation_transform(32)), workers)


def test_image_files_of_a_folder(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt", "deep/c.png", ".deep/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert [path.name for path in list_images(tmp_path, recursive=True)] == [
        "a.jpg",
        "b.PNG",
        "c.png",
    ]
    with pytest.raises(ValueError, match="is not a folder"):
        list_images(tmp_path / "none")


def test_synthetic_images_are_reproducible(tmp_path):
    for grade in range(5):
        image = generate(grade, 2, 48, 7)
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
        assert np.array_equal(image, generate(grade, 2, 48, 7))
        assert not np.array_equal(image, generate(grade, 2, 48, 8))
    paths = write_dataset(tmp_path, 2, size=32, seed=5, first_index=4)
    assert len(paths) == 10 and {path.parent.name for path in paths} == set(GRADES)
    assert np.array_equal(load_image(paths[1]), generate(0, 5, 32, 5))
    for bad in ((5, 0, 48, 0), (-1, 0, 48, 0), (0, -1, 48, 0), (0, 0, 8, 0)):
        with pytest.raises(ValueError, match="synthetic_fundus: "):
            generate(*bad)


def test_higher_grades_have_more_lesions():
    """Haemorrhages, exudates and cotton wool are dark and bright pixels, which healthy retinas lack."""

    def unusual(grade):
        total = 0.0
        for index in range(12):
            image = generate(grade, 0, 96, index).astype(float)
            inside = image.sum(axis=2) > 60
            dark = (image[..., 0] < 110) & inside
            bright = (image[..., 2] > 110) & inside
            total += float((dark | bright).sum())
        return total

    values = [unusual(grade) for grade in range(5)]
    assert max(values[:2]) < values[2] < values[3]
