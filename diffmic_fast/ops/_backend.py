"""Backend dispatch: which implementation serves an operation.

`reference` is plain PyTorch, the definition; `cpu` is C++, `cuda` CUDA C++, `triton` Triton; `cuda-emulated` runs the
CUDA sources on the CPU, for tests. "auto" selects the fastest one that supports the tensors. The environment variable
``DIFFMIC_BACKEND`` sets what "auto" means for a process: an operation that has an implementation of that name uses it
or raises; one that has none uses the ordinary choice and warns once.

Kernels implement `backward()` only. Under a transform of `torch.func` (`grad`, `jvp`, `vmap`, …) and in forward mode
"auto" selects the reference, which is differentiable in every way; a kernel requested by name raises, since it would
drop the tangents silently.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from diffmic_fast import _native, triton
from diffmic_fast.ops._torch_internals import transforming


class BackendError(RuntimeError):
    """The requested backend, precision or instruction set is not available; the message says why."""


BACKENDS = ("reference", "cpu", "cuda", "triton", "cuda-emulated")

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "denoise": ("reference", "cpu", "cuda", "triton", "cuda-emulated"),
    "conditioning": ("reference", "cpu", "cuda", "cuda-emulated"),
    "conditional_linear": ("reference", "triton"),
    "image_ids": ("reference", "cuda", "cuda-emulated"),
    "mmd": ("reference", "cpu", "cuda", "cuda-emulated"),
    "rois": ("reference", "cpu", "cuda", "cuda-emulated"),
}

_VARIABLE = "DIFFMIC_BACKEND"
_warned: set[str] = set()


def resolve(operation: str, backend: str, device: torch.device) -> str:
    """Return the backend that serves a call, and warn once where it is not the one expected.

    Args:
        operation: a key of `IMPLEMENTATIONS`.
        backend: "auto" or one of `BACKENDS`.
        device: device of the operation's tensors.

    Returns:
        One of `BACKENDS`, never "auto".

    Raises:
        ValueError: there is no backend of that name.
        BackendError: the backend was requested by name and is not available.
    """
    name, remark = decide(operation, backend, device)
    if remark and remark not in _warned:
        _warned.add(remark)
        warnings.warn(remark, RuntimeWarning, stacklevel=3)
    return name


# A constant of a compiled graph: torch.compile does not trace the environment and the loading of the extension. This
# is the attribute that torch.compiler.assume_constant_result sets; that function would import all of torch._dynamo. In
# a version of torch without it torch.compile reports a graph break here.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decide(operation: str, backend: str, device: torch.device) -> tuple[str, str]:
    """Return the backend of `resolve` and the text of its warning ("" for none)."""
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
    """Whether the caller or the environment requested the backend by name, so that no other may replace it."""
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
    """Return the backend of `resolve`, or the reference if "auto" selects kernels without the tensors' dtypes.

    Args:
        operation, backend: as in `resolve`.
        tensors: those of the call, on one device.
        dtypes: dtypes that the kernels support.
        caller: the name in an error (default: the operation).

    Raises:
        BackendError: the backend was requested by name and does not support the tensors.
    """
    name = resolve(operation, backend, tensors[0].device)
    if name == "reference":
        return name
    for tensor in tensors:  # a loop, since a generator takes half as long again
        if tensor.dtype not in dtypes:
            break
    else:
        return name
    if asked_by_name(operation, backend):
        found = sorted({str(tensor.dtype) for tensor in tensors})
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BackendError(
            f"{caller or operation}: the backend {name} cannot serve: it takes {taken} tensors, got {', '.join(found)}"
        )
    return "reference"


def unavailable(operation: str, backend: str, device: torch.device) -> str:
    """Return why `backend` cannot serve `operation` for tensors on `device`; "" if it can."""
    if backend not in IMPLEMENTATIONS[operation]:
        names = ", ".join(IMPLEMENTATIONS[operation])
        return f"it has no {backend} implementation, only {names}"
    if backend != "reference" and transforming():
        return (
            "a transform of torch.func or forward-mode AD is active, which only the reference supports "
            '(backend="auto" selects it)'
        )
    if backend == "cpu":
        if device.type != "cpu":
            return f"it takes tensors on the CPU, got {device}"
        if _native.failure():
            return f"the compiled extension is not available: {_native.failure()}"
    if backend == "cuda":
        if device.type != "cuda":
            return f"it takes tensors on a GPU, got {device}"
        return _native.cuda_failure() or _missing_architecture(device)
    if backend == "cuda-emulated":
        if device.type != "cpu":
            return f"it takes tensors on the CPU, got {device}"
        return _native.attempt_emulated()[1]
    if backend == "triton":
        return triton.unavailable(device)
    return ""


def _missing_architecture(device: torch.device) -> str:
    """Return why the CUDA kernels of this build do not run on a GPU; "" if they do."""
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return "PyTorch finds no GPU"
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
    """Return PyTorch's current CUDA stream on the tensor's device as a cudaStream_t; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _fastest(operation: str, device: torch.device) -> tuple[str, str]:
    if transforming():
        return "reference", ""
    implementations = IMPLEMENTATIONS[operation]
    reason, kind = "", device.type
    for name in ("cuda", "triton") if kind == "cuda" else ():
        if name in implementations:
            why_not = unavailable(operation, name, device)
            if not why_not:
                remark = f"{operation}: using the {name} implementation, because {reason}"
                return name, remark if reason else ""
            reason = reason or why_not
    if reason:
        return "reference", _slower(operation, reason)
    if "cpu" not in implementations or kind != "cpu":
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
            f"{operation}: {argument} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}"
        )
