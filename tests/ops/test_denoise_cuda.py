"""`denoise` in CUDA: numerical results, batch invariance and argument validation."""

from __future__ import annotations

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds
from denoise_cases import (
    SCHEDULE,
    T,
    as_double,
    assert_states,
    exact,
    make_inputs,
    make_weights,
    one_rounded_step,
    to_bfloat16,
    to_float8,
    weights_on,
)
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops import denoise as ops
from diffmic_fast.ops.denoise import PRECISIONS_OF, denoise
from diffmic_fast.reference import denoise as reference

pytestmark = [
    pytest.mark.parametrize("backend", CUDA_BACKENDS),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

PRECISIONS = PRECISIONS_OF["cuda"]
SAMPLERS = [("ddpm", None, 0.0), ("ddpm_truncated", 5, 0.0), ("ddim", 6, 0.5)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def case(backend: str, rows: int, features: int, classes: int, seed: int = 0):
    device = device_of(backend)
    inputs = tuple(t.to(device) for t in make_inputs(rows, features, classes, seed))
    return weights_on(device, make_weights(features, classes, seed)), inputs


@pytest.mark.parametrize(
    ("rows", "features", "classes", "sampler"),
    [
        (1, 1, 1, 0), (1, 16, 2, 0), (2, 15, 3, 2), (3, 33, 7, 1), (7, 70, 5, 1), (8, 129, 4, 1),
        (9, 40, 6, 2), (17, 64, 5, 1), (33, 100, 3, 1), (64, 31, 2, 1), (65, 20, 3, 1),
        (2, 300, 5, 1), (3, 17, 130, 1), (1, 270, 5, 1),
    ],
)  # fmt: skip
def test_states_match_the_reference(backend, rows, features, classes, sampler) -> None:
    weights, inputs = make_weights(features, classes), make_inputs(rows, features, classes)
    steps = make_steps(SCHEDULE, *SAMPLERS[sampler])
    noise = torch.randn(
        len(steps.timesteps), rows, classes, generator=torch.Generator().manual_seed(1)
    )
    there, on_device = case(backend, rows, features, classes)
    z = noise.to(on_device[0].device)
    found = denoise(*on_device, there, steps, noise=z, trajectory=True, backend=backend)
    last = denoise(*on_device, there, steps, noise=z, backend=backend)
    assert torch.equal(last, found[-1])
    assert_states(found.cpu(), inputs, weights, steps, noise)


def test_depth_that_fills_the_activation_pipeline(backend) -> None:
    """Enough features that all pipeline stages of activations are in use, in the last warp too."""
    rows, features, classes = 2, 515, 3
    weights, inputs = make_weights(features, classes), make_inputs(rows, features, classes)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    noise = torch.randn(1, rows, classes, generator=torch.Generator().manual_seed(1))
    expected = exact(inputs, weights, steps, noise)[-1]
    there, inputs = case(backend, rows, features, classes)
    found = denoise(*inputs, there, steps, noise=noise.to(inputs[0].device), backend=backend)
    assert float((found.cpu() - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(("precision", "of_weights"), [("bf16", to_bfloat16), ("fp8", to_float8)])
@pytest.mark.parametrize(("rows", "features"), [(9, 300), (40, 70), (1, 129)])
def test_only_weights_and_activations_are_rounded(
    backend, rows, features, precision, of_weights
) -> None:
    """Compared with float64 that rounds the same values."""
    classes = 5
    weights, inputs = make_weights(features, classes), make_inputs(rows, features, classes)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    noise = torch.randn(1, rows, classes, generator=torch.Generator().manual_seed(1))
    expected = one_rounded_step(inputs, weights, steps, noise, to_bfloat16, of_weights)
    there, inputs = case(backend, rows, features, classes)
    noise = noise.to(inputs[0].device)
    found = denoise(*inputs, there, steps, noise=noise, backend=backend, precision=precision).cpu()
    plain = denoise(*inputs, there, steps, noise=noise, backend=backend).cpu()
    error = (found - expected).square().mean().sqrt()
    assert float((plain - expected).square().mean().sqrt()) > 5 * float(error)
    assert float(error) < 1e-4


def test_float8_of_every_magnitude(backend) -> None:
    """Weights that are subnormal or 0 in e4m3, output channels of zeros and of tiny weights."""
    rows, features, classes = 9, 70, 4
    weights, inputs = case(backend, rows, features, classes)
    for seed, layer in enumerate(weights.hidden):
        g = torch.Generator().manual_seed(seed)
        layer.weight.mul_(
            2.0 ** -torch.randint(0, 21, (features, features), generator=g).to(layer.weight.device)
        )
        layer.weight[3] = 0.0
        layer.weight[5].mul_(1e-40)
        layer.weight[16].mul_(1e20)
        layer.norm_weight[16] *= 1e-20
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    noise = torch.randn(1, rows, classes, generator=torch.Generator().manual_seed(1))
    there = tuple(t.cpu() for t in inputs)
    expected = one_rounded_step(
        there, weights_on(torch.device("cpu"), weights), steps, noise, to_bfloat16, to_float8
    )
    found = denoise(
        *inputs, weights, steps, noise=noise.to(inputs[0].device), backend=backend, precision="fp8"
    )
    assert float((found.cpu() - expected).square().mean().sqrt()) < 1e-4


@pytest.mark.parametrize("broken", [float("inf"), -float("inf"), float("nan")])
def test_float8_with_a_non_finite_weight(backend, broken) -> None:
    """All results are NaN."""
    weights, inputs = case(backend, 3, 20, 4)
    weights.hidden[1].weight[17, 18] = broken
    steps = make_steps(SCHEDULE, "ddim", 2)
    assert denoise(*inputs, weights, steps, backend=backend, precision="fp8").isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_batch_invariant(backend, precision, monkeypatch) -> None:
    """Bits depend neither on other rows, nor on the launches of a chain, nor on the order of threads."""
    rows, features, classes = 70, 50, 3  # more rows than one launch
    weights, inputs = case(backend, rows, features, classes)
    steps = make_steps(SCHEDULE, "ddim", 4, 0.3)
    images, samples = torch.arange(rows) * 10**13, torch.arange(rows) % 7

    def run(order: Tensor, **how: object) -> Tensor:
        return denoise(
            *(t[order] for t in inputs), weights, steps, seed=3, image_ids=images[order],
            sample_ids=samples[order], backend=backend, precision=precision, **how,
        )  # fmt: skip

    together = run(torch.arange(rows))
    schedule(backend, 12345)
    assert torch.equal(run(torch.arange(rows)), together)
    for size in (1, 2, 9, 33):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(size))[:size]
        assert torch.equal(run(order), together[order]), size
    few = torch.tensor([66, 3, 41])
    for sweeps in (1, 3):
        monkeypatch.setattr(ops, "_SWEEPS_PER_LAUNCH", sweeps)
        assert torch.equal(run(few), together[few]), sweeps
        assert torch.equal(run(few, window=3), together[few]), sweeps


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_the_schedule(backend, precision) -> None:
    weights, inputs = case(backend, 2, 33, 3)
    steps = make_steps(SCHEDULE, "ddim", 2, 0.3)
    found = []
    for seed in seeds(backend, 50):
        schedule(backend, seed)
        found.append(denoise(*inputs, weights, steps, seed=1, backend=backend, precision=precision))
    assert all(torch.equal(each, found[0]) for each in found)
    expected = reference.denoise(*inputs, weights, steps, seed=1)
    torch.testing.assert_close(
        found[0], expected, rtol=0, atol={"fp32": 1e-4, "bf16": 2e-2, "fp8": 0.1}[precision]
    )


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_windows_do_not_change_the_bits(backend, sampler, rows, precision) -> None:
    weights, inputs = case(backend, rows, 40, 3)
    steps = make_steps(SCHEDULE, *sampler)

    def run(window: int, tolerance: float = 0.0) -> Tensor:
        return denoise(
            *inputs, weights, steps, seed=7, backend=backend, window=window, tolerance=tolerance,
            trajectory=True, precision=precision,
        )  # fmt: skip

    one_by_one = run(1)
    for window in (2, 5, 16, 64):
        assert torch.equal(run(window), one_by_one), window
    near = run(8, 1e-6)
    assert torch.equal(run(8, 1e-6), near)
    torch.testing.assert_close(near[-1], one_by_one[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7])
def test_launches_after_the_end_of_the_chains(backend, rows, monkeypatch) -> None:
    """A large tolerance ends a chain after a few sweeps; launches are enqueued for one sweep per step."""
    weights, inputs = case(backend, rows, 70, 3)
    steps = make_steps(SCHEDULE, "ddim", 9, 0.3)

    def run() -> Tensor:
        return denoise(*inputs, weights, steps, seed=7, backend=backend, window=4, tolerance=1e9)

    at_once = run()
    for sweeps in (1, 2, 4):
        monkeypatch.setattr(ops, "_SWEEPS_PER_LAUNCH", sweeps)
        for seed in seeds(backend, 5):
            schedule(backend, seed)
            assert torch.equal(run(), at_once), (sweeps, seed)


def test_a_chain_that_ends_launches_before_the_others(backend, monkeypatch) -> None:
    """Without features eps does not depend on the state, and guesses are right; with them few are."""
    weights, inputs = case(backend, 3, 70, 3)
    inputs[0][1] = 0.0
    steps = make_steps(SCHEDULE, "ddim", 9, 0.3)

    def run(window: int) -> Tensor:
        return denoise(
            *inputs, weights, steps, seed=7, backend=backend, window=window, trajectory=True
        )

    one_by_one = run(1)
    for sweeps in (1, 2):
        monkeypatch.setattr(ops, "_SWEEPS_PER_LAUNCH", sweeps)
        assert torch.equal(run(4), one_by_one), sweeps


def test_noise_matches_the_reference(backend) -> None:
    weights, inputs = case(backend, 3, 20, 5)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 4)
    ids, samples = torch.tensor([5, 2**40, 0]), torch.tensor([0, 2**32 - 1, 9])
    for seed in (0, 2**63, -1):
        keys = {"seed": seed, "image_ids": ids, "sample_ids": samples}
        found = denoise(*inputs, weights, steps, trajectory=True, backend=backend, **keys)
        there = {
            key: v.to(inputs[0].device) if isinstance(v, Tensor) else v for key, v in keys.items()
        }
        expected = reference.denoise(*inputs, weights, steps, trajectory=True, **there)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert torch.equal(found[0], expected[0])


def test_in_place_changes_of_weights_take_effect(backend) -> None:
    weights, inputs = case(backend, 2, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 2)
    before = denoise(*inputs, weights, steps, backend=backend)
    weights.hidden[1].weight.data.mul_(1.5)
    found = denoise(*inputs, weights, steps, backend=backend)
    assert float((found - before).abs().max()) > 1e-4
    torch.testing.assert_close(found, reference.denoise(*inputs, weights, steps), rtol=0, atol=1e-4)


def test_no_rows_and_no_steps(backend) -> None:
    weights, inputs = case(backend, 2, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 2)
    assert denoise(*(t[:0] for t in inputs), weights, steps, backend=backend).shape == (0, 3)
    none = steps._replace(**{name: getattr(steps, name)[:0] for name in steps._fields[:-1]})
    found = denoise(*inputs, weights, none, backend=backend, trajectory=True)
    torch.testing.assert_close(
        found, reference.denoise(*inputs, weights, none, trajectory=True), rtol=0, atol=1e-6
    )


def test_progress_is_reported_and_can_stop_the_chain(backend, monkeypatch) -> None:
    weights, inputs = case(backend, 2, 20, 3)
    steps = make_steps(SCHEDULE, "ddpm")
    monkeypatch.setattr(ops, "_SWEEPS_PER_LAUNCH", 16)
    seen = []
    denoise(*inputs, weights, steps, backend=backend, window=1,
            progress=lambda *each: seen.append(each))  # fmt: skip
    assert seen == [(32, 2 * T), (64, 2 * T), (2 * T, 2 * T)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(*inputs, weights, steps, backend=backend, progress=stop)


def test_unsupported_arguments_raise(backend) -> None:
    weights, inputs = case(backend, 2, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 2)
    with pytest.raises(
        RuntimeError,
        match=r"precision='int8' needs a backend that has it \(cpu\).*served by " + backend,
    ):
        denoise(*inputs, weights, steps, backend=backend, precision="int8")
    with pytest.raises(RuntimeError, match="instructions='avx2'"):
        denoise(*inputs, weights, steps, backend=backend, instructions="avx2")
    with pytest.raises(RuntimeError, match="it takes float32 tensors"):
        denoise(*(t.double() for t in inputs), as_double(weights), steps, backend=backend)
    with pytest.raises(ValueError, match=r"sample_ids must be in \[0, 4294967295\], got -1"):
        denoise(*inputs, weights, steps, backend=backend, sample_ids=torch.tensor([0, -1]))
    sigma = steps.sigma.clone()
    sigma[-1] = 0.5
    noise = torch.randn(2, 2, 3, device=inputs[0].device)
    with pytest.raises(ValueError, match="with noise, sigma of the last step must be 0"):
        denoise(*inputs, weights, steps._replace(sigma=sigma), noise=noise, backend=backend)
    many_weights, many = case(backend, 2, 20, 513)
    with pytest.raises(
        RuntimeError, match=r"at most 65536 features and 512 classes, got .* and 513"
    ):
        denoise(*many, many_weights, steps, backend=backend)


def test_the_extension_validates_its_arguments(backend) -> None:
    module = _native.cuda(backend)
    with pytest.raises(ValueError, match=r"number of features must be in \[1, 65536\], got 0"):
        module.denoise_workspace(0, 3, 1, 1, 1, "fp32", 0)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp8, got fp16"):
        module.denoise_workspace(20, 3, 1, 1, 1, "fp16", 0)
