"""Checks of the arguments of public functions; messages say "operation: argument must be ..., got ..."."""

from __future__ import annotations

import torch
from torch import Tensor


class Arguments:
    """Checks the tensors of one call against shapes written with letters; equal letters are equal sizes.

        args = Arguments("mmd")
        args.floating("x", x, "n d")
        args.floating("y", y, "m d")    # ValueError: mmd: y must be [m, d=5], got (32, 7)

    Attributes:
        operation: Begins every message.
        sizes: The size of each letter so far.
    """

    def __init__(self, operation: str, device: torch.device | None = None) -> None:
        """Begin the checks of a call; `device` is that of its tensors (default: the first one's)."""
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self._device = device
        self._dtype: torch.dtype | None = None

    def floating(self, name: str, value: object, *shapes: str) -> Tensor:
        """Require a floating-point tensor of one of the shapes, on the device and of the dtype of those before it."""
        tensor = self.tensor(name, value, *shapes)
        dtype = tensor.dtype
        if dtype == self._dtype:
            return tensor
        if not dtype.is_floating_point:
            raise TypeError(
                f"{self.operation}: {name} must be a floating-point tensor, got {dtype}"
            )
        if self._dtype is not None and not autocast_enabled(tensor.device):
            raise TypeError(
                f"{self.operation}: {name} must be {self._dtype} as the arguments before it, got {dtype}"
            )
        self._dtype = dtype
        return tensor

    def integer(self, name: str, value: object, *shapes: str, host: bool = False) -> Tensor:
        """Require an int64 tensor of one of the shapes, on the device of those before it, or with `host` on the CPU."""
        tensor = self.tensor(name, value, *shapes, host=host)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{self.operation}: {name} must be int64, got {tensor.dtype}")
        return tensor

    def tensor(self, name: str, value: object, *shapes: str, host: bool = False) -> Tensor:
        """Require a tensor of one of the shapes, on the device of those before it, or with `host` on the CPU."""
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.operation}: {name} must be a torch.Tensor, got {type(value).__name__}"
            )
        for shape in shapes:  # a loop, since a generator takes as long as the check
            if self._bind(value, shape):
                break
        else:
            expected = " or ".join(self._describe(shape) for shape in shapes)
            raise ValueError(
                f"{self.operation}: {name} must be {expected}, got {tuple(value.shape)}"
            )
        if self._device is None:
            self._device = value.device
        elif self._device != value.device and not (host and value.device.type == "cpu"):
            also = ", or on the CPU" if host else ""
            raise ValueError(
                f"{self.operation}: {name} must be on {self._device} as the arguments before it{also}, got "
                f"{value.device}"
            )
        return value

    def within(self, name: str, value: Tensor, low: int, high: int) -> None:
        """Require every element of a tensor on the CPU to be in [low, high].

        Not checked while `torch.compile` traces, nor on a GPU, where the host would have to wait for the device to read
        the values: there kernels mark what such a value would decide with NaN, or `assert_within` stops them.
        """
        if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
            return
        bounds = value.aminmax()
        least, most = int(bounds.min), int(bounds.max)
        if least < low or most > high:
            raise ValueError(
                f"{self.operation}: {name} must be in [{low}, {high}], got {least} … {most}"
            )

    def _bind(self, value: Tensor, shape: str) -> bool:
        letters, sizes = shape.split(), value.shape
        if len(letters) != len(sizes):
            return False
        known, added = self.sizes, []
        for letter, size in zip(letters, sizes):  # noqa: B905 (as long as each other)
            expected = known.get(letter)
            if expected is None and letter.isdigit():
                expected = int(letter)
            elif expected is None:
                known[letter] = size
                added.append(letter)
                continue
            if expected != size:
                for name in added:
                    del known[name]
                return False
        return True

    def _describe(self, shape: str) -> str:
        parts = [
            f"{letter}={self.sizes[letter]}" if letter in self.sizes else letter
            for letter in shape.split()
        ]
        return f"[{', '.join(parts)}]"


# Asked once: torch.compile of torch 2.7 does not trace the question.
_WITH_AUTOCAST = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is enabled for a device; False for those that have none, as the meta device."""
    return device.type in _WITH_AUTOCAST and torch.is_autocast_enabled(device.type)


def assert_within(what: str, value: Tensor, low: int, high: int) -> None:
    """Stop kernels of a GPU whose integer argument has an element outside of [low, high], without waiting for them.

    The assertion is made on the device: like an index out of range, it ends the process's use of that GPU, and the next
    call that waits raises. Does nothing for tensors that are not on a GPU (`Arguments.within` checks those on the CPU),
    and while `torch.compile` traces.
    """
    if value.device.type != "cuda" or value.numel() == 0 or torch.compiler.is_compiling():
        return
    inside = (value.clamp(low, high) == value).all()
    torch._assert_async(inside, f"{what} must be in [{low}, {high}]")


def finite_on_device(what: str, images: Tensor, device: torch.device) -> Tensor:
    """Images [B, ...] from the CPU on a device; raises ValueError if one is not finite.

    Models check images on the CPU themselves. On a GPU they do not, which would wait for it.
    """
    if device.type != "cpu":
        check_finite(what, images, ValueError)
    return images.to(device)


def check_finite(what: str, values: Tensor, error: type[Exception]) -> None:
    """Raise an error that names the images whose values are not finite. Not checked while `torch.compile` traces.

    Args:
        what: Begins the message.
        values: [B, ...], one entry per image.
        error: Class of the exception.
    """
    if torch.compiler.is_compiling():
        return
    # One pass without temporaries, where isfinite makes four; a sum may overflow though every value is finite.
    if bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all()):
        return
    finite = torch.isfinite(values.flatten(1)).all(dim=1)
    indices = (~finite).nonzero()[:, 0].tolist()
    raise error(f"{what}: NaN or infinity for image {', '.join(map(str, indices[:8]))}")
