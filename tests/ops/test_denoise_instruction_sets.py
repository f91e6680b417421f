"""`denoise` on the CPU across instruction sets."""

from __future__ import annotations

import re

import pytest
import torch
from denoise_cases import INSTRUCTIONS, SCHEDULE, make_inputs, make_weights
from torch import Tensor

from diffmic_fast import _native, info
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights

_C = _native.extension()
WHY_NO_AMX = _C.why_no_amx()


def run(rows: int, features: int, precision: str, instructions: str, **options) -> Tensor:
    """States of a short chain with noise, [n + 1, rows, 5]."""
    steps = make_steps(SCHEDULE, "ddim", 4, 0.3)
    with torch.no_grad():
        return denoise(
            *make_inputs(rows, features, 5), make_weights(features, 5), steps, seed=7,
            trajectory=True, backend="cpu", precision=precision, instructions=instructions,
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("features", [1, 31, 70, 515, 1030])
def test_int8_is_bitwise_identical_across_instruction_sets(features: int) -> None:
    for rows in (1, 2, 7, 13, 17, 40, 66, 195):
        expected = run(rows, features, "int8", "portable")
        assert bool(expected.isfinite().all())
        for instructions in INSTRUCTIONS:
            assert torch.equal(run(rows, features, "int8", instructions), expected), instructions


def test_int8_is_summed_exactly_over_all_features() -> None:
    """Sums beyond 2^24, which float32 rounds; tests/native/amx.cpp compares those of AMX with exact ones."""
    features, rows = 2100, 3
    weights, (x, prior, guidance) = make_weights(features, 2), make_inputs(rows, features, 2)
    hidden = weights.hidden[0].weight
    hidden.fill_(1.0)  # all int8 weights are 127
    hidden[:, 0] = 0.5
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    with torch.no_grad():
        results = [
            denoise(
                x, prior, guidance, weights, steps, seed=1, backend="cpu", precision="int8",
                instructions=instructions,
            )
            for instructions in INSTRUCTIONS
        ]  # fmt: skip
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_int8_rejects_too_many_features() -> None:
    """More than 133144 features could overflow int32. Expanded weights take no memory."""
    features = 133_145
    zero = torch.zeros(1)

    def layer(width: int) -> ConditionalLayer:
        vectors = (zero.expand(features) for _ in range(4))
        bias = zero.expand(features)
        return ConditionalLayer(
            zero.expand(features, width), bias, zero.expand(41, features), *vectors
        )

    weights = DenoiserWeights(
        layer(4), (layer(features), layer(features)), zero.expand(2, features), zero.expand(2),
        (1e-5, 1e-5, 1e-5),
    )  # fmt: skip
    inputs = (torch.zeros(1, features), torch.zeros(1, 2), torch.zeros(1, 2))
    steps = make_steps(SCHEDULE, "ddim", 1)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="at most 133144 columns with precision='int8', got 133145"),
    ):
        denoise(*inputs, weights, steps, backend="cpu", precision="int8")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.skipif(bool(WHY_NO_AMX), reason=f"no AMX: {WHY_NO_AMX}")
def test_amx_emulation_is_bitwise_identical(precision: str) -> None:
    for features in (1, 31, 70, 515, 1030):
        for rows in (1, 2, 15, 16, 17, 33, 49, 64, 65, 130, 250):
            expected = run(rows, features, precision, "amx")
            assert torch.equal(run(rows, features, precision, "amx_emulated"), expected)


@pytest.mark.skipif("amx_emulated" not in INSTRUCTIONS, reason="no AVX2")
def test_amx_bf16_matches_avx2_within_rounding() -> None:
    """The results do differ: the emulation is not one of the vector kernels."""
    found = run(9, 1030, "bf16", "amx_emulated")
    vectors = run(9, 1030, "bf16", "avx2")
    assert not torch.equal(found, vectors)
    assert float((found - vectors).abs().max()) < 2e-2
    assert float((found - vectors).square().mean().sqrt()) < 1e-3


def test_auto_never_selects_the_emulation() -> None:
    assert INSTRUCTIONS[-1] in ("amx_emulated", "portable")
    x = run(3, 70, "bf16", "auto")
    assert torch.equal(x, run(3, 70, "bf16", INSTRUCTIONS[0]))
    assert INSTRUCTIONS[0] != "amx_emulated"


def test_amx_is_available_or_the_reason_is_reported() -> None:
    assert ("amx" in INSTRUCTIONS) == (WHY_NO_AMX == "")
    assert ("amx" in _C.cpu_features()) == (WHY_NO_AMX == "")
    shown = info.report()["processor"]["amx"]
    if not WHY_NO_AMX:
        assert shown == "yes"
        return
    assert shown == f"no: {WHY_NO_AMX}"
    with pytest.raises(ValueError, match=re.escape(f'"amx" cannot be served: {WHY_NO_AMX}')):
        run(1, 8, "bf16", "amx")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_result_does_not_depend_on_chunks_per_call(instructions: str, precision: str) -> None:
    """With more than 64 rows a call computes several chunks, fewer with more threads."""
    before, rows, features = torch.get_num_threads(), 130, 1100
    try:
        torch.set_num_threads(1)
        expected = run(rows, features, precision, instructions)
        torch.set_num_threads(9)  # one chunk per call
        assert torch.equal(run(rows, features, precision, instructions), expected)
    finally:
        torch.set_num_threads(before)
    steps = make_steps(SCHEDULE, "ddim", 4, 0.3)
    weights, inputs = make_weights(features, 5), make_inputs(rows, features, 5)
    images = torch.arange(rows)
    for part in (slice(0, 40), slice(40, 41), slice(41, 130)):
        with torch.no_grad():
            found = denoise(
                *(t[part] for t in inputs), weights, steps, seed=7, image_ids=images[part],
                backend="cpu", precision=precision, instructions=instructions,
            )  # fmt: skip
        assert torch.equal(found, expected[-1][part])


@pytest.mark.parametrize(
    ("instructions", "precision", "window"),
    [
        ("amx_emulated", "bf16", 32),
        ("avx512_bf16", "bf16", 16),
        ("avx2", "bf16", 8),
        ("avx2", "fp32", 16),
    ],
)
def test_default_window_with_a_tolerance(instructions: str, precision: str, window: int) -> None:
    """The default window gives the states of the same window passed explicitly."""
    if instructions not in INSTRUCTIONS:
        pytest.skip(f"no {instructions}")
    schedule = make_schedule("linear", 300, 1e-3, 0.05)
    steps = make_steps(schedule, "ddpm_truncated", 200)
    weights = make_weights(64, 3)
    gamma = torch.rand(301, 64, generator=torch.Generator().manual_seed(0))
    weights = weights._replace(
        conditioning=weights.conditioning._replace(gamma=gamma),
        hidden=tuple(layer._replace(gamma=gamma) for layer in weights.hidden),
    )

    def states(window: int | None) -> Tensor:
        with torch.no_grad():
            return denoise(
                *make_inputs(1, 64, 3), weights, steps, seed=2, trajectory=True, backend="cpu",
                precision=precision, instructions=instructions, window=window, tolerance=1e-4,
            )  # fmt: skip

    default = states(None)
    assert torch.equal(default, states(window))
    assert not torch.equal(default, states(window // 2))
