"""Files are written completely or not at all."""

import os

import pytest
import torch

from diffmic_fast.atomic_files import atomic_file, atomic_folder, keep_copy
from diffmic_fast.checkpoint import atomic_save


def test_a_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pth"
    atomic_save([1, 2], path)
    old = path.read_bytes()

    def half(value, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        atomic_save([3], path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pth"]


def test_content_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    with atomic_file(tmp_path / "f") as file:
        file.write(b"x")
        assert not (tmp_path / "f").exists()
    assert calls[:2] == ["fsync", "replace"]
    assert (tmp_path / "f").read_bytes() == b"x"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~current_mask()


def test_files_of_a_folder_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append(os.fstat(f).st_ino), fsync(f)))
    monkeypatch.setattr(os, "rename", lambda *a: (calls.append("rename"), rename(*a)))
    with atomic_folder(tmp_path / "a") as folder:
        for name in "xy":
            (folder / name).write_text(name)
    files = {(tmp_path / "a" / name).stat().st_ino for name in "xy"}
    assert set(calls[:2]) == files and calls[2] == "rename"


def test_a_kept_copy_survives_the_next_checkpoint(tmp_path):
    atomic_save("best", tmp_path / "a")
    keep_copy(tmp_path / "a", tmp_path / "b")
    atomic_save("next", tmp_path / "a")
    assert torch.load(tmp_path / "b", weights_only=True) == "best"
    keep_copy(tmp_path / "a", tmp_path / "b")
    assert torch.load(tmp_path / "b", weights_only=True) == "next"


def test_a_folder_appears_as_a_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~current_mask()
    for target, message in (
        (tmp_path / "a" / "b", "exists and is not empty"),
        (tmp_path / "a" / "b" / "x", "exists and is not a folder"),
    ):
        with pytest.raises(FileExistsError, match=message), atomic_folder(target):
            pass


def test_a_failed_rename_restores_the_replaced_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError("quota exceeded")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with (
        pytest.raises(OSError, match="quota"),
        atomic_folder(tmp_path / "a", overwrite=True) as folder,
    ):
        (folder / "x").write_text("new")
    monkeypatch.undo()
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with atomic_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "y").write_text("new")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def current_mask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
