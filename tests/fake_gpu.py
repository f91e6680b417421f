"""A GPU in name only, for tests of what a call does before and between its launches.

`FakeGpu` tensors say that they are on ``cuda:0`` and compute on the CPU. `fake_gpu` lets every operation find a GPU
whose CUDA kernels are the emulated ones, and records what would make the host wait for the device:

- a value that is read back (`item`, `int`, `float`, `bool`, `tolist`, `nonzero`, `equal`, ...);
- a copy from the device;
- a copy to the device that is not declared `non_blocking`.

As on a GPU, an operation on tensors of both devices raises, but for scalars on the CPU.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from diffmic_fast import _native, triton
from diffmic_fast.ops import _backend

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
# Operators whose result has a size, or is a Python value, that depends on data.
_READS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2", "item",
}  # fmt: skip

_waits: list[str] = []


class FakeGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU.

    Attributes:
        host: The tensor.
    """

    host: Tensor
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeGpu:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, host.shape, strides=host.stride(), dtype=host.dtype, storage_offset=host.storage_offset(),
            requires_grad=False,
        )  # fmt: skip

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FakeGpu({self.host!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "diffmic_fast":
            # The kernel itself, on these arguments.
            with _Devices():
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        name = func.overloadpacket.__name__
        if name in _READS:
            _record(name)
        _check_devices(name, tree_leaves((args, kwargs)))
        plain_args, plain_kwargs = tree_map(host_of, (args, kwargs))
        found = func(*plain_args, **plain_kwargs)
        if name.endswith("_") and not name.startswith("_"):  # in place
            return args[0]
        by_host = {id(host_of(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeGpu)}
        return tree_map(
            lambda x: by_host.get(id(x), FakeGpu(x)) if isinstance(x, Tensor) else x, found
        )


def host_of(value: Any) -> Any:
    """The CPU tensor behind a fake one, anything else as it is."""
    return value.host if isinstance(value, FakeGpu) else value


def to_gpu(value: Tensor) -> Tensor:
    """A copy on the fake GPU, a leaf; uncounted."""
    found = FakeGpu(value.detach().clone())
    return found.requires_grad_() if value.requires_grad else found


def module_to_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """Move a module to the fake GPU, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = FakeGpu(parameter.detach().clone())
                part._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FakeGpu(buffer.clone())
    return module


def _record(what: str) -> None:
    """Note a wait with the line of the package that causes it."""
    frames = [f for f in traceback.extract_stack() if "/diffmic_fast/" in f.filename]
    where = (
        f"{frames[-1].filename.rsplit('/diffmic_fast/')[-1]}:{frames[-1].lineno}"
        if frames
        else "the test"
    )
    _waits.append(f"{what} at {where}")


def _check_devices(name: str, leaves: list[Any]) -> None:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    others = [x for x in tensors if not isinstance(x, FakeGpu) and x.ndim > 0]
    if not others or not any(isinstance(x, FakeGpu) for x in tensors):
        return
    if name == "copy_":
        if kwargs_non_blocking(leaves):
            return
        _record("copy_")
    elif name in ("index", "index_put_", "index_put"):
        _record("indices on the CPU")
    elif name == "scatter":
        pass  # torch 2.6 makes the zeros that a gradient is scattered into in C++, which sees the CPU
    else:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, got cuda:0 and cpu"
        )


def kwargs_non_blocking(leaves: list[Any]) -> bool:
    """Whether a `copy_` was called with non_blocking."""
    return any(x is True for x in leaves)


class _Devices(TorchFunctionMode):
    """Carries out what moves or creates tensors on the fake device, whose name C++ does not know."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], Tensor):
            return _move(name, args, kwargs)
        if name in ("tolist", "numpy") and args and isinstance(args[0], FakeGpu):
            _record(name)
            return func(args[0].host, *args[1:], **kwargs)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
            if name in ("tensor", "as_tensor", "new_tensor"):
                _record(name)
            found = func(*tree_map(host_of, args), **kwargs)
            return FakeGpu(found)
        if name == "new_tensor" and isinstance(args[0], FakeGpu):
            _record(name)
            return FakeGpu(func(args[0].host, *args[1:], **kwargs))
        return func(*args, **kwargs)


class _Copy(torch.autograd.Function):
    """A copy to the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeGpu):
            return tensor.host.clone()
        return FakeGpu(tensor.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Copy.apply(grad)  # type: ignore[no-any-return]


def _move(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`Tensor.to` and its short forms."""
    tensor, *rest = args
    device = kwargs.pop("device", None) if name == "to" else torch.device(name)
    non_blocking = kwargs.pop("non_blocking", False)
    kept = []
    for value in rest:
        if isinstance(value, (torch.device, str)):
            device = torch.device(value)
        elif isinstance(value, Tensor):
            device = value.device
            kept.append(value.dtype)
        elif value is not None:
            kept.append(value)
    wanted = tensor.device if device is None else torch.device(device)
    if isinstance(tensor, FakeGpu) != (wanted.type == "cuda"):
        if wanted.type == "cpu":
            _record("copy to the host")
        elif not non_blocking:
            _record("copy to the device")
        tensor = _Copy.apply(tensor)
    return Tensor.to(tensor, *kept, **kwargs) if kept or kwargs else tensor


def _by_device_and_dtype(groups: list[list[Tensor]]) -> dict[Any, Any]:
    """PyTorch's grouping, which is in C++ and sees tensors on the CPU."""
    found: dict[Any, Any] = {}
    for i, tensor in enumerate(groups[0]):
        parts, indices = found.setdefault((tensor.device, tensor.dtype), ([[]], []))
        parts[0].append(tensor)
        indices.append(i)
    return found


class _Kernels:
    """The emulated CUDA kernels for arguments on the fake GPU."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)
        return lambda *arguments: function(*map(_unwrapped, arguments))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = [_unwrapped(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_unwrapped(each) for each in value]
    return host_of(value)


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A block in which there is a GPU; gives what has made the host wait so far."""
    module = _native.cuda("cuda-emulated")
    kernels = _Kernels(module)
    monkeypatch.setattr(_native, "cuda_failure", lambda: "")
    monkeypatch.setattr(_native, "cuda", lambda backend: kernels)
    monkeypatch.setattr(_backend, "_missing_architecture", lambda device: "")
    monkeypatch.setattr(triton, "unavailable", lambda device: "it is not tested here")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_operators", "_transfer", "denoise"):
        monkeypatch.setattr(f"diffmic_fast.ops.{name}.stream_of", lambda tensor: 0)
    monkeypatch.setattr(
        torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", _by_device_and_dtype
    )
    _waits.clear()
    with _Devices():
        yield _waits
