"""bfloat16 instructions as torch reports them, or the extension where torch does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmic_fast import _native
from diffmic_fast.cpu_capabilities import bfloat16_instructions


@pytest.fixture
def machine(monkeypatch):
    """machine(...) sets the architecture and what torch and the extension report (None: nothing)."""

    def pretend(architecture, amx, avx512, features):
        monkeypatch.setattr("platform.machine", lambda: architecture)
        for name, has in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
            if has is None:
                monkeypatch.delattr(torch.cpu, name, raising=False)
            else:
                monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
        module = None if features is None else SimpleNamespace(cpu_features=lambda: features)
        monkeypatch.setattr(_native, "attempt", lambda: (module, ""))

    return pretend


@pytest.mark.parametrize(
    ("amx", "avx512", "features", "expected"),
    [
        (True, True, ["avx512bf16"], "AMX"),
        (False, True, ["avx512bf16"], "AVX-512"),
        (False, False, ["avx2"], ""),
        (False, False, ["avx512bf16"], ""),  # torch would not use it
        (None, True, ["avx2", "avx512bf16"], "AVX-512"),
        (None, None, ["avx2", "avx512bf16", "amx"], "AMX"),
        (None, None, ["avx2"], ""),
        (None, None, None, ""),
    ],
)
def test_x86(amx, avx512, features, expected, machine):
    machine("x86_64", amx, avx512, features)
    assert bfloat16_instructions() == expected


def test_arm(machine, monkeypatch):
    for has in (True, False):
        machine("aarch64", True, True, ["bf16"])
        operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda has=has: has)
        monkeypatch.setattr(torch.ops, "mkldnn", operators, raising=False)
        assert bfloat16_instructions() == ("Arm" if has else "")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(), raising=False)
    assert bfloat16_instructions() == "Arm"
    machine("aarch64", True, True, [])
    assert bfloat16_instructions() == ""


def test_here():
    assert bfloat16_instructions() in ("", "AMX", "AVX-512", "Arm")
