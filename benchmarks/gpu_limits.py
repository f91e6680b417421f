"""Limits of GPUs on the warps that are resident on a multiprocessor."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities").

    Attributes:
        warps, blocks: resident at most.
        shared_bytes: shared memory.
        block_shared_bytes: shared memory of one block at most.
        registers: of 32 bits.
    """

    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int
    registers: int = 65536


_KIB = 1024
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * _KIB, 163 * _KIB),
    86: Multiprocessor(48, 16, 100 * _KIB, 99 * _KIB),
    89: Multiprocessor(48, 24, 100 * _KIB, 99 * _KIB),
    90: Multiprocessor(64, 32, 228 * _KIB, 227 * _KIB),
    100: Multiprocessor(64, 32, 228 * _KIB, 227 * _KIB),
    120: Multiprocessor(48, 24, 100 * _KIB, 99 * _KIB),
}
_RESERVED_BYTES = 1024  # of every block's shared memory, by the system


def resident_warps(
    architecture: int, registers: int, shared_bytes: int, dynamic: int | str, block: int
) -> int:
    """Warps of a kernel that are resident on one multiprocessor.

    Args:
        registers: per thread.
        shared_bytes: static shared memory, as cuobjdump counts it.
        dynamic: bytes of dynamic shared memory, or "most".
        block: threads per block.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-block // 32)
    # From 9.0 on the static count includes the system's share.
    reserved = 0 if architecture >= 90 else _RESERVED_BYTES
    if dynamic == "most":
        shared = limits.block_shared_bytes + _RESERVED_BYTES
    else:
        shared = shared_bytes + reserved + int(dynamic)
    shared = -(-shared // 128) * 128
    warp_registers = -(-registers * 32 // 256) * 256  # allocated in units of 256
    # A multiprocessor has four register files, and a warp uses one.
    by_registers = 4 * (limits.registers // 4 // warp_registers) // warps
    blocks = min(
        limits.blocks, limits.warps // warps, by_registers, limits.shared_bytes // max(shared, 1)
    )
    return blocks * warps
