"""Private interfaces of PyTorch that the operators use, which have no public equivalent.

They are looked up at the time of the call: if a release of PyTorch removes one, the package still imports, and calls
that need it raise an AttributeError that names it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.autograd import forward_ad


def below_autograd() -> AbstractContextManager[None]:
    """A block whose operators dispatch past autograd, as in the body of a `torch.library.custom_op`.

    The forward pass of an operator's derivative calls the operator again, for its kernel.
    """
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return]


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active.

    These ask for derivatives other than those of `backward()`, which the kernels do not have.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
