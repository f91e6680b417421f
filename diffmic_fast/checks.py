"""Argument checks at the border of the package, in words: operation, argument, what it wants, what it got."""

from __future__ import annotations

import torch
from torch import Tensor


class Arguments:
    """Checks the tensors of one call against shapes written with letters, equal letters being equal sizes.

        args = Arguments("mmd")
        args.floating("x", x, "n d")
        args.floating("y", y, "m d")    # ValueError: mmd: y must be [m, d=5], got (32, 7)

    Attributes:
        operation: begins every message.
        sizes: the size each letter has been seen to have.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self._device: torch.device | None = None
        self._dtype: torch.dtype | None = None

    def floating(self, name: str, value: object, *shapes: str) -> Tensor:
        """A floating-point tensor of one of the shapes, on the device and of the dtype of those before it."""
        tensor = self.tensor(name, value, *shapes)
        if not tensor.is_floating_point():
            raise TypeError(
                f"{self.operation}: {name} must be a floating-point tensor, got {tensor.dtype}"
            )
        if self._dtype not in (None, tensor.dtype) and not torch.is_autocast_enabled(
            tensor.device.type
        ):
            raise TypeError(
                f"{self.operation}: {name} must be {self._dtype} as the arguments before it, got {tensor.dtype}"
            )
        self._dtype = tensor.dtype
        return tensor

    def integer(self, name: str, value: object, *shapes: str) -> Tensor:
        """An int64 tensor of one of the shapes."""
        tensor = self.tensor(name, value, *shapes)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{self.operation}: {name} must be int64, got {tensor.dtype}")
        return tensor

    def tensor(self, name: str, value: object, *shapes: str) -> Tensor:
        """A tensor of one of the shapes, on the device of those before it."""
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.operation}: {name} must be a torch.Tensor, got {type(value).__name__}"
            )
        for shape in shapes:  # no generator, which takes as long as what it asks
            if self._bind(value, shape):
                break
        else:
            wanted = " or ".join(self._describe(shape) for shape in shapes)
            raise ValueError(f"{self.operation}: {name} must be {wanted}, got {tuple(value.shape)}")
        device = value.device
        if self._device is None:
            self._device = device
        elif self._device != device:
            raise ValueError(
                f"{self.operation}: {name} must be on {self._device} as the arguments before it, got {device}"
            )
        return value

    def within(self, name: str, value: Tensor, low: int, high: int) -> None:
        """Every element in [low, high]. Not looked at while `torch.compile` traces."""
        if value.numel() == 0 or torch.compiler.is_compiling():
            return
        least, most = (int(bound) for bound in value.aminmax())
        if least < low or most > high:
            raise ValueError(
                f"{self.operation}: {name} must be in [{low}, {high}], got {least} … {most}"
            )

    def _bind(self, value: Tensor, shape: str) -> bool:
        letters, sizes = shape.split(), value.shape
        if len(letters) != len(sizes):
            return False
        seen: dict[str, int] = {}
        for letter, size in zip(letters, sizes, strict=True):
            wanted = self.sizes.get(letter, seen.get(letter))
            if wanted is None and letter.isdigit():
                wanted = int(letter)
            elif wanted is None:
                wanted = seen[letter] = size
            if wanted != size:
                return False
        self.sizes.update(seen)
        return True

    def _describe(self, shape: str) -> str:
        parts = [
            f"{letter}={self.sizes[letter]}" if letter in self.sizes else letter
            for letter in shape.split()
        ]
        return f"[{', '.join(parts)}]"
