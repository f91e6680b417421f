"""The states of the random number generators of Python, NumPy and torch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The states of the global generators and of `generators`, as tensors, numbers and text."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position),
                  int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "generators": {key: g.get_state() for key, g in generators.items()},
    }  # fmt: skip
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(
    states: Mapping[str, Any], generators: Mapping[str, torch.Generator]
) -> None:
    """Set every generator to the state that `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    for key, generator in generators.items():
        generator.set_state(states["generators"][key])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """A block after which the global generators have their states of before; some libraries draw when imported."""
    states = random_states({})
    try:
        yield
    finally:
        restore_random_states(states, {})
