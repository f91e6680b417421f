"""Backend dispatch: "auto", DIFFMIC_BACKEND, and backends requested by name."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from diffmic_fast import _native, triton
from diffmic_fast.ops import _backend
from diffmic_fast.ops._backend import BACKENDS, IMPLEMENTATIONS, resolve
from diffmic_fast.ops.rois import choose_windows

CPU = torch.device("cpu")
REASON = "nothing was there to compile it"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DIFFMIC_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "attempt", lambda: (None, REASON))


def test_every_operation_has_a_reference() -> None:
    operations = {"denoise", "conditioning", "conditional_linear", "image_ids", "mmd", "rois"}
    assert set(IMPLEMENTATIONS) == operations
    for operation, backends in IMPLEMENTATIONS.items():
        assert set(backends) <= set(BACKENDS)
        assert resolve(operation, "reference", CPU) == "reference"
        assert resolve(operation, "reference", torch.device("cuda", 1)) == "reference"


def test_auto_selects_the_fastest_available_backend() -> None:
    assert resolve("rois", "auto", CPU) == "cpu"
    assert resolve("conditional_linear", "auto", CPU) == "reference"


@pytest.mark.parametrize("reason", ["", "there is no Triton here"])
def test_auto_selects_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda device: reason)
    if not reason:
        assert resolve("conditional_linear", "auto", torch.device("cuda")) == "triton"
        return
    with pytest.warns(RuntimeWarning, match=f"conditional_linear: using the slower.*{reason}"):
        assert resolve("conditional_linear", "auto", torch.device("cuda")) == "reference"


def test_unknown_backend_raises() -> None:
    with pytest.raises(
        ValueError, match=r"rois: backend must be one of auto, reference, cpu.*'fast'"
    ):
        resolve("rois", "fast", CPU)


def test_missing_implementation_requested_by_name_raises() -> None:
    with pytest.raises(
        RuntimeError, match=r"conditional_linear: backend=\"cpu\" cannot serve: it has no cpu"
    ):
        resolve("conditional_linear", "cpu", CPU)
    for name in ("cuda", "cuda-emulated"):
        with pytest.raises(
            RuntimeError, match=f"conditional_linear: .*it has no {name} implementation"
        ):
            resolve("conditional_linear", name, CPU)


def test_backend_requested_by_name_on_another_device_raises() -> None:
    with pytest.raises(RuntimeError, match="takes tensors on the CPU, got cuda:1"):
        resolve("rois", "cpu", torch.device("cuda", 1))


def test_auto_warns_once_without_the_extension(no_extension: None) -> None:
    with pytest.warns(RuntimeWarning, match=f"rois: using the slower reference.*{REASON}"):
        assert resolve("rois", "auto", CPU) == "reference"
    assert resolve("rois", "auto", CPU) == "reference"  # a second warning would be an error
    assert resolve("conditional_linear", "auto", CPU) == "reference"
    with pytest.raises(RuntimeError, match=f"cannot serve: the compiled extension.*{REASON}"):
        resolve("rois", "cpu", CPU)


def test_environment_variable_sets_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMIC_BACKEND", "reference")
    assert resolve("rois", "auto", CPU) == "reference"
    assert resolve("rois", "cpu", CPU) == "cpu"
    monkeypatch.setenv("DIFFMIC_BACKEND", "auto")
    assert resolve("rois", "auto", CPU) == "cpu"
    monkeypatch.setenv("DIFFMIC_BACKEND", "")
    assert resolve("rois", "auto", CPU) == "cpu"
    monkeypatch.setenv("DIFFMIC_BACKEND", "fast")
    with pytest.raises(ValueError, match="the variable DIFFMIC_BACKEND must be one of auto"):
        resolve("rois", "auto", CPU)


def test_environment_variable_raises_if_its_backend_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, no_extension: None
) -> None:
    monkeypatch.setenv("DIFFMIC_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="rois: DIFFMIC_BACKEND=cpu cannot serve"):
        resolve("rois", "auto", CPU)


def test_environment_variable_warns_once_if_an_operation_lacks_its_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIFFMIC_BACKEND", "cpu")
    with pytest.warns(
        RuntimeWarning, match="conditional_linear: DIFFMIC_BACKEND=cpu does not apply"
    ):
        assert resolve("conditional_linear", "auto", CPU) == "reference"
    assert resolve("conditional_linear", "auto", CPU) == "reference"


def test_resolve_is_constant_in_a_compiled_graph() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if resolve("conditional_linear", "auto", x.device) == "reference" else 2)

    assert add(torch.zeros(2)).tolist() == [1, 1]


def test_operation_reports_why_the_extension_is_missing(no_extension: None) -> None:
    with pytest.raises(RuntimeError, match=REASON):
        choose_windows(torch.rand(1, 2, 3, 3), (1, 1), 1, backend="cpu")


@pytest.mark.parametrize("breakage", ["missing", "broken"])
def test_the_package_works_without_a_loadable_extension(breakage: str) -> None:
    """A fresh process in which importing diffmic_fast._C fails, in two ways."""
    program = f"""
import sys, warnings, importlib.abc, importlib.machinery
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "diffmic_fast._C":
            if {breakage == "broken"}:
                raise ImportError("undefined symbol: kernel")
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Finder())
import torch
from diffmic_fast import _native
from diffmic_fast.ops.rois import choose_windows
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(choose_windows(torch.ones(1, 2, 3, 3), (1, 1), 2).tolist())
print([str(w.message) for w in caught if "rois" in str(w.message)])
try:
    _native.extension()
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[0] == lines[1] == "[[[0, 0], [0, 0]]]"
    said = eval(lines[2])
    assert len(said) == 1
    expected = "undefined symbol: kernel" if breakage == "broken" else "_C has not been built"
    assert expected in said[0] and expected in lines[3]
