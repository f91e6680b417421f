"""What is fuzzed: readers of files, with valid examples, and what any input may lead to.

An input is the content of one file. It is read, and then either the result is as documented or the error is one that a
user can act on. Everything else is a fault: another exception, a hang, a crash, memory above the limit.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from diffmic_fast.checkpoint import load_model, read_checkpoint, read_guidance
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.config.sampling import SamplingConfig
from diffmic_fast.data.decode import UnreadableImageError, load_image
from diffmic_fast.data.readers import (
    CsvColumns,
    read_csv,
    read_ham10000,
    read_medmnist,
    read_pickle,
)
from diffmic_fast.data.scan import find_unreadable
from diffmic_fast.data.table import ImageTable
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.models import DiffMIC
from diffmic_fast.pretrained_folder import read_folder
from tests.data_loading.image_files import png16, tiff

_NAMES = ("a.png", "b.png", "dir/c.jpg")
_MODEL = DiffMICConfig(
    classes=2, image_size=32, timesteps=4, feature_dim=8, encoder="test_resnet",
    guidance_trunk="test_resnet", crops=1, crop_size=8,
)  # fmt: skip


class Target(NamedTuple):
    """A reader.

    Attributes:
        suffix: of the file.
        seeds: valid contents.
        read: reads a file; raises ValueError or OSError for content that it rejects, AssertionError for a result that
            is not as documented.
    """

    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], None]


def image_seeds() -> list[bytes]:
    """Small images of each format and of many kinds of pixels."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    kinds = {
        "PNG": [{}, {"pnginfo": None, "optimize": True}], "JPEG": [{"quality": 80}, {"progressive": True}],
        "GIF": [{}], "BMP": [{}], "PPM": [{}], "WEBP": [{"lossless": True}], "JPEG2000": [{}],
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}],
    }  # fmt: skip
    seeds = [_saved(colour, kind, **options) for kind, all_ in kinds.items() for options in all_]
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"):
        image = colour.convert("L").convert(mode) if mode == "I;16" else colour.convert(mode)
        for kind in ("PNG", "TIFF"):
            try:
                seeds.append(_saved(image, kind))
            except (OSError, KeyError, ValueError):
                continue  # Pillow does not write it
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds.append(_saved(colour, "JPEG", exif=exif))
    deep = rng.integers(0, 4096, (8, 8, 3), dtype=np.uint16)
    seeds += [png16(deep, 2), png16(deep[:, :, :1], 0, significant=[12]), png16(deep[:, :, :2], 4)]
    for bits in (8, 12, 16, 32):
        samples = deep[:, :, 0].astype(np.int64) % 2**bits
        seeds.append(tiff(samples, bits, white_is_zero=bits != 8))
    return seeds


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def read_image(path: Path) -> None:
    """Pixels are [H, W, 3] uint8, and the scan says the same as decoding."""
    found = find_unreadable([path], bit_depth=16, extent="full")
    try:
        pixels = load_image(path)
    except UnreadableImageError as error:
        assert error.reason and str(path) in str(error)
        assert found == [(path, error.reason)]
        raise
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert min(pixels.shape) > 0 and not found


def csv_seeds() -> list[bytes]:
    """Tables with names and with numbers, of several encodings and line ends."""
    rows = "file,label,fold,patient\na.png,mild,0,p1\nb.png,severe,1,p2\ndir/c.jpg,mild,2,p1\n"
    numbers = "file,label,fold,patient\r\na.png,0,0,\r\nb.png,1,0,1\r\n"
    quoted = 'label,"file",fold,patient\n"mild","a.png",0,"x,\ny"\n'
    isic = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\na,0.0,1.0,0,0,0,0,0\n"
    metadata = (
        "lesion_id,image_id,dx,dx_type,age,sex,localization\nHAM_1,a,nv,histo,80.0,male,scalp\n"
    )
    texts = [rows, numbers, quoted, isic, metadata]
    return [text.encode() for text in texts] + [rows.encode("utf-8-sig"), rows.encode("utf-16")]


def read_tables(path: Path) -> None:
    """Every row has one of the classes and a file that exists."""
    for name in _NAMES:
        file = path.parent / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"")
    readers = (
        lambda: read_csv(path),
        lambda: read_csv(path, classes=("mild", "severe"), columns=CsvColumns(group="patient")),
        lambda: read_csv(path, num_classes=2),
        lambda: read_ham10000(path, [path.parent], suffix=".png"),
    )
    for table in _accepted(readers):
        _check_table(table)


def _accepted(readers: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the readers return that accept the content; the error of the last one if none does."""
    results: list[Any] = []
    for number, read in enumerate(readers, 1):
        try:
            results.append(read())
        except (ValueError, OSError):
            if number == len(readers) and not results:
                raise
    return results


def _check_table(table: ImageTable) -> None:
    assert len(set(table.classes)) == len(table.classes) >= 1 and all(table.classes)
    for entry in table.entries:
        assert 0 <= entry.label < len(table.classes)
        assert not isinstance(entry.source, Path) or entry.source.exists()


def yaml_seeds() -> list[bytes]:
    """All presets, and a configuration of the published program."""
    presets = sorted(Path("diffmic_fast/config/presets").glob("*.yml"))
    theirs = (
        "data:\n    dataset: 'PLACENTAL'\n    dataroot: 'dataset/'\n    num_classes: 5\nmodel:\n    arch: resnet18\n"
        "    feature_dim: 6144\ndiffusion:\n    timesteps: 1000\n    beta_schedule: linear\n"
        "training:\n    n_epochs: 10\n"
    )
    short = "seed: 1\ndata: {kind: folder, root: x, class_names: [a, b]}\ntraining: {epochs: 3, learning_rate: 1e-3}\n"
    return [path.read_bytes() for path in presets] + [theirs.encode(), short.encode()]


def read_yaml(path: Path) -> None:
    """A configuration survives being written and read again."""
    config = read_config(path)
    assert RunConfig.from_dict(config.to_dict()) == config


def pickle_seeds() -> list[bytes]:
    """Lists as in the published program, of several protocols, with NumPy's numbers and text."""
    pairs = [{"img_root": "a.png", "label": 0}, {"img_root": "b.png", "label": 1}]
    scalars = [
        {"img_root": "a.png", "label": np.int64(1)},
        {"img_root": "b.png", "label": np.float64(0)},
    ]
    return [pickle.dumps(value, protocol=p) for value in (pairs, scalars) for p in (0, 1, 2, 4)]


def read_pickles(path: Path) -> None:
    """No code runs, and every entry is an image of a class."""
    for name in _NAMES[:2]:
        (path.parent / name).write_bytes(b"")
    _check_table(read_pickle(path, path.parent))


def npz_seeds() -> list[bytes]:
    """MedMNIST files, gray and colour, compressed and not."""
    seeds = []
    for shape in ((3, 4, 4), (2, 4, 4, 3)):
        arrays: dict[str, np.ndarray] = {}
        for split in ("train", "val", "test"):
            arrays[f"{split}_images"] = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
            arrays[f"{split}_labels"] = np.arange(shape[0], dtype=np.uint8)[:, None] % 2
        for save in (np.savez, np.savez_compressed):
            content = io.BytesIO()
            save(content, **arrays)
            seeds.append(content.getvalue())
    return seeds


def read_npz(path: Path) -> None:
    """Labels are numbers of classes."""
    for split in ("train", "validation", "test"):
        table = read_medmnist(path, split)
        _check_table(table)
        for entry in table.entries:
            assert load_image(entry.source).shape[2] == 3


def checkpoint_seeds() -> list[bytes]:
    """A checkpoint of the whole list, a bare state dict, and a guidance file, in both formats of torch.save."""
    torch.manual_seed(0)
    model = DiffMIC(_MODEL, pretrained=False)
    denoiser, guidance = model.denoiser.state_dict(), model.guidance.state_dict()
    average = {name: p.detach() for name, p in model.denoiser.named_parameters()}
    sampling = SamplingConfig(sampler="ddim", steps=2)
    config = RunConfig(model=_MODEL, data=DataConfig(root="x"), sampling=sampling).to_dict()
    extras = {"format": 1, "config": config, "classes": ["a", "b"], "guidance": guidance}
    whole = [denoiser, {"state": {}, "param_groups": [], "diffmic_fast": extras}, 3, 20, average]
    seeds = []
    for value in (whole, denoiser, [guidance, {}]):
        for zipped in (True, False):
            content = io.BytesIO()
            torch.save(value, content, _use_new_zipfile_serialization=zipped)
            seeds.append(content.getvalue())
    return seeds


def read_checkpoints(path: Path) -> None:
    """A model that is loaded has a name for each of its classes."""
    for loaded in _accepted(
        (lambda: read_guidance(path), lambda: read_checkpoint(path), lambda: load_model(path))
    ):
        if isinstance(loaded, tuple):
            model, names = loaded
            assert names is None or len(names) == model.config.classes


@functools.cache
def _pretrained_folder() -> tuple[Path, bytes]:
    """A folder of save_pretrained, removed when the process ends, and its config.json."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "model"
    torch.manual_seed(0)
    model = DiffMIC(_MODEL, pretrained=False)
    model.class_names, model.preprocessing = ("a", "b"), Preprocessing()
    model.sampling = SamplingOptions("ddim", 2)
    model.save_pretrained(path)
    return path, (path / "config.json").read_bytes()


def config_json_seeds() -> list[bytes]:
    """The config.json of a folder."""
    return [_pretrained_folder()[1]]


def read_config_json(path: Path) -> None:
    """What is accepted describes the weights beside it. The digest is made to fit, so that more is reached."""
    content = path.read_bytes()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict) and "digest" in tree:
        others = {key: value for key, value in tree.items() if key != "digest"}
        digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
        content = json.dumps(tree | {"digest": digest}).encode()
    folder, _ = _pretrained_folder()
    (folder / "config.json").write_bytes(content)
    found = read_folder(folder)
    names = found.description.class_names
    assert names is None or len(names) == found.description.model.classes


TARGETS = {
    "image": Target(".img", image_seeds, read_image),
    "csv": Target(".csv", csv_seeds, read_tables),
    "yaml": Target(".yml", yaml_seeds, read_yaml),
    "pickle": Target(".pkl", pickle_seeds, read_pickles),
    "npz": Target(".npz", npz_seeds, read_npz),
    "config_json": Target(".json", config_json_seeds, read_config_json),
    "checkpoint": Target(".pth", checkpoint_seeds, read_checkpoints),
}
