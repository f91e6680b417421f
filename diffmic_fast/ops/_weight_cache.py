"""The packed hidden weights that the backend "cpu" of `denoise` keeps from call to call."""

from __future__ import annotations

import os
import threading

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffmic_fast import _native

_caches: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


def cache_of(weight: Tensor) -> object:
    """The `_C.WeightCache` of a model, named by its first hidden weight and freed with it."""
    with _lock:
        if weight not in _caches:
            _caches[weight] = _native.extension().WeightCache()
        return _caches[weight]


def _forget() -> None:
    """Start anew in a forked child, where a thread that does not exist may hold the locks."""
    global _caches, _lock
    _caches, _lock = WeakIdKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
