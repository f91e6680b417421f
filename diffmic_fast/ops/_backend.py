"""Which implementation serves an operation: the grid of design decisions, as one small table.

Five names: ``reference`` (plain PyTorch, the definition), ``cpu`` (C++), ``cuda`` (CUDA C++),
``triton``, and ``cuda-emulated`` (CUDA sources run on the CPU, for tests). ``auto`` takes the
fastest one that can serve the tensors at hand.

The environment variable ``DIFFMIC_BACKEND`` sets what ``auto`` means for a process. An operation
that has an implementation of that name uses it or raises; one that has none of that name (no
operation has all of them) keeps the ordinary choice and says so once.

Kernels have derivatives for `backward()` and nothing else. Under a transform of `torch.func` (`grad`,
`jvp`, `vmap`, …) and where a forward-mode derivative is under way ``auto`` takes the reference, which
has them all; a kernel asked for by name raises there, for it would drop tangents without a word.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from diffmic_fast import _native, triton


class BackendError(RuntimeError):
    """What was asked for by name, a backend or a precision, cannot serve here; the message says why."""


BACKENDS = ("reference", "cpu", "cuda", "triton", "cuda-emulated")

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "denoise": ("reference", "cpu", "cuda", "triton", "cuda-emulated"),
    "conditioning": ("reference", "cpu", "cuda", "cuda-emulated"),
    "conditional_linear": ("reference", "triton"),
    "mmd": ("reference", "cpu", "cuda", "cuda-emulated"),
    "rois": ("reference", "cpu", "cuda", "cuda-emulated"),
}

_VARIABLE = "DIFFMIC_BACKEND"
_said: set[str] = set()


def resolve(operation: str, backend: str, device: torch.device) -> str:
    """Name the backend that serves one call.

    Args:
        operation: a key of `IMPLEMENTATIONS`.
        backend: ``"auto"`` or one of `BACKENDS`.
        device: where the operation's tensors are.

    Returns:
        One of `BACKENDS`, never ``"auto"``.

    Raises:
        ValueError: the name is none of these.
        BackendError: the backend was asked for by name and cannot serve; says why.
    """
    name, remark = decide(operation, backend, device)
    if remark and remark not in _said:
        _said.add(remark)
        warnings.warn(remark, RuntimeWarning, stacklevel=3)
    return name


# torch.compile takes the answer as a constant of the graph instead of tracing through the
# environment and the extension's loading. This is the mark that torch.compiler.
# assume_constant_result sets; calling that here would import all of torch._dynamo.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decide(operation: str, backend: str, device: torch.device) -> tuple[str, str]:
    """`resolve` without its warning: the backend's name, and what there is to say about it."""
    if backend != "auto":
        _check_name(operation, backend, "backend")
        _require(operation, backend, device, asked_by=f'backend="{backend}"')
        return backend, ""

    wanted = os.environ.get(_VARIABLE) or "auto"
    if wanted == "auto":
        return _fastest(operation, device)
    _check_name(operation, wanted, f"the variable {_VARIABLE}")
    implementations = IMPLEMENTATIONS[operation]
    if wanted in implementations:
        _require(operation, wanted, device, asked_by=f"{_VARIABLE}={wanted}")
        return wanted, ""
    name, _ = _fastest(operation, device)
    return name, (
        f"{operation}: {_VARIABLE}={wanted} does not apply, this operation has only "
        f"{', '.join(implementations)}; using {name}"
    )


def asked_by_name(operation: str, backend: str) -> bool:
    """Whether the caller or the environment named the backend, so that none may take its place."""
    return (backend if backend != "auto" else os.environ.get(_VARIABLE, "auto")) in (
        IMPLEMENTATIONS[operation]
    )


def choose(
    operation: str,
    backend: str,
    tensors: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    *,
    caller: str = "",
) -> str:
    """`resolve` for kernels of some dtypes: where "auto" would take one that has not these tensors', the reference.

    Args:
        operation, backend: as in `resolve`.
        tensors: of the call, on one device.
        dtypes: those that kernels take.
        caller: who is named in an error (default: the operation).

    Raises:
        BackendError: the backend was asked for by name and cannot serve; says why.
    """
    name = resolve(operation, backend, tensors[0].device)
    if name == "reference" or all(tensor.dtype in dtypes for tensor in tensors):
        return name
    if asked_by_name(operation, backend):
        found = sorted({str(tensor.dtype) for tensor in tensors})
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BackendError(
            f"{caller or operation}: the backend {name} cannot serve: it takes {taken} tensors, got {', '.join(found)}"
        )
    return "reference"


def transforming() -> bool:
    """Whether derivatives other than those of `backward()` may be asked of a call made now."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unavailable(operation: str, backend: str, device: torch.device) -> str:
    """Why `backend` cannot serve `operation` for tensors on `device`; empty when it can."""
    if backend not in IMPLEMENTATIONS[operation]:
        names = ", ".join(IMPLEMENTATIONS[operation])
        return f"there is no {backend} implementation of it, only {names}"
    if backend != "reference" and transforming():
        return (
            "a transform of torch.func or a forward-mode derivative is under way, which only the reference "
            'can serve (backend="auto" takes it)'
        )
    if backend == "cpu":
        if device.type != "cpu":
            return f"it takes tensors on the CPU, these are on {device}"
        if _native.failure():
            return f"the compiled extension is not available: {_native.failure()}"
    if backend == "cuda":
        if device.type != "cuda":
            return f"it takes tensors on a GPU, these are on {device}"
        return _native.cuda_failure() or _unserved(device)
    if backend == "cuda-emulated":
        if device.type != "cpu":
            return f"it takes tensors on the CPU, these are on {device}"
        return _native.attempt_emulated()[1]
    if backend == "triton":
        return triton.unavailable(device)
    return ""


def _unserved(device: torch.device) -> str:
    """Why the CUDA kernels of this build do not run on that GPU; empty when they do."""
    major, minor = torch.cuda.get_device_capability(device)
    module = _native.extension()
    built_for = module.build_info()["cuda_architectures"]
    if module.cuda_serves(built_for, major, minor):
        return ""
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and the "
        f"extension was built for {built_for}: reinstall with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def stream_of(tensor: torch.Tensor) -> int:
    """The CUDA stream that PyTorch is using on the tensor's device, as an address; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _fastest(operation: str, device: torch.device) -> tuple[str, str]:
    if transforming():
        return "reference", ""
    implementations = IMPLEMENTATIONS[operation]
    reason, on_gpu = "", device.type == "cuda"
    for name in ("cuda", "triton") if on_gpu else ():
        if name in implementations:
            why_not = unavailable(operation, name, device)
            if not why_not:
                remark = f"{operation}: using the {name} implementation, because {reason}"
                return name, remark if reason else ""
            reason = reason or why_not
    if reason:
        return "reference", _slower(operation, reason)
    if "cpu" not in implementations or device.type != "cpu":
        return "reference", ""
    if not _native.failure():
        return "cpu", ""
    reason = f"the compiled extension is not available: {_native.failure()}"
    return "reference", _slower(operation, reason)


def _slower(operation: str, reason: str) -> str:
    return f"{operation}: using the slower reference implementation, because {reason}"


def _require(operation: str, backend: str, device: torch.device, *, asked_by: str) -> None:
    reason = unavailable(operation, backend, device)
    if reason:
        raise BackendError(f"{operation}: {asked_by} cannot serve: {reason}")


def _check_name(operation: str, backend: str, argument: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"{operation}: {argument} must be auto, {', '.join(BACKENDS)}; got {backend!r}"
        )
