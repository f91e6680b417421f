"""TIFF files of a kind that Pillow reads as BlackIsZero only."""

from __future__ import annotations

import struct

_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_PHOTOMETRIC, _SHORT = 262, 3


def is_tiff(data: bytes) -> bool:
    """Whether a file begins like a TIFF file."""
    return data[:4] in _ORDERS


def as_black_is_zero(data: bytes) -> bytes | None:
    """Declare the first image of a WhiteIsZero TIFF file to be BlackIsZero; the samples stay as they are.

    Pillow has no WhiteIsZero decoder for some depths, byte orders and bit orders that it reads as BlackIsZero.

    Args:
        data: the content of the file.

    Returns:
        The changed content; None if it is no TIFF file, or its PhotometricInterpretation is not 0.
    """
    order = _ORDERS.get(data[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, entry)
            if tag == _PHOTOMETRIC:
                if kind != _SHORT or value != 0:
                    return None
                changed = bytearray(data)
                struct.pack_into(f"{order}H", changed, entry + 8, 1)
                return bytes(changed)
    except struct.error:
        return None  # damaged: the directory lies outside the file
    return None
