"""`info` reports what is available and why the rest is not, and never raises for a missing part."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from diffmic_fast import _native, info
from diffmic_fast.ops._backend import IMPLEMENTATIONS


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFMIC_BACKEND", raising=False)


def test_report_of_this_machine() -> None:
    found = info.report()
    assert found["versions"]["torch"] and found["versions"]["diffmic_fast"]
    assert found["extension"]["loaded"] is True
    assert found["extension"]["compiler"].strip()
    assert "-ffp-contract=off" in found["extension"]["flags"]
    assert set(found["extension"]["instruction_sets"]) <= set(
        found["processor"]["instruction_sets"]
    )
    assert found["processor"]["threads"] >= 1
    assert set(found["backends"]["cpu"]) == set(IMPLEMENTATIONS)
    assert found["backends"]["cpu"]["rois"] == "cpu"
    assert found["gpu"]["devices"] or found["gpu"]["reason"]


def test_main_prints_json_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(json=True) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["cpu"]["mmd"] == "cpu"
    assert info.main() == 0
    text = capsys.readouterr().out
    for word in ("versions", "extension", "processor", "gpu", "backends", "conditional_linear"):
        assert word in text


def test_a_missing_extension_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "attempt", lambda: (None, "no C++ compiler was found"))
    found = info.report()
    assert found["extension"] == {"loaded": False, "reason": "no C++ compiler was found"}
    assert found["backends"]["cpu"]["rois"].startswith("reference (rois: using the slower")
    assert "no C++ compiler was found" in found["gpu"]["reason"]
    assert "no C++ compiler was found" in info.render(found)


def test_an_invalid_backend_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMIC_BACKEND", "fast")
    found = info.report()
    assert found["backends"]["variable"] == "fast"
    assert found["backends"]["cpu"]["rois"].startswith("none: rois: the variable DIFFMIC_BACKEND")


class _CudaError(RuntimeError):
    pass


def _with_cuda(monkeypatch: pytest.MonkeyPatch, state: object) -> dict[str, object]:
    real = _native.extension()

    def cuda_state() -> object:
        if isinstance(state, Exception):
            raise state
        return state

    module = SimpleNamespace(
        __file__="_C.so",
        build_info=real.build_info,
        cpu_features=real.cpu_features,
        why_no_amx=real.why_no_amx,
        cuda_state=cuda_state,
        CudaError=_CudaError,
    )
    monkeypatch.setattr(_native, "attempt", lambda: (module, ""))
    return info.report()


def test_gpus_without_code_in_this_build_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {
        "index": 0,
        "name": "Test GPU",
        "compute_capability": (7, 5),
        "multiprocessors": 40,
        "memory_bytes": 16 * 2**30,
        "served": False,
    }
    state = {"runtime_version": 13000, "driver_version": 13020, "reason": "", "devices": [device]}
    text = info.render(_with_cuda(monkeypatch, state))
    assert "supports CUDA 13.2" in text
    assert "Test GPU, sm_75, for which this build has no code, 40 multiprocessors, 16 GiB" in text


def test_a_driver_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _with_cuda(monkeypatch, _CudaError("cudaGetDeviceCount failed: cudaErrorUnknown"))
    assert found["gpu"]["reason"] == "cudaGetDeviceCount failed: cudaErrorUnknown"  # type: ignore[index]


def test_device_query_of_this_build() -> None:
    """With CUDA compiled in, the query succeeds with or without a GPU."""
    module = _native.extension()
    if not module.build_info()["cuda"]:
        assert not hasattr(module, "cuda_state")
        pytest.skip("this build has no CUDA: " + info.report()["gpu"]["reason"])
    state = module.cuda_state()
    assert state["runtime_version"] >= 11000
    assert bool(state["devices"]) != bool(state["reason"])
    served = {
        capability: module.cuda_serves("80 90a 100 120+PTX", *capability)
        for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)]
    }
    assert served == {
        (7, 5): False,
        (8, 0): True,
        (8, 9): True,
        (9, 0): True,
        (10, 3): True,
        (11, 0): False,
        (12, 1): True,
        (13, 0): True,
    }
    assert not module.cuda_serves("90a", 9, 1)
