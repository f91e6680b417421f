"""`noised_conditioning`: noise, noisy labels and the denoiser's first layer in one call."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conditioning_cases import Case, sliced
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds
from rounding import assert_within_rounding
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.diffusion import make_schedule
from diffmic_fast.diffusion.schedule import q_sample
from diffmic_fast.ops._conditioning import Conditioning, Noising, Outputs
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.noised_conditioning import NoisedConditioning, noised_conditioning
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer

# S (0: no stream dimension), B, F, C, where the CUDA kernels take one tile or more, one launch or more, and labels of
# one piece or more; the last one's noisy labels end in the middle of a piece.
SIZES = [
    (0, 2, 1, 2), (1, 7, 129, 3), (3, 35, 40, 7), (2, 4, 33, 20), (8, 6, 37, 3), (3, 120, 8, 2),
    (3, 200, 40, 5), (2, 70, 33, 19),
]  # fmt: skip
BACKENDS = ["cpu", *CUDA_BACKENDS]
ROWS = 9  # of gamma; the schedule has one less
GRADIENTS = (
    "x", "y_0", "guidance", "weight", "bias", "gamma", "norm_weight", "norm_bias", "noise",
)  # fmt: skip
SCHEDULE = make_schedule("linear", ROWS - 1, 1e-2, 0.3)


def call(
    backend: str,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    timesteps: Tensor | None = None,
    **options: Any,
) -> tuple[NoisedConditioning, list[Tensor], ConditionalLayer]:
    """The call, the leaves x, y_0, guidance and parameters, and the layer."""
    device = device_of(backend)
    x, labels, guidance = (v.to(device, dtype, copy=True) for v in case.inputs)
    y_0 = (labels[0] if labels.ndim == 3 else labels).clone()
    leaves = [x, y_0, guidance, *(v.to(device, dtype, copy=True) for v in case.parameters)]
    for leaf in leaves:
        leaf.requires_grad_()
    layer = ConditionalLayer(*leaves[3:], *(v.to(device, dtype, copy=True) for v in case.running))
    t = (case.timesteps.clamp(max=ROWS - 2) if timesteps is None else timesteps).to(device)
    tables = (
        v.to(device, dtype, copy=True)
        for v in (SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar)
    )
    found = noised_conditioning(*leaves[:3], layer, t, *tables, backend=backend, **options)
    return found, leaves, layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_noising_then_conditioning(
    backend: str, sizes: tuple[int, ...], training: bool
) -> None:
    """Noise and noisy labels have the reference's bits; h and statistics those of `conditioning` on these labels."""
    case = Case(*sizes)
    found, leaves, layer = call(backend, case, training=training, seed=5)
    other = call("reference", case, training=training, seed=5)[0]
    assert torch.equal(found.noise.cpu(), other.noise)
    assert torch.equal(found.y_t.cpu(), other.y_t)
    device = device_of(backend)
    plain = ConditionalLayer(*leaves[3:], *(v.to(device, torch.float32) for v in case.running))
    t = case.timesteps.clamp(max=ROWS - 2).to(device)
    h = conditioning(leaves[0], found.y_t, leaves[2], plain, t, training=training, backend=backend)
    assert torch.equal(found.h, h)
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert torch.equal(layer.running_var, plain.running_var)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(0, 6, 5, 2), *SIZES[:5]])
def test_gradients(backend: str, sizes: tuple[int, ...], training: bool) -> None:
    """Against float64, through h and through the noisy labels."""
    case = Case(*sizes)
    noise = torch.randn(sizes[1], sizes[3], generator=torch.Generator().manual_seed(2)).double()
    weight = torch.randn(case.inputs[1].shape, generator=torch.Generator().manual_seed(3)).double()

    def gradients(name: str, dtype: torch.dtype, parts: tuple[int, ...]) -> list[Tensor]:
        z = noise.to(device_of(name), dtype, copy=True).requires_grad_()
        found, leaves, _ = call(name, case, dtype=dtype, training=training, noise=z)
        assert found.noise is z
        ways = [(found.h, case.grad), (found.y_t, weight)]
        total = sum((ways[i][0] * ways[i][1].to(z)).sum() for i in parts)
        given = torch.autograd.grad(total, [*leaves, z], allow_unused=True)
        return [z.new_zeros(1).cpu() if g is None else g.cpu() for g in given]

    for parts in ((0, 1), (0,), (1,)):
        definition = partial(gradients, "reference", torch.float64, parts)
        found = gradients(backend, torch.float32, parts)
        assert_within_rounding(found, definition, GRADIENTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_of_large_keys(backend: str) -> None:
    case = Case(2, 4, 5, 6)
    ids = torch.tensor([-1, 2**40 + 3, 0, -(2**63)])
    samples = torch.tensor([2**32 - 1, 0, 1, 2**31])
    for seed in (0, -1, 2**64 - 1, 2**63):
        keys = {"seed": seed, "image_ids": ids, "sample_ids": samples}
        other = call("reference", case, **keys)[0]
        keys |= {
            "image_ids": ids.to(device_of(backend)),
            "sample_ids": samples.to(device_of(backend)),
        }
        found = call(backend, case, **keys)[0]
        assert torch.equal(found.noise.cpu(), other.noise) and torch.equal(
            found.y_t.cpu(), other.y_t
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_timestep_for_all_and_any_strides(backend: str) -> None:
    case = Case(3, 5, 33, 4)
    t = torch.tensor([ROWS - 2])
    found = call(backend, case, timesteps=t, training=True)[0]
    same = call(backend, case, timesteps=t.expand(5), training=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    device = device_of(backend)
    x, labels, guidance = (v.float().to(device) for v in case.inputs)
    wide_y, wide_guidance = (
        sliced(labels[0], rows_only=False)[0],
        sliced(guidance, rows_only=False)[0],
    )
    layer = ConditionalLayer(*(v.float().to(device) for v in (*case.parameters, *case.running)))
    tables = [
        sliced(v.to(device), rows_only=False)[0]
        for v in (SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar)
    ]
    there = noised_conditioning(
        x, wide_y, wide_guidance, layer, t.to(device), *tables, training=True, backend=backend
    )
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(there, found, strict=True))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize(("batch", "training"), [(5, True), (70, True), (70, False)])
def test_any_schedule_gives_the_same_bits(backend: str, batch: int, training: bool) -> None:
    case = Case(2, batch, 40, 3)
    found = []
    for seed in seeds(backend, 50 if batch == 5 else 5):
        schedule(backend, seed)
        found.append(call(backend, case, training=training, seed=1)[0])
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0], strict=True))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_keys_and_timesteps_out_of_range_give_nan(backend: str) -> None:
    """The kernels check them: the host does not read them."""
    case, device = Case(2, 5, 33, 3), device_of(backend)
    x, labels, guidance = (v.float().to(device) for v in case.inputs)
    layer = [v.float().to(device) for v in (*case.parameters, *case.running)]
    t = torch.tensor(
        [0, ROWS - 1, 1, -1, 2], device=device
    )  # gamma has the second, the schedule not
    samples = torch.tensor([0, 0, 2**32, 0, 7], device=device)
    h, y_t, drawn, *_ = torch.ops.diffmic_fast.noised_conditioning(
        x, labels[0].contiguous(), guidance, t, *layer, False, 0.1, 1e-5, backend,
        SCHEDULE.sqrt_alpha_bar.to(device), SCHEDULE.sqrt_one_minus_alpha_bar.to(device), None, 3, None, samples,
    )  # fmt: skip
    bad = torch.tensor([False, True, True, True, False], device=device)
    assert torch.equal(y_t.isnan().all(dim=-1), bad.expand(2, 5))
    assert torch.equal(h.isnan().all(dim=-1), bad.expand(2, 5)) and not h[:, ~bad].isnan().any()
    assert torch.equal(drawn.isnan().all(dim=-1), samples > 2**32 - 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend: str) -> None:
    case = Case(2, 4, 6, 3)

    def penalty(name: str, dtype: torch.dtype) -> list[Tensor]:
        found, leaves, _ = call(name, case, dtype=dtype, training=True)
        first = torch.autograd.grad(found.h.square().sum(), leaves[:3], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [g.cpu().double() for g in second]

    noise = call("reference", case)[0].noise
    assert noise.dtype == torch.float32
    for a, b in zip(
        penalty(backend, torch.float32), penalty("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    case, device = Case(2, 4, 6, 3), device_of(backend)
    x, labels, guidance = (v.float().to(device).requires_grad_() for v in case.inputs)
    layer = [v.float().to(device).requires_grad_() for v in case.parameters]
    running = [v.float().to(device) for v in case.running]
    tables = [v.to(device) for v in (SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar)]
    t = case.timesteps.clamp(max=ROWS - 2).to(device)
    y_0 = labels[0].detach().clone().requires_grad_()
    ids = torch.arange(4, device=device)
    for noise, keys in ((None, ids), (torch.randn(4, 3, device=device).requires_grad_(), None)):
        torch.library.opcheck(
            torch.ops.diffmic_fast.noised_conditioning.default,
            (x, y_0, guidance, t, *layer, *running, True, 0.1, 1e-5, backend, *tables, noise, 3, keys, keys),
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str) -> None:
    case = Case(2, 4, 6, 3)
    eager, leaves, layer = call(backend, case, seed=4)
    t = case.timesteps.clamp(max=ROWS - 2).to(leaves[0].device)
    tables = [v.to(leaves[0]) for v in (SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar)]

    def run(*inputs: Tensor) -> Tensor:
        found = noised_conditioning(*inputs, layer, t, *tables, seed=4, backend=backend)
        return found.h.sum() + found.y_t.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves[:3])
    torch.testing.assert_close(compiled, eager.h.sum() + eager.y_t.sum())
    expected = torch.autograd.grad(run(*leaves[:3]), leaves)
    for a, b in zip(torch.autograd.grad(compiled, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_equals_q_sample_then_conditioning() -> None:
    """`q_sample` of the schedule, then the layer."""
    case = Case(3, 6, 8, 4)
    found, leaves, layer = call("reference", case, dtype=torch.float64)
    t = case.timesteps.clamp(max=ROWS - 2)
    y_t = q_sample(leaves[1], leaves[2], SCHEDULE, t, found.noise)
    torch.testing.assert_close(found.y_t, y_t)
    h = reference.conditioning(leaves[0], y_t, leaves[2], layer, t)
    torch.testing.assert_close(found.h, h)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise(backend: str) -> None:
    case = Case(2, 4, 6, 3)
    device = device_of(backend)
    if backend == "cuda":  # values on a GPU are not read
        found, *_ = call(backend, case, timesteps=torch.tensor([ROWS - 1]))
        assert found.y_t.isnan().all()
        found, *_ = call(backend, case, sample_ids=torch.full((4,), -1, device=device))
        assert found.noise.isnan().all() and found.h.isnan().all()
    else:
        with pytest.raises(ValueError, match=r"timesteps must be in \[0, 7\], got 8 … 8"):
            call(backend, case, timesteps=torch.tensor([ROWS - 1]))
        with pytest.raises(ValueError, match=r"sample_ids must be in \[0, 4294967295\], got -1"):
            call(backend, case, sample_ids=torch.full((4,), -1, device=device))
    with pytest.raises(ValueError, match=r"noise must be \[B=4, C=3\], got \(4, 2\)"):
        call(backend, case, noise=torch.zeros(4, 2, device=device))
    with pytest.raises(TypeError, match="image_ids"):
        call(backend, case, image_ids=torch.zeros(4, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_of_the_extension_raise(backend: str) -> None:
    case, device = Case(2, 4, 6, 3), device_of(backend)
    module = _native.extension() if backend == "cpu" else _native.cuda(backend)
    x, labels, guidance = (v.float().to(device) for v in case.inputs)
    layer = [v.float().to(device) for v in case.parameters]
    running = [v.float().to(device) for v in case.running]
    tables = [v.to(device) for v in (SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar)]
    t = case.timesteps.clamp(max=ROWS - 2).to(device)
    y_0, drawn = labels[0].contiguous(), x.new_empty(4, 3)

    def bad(match: str, *noising: Any, y_t: Tensor | None = None) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            module.conditioning(
                Conditioning(
                    x, x.new_empty(2, 4, 3) if y_t is None else y_t, guidance, t, ConditionalLayer(*layer, *running),
                    False, 0.1, 1e-5, backend,
                ),
                Outputs(x.new_empty(2, 4, 6), x.new_empty(2, 1, 6), x.new_empty(0), x.new_empty(0)),
                Noising(*noising), 1,
            )  # fmt: skip

    bad("y_0 must have shape", y_0[:3], *tables, None, 0, None, None, drawn)
    bad(
        "sqrt_one_minus_alpha_bar must have shape",
        y_0,
        tables[0],
        tables[1][:5],
        None,
        0,
        None,
        None,
        drawn,
    )
    bad("noise must be either given or drawn", y_0, *tables, drawn, 0, None, None, drawn)
    bad("noise must be either given or drawn", y_0, *tables, None, 0, None, None, None)
    bad("image_ids must be int64", y_0, *tables, None, 0, t.int(), None, drawn)
    bad("y_t must not share memory with", y_0, *tables, None, 0, None, None, drawn, y_t=guidance)
    bad("must not share memory with", y_0, *tables, None, 0, None, None, y_0)
    bad("sample_ids must have shape", y_0, *tables, None, 0, None, t[:2], drawn)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    found = call(backend, Case(2, 0, 6, 3))[0]
    assert [tuple(v.shape) for v in found] == [(2, 0, 6), (2, 0, 3), (0, 3)]
