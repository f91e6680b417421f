"""`denoise` in Triton: numerical results, noise, and chains over several blocks of rows."""

from __future__ import annotations

import pytest
import torch
from cuda_backends import NO_TRITON, TRITON_DEVICE
from denoise_cases import (
    SCHEDULE,
    T,
    assert_states,
    exact,
    make_inputs,
    make_weights,
    one_rounded_step,
    to_bfloat16,
    weights_on,
)

from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops._backend import BackendError
from diffmic_fast.ops.denoise import denoise

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from diffmic_fast.triton import denoise as kernels

SAMPLERS = [("ddpm", None, 0.0), ("ddpm_truncated", 5, 0.0), ("ddim", 6, 0.5)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def case(rows: int, features: int, classes: int):
    inputs = tuple(t.to(TRITON_DEVICE) for t in make_inputs(rows, features, classes))
    return weights_on(TRITON_DEVICE, make_weights(features, classes)), inputs


@pytest.mark.parametrize(
    ("rows", "features", "classes", "sampler"),
    [(1, 1, 1, 1), (2, 15, 3, 2), (5, 33, 7, 0), (17, 65, 17, 1), (3, 129, 2, 2), (33, 16, 128, 1)],
)
def test_states_match_the_reference(rows, features, classes, sampler) -> None:
    weights, inputs = case(rows, features, classes)
    steps = make_steps(SCHEDULE, *SAMPLERS[sampler])
    noise = torch.randn(
        len(steps.timesteps), rows, classes, generator=torch.Generator().manual_seed(1)
    )
    states = denoise(
        *inputs, weights, steps, noise=noise.to(TRITON_DEVICE), trajectory=True, backend="triton"
    ).cpu()
    on_host = make_inputs(rows, features, classes)
    assert torch.equal(states[0], on_host[1] + noise[0])
    assert_states(states, on_host, make_weights(features, classes), steps, noise)
    last = denoise(*inputs, weights, steps, noise=noise.to(TRITON_DEVICE), backend="triton")
    assert torch.equal(last.cpu(), states[-1])


def test_noise_matches_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is a function of image, sample and timestep; here it is drawn in several blocks."""
    monkeypatch.setattr(kernels, "_NOISE_BLOCK", 7)
    weights, inputs = case(9, 20, 5)
    ids = torch.arange(9, device=TRITON_DEVICE) * 10**15 - 3
    samples = torch.arange(9, device=TRITON_DEVICE) % 4
    options = {"seed": 2**63 + 5, "image_ids": ids, "sample_ids": samples, "trajectory": True}
    steps = make_steps(SCHEDULE, "ddpm")
    found = denoise(*inputs, weights, steps, backend="triton", **options)
    expected = denoise(*inputs, weights, steps, backend="reference", **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], expected[0])
    again = denoise(*inputs, weights, steps, backend="triton", **options)
    assert torch.equal(found, again)


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_blocks_of_rows_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, trajectory: bool, given: bool
) -> None:
    weights, inputs = case(37, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 9, 0.5)
    noise = torch.randn(9, 37, 3, device=TRITON_DEVICE) if given else None
    seen: list[tuple[int, int]] = []

    def run() -> torch.Tensor:
        return denoise(
            *inputs, weights, steps, noise=noise, seed=3, trajectory=trajectory, backend="triton",
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip

    whole = run()
    monkeypatch.setattr(kernels, "MOST_ROWS", 16)
    monkeypatch.setattr(kernels, "_NOISE_BLOCK", 4)
    seen.clear()
    torch.testing.assert_close(run(), whole, rtol=1e-5, atol=1e-5)
    assert seen == sorted(seen) and seen[-1] == (27, 27)
    assert len(seen) == 7


def test_bfloat16_rounds_the_operands_of_hidden_layers() -> None:
    rows, features, classes = 6, 70, 4
    weights, inputs = case(rows, features, classes)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    noise = torch.randn(1, rows, classes, generator=torch.Generator().manual_seed(1))
    found = denoise(
        *inputs, weights, steps, noise=noise.to(TRITON_DEVICE), precision="bf16", backend="triton"
    )
    arguments = make_inputs(rows, features, classes), make_weights(features, classes), steps, noise
    expected = one_rounded_step(*arguments, to_bfloat16)
    assert float((expected - exact(*arguments)[-1]).abs().max()) > 2e-5
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=5e-6)


def test_a_chain_can_begin_again() -> None:
    """On a GPU the steps that compile and capture the kernels precede the first one of the chain."""
    weights, (x, prior, guidance) = case(5, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 4, 0.5)
    noise = torch.randn(4, 5, 3, device=x.device)
    sizes = kernels.Sizes(5, 20, 3, 4, noise_steps=4, trajectory=False, hidden=torch.float32)
    chain = kernels.Chain(sizes, x.device)
    denoiser = kernels.Weights(
        (weights.conditioning, *weights.hidden), (weights.output_weight, weights.output_bias),
        tuple(weights.eps),
    )  # fmt: skip
    coefficients = torch.stack(steps[1:-1]).T.to(x.device)
    chain.load(x, prior, guidance, denoiser, steps.timesteps.to(x.device), coefficients)
    chain.noise.copy_(noise)
    chain.begin()
    chain.step()
    chain.step()
    chain.begin()
    for _ in range(4):
        chain.step()
    expected = denoise(x, prior, guidance, weights, steps, noise=noise, backend="triton")
    assert torch.equal(chain.y, expected)


def test_nan_stays_in_its_row() -> None:
    weights, inputs = case(20, 17, 3)
    inputs[0][7, 3] = torch.nan
    found = denoise(*inputs, weights, make_steps(SCHEDULE, "ddim", 3), backend="triton")
    assert found[7].isnan().all() and not found[torch.arange(20) != 7].isnan().any()


def test_an_exception_in_progress_stops_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_NOISE_BLOCK", 4)
    weights, inputs = case(2, 5, 3)
    asked = []

    def progress(done: int, total: int) -> None:
        asked.append((done, total))
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        denoise(*inputs, weights, make_steps(SCHEDULE, "ddpm"), backend="triton", progress=progress)
    assert asked == [(3, T)]


def test_no_rows() -> None:
    weights, inputs = case(0, 5, 3)
    steps = make_steps(SCHEDULE, "ddim", 3)
    assert denoise(*inputs, weights, steps, backend="triton").shape == (0, 3)
    states = denoise(*inputs, weights, steps, backend="triton", trajectory=True)
    assert states.shape == (4, 0, 3)


def test_unsupported_arguments_raise() -> None:
    steps = make_steps(SCHEDULE, "ddim", 2)
    weights, inputs = case(2, 5, 129)
    with pytest.raises(
        BackendError, match=r"at most 65536 features and 128 classes, got .* and 129"
    ):
        denoise(*inputs, weights, steps, backend="triton")
    weights, inputs = case(2, 5, 3)
    for precision in ("fp8", "int8"):
        with pytest.raises(BackendError, match=f"precision='{precision}' needs a backend"):
            denoise(*inputs, weights, steps, backend="triton", precision=precision)
    with pytest.raises(ValueError, match=r"sample_ids must be in \[0, 4294967295\], got -1"):
        denoise(*inputs, weights, steps, backend="triton", sample_ids=torch.tensor([0, -1]))
