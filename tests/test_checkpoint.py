"""Checkpoint files: whole or not at all, published format, and errors in words."""

import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmic_fast import checkpoint as ckpt
from diffmic_fast.models import DiffMIC, DiffMICConfig

CONFIG = DiffMICConfig(
    classes=3,
    image_size=32,
    timesteps=12,
    feature_dim=32,
    encoder="test_resnet",
    guidance_trunk="test_resnet",
    crops=2,
    crop_size=16,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return DiffMIC(CONFIG).eval()


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
    loaded, names = ckpt.load_model(published, config=CONFIG, ema=False)
    assert names is None and not loaded.training
    assert equal(loaded.state_dict(), model.state_dict())
    file = ckpt.read_checkpoint(published)
    assert (file.epoch, file.step) == (7, 1234)
    assert file.sizes == {"classes": 3, "feature_dim": 32, "timesteps": 12}


def test_the_moving_average_is_taken_by_default(model, published):
    loaded, _ = ckpt.load_model(published, config=CONFIG)
    for name, parameter in loaded.denoiser.named_parameters():
        assert torch.equal(parameter, model.denoiser.get_parameter(name) + 1)
    for name, buffer in loaded.denoiser.named_buffers():
        assert torch.equal(buffer, model.denoiser.get_buffer(name))


def test_guidance_can_be_elsewhere_and_must_be_somewhere(model, published, tmp_path):
    other = published.with_name("elsewhere.pth")
    published.with_name("aux_ckpt.pth").rename(other)
    with pytest.raises(ValueError, match=r"no aux_ckpt\.pth beside it.*--guidance"):
        ckpt.load_model(published, config=CONFIG)
    loaded, _ = ckpt.load_model(published, other, CONFIG)
    assert equal(loaded.guidance.state_dict(), model.guidance.state_dict())


def test_names_and_shapes_of_a_published_file_are_accepted(tmp_path):
    """A full-size file by its recorded keys: sizes are told from shapes alone."""
    keys = json.loads((Path(__file__).parent / "data/checkpoint_keys.json").read_text())
    shapes = next(v for k, v in keys.items() if k.startswith("ConditionalModel"))
    state = {k: torch.zeros(()).expand(shape) for k, shape in shapes.items()}
    torch.save([state, {}, 1, 1], tmp_path / "a.pth")
    file = ckpt.read_checkpoint(tmp_path / "a.pth")
    assert file.sizes == {"classes": 5, "feature_dim": 6144, "timesteps": 1000}
    with pytest.raises(ValueError, match=r"no configuration inside.*classes 5, feature_dim 6144"):
        ckpt.load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("key", "value"), [("classes", 4), ("feature_dim", 48), ("timesteps", 1000)]
)
def test_other_sizes_are_named_with_both_numbers(published, key, value):
    found = getattr(CONFIG, key)
    other = DiffMICConfig(**{**vars(CONFIG), key: value})
    with pytest.raises(ValueError, match=f"trained with {key} {found}, .* says {value}"):
        ckpt.load_model(published, config=other)


def test_missing_and_unexpected_keys_are_listed(model, published):
    parts = torch.load(published, weights_only=True)
    parts[0]["module.extra.weight"] = torch.ones(1)
    del parts[0]["module.lin2.lin.bias"]
    torch.save(parts, published)
    with pytest.raises(ValueError, match=r"1 missing \(lin2.lin.bias\), 1 unexpected \(extra"):
        ckpt.load_model(published, config=CONFIG)


def test_another_encoder_does_not_fit(published):
    other = DiffMICConfig(**{**vars(CONFIG), "encoder": "test_byobnet"})
    with pytest.raises(ValueError, match=r"does not fit the model.*same encoder"):
        ckpt.load_model(published, config=other)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save([Malicious(marker)], tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps([Malicious(marker)]))
    torch.save([Malicious(marker)], tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"refused: it asks to load .*system, which could run code"
    ):
        ckpt.read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"plain Python pickle.*can run code"):
        ckpt.read_checkpoint(tmp_path / "b.pth")
    with pytest.raises(ValueError, match="refused"):
        ckpt.read_checkpoint(tmp_path / "c.pth")
    assert not marker.exists()


def test_files_that_are_no_checkpoints(published, tmp_path):
    whole = published.read_bytes()
    bad = tmp_path / "bad.pth"
    for content, message in (
        (b"dear reader", "is no checkpoint: it starts with b'dear rea'"),
        (b"", "is empty"),
        (whole[: len(whole) // 2], "damaged or was cut short"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged or was cut short"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ckpt.read_checkpoint(bad)
    torch.save(torch.ones(3), bad)
    with pytest.raises(ValueError, match=r"wants a list .* got Tensor"):
        ckpt.read_checkpoint(bad)
    torch.save([[1, 2], {}], bad)
    with pytest.raises(ValueError, match=r"wants a state dict .* got list"):
        ckpt.read_checkpoint(bad)
    with pytest.raises(ValueError, match="there is no file"):
        ckpt.read_checkpoint(tmp_path / "nothere.pth")
    with pytest.raises(ValueError, match="is not a file"):
        ckpt.read_checkpoint(tmp_path)


def test_a_failing_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pth"
    ckpt.atomic_save([1, 2], path)
    old = path.read_bytes()

    def half(value, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        ckpt.atomic_save([3], path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pth"]


def test_content_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    with ckpt.atomic_file(tmp_path / "f") as file:
        file.write(b"x")
        assert not (tmp_path / "f").exists()
    assert calls[:2] == ["fsync", "replace"]
    assert (tmp_path / "f").read_bytes() == b"x"


def test_a_kept_copy_survives_the_next_checkpoint(tmp_path):
    ckpt.atomic_save("best", tmp_path / "a")
    ckpt.keep_copy(tmp_path / "a", tmp_path / "b")
    ckpt.atomic_save("next", tmp_path / "a")
    assert torch.load(tmp_path / "b", weights_only=True) == "best"
    ckpt.keep_copy(tmp_path / "a", tmp_path / "b")
    assert torch.load(tmp_path / "b", weights_only=True) == "next"


def test_random_states_come_back(tmp_path):
    generator = torch.Generator().manual_seed(5)
    np.random.standard_normal()  # leaves a cached second normal number
    states = ckpt.random_states({"noise": generator})
    ckpt.atomic_save(states, tmp_path / "r")

    def draw():
        return (
            random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist(),
            torch.rand(3, generator=generator).tolist(),
        )  # fmt: skip

    first = draw()
    assert draw() != first
    restored = torch.load(tmp_path / "r", weights_only=True)
    ckpt.restore_random_states(restored, {"noise": generator})
    assert draw() == first
