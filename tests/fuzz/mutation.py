"""Changes of valid contents, for the share of fuzzing that the test suite runs; atheris has its own."""

from __future__ import annotations

import numpy as np

_EXTREME = (0, 1, 0x7F, 0x80, 0xFF)


def mutate(seeds: list[bytes], rng: np.random.Generator) -> bytes:
    """A valid content with one to six changes: bits, bytes, numbers, cuts, repeats, parts of another content."""
    content = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(int(rng.integers(1, 7))):
        if not content:
            break
        start = int(rng.integers(len(content)))
        length = int(min(len(content) - start, 2 ** rng.integers(0, 7)))
        kind = rng.integers(8)
        if kind == 0:
            content[start] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[start] = int(rng.integers(256))
        elif kind == 2:
            content[start : start + length] = bytes([_EXTREME[rng.integers(5)]]) * length
        elif kind == 3:
            number = (
                int(rng.integers(-(2**31), 2**31))
                if rng.integers(2)
                else int(2 ** rng.integers(31))
            )
            order = "little" if rng.integers(2) else "big"
            content[start : start + 4] = number.to_bytes(4, order, signed=True)
        elif kind == 4:
            del content[start : start + length]
        elif kind == 5:
            content[start:start] = content[start : start + length] * int(rng.integers(1, 5))
        elif kind == 6:
            other = seeds[rng.integers(len(seeds))]
            cut = int(rng.integers(len(other)))
            content[start : start + length] = other[cut : cut + length]
        else:
            del content[start:]
    return bytes(content)
