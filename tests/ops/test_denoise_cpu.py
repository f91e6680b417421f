"""The C++ kernels of `denoise`: values, batch invariance, reproducibility, errors."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import torch
from denoise_cases import (
    INSTRUCTIONS,
    PRECISIONS,
    SCHEDULE,
    T,
    as_double,
    assert_states,
    current,
    make_inputs,
    make_weights,
    one_rounded_step,
    peak,
    reset_peak,
    to_bfloat16,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops.denoise import Call, denoise
from diffmic_fast.reference import denoise as reference

_C = _native.extension()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_states_match_the_reference(data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 33, 65, 197]), label="rows")
    features = data.draw(st.sampled_from([1, 3, 8, 31, 32, 33, 70, 129, 1025]), label="features")
    classes = data.draw(st.integers(1, 7), label="classes")
    instructions = data.draw(st.sampled_from(INSTRUCTIONS), label="instructions")
    sampler = data.draw(
        st.sampled_from([("ddpm", None, 0.0), ("ddpm_truncated", 5, 0.0), ("ddim", 6, 0.5)])
    )
    if rows * features > 40_000:
        sampler = ("ddim", 2, 0.5)
    steps = make_steps(SCHEDULE, *sampler)
    weights, inputs = make_weights(features, classes), make_inputs(rows, features, classes)
    noise = torch.randn(len(steps.timesteps), rows, classes)
    with torch.no_grad():
        found = denoise(
            *inputs, weights, steps, noise=noise, trajectory=True, backend="cpu",
            instructions=instructions,
        )  # fmt: skip
        last = denoise(
            *inputs, weights, steps, noise=noise, backend="cpu", instructions=instructions
        )
        assert_states(found, inputs, weights, steps, noise)
    assert torch.equal(last, found[-1])


def to_bytes(t: Tensor) -> Tensor:
    """Each row quantised to int8 with scale amax / 127, in float32 arithmetic as the kernels do."""
    t = t.float()
    largest = t.abs().amax(dim=1, keepdim=True)
    return (t * (127 / largest)).round().double() * (largest / 127).double()


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("precision", "rounded"), [("bf16", to_bfloat16), ("int8", to_bytes)])
@pytest.mark.parametrize("features", [1100, 1027])
def test_reduced_precision_rounds_only_weights_and_activations(
    precision, rounded, instructions, features
) -> None:
    """Against float64 with the same roundings of hidden weights and activations."""
    rows, classes = 9, 5
    weights, inputs = make_weights(features, classes), make_inputs(rows, features, classes)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    noise = torch.randn(1, rows, classes, generator=torch.Generator().manual_seed(1))
    expected = one_rounded_step(inputs, weights, steps, noise, rounded)
    with torch.no_grad():
        found = denoise(
            *inputs, weights, steps, noise=noise, backend="cpu", precision=precision,
            instructions=instructions,
        )  # fmt: skip
        plain = denoise(*inputs, weights, steps, noise=noise, backend="cpu")
    # A few roundings differ, of sums that differ in their last bits.
    error = (found - expected).square().mean().sqrt()
    assert float((plain - expected).square().mean().sqrt()) > 5 * float(error)
    assert float(error) < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("features", [70, 1100])
def test_rows_are_batch_invariant(instructions, precision, features) -> None:
    rows, classes = 210, 3  # more than a block
    weights, inputs = make_weights(features, classes), make_inputs(rows, features, classes)
    steps = make_steps(SCHEDULE, "ddim", 4, 0.3)
    images, samples = torch.arange(rows) * 10**13, torch.arange(rows) % 7

    def run(order: Tensor) -> Tensor:
        return denoise(
            *(t[order] for t in inputs), weights, steps, seed=3, image_ids=images[order],
            sample_ids=samples[order], backend="cpu", precision=precision,
            instructions=instructions,
        )  # fmt: skip

    with torch.no_grad():
        together = run(torch.arange(rows))
        assert torch.equal(run(torch.arange(rows)), together)
        for size in (1, 2, 3, 5, 6, 7, 8, 13, 33, 64, 65, 129):
            order = torch.randperm(rows)[:size]
            assert torch.equal(run(order), together[order]), size


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("rows", [1, 33])
def test_result_does_not_depend_on_the_number_of_threads(instructions, precision, rows) -> None:
    weights, inputs = make_weights(300, 4), make_inputs(rows, 300, 4)
    steps = make_steps(SCHEDULE, "ddpm")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(
                    denoise(
                        *inputs,
                        weights,
                        steps,
                        backend="cpu",
                        precision=precision,
                        instructions=instructions,
                    )
                )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    "sampler",
    [("ddpm", None, 0.0), ("ddpm_truncated", 30, 0.0), ("ddim", 9, 0.0), ("ddim", 1, 1.0)],
)
def test_windows_are_bitwise_identical_to_sequential_steps(
    instructions, precision, sampler
) -> None:
    steps = make_steps(SCHEDULE, *sampler)
    for rows, features in ((1, 65), (3, 40), (21, 33)):
        weights, inputs = make_weights(features, 3), make_inputs(rows, features, 3)
        for noise in (None, torch.randn(len(steps.timesteps), rows, 3)):
            run = lambda window: denoise(  # noqa: E731
                *inputs, weights, steps, noise=noise, trajectory=True, backend="cpu",  # noqa: B023
                precision=precision, instructions=instructions, window=window,
            )  # fmt: skip
            with torch.no_grad():
                expected = run(1)
                for window in (2, 3, 8, 64, 192):
                    assert torch.equal(run(window), expected), (rows, window)


def count_sweeps(weights, inputs, steps, window=1, tolerance=0.0) -> int:
    zeros, out = torch.zeros(len(inputs[0]), dtype=torch.int64), torch.empty_like(inputs[1])
    call = Call(
        *inputs, weights.conditioning, *weights.hidden, weights.output_weight, weights.output_bias, weights.eps,
        steps.timesteps, steps.coefficients(), steps.start, None, 0, zeros, zeros, False, "fp32", "auto", window,
        tolerance, "cpu",
    )  # fmt: skip
    return _C.denoise(call, out, None)


def test_windows_need_fewer_sweeps() -> None:
    """Where eps hardly depends on the label, a window advances by nearly its length per sweep."""
    weights, inputs = make_weights(2048, 3), make_inputs(1, 2048, 3)
    steps = make_steps(SCHEDULE, "ddpm")
    assert count_sweeps(weights, inputs, steps, window=1) == T
    assert count_sweeps(weights, inputs, steps, window=32) <= T - 5
    sweeps = [
        count_sweeps(weights, inputs, steps, window=w, tolerance=1e-5) for w in (4, 7, 12, 32)
    ]
    assert sweeps == sorted(sweeps, reverse=True) and len(set(sweeps)) == 4
    assert sweeps[-1] <= T // 3


@pytest.mark.parametrize(
    "sampler", [("ddpm", None, 0.0), ("ddpm_truncated", 30, 0.0), ("ddim", 9, 0.0)]
)
@pytest.mark.parametrize("rows", [1, 3, 19])
def test_tolerance_is_respected_and_reproducible(sampler, rows) -> None:
    weights, inputs = make_weights(300, 3), make_inputs(rows, 300, 3)
    steps = make_steps(SCHEDULE, *sampler)
    before = torch.get_num_threads()

    def run(window: int, tolerance: float) -> Tensor:
        return denoise(
            *inputs, weights, steps, backend="cpu", trajectory=True, window=window,
            tolerance=tolerance,
        )  # fmt: skip

    with torch.no_grad():
        sequential = run(1, 0.0)
        assert torch.equal(run(1, 1e-5), sequential)
        for window in (4, 16):
            found = run(window, 1e-5)
            assert float((found - sequential).abs().max()) < 1e-4
            try:
                torch.set_num_threads(3)
                assert torch.equal(run(window, 1e-5), found)
            finally:
                torch.set_num_threads(before)


def test_nan_terminates_windows() -> None:
    weights, (x, prior, guidance) = make_weights(40, 3), make_inputs(2, 40, 3)
    x[1, 3] = float("nan")
    steps = make_steps(SCHEDULE, "ddpm")
    with torch.no_grad():
        expected = denoise(x, prior, guidance, weights, steps, backend="cpu", window=1)
        for tolerance in (0.0, 1e-6):
            found = denoise(
                x, prior, guidance, weights, steps, backend="cpu", window=64, tolerance=tolerance
            )
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=100 * tolerance)
            assert bool(found[1].isnan().all())


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_softplus_error_bound(instructions: str) -> None:
    """Relative error below 4e-7 from -87 on, absolute error below 2e-38 under it (simd.h)."""
    x = torch.cat((torch.linspace(-87, 90, 400_001), torch.linspace(-1, 1, 100_001)))
    out = torch.empty_like(x)
    _C.softplus(x, out, instructions)
    expected = torch.log1p(torch.exp(-x.double().abs())) + x.double().clamp(min=0)
    assert float(((out - expected) / expected).abs().max()) < 4e-7
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([-inf, -1e30, -90.0, inf, 3e38, nan, 0.0, -0.0])
    out = torch.empty_like(special)
    _C.softplus(special, out, instructions)
    assert float(out[:3].abs().max()) < 2e-38
    assert out[3:5].tolist() == special[3:5].tolist() and bool(out[5].isnan())
    assert out[6:].tolist() == pytest.approx([np.log(2.0)] * 2, rel=4e-7)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_stays_in_its_row(instructions, precision) -> None:
    weights, (x, prior, guidance) = make_weights(40, 3), make_inputs(7, 40, 3)
    steps = make_steps(SCHEDULE, "ddim", 3)
    run = lambda: denoise(  # noqa: E731
        x, prior, guidance, weights, steps, backend="cpu", precision=precision,
        instructions=instructions,
    )  # fmt: skip
    with torch.no_grad():
        clean = run()
        x[4, 17] = float("nan")
        found = run()
        x[4, 17] = 0.0
        x[4, 18] = float("inf")
        assert not bool(run()[4].isfinite().any())
    assert bool(found[4].isnan().all())
    others = torch.arange(7) != 4
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_stays_in_its_row_within_windows(instructions, precision) -> None:
    """Rows of a window reuse the memory of other rows, and an odd number of features leaves half a pair of padding."""
    weights, (x, prior, guidance) = make_weights(41, 3), make_inputs(7, 41, 3)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 20)
    with torch.no_grad():
        for window in (3, 4, 5):
            run = lambda x: denoise(  # noqa: E731
                x, prior, guidance, weights, steps, backend="cpu", precision=precision,
                instructions=instructions, window=window, tolerance=1e-6,  # noqa: B023
            )  # fmt: skip
            clean = run(x)
            for row in range(7):
                broken = x.clone()
                broken[row, 17] = float("nan")
                found, others = run(broken), torch.arange(7) != row
                assert bool(found[row].isnan().all())
                assert torch.equal(found[others], clean[others]), (window, row)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_is_bounded_by_a_block_of_rows() -> None:
    """100,000 rows of F = 64: two buffers of activations of all rows would take 26 MB each."""
    rows, features = 100_000, 64
    weights, inputs = make_weights(features, 2), make_inputs(rows, features, 2)
    steps = make_steps(SCHEDULE, "ddim", 1)
    with torch.no_grad():
        denoise(*(t[:10] for t in inputs), weights, steps, backend="cpu")
        reset_peak()
        before = current()
        out = denoise(*inputs, weights, steps, backend="cpu")
        grown = peak() - before
    assert out.shape == (rows, 2)
    # The labels are compact already, and features are read in place.
    assert grown < 10e6


def long_chain(progress=None) -> Tensor:
    weights, inputs = make_weights(512, 3), make_inputs(2000, 512, 3)
    with torch.no_grad():
        return denoise(
            *inputs, weights, make_steps(SCHEDULE, "ddpm"), backend="cpu", progress=progress
        )


def test_progress_increases_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    long_chain(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (11 * T, 11 * T)  # 2000 rows are 11 blocks
    assert seen == sorted(seen) and {total for _, total in seen} == {11 * T}


def test_exception_in_progress_stops_the_chain() -> None:
    asked = []

    def progress(done: int, total: int) -> None:
        asked.append(done)
        raise LookupError("stop here")

    with pytest.raises(LookupError, match="stop here"):
        long_chain(progress)
    assert len(asked) == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX timers")
def test_signal_interrupts_the_chain() -> None:
    reached: list[tuple[int, int]] = []

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    def progress(done: int, total: int) -> None:
        # One signal, while the kernel runs: an exception from a handler that interrupts the enter or exit of `no_grad`
        # would leave gradients disabled for every later test.
        if not reached:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        reached.append((done, total))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            long_chain(progress)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert reached[-1][0] < reached[-1][1]


def test_gil_is_released() -> None:
    ticks, running = [], threading.Event()

    def count() -> None:
        while not running.is_set():
            ticks.append(0)
            running.wait(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    before = len(ticks)
    long_chain()
    after = len(ticks)
    running.set()
    thread.join()
    assert after - before > 5


@pytest.mark.usefixtures("auto_backend")
def test_unsupported_calls_are_rejected() -> None:
    weights, inputs = make_weights(20, 3), make_inputs(2, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 2)
    weights.output_bias.requires_grad_()
    with pytest.raises(RuntimeError, match=r"denoise: the backend cpu cannot serve: .*gradient"):
        denoise(*inputs, weights, steps, backend="cpu")
    assert denoise(*inputs, weights, steps).requires_grad
    with torch.no_grad():
        denoise(*inputs, weights, steps, backend="cpu")
        double = [t.double() for t in inputs]
        with pytest.raises(RuntimeError, match="float32"):
            denoise(*double, as_double(weights), steps, backend="cpu")
        assert denoise(*double, as_double(weights), steps).dtype == torch.float64
        with pytest.raises(
            RuntimeError, match=r"needs a backend that has it \(cpu, cuda, triton, cuda-emulated\)"
        ):
            denoise(*double, as_double(weights), steps, precision="bf16")
        with pytest.raises(
            ValueError, match="precision must be one of fp32, bf16, fp8, int8, got 'fp16'"
        ):
            denoise(*inputs, weights, steps, precision="fp16")
        with pytest.raises(ValueError, match=r"instructions must be one of .*portable.*got sse9"):
            denoise(*inputs, weights, steps, instructions="sse9")
        for tolerance in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="tolerance must be finite and at least 0"):
                denoise(*inputs, weights, steps, tolerance=tolerance)
        with pytest.raises(ValueError, match="tolerance must be 0 with precision='int8'"):
            denoise(*inputs, weights, steps, precision="int8", tolerance=1e-5)
        for window in (0, 193):
            with pytest.raises(ValueError, match=rf"window must be in \[1, 192\], got {window}"):
                denoise(*inputs, weights, steps, window=window)


def test_noise_for_a_stochastic_last_step_is_rejected() -> None:
    weights, inputs = make_weights(20, 3), make_inputs(2, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 4)
    sigma = steps.sigma.clone()
    sigma[-1] = 0.5
    for window in (1, 4):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="with noise, sigma of the last step must be 0"),
        ):
            denoise(
                *inputs, weights, steps._replace(sigma=sigma), noise=torch.randn(4, 2, 3),
                backend="cpu", window=window,
            )  # fmt: skip


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = make_weights(20, 3), make_inputs(2, 20, 3)
    steps = make_steps(SCHEDULE, "ddim", 2)
    monkeypatch.setenv("DIFFMIC_BACKEND", "reference")
    with torch.no_grad():
        theirs = denoise(*inputs, weights, steps)
        expected = reference.denoise(*inputs, weights, steps)
        assert torch.equal(theirs, expected)
        monkeypatch.setenv("DIFFMIC_BACKEND", "cpu")
        with pytest.raises(RuntimeError, match="the backend cpu cannot serve"):
            denoise(*(t.double() for t in inputs), as_double(weights), steps)


def test_opcheck() -> None:
    weights, inputs = make_weights(33, 3), make_inputs(4, 33, 3)
    steps = make_steps(SCHEDULE, "ddim", 3)
    operator = torch.ops.diffmic_fast.denoise.default
    for noise in (None, torch.randn(3, 4, 3)):
        for trajectory in (False, True):
            arguments = Call(
                *inputs, weights.conditioning, *weights.hidden, weights.output_weight, weights.output_bias,
                list(weights.eps), steps.timesteps, steps.coefficients(), steps.start, noise, -5, None, None,
                trajectory, "bf16", "auto", 2, 0.0, "cpu",
            )  # fmt: skip
            torch.library.opcheck(operator, arguments)


def test_seeds_of_64_bits() -> None:
    weights, inputs = make_weights(20, 3), make_inputs(2, 20, 3)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 3)
    for seed in (0, 2**63, 2**64 - 1, -1):
        with torch.no_grad():
            found = denoise(*inputs, weights, steps, seed=seed, backend="cpu")
            expected = reference.denoise(*inputs, weights, steps, seed=seed)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
