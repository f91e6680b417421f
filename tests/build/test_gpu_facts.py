"""What benchmarks record of a GPU, with a fake one."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_facts, harness

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=85_000_000_000,
    uuid="11111111-2222",
)  # fmt: skip
ANSWERS = {
    "driver_version": "580.65.06", "clocks.sm": "1980 MHz", "clocks.max.sm": "1980 MHz", "clocks.mem": "2619 MHz",
    "clocks.max.mem": "2619 MHz", "temperature.gpu": "41", "power.limit": "700.00 W",
    "ecc.mode.current": "Enabled", "mig.mode.current": "[N/A]",
}  # fmt: skip


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Replaces the current CUDA device by one with given properties, and nvidia-smi by a script."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def install(properties: SimpleNamespace, script: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        if script is not None:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
            program.chmod(0o755)

    return install


# Answers a query of fields for one device, and fails for others, as nvidia-smi does.
SMI = f"""
answers = {ANSWERS}
options = dict(word.split("=", 1) for word in sys.argv[1:])
if options["--id"] not in ("GPU-11111111-2222", "1"):
    sys.exit("No devices were found")
assert options["--format"] == "csv,noheader"
print(", ".join(answers[name] for name in options["--query-gpu"].split(",")))
"""


@pytest.mark.parametrize("uuid", ["11111111-2222", None])
def test_name_driver_and_clocks(device: Any, uuid: str | None) -> None:
    properties = SimpleNamespace(**vars(H100))
    if uuid is None:  # an older PyTorch
        del properties.uuid
    device(properties, SMI)
    assert gpu_facts.facts() == {
        "name": "NVIDIA H100", "compute_capability": "9.0", "multiprocessors": 132,
        "memory_bytes": 85_000_000_000, "cuda": torch.version.cuda, "driver": "580.65.06",
        "sm_clock": "1980 MHz", "sm_clock_max": "1980 MHz", "memory_clock": "2619 MHz",
        "memory_clock_max": "2619 MHz", "temperature": "41", "power_limit": "700.00 W", "ecc": "Enabled",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "not installed"),
        ("sys.exit('no permission')", "failed: no permission"),
        ("print('one, two')", "failed: one, two"),
        ("import time; time.sleep(60)", "failed: .*timed out"),
    ],
)
def test_what_nvidia_smi_cannot_tell(
    device: Any, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    monkeypatch.setattr(gpu_facts, "_SECONDS", 1.0 if "sleep" in (script or "") else 20)
    device(H100, script)
    found = gpu_facts.facts()
    assert found is not None and found["name"] == "NVIDIA H100" and "driver" not in found
    assert re.search(reason, found["nvidia_smi"])


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_facts.facts() is None
    assert harness.machine()["gpu"] is None


def test_results_name_the_gpu(device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device(H100, SMI)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    timing = harness.Timing(1.0, 1.0, 1.0, 1.0, 3)
    case = harness.Case("one", {"cuda": timing}, "cuda", {}, 0, 0.0, {}, {})
    path, table = harness.write("made_up", [case])
    machine = json.loads(path.read_text())["machine"]
    assert machine["gpu"]["driver"] == "580.65.06" and machine["gpu"]["sm_clock"] == "1980 MHz"
    assert {"triton", "cuda_compiler", "cuda_architectures"} <= set(machine)
    with table.open(newline="") as file:
        assert [line["gpu"] for line in csv.DictReader(file)] == ["NVIDIA H100"]
