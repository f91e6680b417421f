"""CUDA graphs of `denoise` in Triton: a fake graph replays the launches of a step at the addresses of its capture."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_backends import NO_TRITON, TRITON_DEVICE
from denoise_cases import SCHEDULE, make_inputs, make_weights, weights_on
from torch.utils._python_dispatch import TorchDispatchMode

from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops.denoise import DenoiserWeights, denoise

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from diffmic_fast.triton import denoise as kernels
from diffmic_fast.triton import graphs

ROWS, FEATURES, CLASSES = 5, 12, 3
STEPS = make_steps(SCHEDULE, "ddim", 9, 0.5)


class Graph:
    """What is captured: the launches of a step, with the tensors of that moment."""

    captured: list[torch.device]

    def __init__(self) -> None:
        self.captured = []

    def capture(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.captured.append(device)
        chain: Any = step.__self__  # type: ignore[attr-defined]
        recorded = chain._weights

        def replay() -> None:
            kept, chain._weights = chain._weights, recorded
            type(chain).step(chain)
            chain._weights = kept

        return replay


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    """Replaces CUDA graphs, and begins without kept ones."""
    fake = Graph()
    monkeypatch.setattr(graphs, "usable", lambda device: True)
    monkeypatch.setattr(graphs, "current_stream", lambda device: 0)
    monkeypatch.setattr(graphs, "capture", fake.capture)
    store = graphs.Store(kernels._MOST_KEPT, kernels._MOST_KEPT_BYTES)
    monkeypatch.setattr(kernels, "KEPT", store)
    return fake


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def case(rows: int = ROWS, seed: int = 0) -> tuple[DenoiserWeights, tuple[torch.Tensor, ...]]:
    weights = weights_on(TRITON_DEVICE, make_weights(FEATURES, CLASSES, seed))
    return weights, tuple(t.to(TRITON_DEVICE) for t in make_inputs(rows, FEATURES, CLASSES, seed))


def run(weights: DenoiserWeights, inputs: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    return denoise(*inputs, weights, options.pop("steps", STEPS), backend="triton", **options)


def without_graphs(weights: DenoiserWeights, inputs: Any, **options: Any) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "usable", lambda device: False)
        return run(weights, inputs, **options)


def prepared_call(weights: DenoiserWeights, inputs: tuple[torch.Tensor, ...]) -> Any:
    """The arguments of the kernels for a call."""
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "denoise", lambda call, *_: calls.append(call))
        run(weights, inputs)
    return calls[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trajectory", [False, True])
def test_a_graph_serves_later_calls(graph: Graph, precision: str, trajectory: bool) -> None:
    """Other images, noise and seeds lie at other addresses; the graph is captured once."""
    weights, _ = case()
    options: dict[str, Any] = {"precision": precision, "trajectory": trajectory}
    for seed in range(3):
        _, inputs = case(seed=seed)
        found = run(weights, inputs, seed=seed, **options)
        assert torch.equal(found, without_graphs(weights, inputs, seed=seed, **options))
    assert len(graph.captured) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_changed_in_place_are_read(graph: Graph, precision: str) -> None:
    weights, inputs = case()
    first = run(weights, inputs, precision=precision)
    other, _ = case(seed=1)
    for mine, new in zip(
        (*weights.conditioning, *weights.hidden[0], *weights.hidden[1], weights.output_weight),
        (*other.conditioning, *other.hidden[0], *other.hidden[1], other.output_weight),
        strict=True,
    ):
        mine.copy_(new)
    found = run(weights, inputs, precision=precision)
    assert torch.equal(found, without_graphs(weights, inputs, precision=precision))
    assert not torch.equal(found, first) and len(graph.captured) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_at_other_addresses_are_captured_again(graph: Graph, precision: str) -> None:
    weights, inputs = case()
    run(weights, inputs, precision=precision)
    other, _ = case(seed=1)
    found = run(other, inputs, precision=precision)
    assert torch.equal(found, without_graphs(other, inputs, precision=precision))
    assert len(graph.captured) == 2


def test_what_the_launches_depend_on_is_part_of_the_key(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, inputs = case()
    different: list[dict[str, Any]] = [
        {}, {"steps": make_steps(SCHEDULE, "ddim", 10, 0.5)}, {"trajectory": True}, {"precision": "bf16"},
        {"noise": torch.randn(9, ROWS, CLASSES, device=TRITON_DEVICE)},
    ]  # fmt: skip
    monkeypatch.setattr(kernels, "KEPT", graphs.Store(20, 2**30))
    for options in different + different:
        run(weights, inputs, **options)
    assert len(graph.captured) == len(different)
    run(weights._replace(eps=(1e-3, 1e-4, 1e-5)), inputs)
    run(weights, tuple(t[:4] for t in inputs))
    assert len(graph.captured) == len(different) + 2
    monkeypatch.setattr(graphs, "current_stream", lambda device: 8)
    run(weights, inputs)
    assert len(graph.captured) == len(different) + 3


def test_few_steps_are_captured_when_they_come_again(graph: Graph) -> None:
    weights, inputs = case()
    steps = make_steps(SCHEDULE, "ddim", 4)
    expected = without_graphs(weights, inputs, steps=steps)
    counts = []
    for _ in range(3):
        assert torch.equal(run(weights, inputs, steps=steps), expected)
        counts.append(len(graph.captured))
    assert counts == [0, 1, 1]


def test_blocks_of_rows_share_a_graph(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = case(rows=14)
    monkeypatch.setattr(kernels, "MOST_ROWS", 4)
    found = run(weights, inputs, seed=2)
    assert len(graph.captured) == 2  # of 4 rows, and of the last 2
    assert torch.equal(found, without_graphs(weights, inputs, seed=2))


def test_kept_chains_hold_no_weights(graph: Graph) -> None:
    weights, inputs = case()
    run(weights, inputs, steps=make_steps(SCHEDULE, "ddim", 2))  # not captured
    watched = [weakref.ref(layer.weight) for layer in (weights.conditioning, *weights.hidden)]
    assert len(kernels.KEPT) == 1
    del weights
    assert not [each for each in watched if each() is not None]


def test_an_exception_leaves_no_chain_behind(graph: Graph) -> None:
    weights, inputs = case()

    def progress(done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_NOISE_BLOCK", 4)
        run(weights, inputs, progress=progress)
    assert len(kernels.KEPT) == 0
    assert torch.equal(run(weights, inputs), without_graphs(weights, inputs))


def test_memory_of_kept_chains_is_bounded(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = case()
    for rows in range(1, 9):
        run(weights, case(rows)[1])
    assert len(kernels.KEPT) == kernels._MOST_KEPT == 4
    run(weights, case(8)[1])
    assert len(graph.captured) == 8  # the last one was kept
    run(weights, case(1)[1])
    assert len(graph.captured) == 9  # the first one was not
    size = kernels.Chain(
        kernels.Sizes(64, 6144, 5, 100, 64, False, torch.bfloat16), TRITON_DEVICE
    ).nbytes()
    assert 2 * 2 * 6144**2 < size < 2 * 2 * 6144**2 + 12 * 64 * 6144 + 2**20


def test_a_chain_is_lent_to_one_thread_at_a_time(graph: Graph) -> None:
    """A second call with the same key begins while the first is between two steps."""
    weights, inputs = case()
    _, other = case(seed=3)
    expected = without_graphs(weights, inputs), without_graphs(weights, other)
    run(weights, inputs)
    assert len(kernels.KEPT) == 1
    begun, found = threading.Event(), {}

    def inner() -> None:
        with torch.no_grad():
            found["other"] = run(weights, other)

    def progress(done: int, total: int) -> None:
        if not begun.is_set():
            begun.set()
            thread = threading.Thread(target=inner)
            thread.start()
            thread.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_NOISE_BLOCK", 4)
        found["first"] = run(weights, inputs, progress=progress)
    assert torch.equal(found["first"], expected[0]) and torch.equal(found["other"], expected[1])


# ---- what is kept, with small sizes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [([1, 1, 1], "abc"), ([1, 1, 1, 1], "bcd"), ([4, 4, 4], "bc"), ([11, 2], "b"), ([2, 11], "a")],
)
def test_the_least_recently_used_are_dropped(sizes: list[int], kept: str) -> None:
    store: graphs.Store[str] = graphs.Store(most=3, most_bytes=10)
    for name, size in zip("abcd", sizes, strict=False):
        store.give(name, name.upper(), size)
    assert len(store) == len(kept) and store.bytes() <= 10
    assert [store.take(name) for name in "abcd"] == [
        name.upper() if name in kept else None for name in "abcd"
    ]
    assert len(store) == 0


def test_use_makes_recent() -> None:
    store: graphs.Store[int] = graphs.Store(most=2, most_bytes=10)
    store.give("a", 1, 1)
    store.give("b", 2, 1)
    store.give("a", store.take("a") or 0, 1)
    store.give("c", 3, 1)
    assert store.take("b") is None and store.take("a") == 1
    store.clear()
    assert store.take("c") is None


# ---- the capture itself, with a fake torch.cuda ------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces what a capture calls of torch.cuda; the names of the calls, in order."""
    made: list[str] = []

    class CUDAGraph:
        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            made.append(f"begin {capture_error_mode}")

        def capture_end(self) -> None:
            made.append("end")

        def replay(self) -> None:
            made.append("replay")

    @contextlib.contextmanager
    def stream(which: str):
        made.append(f"on {which}")
        yield
        made.append("back")

    def forbidden(*_: Any) -> None:
        raise AssertionError("a capture must not synchronise")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    return made


def test_other_threads_may_call_cuda_during_a_capture(calls: list[str]) -> None:
    replay = graphs.capture(lambda: calls.append("step"), torch.device("cuda", 1))
    expected = ["on a stream of cuda:1", "begin thread_local", "step", "end", "back"]
    assert calls == expected
    replay()
    assert calls == [*expected, "replay"]


def test_a_capture_ends_after_an_exception(calls: list[str]) -> None:
    def step() -> None:
        raise LookupError("no kernel")

    with pytest.raises(LookupError, match="no kernel"):
        graphs.capture(step, torch.device("cuda", 0))
    assert calls[-1] == "end"


@pytest.mark.parametrize("capturing", [False, True])
def test_within_a_capture_of_the_caller_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert graphs.usable(torch.device("cuda", 0)) is not capturing
    assert not graphs.usable(torch.device("cpu"))


class Readings(TorchDispatchMode):
    """Counts operations that copy a value from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_call_reads_nothing_back(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture of the caller would fail at a value that is read back from the GPU, and any call would wait."""
    weights, inputs = case()
    call = prepared_call(weights, inputs)
    out = torch.empty(ROWS, CLASSES, device=TRITON_DEVICE)
    run(weights, inputs)  # compiles
    monkeypatch.setattr(
        kernels.Chain, "step", lambda self: None
    )  # the interpreter reads its arguments
    with Readings() as readings:
        kernels.denoise(call, out, None, None)
    assert not readings.found
    with Readings() as readings:
        int(out[0, 0])
    assert readings.found


# ---- on a GPU ----------------------------------------------------------------------------------

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(TRITON_DEVICE.type != "cuda", reason="no GPU"),
]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> graphs.Store[kernels.Chain]:
    """An empty store of chains."""
    store: graphs.Store[kernels.Chain] = graphs.Store(4, 2**30)
    monkeypatch.setattr(kernels, "KEPT", store)
    return store


class TestOnAGpu:
    """With graphs of CUDA."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_replays_have_the_bits_of_launches(
        self, kept: graphs.Store[kernels.Chain], precision: str
    ) -> None:
        weights, _ = case()
        for seed in range(3):
            _, inputs = case(seed=seed)
            found = run(weights, inputs, seed=seed, precision=precision)
            expected = without_graphs(weights, inputs, seed=seed, precision=precision)
            assert torch.equal(found, expected)
        assert len(kept) == 1

    def test_a_second_call_does_not_synchronise(self, kept: graphs.Store[kernels.Chain]) -> None:
        weights, inputs = case()
        call, out = prepared_call(weights, inputs), torch.empty(ROWS, CLASSES, device=TRITON_DEVICE)
        kernels.denoise(call, out, None, None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels.denoise(call, out, None, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, without_graphs(weights, inputs))

    def test_the_caller_captures(self, kept: graphs.Store[kernels.Chain]) -> None:
        weights, inputs = case()
        call, out = prepared_call(weights, inputs), torch.empty(ROWS, CLASSES, device=TRITON_DEVICE)
        kernels.denoise(call, out, None, None)
        kept.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels.denoise(call, out, None, None)
        assert len(kept) == 0
        call.features.mul_(0.5)
        out.fill_(torch.nan)
        graph.replay()
        changed = call.features, call.prior, call.guidance
        assert torch.equal(out, without_graphs(weights, changed))

    def test_another_thread_allocates_during_captures(
        self, kept: graphs.Store[kernels.Chain]
    ) -> None:
        weights, inputs = case()
        stop, failures = threading.Event(), []

        def allocate() -> None:
            try:
                size = 2**21
                while not stop.is_set():
                    size += 2**12  # a size that the allocator does not hold
                    torch.empty(size, device=TRITON_DEVICE)
                    torch.cuda.empty_cache()
            except RuntimeError as error:
                failures.append(error)

        thread = threading.Thread(target=allocate)
        thread.start()
        try:
            for _ in range(20):
                found = run(weights, inputs)
                kept.clear()  # the next call captures again
        finally:
            stop.set()
            thread.join()
        assert not failures and torch.equal(found, without_graphs(weights, inputs))
