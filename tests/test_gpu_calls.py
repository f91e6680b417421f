"""What calls do on a GPU besides their kernels: where their arguments may lie, and that the host never waits.

On a fake GPU (fake_gpu.py), which counts what would wait, and on a GPU, where PyTorch raises for it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from cuda_backends import CUDA_BACKENDS
from denoise_cases import SCHEDULE, make_inputs, make_weights, weights_on
from fake_gpu import CUDA, fake_gpu, host_of, module_to_gpu
from torch import Tensor, nn

if not all(map(find_spec, ("pydantic", "torchvision"))):  # a machine with a GPU may lack them
    pytest.skip("the model needs pydantic and torchvision", allow_module_level=True)

from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops._transfer import to_device
from diffmic_fast.ops.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import PRECISIONS_OF, denoise
from diffmic_fast.ops.image_ids import image_ids
from diffmic_fast.ops.mmd import mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.ops.noised_conditioning import noised_conditioning
from diffmic_fast.ops.rois import cut_crops, rois
from diffmic_fast.training.steps import Steps

pytestmark = [
    pytest.mark.parametrize("gpu", CUDA_BACKENDS, indirect=True),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

Quiet = Callable[[], contextlib.AbstractContextManager[None]]


class Gpu:
    """A GPU, fake or not.

    Attributes:
        fake: Whether it is.
    """

    def __init__(self, waits: list[str] | None) -> None:
        self._waits = waits
        self.fake = waits is not None

    @contextlib.contextmanager
    def waits(self, count: int) -> Iterator[None]:
        """A block that waits for the device that often; on a GPU, 0 raises where it waits."""
        if self._waits is not None:
            self._waits.clear()
            yield
            assert len(self._waits) == count, self._waits
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if count else "error")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sum("synchroniz" in str(each.message) for each in caught) == count

    def module(self, module: nn.Module) -> nn.Module:
        """The module, moved there in place."""
        return module_to_gpu(module) if self.fake else module.to(CUDA)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if request.param == "cuda":
        yield Gpu(None)
        return
    monkeypatch.delenv("DIFFMIC_BACKEND", raising=False)
    with fake_gpu(monkeypatch) as waits:
        yield Gpu(waits)


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(CUDA, non_blocking=True) for tensor in tensors]


def host(tensor: Tensor) -> Tensor:
    """The values, for comparisons: these wait."""
    return host_of(tensor) if tensor.device != torch.device("cpu") else tensor


def values(tensor: Tensor) -> Tensor:
    return tensor.cpu()


def denoiser(rows: int = 3, features: int = 20, classes: int = 3):
    weights = weights_on(CUDA, make_weights(features, classes))
    return there(*make_inputs(rows, features, classes)), weights


# ---- where arguments may lie -------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS_OF["cuda"])
def test_ids_of_denoise_may_lie_on_the_cpu(gpu: Gpu, precision: str) -> None:
    inputs, weights = denoiser()
    steps = make_steps(SCHEDULE, "ddim", 3, 0.5)
    ids = {"image_ids": torch.tensor([5, 2**40, -1]), "sample_ids": torch.tensor([0, 2**32 - 1, 9])}
    moved = {name: value.to(CUDA) for name, value in ids.items()}
    expected = values(denoise(*inputs, weights, steps, precision=precision, **moved))
    with gpu.waits(0):
        found = denoise(*inputs, weights, steps, precision=precision, **ids)
    assert found.device == CUDA and torch.equal(values(found), expected)
    other = values(denoise(*inputs, weights, steps, precision=precision))
    assert not torch.equal(other, expected)


def layer_of(width: int, features: int, rows: int = 9) -> ConditionalLayer:
    ones = torch.ones(features)
    parts = (torch.rand(features, width), ones, torch.rand(rows, features), ones, ones, ones, ones)
    return ConditionalLayer(*there(*parts))


def mixed_calls() -> dict[str, Callable[[], object]]:
    """Calls with one argument on the CPU, of every operation, by the name in the error."""
    steps = make_steps(SCHEDULE, "ddim", 2)
    (x, y, guidance), weights = denoiser(4, 6, 3)
    t, cpu = torch.zeros(4, dtype=torch.int64), torch.device("cpu")
    t_there = t.to(CUDA)
    tables = there(torch.rand(8), torch.rand(8))
    images, saliency = there(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4))
    bias_here = weights._replace(output_bias=torch.zeros(3))
    layer_here = weights.hidden[0]._replace(bias=torch.zeros(6))
    hidden_here = weights._replace(hidden=(layer_here, weights.hidden[1]))
    steps_there = steps._replace(timesteps=steps.timesteps.to(CUDA))
    layer, hidden, small = layer_of(6, 6), layer_of(6, 6), torch.rand(4, 3)
    noised = (layer, t_there, *tables)
    return {
        "denoise: prior must be on cuda:0": lambda: denoise(x, small, guidance, weights, steps),
        "denoise: output_bias must be on cuda:0": lambda: denoise(x, y, guidance, bias_here, steps),
        "denoise: bias must be on cuda:0": lambda: denoise(x, y, guidance, hidden_here, steps),
        "denoise: noise must be on cuda:0": lambda: denoise(
            x, y, guidance, weights, steps, noise=torch.zeros(2, 4, 3)
        ),
        "denoise: steps.timesteps must be on cpu": lambda: denoise(
            x, y, guidance, weights, steps_there
        ),
        "denoise: image_ids must be on cpu": lambda: denoise(
            *make_inputs(4, 6, 3), weights_on(cpu, make_weights(6, 3)), steps, image_ids=t_there
        ),
        "conditional_linear: timesteps must be on cuda:0": lambda: conditional_linear(x, hidden, t),
        "conditioning: y_t must be on cuda:0": lambda: conditioning(
            x, small, guidance, layer, t_there
        ),
        "conditioning: timesteps must be on cuda:0": lambda: conditioning(x, y, guidance, layer, t),
        "noised_conditioning: sample_ids must be on cuda:0": lambda: noised_conditioning(
            x, y, guidance, *noised, sample_ids=t
        ),
        "noise_losses: predictions must be on cuda:0": lambda: noise_losses(y, small[None]),
        "mmd: y must be on cuda:0": lambda: mmd(y, small),
        "mmd: x_weights must be on cuda:0": lambda: mmd(y, guidance, x_weights=torch.ones(4)),
        "rois: images must be on cuda:0": lambda: rois(saliency, torch.rand(2, 3, 8, 8), (2, 2), 1),
        "rois.cut_crops: origins must be on cuda:0": lambda: cut_crops(
            images, torch.zeros(2, 1, 2, dtype=torch.int64), (2, 2)
        ),
    }


MIXED = [
    "denoise: prior must be on cuda:0", "denoise: output_bias must be on cuda:0", "denoise: bias must be on cuda:0",
    "denoise: noise must be on cuda:0", "denoise: steps.timesteps must be on cpu", "denoise: image_ids must be on cpu",
    "conditional_linear: timesteps must be on cuda:0", "conditioning: y_t must be on cuda:0",
    "conditioning: timesteps must be on cuda:0", "noised_conditioning: sample_ids must be on cuda:0",
    "noise_losses: predictions must be on cuda:0", "mmd: y must be on cuda:0", "mmd: x_weights must be on cuda:0",
    "rois: images must be on cuda:0", "rois.cut_crops: origins must be on cuda:0",
]  # fmt: skip


@pytest.mark.parametrize("message", MIXED)
def test_tensors_of_two_devices_raise(gpu: Gpu, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed_calls()[message]()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3, 992, 1000, 40_001])
def test_to_device(gpu: Gpu, dtype: torch.dtype, count: int) -> None:
    """The values at the time of the call, by the parameters of kernels and, from 64 KB on, through pinned memory."""
    source = (torch.arange(2 * count) * 7919 % 251).to(dtype)[::2]
    expected = source.clone()
    with gpu.waits(0):
        found = to_device(source, CUDA)
    source.zero_()
    assert found.device == CUDA and torch.equal(values(found), expected)


# ---- values out of range -----------------------------------------------------------------------


@pytest.mark.parametrize("sample", [-1, 2**32])
def test_a_sample_out_of_range_makes_its_row_nan(gpu: Gpu, sample: int) -> None:
    inputs, weights = denoiser()
    steps = make_steps(SCHEDULE, "ddim", 3)
    good, bad = torch.tensor([0, 1, 2]), torch.tensor([0, sample, 2])
    expected = values(denoise(*inputs, weights, steps, sample_ids=good))
    with gpu.waits(0):
        found = denoise(*inputs, weights, steps, sample_ids=bad.to(CUDA, non_blocking=True))
    found = values(found)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])
    with pytest.raises(ValueError, match=r"sample_ids must be in \[0, 4294967295\]"):
        denoise(*inputs, weights, steps, sample_ids=bad)


def test_timesteps_of_the_table_are_checked(gpu: Gpu) -> None:
    inputs, weights = denoiser()
    steps = make_steps(SCHEDULE, "ddim", 3)
    steps = steps._replace(timesteps=steps.timesteps + 39)
    with pytest.raises(ValueError, match=r"steps.timesteps must be in \[0, 40\], got 51 … 78"):
        denoise(*inputs, weights, steps)


def test_a_timestep_out_of_range_is_not_served(gpu: Gpu) -> None:
    """NaN by the kernels of `conditioning`; else an assertion, which on a GPU would end the process's use of it."""
    x, y, guidance = there(torch.rand(4, 6), torch.rand(4, 3), torch.rand(4, 3))
    for t in (-1, 9):
        timesteps = torch.tensor([0, t, 8, 1]).to(CUDA, non_blocking=True)
        layer = layer_of(6, 6)
        with gpu.waits(0):
            found = conditioning(x, y, guidance, layer, timesteps)
        assert values(found).isnan().any(dim=1).tolist() == [False, True, False, False]
        if gpu.fake:
            with pytest.raises(RuntimeError, match=r"timesteps must be in \[0, 8\]"):
                conditional_linear(x, layer, timesteps)


# ---- waiting -----------------------------------------------------------------------------------


def test_denoise_does_not_wait(gpu: Gpu) -> None:
    inputs, weights = denoiser(5)
    steps = make_steps(SCHEDULE, "ddpm")
    noise = torch.randn(len(steps.timesteps), 5, 3).to(CUDA)
    for how in ({}, {"noise": noise}, {"trajectory": True, "window": 8}, {"precision": "bf16"}):
        with gpu.waits(0):
            denoise(*inputs, weights, steps, **how)


def test_the_fake_counts_what_waits(gpu: Gpu) -> None:
    """Otherwise the tests here could not fail."""
    tensor = torch.arange(3.0).to(CUDA)
    for wait in (
        lambda: int(tensor.max()), lambda: bool(tensor.any()), lambda: tensor.cpu(), lambda: tensor.tolist(),
        lambda: torch.ones(3).to(CUDA), lambda: tensor.nonzero(), lambda: tensor.new_tensor([1.0]),
        lambda: tensor.copy_(torch.ones(3)), lambda: torch.equal(tensor, tensor),
    ):  # fmt: skip
        if gpu.fake:
            with gpu.waits(1):
                wait()
        else:
            with pytest.raises(RuntimeError, match="synchronizing"), gpu.waits(0):
                wait()
    if gpu.fake:
        with pytest.raises(RuntimeError, match="same device"):
            tensor + torch.ones(3)


def test_image_ids_do_not_wait(gpu: Gpu) -> None:
    images = torch.randn(3, 3, 9, 7)
    expected = image_ids(images)
    on_gpu = images.to(CUDA)
    with gpu.waits(0):
        found = image_ids(on_gpu)
    assert found.device == CUDA and torch.equal(values(found), expected)


@pytest.fixture(scope="module")
def trained() -> DiffMIC:
    torch.manual_seed(0)
    config = DiffMICConfig(
        classes=3, image_size=32, timesteps=20, feature_dim=24, guidance_trunk="resnet18", crops=2, crop_size=8
    )  # fmt: skip
    model = DiffMIC(config).train()
    with torch.no_grad():
        for _ in range(3):
            model.loss(torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,)))
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_predict_does_not_wait(trained: DiffMIC, images: Tensor, gpu: Gpu) -> None:
    options = {"sampler": "ddim", "steps": 4, "samples": 2, "saliency": True, "boxes": True}
    expected = trained.predict(images, **options)
    model = gpu.module(copy.deepcopy(trained))
    on_gpu = images.to(CUDA)
    with gpu.waits(0):
        found = model.predict(on_gpu, **options)
    for name in ("probabilities", "samples", "guidance", "saliency"):
        torch.testing.assert_close(
            values(getattr(found, name)), getattr(expected, name), rtol=1e-3, atol=1e-3
        )
    assert torch.equal(values(found.label), expected.label)
    assert torch.equal(values(found.boxes), expected.boxes)
    found.check()
    ids = image_ids(images)
    with gpu.waits(0):
        again = model.predict(on_gpu, ids=ids, **options)
    assert torch.equal(values(again.samples), values(found.samples))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predict_marks_an_image_that_is_not_finite(
    trained: DiffMIC, images: Tensor, gpu: Gpu, value: float
) -> None:
    model = gpu.module(copy.deepcopy(trained))
    expected = model.predict(images.to(CUDA), sampler="ddim", steps=2)
    images[1, 2, 3, 4] = value
    on_gpu = images.to(CUDA)
    with gpu.waits(0):
        found = model.predict(on_gpu, sampler="ddim", steps=2)
    assert values(found.label).tolist() == [
        -1 if i == 1 else int(label) for i, label in enumerate(values(expected.label))
    ]
    for name in ("probabilities", "samples", "guidance"):
        bad = values(getattr(found, name)).flatten(1).isnan()
        assert bad.all(dim=1).tolist() == [False, True, False, False]
        assert int(bad.any(dim=1).sum()) == 1
    with pytest.raises(FloatingPointError, match="NaN or infinity for image 1"):
        found.check()


def test_the_loss_and_its_gradient_do_not_wait(trained: DiffMIC, images: Tensor, gpu: Gpu) -> None:
    labels, generator = torch.tensor([0, 2, 1, 0]), torch.Generator().manual_seed(2)
    given = {"timesteps": torch.tensor([3, 0, 19, 7] * 2), "noise": torch.randn(8, 3), "draws": 2}
    given["hidden"] = torch.tensor([True, False, False, False])
    reference = copy.deepcopy(trained)
    reference.denoiser.train()
    expected = reference.loss(images, labels, **given)
    expected.total.backward()
    model = gpu.module(copy.deepcopy(trained))
    model.denoiser.train()
    on_gpu = images.to(CUDA)
    with gpu.waits(0):
        found = model.loss(on_gpu, labels, **given)
        found.total.backward()
        model.loss(on_gpu, labels.to(CUDA, non_blocking=True), generator=generator)
    torch.testing.assert_close(
        values(found.total.detach()), expected.total.detach(), rtol=1e-3, atol=1e-3
    )
    for name in ("lin1.embed.weight", "lin2.lin.weight", "lin4.bias"):
        gradient = model.denoiser.get_parameter(name).grad
        torch.testing.assert_close(
            values(gradient), reference.denoiser.get_parameter(name).grad, rtol=1e-2, atol=1e-3
        )
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\]"):
        model.loss(on_gpu, labels + 1, **given)
    if gpu.fake:
        with pytest.raises(RuntimeError, match=r"labels must be in \[0, 2\]"):
            model.loss(on_gpu, (labels + 1).to(CUDA), **given)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_step_waits_once(
    trained: DiffMIC, images: Tensor, gpu: Gpu, accumulation: int
) -> None:
    """For its losses and the gradient's norm, before the optimizer's step."""
    model = gpu.module(copy.deepcopy(trained))
    config = TrainingConfig(precision="fp32", accumulation=accumulation)
    steps = Steps(model, config, seed=1)
    on_gpu, labels = there(images, torch.tensor([0, 2, 1, 0]))
    steps.denoiser_step(on_gpu, labels, 0.5)
    with gpu.waits(1):
        losses = steps.denoiser_step(on_gpu, labels, 0.5)
    assert all(map(torch.isfinite, map(torch.tensor, losses.values())))
    with gpu.waits(1):
        steps.guidance_step(on_gpu, labels, 0.5)


# ---- CUDA graphs -------------------------------------------------------------------------------


def test_a_cuda_graph_captures_denoise(gpu: Gpu) -> None:
    """A replay has the bits of a call, with new features and labels, and after the arguments on the CPU are gone."""
    if gpu.fake:
        pytest.skip("needs a GPU")
    inputs, weights = denoiser(4)
    ids = torch.tensor([5, 7, 2**40, 0])
    steps = make_steps(SCHEDULE, "ddpm")
    expected = []
    others = there(*make_inputs(4, 20, 3, seed=3))
    for each in (inputs, others):
        expected.append(denoise(*each, weights, steps, image_ids=ids, seed=4))
    static = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = denoise(*static, weights, steps, image_ids=ids, seed=4)
    ids.zero_()
    for column in steps[:-1]:
        column.zero_()
    for each, wanted in zip((inputs, others), expected, strict=True):
        for target, source in zip(static, each, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(found, wanted)
