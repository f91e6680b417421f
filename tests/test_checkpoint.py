"""Checkpoint files: the published format, what is rejected, and its errors."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import MODEL

from diffmic_fast.checkpoint import apply_average, load_model, read_checkpoint
from diffmic_fast.models import DiffMIC, DiffMICConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return DiffMIC(MODEL).eval()


@pytest.fixture
def published(model, tmp_path):
    """Files as the authors' program writes them, with the prefix of DataParallel."""
    state = {f"module.{k}": v for k, v in model.denoiser.state_dict().items()}
    average = {f"module.{k}": v + 1 for k, v in model.denoiser.named_parameters()}
    torch.save([state, {"state": {}}, 7, 1234, average], tmp_path / "ckpt.pth")
    torch.save([model.guidance.state_dict(), {"state": {}}], tmp_path / "aux_ckpt.pth")
    return tmp_path / "ckpt.pth"


def equal(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items()) and a.keys() == b.keys()


def test_published_files_load_strictly(model, published):
    loaded, names = load_model(published, config=MODEL, ema=False)
    assert names is None and not loaded.training
    assert equal(loaded.state_dict(), model.state_dict())
    file = read_checkpoint(published)
    assert (file.epoch, file.step) == (7, 1234)
    assert file.sizes == {"classes": 3, "feature_dim": 32, "timesteps": 12}


def test_the_moving_average_is_loaded_by_default(model, published):
    loaded, _ = load_model(published, config=MODEL)
    for name, parameter in loaded.denoiser.named_parameters():
        assert torch.equal(parameter, model.denoiser.get_parameter(name) + 1)
    for name, buffer in loaded.denoiser.named_buffers():
        assert torch.equal(buffer, model.denoiser.get_buffer(name))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), ()])
def test_an_average_of_another_shape_is_refused(model, published, shape):
    """Shapes that broadcast, too."""
    values = {name: p.detach() for name, p in model.denoiser.named_parameters()}
    with pytest.raises(
        ValueError, match=r"average of x does not fit .* lin4\.weight must be .*, got"
    ):
        apply_average(model.denoiser, values | {"lin4.weight": torch.ones(shape)}, "x")


def test_the_guidance_file_is_beside_or_named(model, published, tmp_path):
    other = published.with_name("elsewhere.pth")
    published.with_name("aux_ckpt.pth").rename(other)
    with pytest.raises(ValueError, match=r"no aux_ckpt\.pth beside it.*--guidance"):
        load_model(published, config=MODEL)
    loaded, _ = load_model(published, other, MODEL)
    assert equal(loaded.guidance.state_dict(), model.guidance.state_dict())


def test_sizes_of_a_published_file(tmp_path):
    """A full-size file by its recorded keys: sizes follow from shapes."""
    keys = json.loads((Path(__file__).parent / "data/checkpoint_keys.json").read_text())
    shapes = next(v for k, v in keys.items() if k.startswith("ConditionalModel"))
    state = {k: torch.zeros(()).expand(shape) for k, shape in shapes.items()}
    torch.save([state, {}, 1, 1], tmp_path / "a.pth")
    file = read_checkpoint(tmp_path / "a.pth")
    assert file.sizes == {"classes": 5, "feature_dim": 6144, "timesteps": 1000}
    with pytest.raises(ValueError, match=r"no configuration inside.*classes 5, feature_dim 6144"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("key", "value"), [("classes", 4), ("feature_dim", 48), ("timesteps", 1000)]
)
def test_errors_about_sizes_name_both(published, key, value):
    found = getattr(MODEL, key)
    other = DiffMICConfig(**{**vars(MODEL), key: value})
    with pytest.raises(ValueError, match=f"trained with {key} {found}, .* says {value}"):
        load_model(published, config=other)


def test_missing_and_unexpected_keys_are_listed(model, published):
    parts = torch.load(published, weights_only=True)
    parts[0]["module.extra.weight"] = torch.ones(1)
    del parts[0]["module.lin2.lin.bias"]
    torch.save(parts, published)
    with pytest.raises(ValueError, match=r"1 missing \(lin2.lin.bias\), 1 unexpected \(extra"):
        load_model(published, config=MODEL)


def test_another_encoder_is_an_error(published):
    other = DiffMICConfig(**{**vars(MODEL), "encoder": "test_byobnet"})
    with pytest.raises(ValueError, match=r"does not fit the model.*same encoder"):
        load_model(published, config=other)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickles_with_code_are_rejected_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save([Malicious(marker)], tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps([Malicious(marker)]))
    torch.save([Malicious(marker)], tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"rejected: it asks to load .*system, which could run code"
    ):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"plain Python pickle.*can run code"):
        read_checkpoint(tmp_path / "b.pth")
    with pytest.raises(ValueError, match="rejected"):
        read_checkpoint(tmp_path / "c.pth")
    assert not marker.exists()


@pytest.mark.parametrize("mmap", [True, False])
def test_damaged_content_is_found(published, tmp_path, mmap):
    """A bit of any byte is changed: the error names the file, or nothing that is read has changed."""
    whole = published.read_bytes()
    expected = read_checkpoint(published)
    bad = tmp_path / "bad.pth"
    found = 0
    positions = np.random.default_rng(0).integers(len(whole), size=150)
    for number, position in enumerate(positions):
        content = bytearray(whole)
        content[position] ^= 1 << (number % 8)
        bad.write_bytes(content)
        try:
            value = read_checkpoint(bad, mmap=mmap)
        except ValueError as error:
            assert str(error).startswith(f"checkpoint: {bad} ")
            found += 1
        else:  # padding between the entries
            assert equal(value.denoiser, expected.denoiser) and equal(value.ema, expected.ema)
            assert (value.epoch, value.step) == (expected.epoch, expected.step)
    assert found > 100


@pytest.mark.parametrize(
    "text",
    [
        "unable to mmap 4096 bytes from file <ckpt.pth>: Cannot allocate memory (12)",
        "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_a_lack_of_memory_is_no_damage(published, monkeypatch, text):
    def fail(*args, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError, match="allocate memory"):
        read_checkpoint(published)


@pytest.mark.parametrize("file", ["ckpt.pth", "aux_ckpt.pth"])
def test_damaged_content_is_named_by_its_entry(published, file):
    path = published.with_name(file)
    load_model(published, config=MODEL)  # a file that was read before and has changed since
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda each: each.file_size)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive, archive.open(entry) as data:
        start = content.index(data.read(256))
    zeroed = bytearray(content)
    zeroed[start + 8 : start + 40] = bytes(32)
    path.write_bytes(zeroed)
    with pytest.raises(ValueError, match=rf"{file} is damaged .*entry {entry.filename}"):
        load_model(published, config=MODEL)
    path.write_bytes(content[:-30])
    with pytest.raises(ValueError, match=rf"{file} is damaged or truncated"):
        load_model(published, config=MODEL)
    path.write_bytes(content)
    load_model(published, config=MODEL)


def test_files_without_checksums_are_read(model, tmp_path):
    """As `torch.serialization.set_crc32_options(False)` and torch before 1.6 write them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.denoiser.state_dict(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save(
        model.denoiser.state_dict(), tmp_path / "b.pth", _use_new_zipfile_serialization=False
    )
    for name in ("a.pth", "b.pth"):
        assert equal(read_checkpoint(tmp_path / name).denoiser, model.denoiser.state_dict())


def test_one_entry_without_a_checksum_is_damaged(published):
    """Only a file whose checksums are all 0 was written without."""
    content = bytearray(published.read_bytes())
    directory = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[directory + 16 : directory + 20] = bytes(4)
    published.write_bytes(content)
    with pytest.raises(ValueError, match=r"ckpt\.pth is damaged .*entry .*/data/0\b"):
        read_checkpoint(published, mmap=True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_occurs_twice_is_damage(published):
    with zipfile.ZipFile(published, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data/0"))
        content = archive.read(name)
        archive.writestr(name, bytes(len(content)))
    with pytest.raises(
        ValueError, match=rf"ckpt\.pth is damaged .*entry {name}\): it occurs twice"
    ):
        read_checkpoint(published, mmap=True)


def test_other_files_are_rejected(published, tmp_path):
    whole = published.read_bytes()
    bad = tmp_path / "bad.pth"
    for content, message in (
        (b"dear reader", "is not a checkpoint: .* starts with b'dear rea'"),
        (b"", "is empty"),
        (whole[: len(whole) // 2], "damaged or truncated"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged or truncated"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(bad)
    torch.save(torch.ones(3), bad)
    with pytest.raises(ValueError, match=r"must hold a list .* got Tensor"):
        read_checkpoint(bad)
    torch.save([[1, 2], {}], bad)
    with pytest.raises(ValueError, match=r"must be a state dict .* got list"):
        read_checkpoint(bad)
    with pytest.raises(ValueError, match="there is no file"):
        read_checkpoint(tmp_path / "nothere.pth")
    with pytest.raises(ValueError, match="is not a file"):
        read_checkpoint(tmp_path)
