"""Names of devices."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.devices import choose_device


@pytest.mark.parametrize(
    "name",
    ["mps", "xpu", "meta", "hpu", "privateuseone", "vulkan", "", "CPU", "0", "cuda:-1", "gpu"],
)
def test_other_devices_are_rejected_by_name(name):
    with pytest.raises(
        ValueError, match=f"^device must be auto, cpu, cuda or cuda:N, got '{name}'$"
    ):
        choose_device(name)


def test_cpu_and_auto(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:0' was asked for, but torch sees no GPU"):
        choose_device("cuda:0")


def test_a_gpu_that_the_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"must be from cuda:0 to cuda:1, .*, got 'cuda:99'"):
        choose_device("cuda:99")
