"""The cache of packed weights of `denoise`: reused across calls, and never stale."""

from __future__ import annotations

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from denoise_cases import INSTRUCTIONS, PRECISIONS, SCHEDULE, current, make_inputs, make_weights
from forked import ends_in_a_child
from torch import Tensor

from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops.denoise import denoise


def swap_rows(w: Tensor) -> None:
    w[[2, 40]] = w[[40, 2]]


def swap_numbers(w: Tensor) -> None:
    w[7, [1, 17]] = w[7, [17, 1]]


def flip_signs(w: Tensor) -> None:
    w[5] *= -1


def write_through_numpy(w: Tensor) -> None:
    w.numpy()[49, 49] *= 1.5


CHANGES = {
    "in place": lambda w: w[3].add_(1),
    "data": lambda w: w.data.mul_(1.5),
    "numpy": write_through_numpy,
    "rows": swap_rows,
    "numbers": swap_numbers,
    "signs": flip_signs,
    "storage": lambda w: w.untyped_storage().copy_((w + 1).contiguous().untyped_storage()),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", [0, 1])
def test_changed_weights_are_repacked(precision: str, change: str, layer: int) -> None:
    """Packed weights are reused only if no weight has changed, by whatever means."""
    weights, inputs = make_weights(50, 3), make_inputs(2, 50, 3)
    weights = weights._replace(
        hidden=tuple(h._replace(weight=h.weight.contiguous()) for h in weights.hidden)
    )
    steps = make_steps(SCHEDULE, "ddim", 3)
    with torch.no_grad():
        run = lambda w: denoise(*inputs, w, steps, backend="cpu", precision=precision)  # noqa: E731
        before = run(weights)
        assert torch.equal(run(weights), before)
        CHANGES[change](weights.hidden[layer].weight)
        found = run(weights)
        assert not torch.equal(found, before)
        fresh = weights._replace(
            hidden=tuple(h._replace(weight=h.weight.clone()) for h in weights.hidden)
        )
        assert torch.equal(found, run(fresh))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_changed_small_weights_take_effect(precision: str) -> None:
    weights, inputs = make_weights(50, 3), make_inputs(2, 50, 3)
    steps = make_steps(SCHEDULE, "ddim", 3)
    with torch.no_grad():
        run = lambda: denoise(*inputs, weights, steps, backend="cpu", precision=precision)  # noqa: E731
        results = [run()]
        weights.hidden[1].gamma.data.mul_(1.5)
        results.append(run())
        weights.hidden[1].running_var.numpy()[:] += 0.5
        results.append(run())
        weights.output_weight.data[0, 0] += 0.5
        results.append(run())
        weights.conditioning.weight.data[0, 0] += 0.5
        results.append(run())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_two_models_from_several_threads() -> None:
    models = [make_weights(70, 3, seed) for seed in range(2)]
    inputs, steps = make_inputs(3, 70, 3), make_steps(SCHEDULE, "ddim", 3)

    def run(i: int) -> Tensor:
        with torch.no_grad():
            return denoise(*inputs, models[i % 2], steps, backend="cpu")

    expected = [run(0), run(1)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(40)))
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(found))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_packed_weights_are_freed_with_the_model() -> None:
    inputs, steps = make_inputs(1, 2048, 2), make_steps(SCHEDULE, "ddim", 1)

    def use_one() -> None:
        weights = make_weights(2048, 2)
        with torch.no_grad():
            for precision in PRECISIONS:
                denoise(*inputs, weights, steps, backend="cpu", precision=precision)

    use_one()
    before = current()
    for _ in range(12):
        use_one()
    # Packed weights take 59 MB per model; the allocator may keep those of a few.
    assert current() - before < 250e6


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bits", [0x7F800001, -0x7FFFFF, -0x400000])
def test_nan_weight_propagates(precision, instructions, bits) -> None:
    """Quiet NaNs, and signalling ones that differ from infinity in the lowest bit alone."""
    weights, inputs = make_weights(50, 3), make_inputs(2, 50, 3)
    weights.hidden[0].weight[7, 11] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        found = denoise(
            *inputs, weights, make_steps(SCHEDULE, "ddim", 3), backend="cpu", precision=precision,
            instructions=instructions,
        )  # fmt: skip
    assert not bool(found.isfinite().any())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_inherit_locks() -> None:
    weights, inputs = make_weights(700, 3), make_inputs(2, 700, 3)
    steps, stop = make_steps(SCHEDULE, "ddim", 2), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with torch.no_grad():
                denoise(*inputs, weights, steps, backend="cpu")

    def in_child() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            denoise(*inputs, weights, steps, backend="cpu")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            assert ends_in_a_child(in_child)
    finally:
        stop.set()
        thread.join()
