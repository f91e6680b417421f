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

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self._device: torch.device | None = None
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

    def integer(self, name: str, value: object, *shapes: str) -> Tensor:
        """Require an int64 tensor of one of the shapes, on the device of those before it."""
        tensor = self.tensor(name, value, *shapes)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{self.operation}: {name} must be int64, got {tensor.dtype}")
        return tensor

    def tensor(self, name: str, value: object, *shapes: str) -> Tensor:
        """Require a tensor of one of the shapes, on the device of those before it."""
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
        elif self._device != value.device:
            raise ValueError(
                f"{self.operation}: {name} must be on {self._device} as the arguments before it, got {value.device}"
            )
        return value

    def within(self, name: str, value: Tensor, low: int, high: int) -> None:
        """Require every element to be in [low, high]. Not checked while `torch.compile` traces."""
        if value.numel() == 0 or torch.compiler.is_compiling():
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


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is enabled for a device; False for those that have none, as the meta device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


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
