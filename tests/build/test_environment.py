"""The Makefile's virtual environment: when it is made of this Python's packages, and what then works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from build_support import environment

SOURCE = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=SOURCE, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_this_python_builds_without_a_network() -> None:
    assert environment.missing() == []


def test_setuptools_can_be_imported_afterwards() -> None:
    """Its hook takes a search for pip for pip itself, and up to Python 3.11 then lacks its own distutils."""
    program = "from build_support import environment; environment.missing(); import setuptools"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_spelled_as_for_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"setuptools": "76.1", "pybind11": "2.13.0", "cmake": "3.9"}
    original = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or original(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert environment.missing() == ["setuptools>=77", "cmake>=3.24", "ninja"]
    for name in ("cmake", "ninja"):  # as programs, of whatever version
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert environment.missing() == ["setuptools>=77"]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.missing() == ["torch", "setuptools>=77"]


def test_an_offline_environment_has_the_packages_of_this_python(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    environment.make_offline(folder)
    assert (folder / ".offline").exists()
    program = """
import json, pybind11, setuptools, sys, torch
print(json.dumps([torch.__file__, sys.prefix, sys.path]))
"""
    done = run(folder / "bin/python", "-c", program)
    assert done.returncode == 0, done.stderr
    import torch

    file, prefix, path = json.loads(done.stdout)
    assert file == torch.__file__ and Path(prefix).samefile(folder)
    own = [Path(each) for each in path if Path(each).is_relative_to(folder)]
    assert own and path.index(str(own[0])) < path.index(str(Path(torch.__file__).parents[1]))
    done = run(folder / "bin/python", "-m", "pip", "--version")
    assert done.returncode == 0, done.stderr


def test_whether_pip_can_fetch_follows_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert not environment.can_fetch()
    with zipfile.ZipFile(tmp_path / "ninja-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "ninja-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: ninja\nVersion: 1\n"
        )
        wheel.writestr(
            "ninja-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("ninja-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert environment.can_fetch()


@pytest.mark.parametrize(
    ("options", "lacking", "fetches", "made"),
    [
        ([], [], True, "online"),
        ([], [], False, "offline"),
        (["--offline"], [], True, "offline"),
        ([], ["torch"], False, "online"),  # pip says what it cannot fetch
    ],
)
def test_the_environment_is_made_in_the_way_that_is_possible(
    options: list[str],
    lacking: list[str],
    fetches: bool,
    made: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(environment, "missing", lambda: lacking)
    monkeypatch.setattr(environment, "can_fetch", lambda: fetches)
    for kind in ("online", "offline"):
        monkeypatch.setattr(
            environment, f"make_{kind}", lambda folder, kind=kind: calls.append((kind, folder))
        )
    monkeypatch.setattr(sys, "argv", ["environment.py", "folder", *options])
    environment.main()
    assert calls == [(made, Path("folder"))]


def test_an_offline_environment_that_cannot_build_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "missing", lambda: ["torch", "setuptools>=77"])
    monkeypatch.setattr(sys, "argv", ["environment.py", str(tmp_path / "new"), "--offline"])
    with pytest.raises(
        SystemExit, match=r"must have the build requirements; it lacks torch, setup"
    ):
        environment.main()
    assert not (tmp_path / "new").exists()


def test_make_gpu_builds_with_cuda_and_without_an_index() -> None:
    shown = run("make", "-n", "-B", "OFFLINE=1", "OUT=some/folder", "gpu-check").stdout
    assert "environment.py .venv --offline" in shown
    (build,) = [line for line in shown.splitlines() if "DIFFMIC_CUDA=on" in line]
    assert "--no-build-isolation" in build and "--no-index --no-deps --editable ." in build
    assert shown.index(build) < shown.index("benchmarks.gpu_stages --out some/folder check")
    every = run("make", "-n", "gpu").stdout
    assert "benchmarks.gpu_stages --out build/gpu check time sanitize" in every
    assert "--offline" not in every
