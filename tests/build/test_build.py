"""plans.py: its decisions, and builds and installations without CUDA and without a compiler."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from build_support import plan as plans
from build_support.environment import make_offline
from build_support.progress import run_showing_progress

SOURCE = Path(__file__).resolve().parents[2]

# Run on an installed wheel: the command line from training to figures, and the kernels.
OUTSIDE = (
    "tests/cli/test_demo.py",
    "tests/ops/test_rois.py",
    "tests/ops/test_denoise.py",
    "tests/test_info.py",
)
KNOWN = ("75", "80", "86", "89", "90", "100", "103", "110", "120", "121")


# ---- CUDA architectures ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("8.0", ("80",)),
        ("8.0;9.0+PTX", ("80", "90+PTX")),
        ("8.0 8.6, 12.0+PTX", ("80", "86", "120+PTX")),
        (" 9.0a;12.0a+PTX; ", ("90a", "120a+PTX")),
        ("10.0f", ("100f",)),
        ("8.0;8.0+PTX;8.0", ("80+PTX",)),
        ("Hopper", ("90+PTX",)),
        ("ampere;Ada", ("80", "86+PTX", "89+PTX")),
        ("Blackwell+Tegra", ("110",)),
        ("Blackwell", ("100", "103", "120", "121+PTX")),
        ("All", ("80", "86", "89", "90", "100", "120+PTX")),
    ],
)
def test_arch_list(text: str, targets: tuple[str, ...]) -> None:
    assert plans.parse_architectures(text, KNOWN) == targets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sm_80", "an entry must be like 8.0.*, got 'sm_80'"),
        ("8", "an entry must be .*, got '8'"),
        ("8.0+SASS", "got '8.0.SASS'"),
        ("Hopper2", "got 'Hopper2'"),
        ("8.0;7.5", "must be 8.0 or newer, got 7.5"),
        ("Turing", "must be 8.0 or newer, got 7.5.PTX"),
        ("8.0;9.9", "does not compile for 9.9; it knows 7.5, 8.0"),
        ("12.4a", "does not compile for 12.4a"),
        (" ; ", "names no architecture"),
    ],
)
def test_invalid_arch_lists_raise(text: str, message: str) -> None:
    with pytest.raises(plans.ConfigurationError, match=f"TORCH_CUDA_ARCH_LIST.*{message}"):
        plans.parse_architectures(text, KNOWN)


@pytest.mark.parametrize(
    ("known", "visible", "targets"),
    [
        (KNOWN, (), ("80+PTX",)),  # machine code for 8.x, PTX for later GPUs
        (("90", "100"), (), ("90+PTX",)),
        (KNOWN, ("90",), ("90",)),
        (KNOWN, ("75", "86", "120"), ("86", "120")),
        (("80", "90"), ("120",), ("90+PTX",)),  # a GPU newer than nvcc
        (("80", "90"), ("90", "120"), ("90+PTX",)),
    ],
)
def test_default_architectures(
    known: tuple[str, ...], visible: tuple[str, ...], targets: tuple[str, ...]
) -> None:
    assert plans.default_architectures(known, visible) == targets


def test_gpus_that_are_too_old_build_without_cuda() -> None:
    with pytest.raises(plans.CudaUnavailable, match=r"8\.0 or newer, got 7\.5"):
        plans.default_architectures(KNOWN, ("61", "75"))


# ---- what is compiled ------------------------------------------------------------------------

Programs = Callable[..., str]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """programs(nvcc="exit 1") writes shell scripts into a folder and returns it, a PATH without more."""

    def make(**scripts: str) -> str:
        for name, body in scripts.items():
            path = tmp_path / name.replace("cxx", "c++").replace("_", "-")
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        return str(tmp_path)

    return make


GOOD_NVCC = 'if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; fi; exit 0'


def test_without_a_compiler_nothing_is_compiled(programs: Programs) -> None:
    plan = plans.make_plan({"PATH": programs(nvcc=GOOD_NVCC)})
    assert plan.compiler is None and plan.nvcc is None
    assert plan.reason.startswith("no C++ compiler was found")


def test_cuda_follows_nvcc(programs: Programs) -> None:
    path = programs(cxx="exit 0", nvcc=GOOD_NVCC)
    for wanted in ("auto", "on", ""):
        plan = plans.make_plan({"PATH": path, "DIFFMIC_CUDA": wanted})
        assert (plan.nvcc, plan.architectures) == (f"{path}/nvcc", ("80+PTX",))
    plan = plans.make_plan({"PATH": path, "TORCH_CUDA_ARCH_LIST": "9.0a"})
    assert plan.architectures == ("90a",)
    programs(nvidia_smi="echo 8.6; echo 9.0; echo 9.0")
    assert plans.make_plan({"PATH": path}).architectures == ("80+PTX", "90")
    programs(nvidia_smi="echo 7.5")
    assert plans.make_plan({"PATH": path}).cuda_reason.endswith("8.0 or newer, got 7.5")
    programs(nvidia_smi="echo 'NVIDIA-SMI has failed'; exit 9")
    assert plans.make_plan({"PATH": path}).architectures == ("80+PTX",)
    plan = plans.make_plan({"PATH": path, "DIFFMIC_CUDA": "off"})
    assert plan.compiler == f"{path}/c++"
    assert (plan.nvcc, plan.cuda_reason) == (None, "DIFFMIC_CUDA=off")


def test_cuda_for_visible_gpus_alone(programs: Programs) -> None:
    path = programs(cxx="exit 0", nvcc=GOOD_NVCC)
    environment = {"PATH": path, "DIFFMIC_CUDA": "visible"}
    expected = "DIFFMIC_CUDA=visible, and nvidia-smi lists no GPU"
    assert plans.make_plan(environment) == plans.Plan(f"{path}/c++", None, (), expected)
    plan = plans.make_plan({**environment, "TORCH_CUDA_ARCH_LIST": "9.0"})
    assert (plan.nvcc, plan.architectures) == (f"{path}/nvcc", ("90",))
    programs(nvidia_smi="echo 'NVIDIA-SMI has failed'; exit 9")
    assert plans.make_plan(environment).cuda_reason == expected
    programs(nvidia_smi="echo 9.0")
    plan = plans.make_plan(environment)
    assert (plan.nvcc, plan.architectures) == (f"{path}/nvcc", ("90",))


def test_nvcc_is_found_by_cuda_home(programs: Programs, tmp_path: Path) -> None:
    path = programs(cxx="exit 0", nvcc=GOOD_NVCC)
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    shutil.move(f"{path}/nvcc", tmp_path / "toolkit" / "bin" / "nvcc")
    assert plans.make_plan({"PATH": path}).nvcc is None
    home = str(tmp_path / "toolkit")
    assert plans.make_plan({"PATH": path, "CUDA_HOME": home}).nvcc == f"{home}/bin/nvcc"
    assert plans.make_plan({"PATH": path, "CUDA_PATH": home}).nvcc == f"{home}/bin/nvcc"


def test_without_nvcc_auto_builds_without_cuda_and_on_raises(programs: Programs) -> None:
    path = programs(cxx="exit 0")
    plan = plans.make_plan({"PATH": path})
    assert plan.nvcc is None and plan.cuda_reason.startswith("nvcc was not found")
    with pytest.raises(plans.ConfigurationError, match="DIFFMIC_CUDA=on, but nvcc was not found"):
        plans.make_plan({"PATH": path, "DIFFMIC_CUDA": "on"})


def test_an_nvcc_that_rejects_the_compiler(programs: Programs) -> None:
    path = programs(cxx="exit 0", nvcc="echo 'error: unsupported GNU version' >&2; exit 1")
    plan = plans.make_plan({"PATH": path})
    assert plan.nvcc is None
    assert plan.cuda_reason.endswith("c++: error: unsupported GNU version")
    with pytest.raises(plans.ConfigurationError, match="unsupported GNU version"):
        plans.make_plan({"PATH": path, "DIFFMIC_CUDA": "on"})


def test_invalid_variables_raise(programs: Programs) -> None:
    path = programs(cxx="exit 0")
    with pytest.raises(
        plans.ConfigurationError, match="must be auto, visible, on or off, got 'yes'"
    ):
        plans.make_plan({"PATH": path, "DIFFMIC_CUDA": "yes"})
    with pytest.raises(plans.ConfigurationError, match="CXX=nowhere/c"):
        plans.make_plan({"PATH": path, "CXX": "nowhere/c++"})
    with pytest.raises(plans.ConfigurationError, match="on, but no C"):
        plans.make_plan({"PATH": "", "DIFFMIC_CUDA": "on"})


def test_progress_is_written_to_a_file_or_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of compiled files of how many, and the last one; nothing where no terminal is."""
    ninja = """
echo "[0/2] Re-checking globbed directories..."
echo "[1/3] Building CUDA object CMakeFiles/_C.dir/csrc/cuda/mmd/mmd.cu.o"
echo "[2/3] Building CXX object CMakeFiles/_C.dir/csrc/cpu/mmd/mmd.cpp.o"
echo "[3/3] Linking CXX shared module _C.so"
exit $STATUS
"""
    expected = ["compiling the extension", "1 of 3 done, csrc/cuda/mmd/mmd.cu",
                "2 of 3 done, csrc/cpu/mmd/mmd.cpp"]  # fmt: skip
    command = ["sh", "-c", ninja]
    path = tmp_path / "progress"
    for status, end in ((0, "compiled"), (3, "failed")):
        monkeypatch.setenv("STATUS", str(status))
        assert run_showing_progress(command, str(path)) == status
        assert path.read_text().splitlines()[-4:] == [
            *(f"diffmic_fast: {line}" for line in expected), f"diffmic_fast: {end} after 0 s"
        ]  # fmt: skip
    for nowhere in ("", str(tmp_path / "no folder" / "progress")):
        assert run_showing_progress(command, nowhere) == 3
    terminal, name = os.openpty()
    assert run_showing_progress(command, os.ttyname(name)) == 3
    text = ""
    # What was written arrives in parts.
    while " after " not in text and select.select([terminal], [], [], 30)[0]:
        text += os.read(terminal, 4096).decode()
    shown = text.split("\r\x1b[K")
    assert shown[1:-1] == [f"diffmic_fast: {line} " for line in expected]


# ---- builds and installations ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    skipped = {".git", ".venv", "build", "dist", "diffmic_fast.egg-info"}
    shutil.copytree(
        SOURCE,
        folder / "tree",
        ignore=lambda at, names: skipped.intersection(names) if at == str(SOURCE) else set(),
    )
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "tree", check=True, capture_output=True
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        # Python before 3.11.4 has no filters.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        packed.extractall(folder / "unpacked", **safe)
    (root,) = (folder / "unpacked").iterdir()
    return root


@pytest.fixture(scope="module")
def offline_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment for machines without a network, which shows this Python's packages."""
    folder = tmp_path_factory.mktemp("offline") / "venv"
    make_offline(folder)
    return folder / "bin/python"


def pip(
    command: str, *arguments: object, python: Path | str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs pip with the build requirements of this environment, so that no test needs a network."""
    unset = {"DIFFMIC_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    options = ["--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [str(python), "-m", "pip", command, *options, *map(str, arguments)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_sdist_contains_what_a_build_needs(sdist: Path) -> None:
    for name in (
        "CMakeLists.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        ".ci/run",
        "build_support/plan.py",
        "csrc/bindings/module.cpp",
        "csrc/bindings/build_config.h.in",
        "csrc/cpu/rois/rois.cpp",
        "csrc/cuda/common/device_query.cu",
        "benchmarks/bench_rois.py",
        "diffmic_fast/py.typed",
        "diffmic_fast/config/presets/demo.yml",
        "diffmic_fast/reports/templates/report.js",
        "tests/conftest.py",
        "tests/data/guidance.npz",
        "tests/build/test_build.py",
    ):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.so")) and not list(sdist.rglob("_build.json"))


@pytest.mark.slow
def test_wheel_of_the_sdist_passes_tests_outside_the_sources(
    sdist: Path, offline_python: Path, tmp_path: Path
) -> None:
    """Built as on a machine without a network."""
    progress = tmp_path / "progress"
    result = pip(
        "wheel", "-w", tmp_path, sdist, python=offline_python, PIP_NO_INDEX="1", DIFFMIC_CUDA="off",
        DIFFMIC_PROGRESS=str(progress),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ of \d+ done, csrc/cpu/mmd/mmd\.cpp\n", progress.read_text())
    (wheel,) = tmp_path.glob("diffmic_fast-*.whl")
    assert f"cp{sys.version_info[0]}{sys.version_info[1]}" in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    for folder in ("diffmic_fast/config/presets", "diffmic_fast/reports/templates"):
        files = {f"{folder}/{p.name}" for p in (SOURCE / folder).iterdir() if p.is_file()}
        assert files and files <= set(names)
    assert "diffmic_fast/py.typed" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]

    program = """
import json
from diffmic_fast import _native, info
found = info.report()
print(json.dumps({"file": _native.extension().__file__, "gpu": found["gpu"]["reason"],
                  "rois": found["backends"]["cpu"]["rois"], "installed": found["installed"]}))
"""
    found = run_with(tmp_path / "site", program)
    assert found["file"].startswith(str(tmp_path))
    assert found["gpu"] == "the extension was built without CUDA: DIFFMIC_CUDA=off"
    assert found["rois"] == "cpu"
    assert found["installed"]["extension"] is True and found["installed"]["cuda"] is False
    assert found["installed"]["compiler"] and "-O3" in found["installed"]["flags"]

    outside = tmp_path / "outside"
    shutil.copytree(
        SOURCE / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(SOURCE / "pyproject.toml", outside)
    selected = ["-m", "not slow and not emulated", *OUTSIDE]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    done = subprocess.run(
        command, cwd=outside, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_install_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = pip(
        "install", "-v", "--no-compile", "--target", tmp_path / "site", sdist, PATH=str(empty)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    assert "installed without its C++ extension: no C++ compiler was found" in said
    program = """
import json, warnings
warnings.simplefilter("ignore")
import torch
from diffmic_fast import info
from diffmic_fast.ops.rois import choose_windows
found = info.report()
print(json.dumps({"extension": found["extension"], "file": info.__file__,
                  "cells": choose_windows(torch.eye(3)[None, None], (1, 1), 1).tolist()}))
"""
    found = run_with(tmp_path / "site", program)
    assert found["file"].startswith(str(tmp_path))
    assert found["extension"]["loaded"] is False
    assert "left out when diffmic_fast was installed: no C++" in found["extension"]["reason"]
    assert found["cells"] == [[[0, 0]]]


@pytest.mark.slow
def test_make_installs_without_a_network(sdist: Path, tmp_path: Path) -> None:
    """By itself, since nothing can be fetched; without a compiler, to be quick: the wheel is built in the same way."""
    tree = shutil.copytree(sdist, tmp_path / "tree")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("make", "sh", "find", "touch", "cmake", "ninja"):
        found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        (programs / name).symlink_to(str(found))
    unset = {"CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "DIFFMIC_CUDA", "MAKEFLAGS", "PYTHONPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", ".venv/.all"], cwd=tree, check=False,
        env={**kept, "PATH": str(programs), "PIP_NO_INDEX": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"nothing is fetched, the packages are those of {sys.executable}" in done.stdout
    program = (
        "import json, diffmic_fast, sys; print(json.dumps([diffmic_fast.__file__, sys.prefix]))"
    )
    result = subprocess.run(
        [tree / ".venv/bin/python", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    file, prefix = json.loads(result.stdout)
    assert Path(file).samefile(tree / "diffmic_fast/__init__.py")
    assert Path(prefix).samefile(tree / ".venv")


@pytest.mark.slow
def test_a_failing_compiler_makes_the_installation_fail(sdist: Path, tmp_path: Path) -> None:
    failing = tmp_path / "failing-c++"
    failing.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    failing.chmod(0o755)
    result = pip("wheel", "-w", tmp_path, sdist, CXX=str(failing), DIFFMIC_CUDA="off")
    assert result.returncode != 0
    assert "diffmic_fast: compiling the extension failed" in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_missing_cuda_is_reported_in_one_line(sdist: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    result = pip("wheel", "-w", tmp_path, sdist, PATH=str(tmp_path), DIFFMIC_CUDA="on")
    assert result.returncode != 0
    said = result.stdout + result.stderr
    lines = [line for line in said.splitlines() if "diffmic_fast:" in line]
    assert len(lines) == 1 and "DIFFMIC_CUDA=on, but nvcc was not found" in lines[0]
    assert "Traceback" not in said


# An editable installation finds diffmic_fast._C in the sources, whatever package asks for it.
_WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def run_with(site: Path, program: str) -> dict[str, object]:
    """The JSON that a program prints which imports diffmic_fast from `site`."""
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EDITABLE + program],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
