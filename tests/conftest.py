"""Fixtures that all tests share: the recorded numbers, and the small denoiser that they were recorded from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# Set before anything imports Triton, whose kernels run in its interpreter without a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_module
import fake_gpu
import triton_interpreter
from cuda_backends import FAKE_GPU

# The tests of kernels run without the packages that models and configurations need.
if all(map(find_spec, ("pydantic", "torchvision"))):
    from training_fixtures import config, images, shared_config  # noqa: F401 (fixtures)

from diffmic_fast.diffusion import Schedule, make_schedule
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights

triton_interpreter.repair()

DATA = Path(__file__).parent / "data"

Golden = Callable[[str], dict[str, Tensor]]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Builds the emulated CUDA kernels before the first test that uses them, or skips with the reason."""
    everywhere = os.environ.get("DIFFMIC_BACKEND") == "cuda-emulated" or FAKE_GPU
    if (everywhere or item.get_closest_marker("emulated")) and (
        reason := emulated_module.prepare()
    ):
        pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of Triton kernels `gpu` where there is a GPU, on which they run then."""
    for item in items if torch.cuda.is_available() else ():
        if "triton" in item.nodeid and "slow" not in item.keywords:
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def _fake_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With DIFFMIC_FAKE_GPU=1, the GPU of a test that needs one."""
    if FAKE_GPU and request.node.get_closest_marker("gpu"):
        with fake_gpu.fake_gpu(monkeypatch):
            yield
    else:
        yield


@pytest.fixture(scope="session")
def golden() -> Golden:
    """golden("denoiser") is tests/data/denoiser.npz as fresh tensors by name."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(DATA / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key].copy()) for key in arrays}

    return load


@pytest.fixture
def auto_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsets DIFFMIC_BACKEND, for inputs that not every kernel supports: float64, gradients, bfloat16."""
    monkeypatch.delenv("DIFFMIC_BACKEND", raising=False)


@pytest.fixture
def record(golden: Golden) -> dict[str, Tensor]:
    """The numbers recorded from a denoiser of C = 5, F = 64, T = 100 for a batch of 8."""
    return golden("denoiser")


@pytest.fixture
def state(record: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its state dict before the first call."""
    return {key[6:]: value for key, value in record.items() if key.startswith("state/")}


@pytest.fixture
def weights(state: dict[str, Tensor]) -> DenoiserWeights:
    """Its layers after the image encoder."""
    layers = [
        ConditionalLayer(
            state[f"lin{n}.lin.weight"],
            state[f"lin{n}.lin.bias"],
            state[f"lin{n}.embed.weight"],
            *(
                state[f"unetnorm{n}.{name}"]
                for name in ("weight", "bias", "running_mean", "running_var")
            ),
        )
        for n in (1, 2, 3)
    ]
    return DenoiserWeights(
        layers[0], (layers[1], layers[2]), state["lin4.weight"], state["lin4.bias"]
    )


@pytest.fixture
def features(record: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    """Image features [8, 64] after `norm` in evaluation mode."""
    norm = (state[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return torch.nn.functional.batch_norm(record["x"], *norm, False)


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    """The noise schedule of the recorded runs."""
    return make_schedule("linear", 100)
