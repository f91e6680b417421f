"""Image files of kinds that Pillow does not write: 16-bit colour, declared depths, WhiteIsZero."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png16(pixels, colour_type, *, significant=None, transparent=None, exif=None):
    """A PNG file of 16 bits per channel, from [H, W, channels].

    Args:
        colour_type: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha.
        significant: content of the sBIT chunk, a list of bytes.
        transparent: content of the tRNS chunk, a list of 16-bit numbers.
        exif: content of the eXIf chunk.
    """
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, 16, colour_type, rows, significant, transparent, exif)


def png(width, height, bits, colour_type, rows, significant=None, transparent=None, exif=None):
    """A PNG file from its filtered rows."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    content = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    )
    if significant is not None:
        content += chunk(b"sBIT", bytes(significant))
    if transparent is not None:
        content += chunk(b"tRNS", np.array(transparent, ">u2").tobytes())
    if exif is not None:
        content += chunk(b"eXIf", exif)
    return content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(samples, bits, *, white_is_zero=False, order="<", channels=1, signed=False, deflate=False):
    """A TIFF file of one strip.

    Args:
        samples: integers, [H, W] or [H, W, channels].
        bits: 1, 4, 8, 12 (packed), 16 or 32 per sample.
        order: "<" or ">", the byte order.
        deflate: compress, which Pillow leaves to libtiff to read.
    """
    height, width = samples.shape[:2]
    if bits in (8, 16, 32):
        kind = f"{order}{'i' if signed else 'u'}{bits // 8}"
        data = samples.astype(kind).tobytes()
    else:
        flat = samples.reshape(height, -1)
        digits = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        data = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    if deflate:
        data = zlib.compress(data)
    photometric = 2 if channels >= 3 else int(not white_is_zero)
    entries = [
        (256, 3, [width]),
        (257, 3, [height]),
        (258, 3, [bits] * channels),
        (259, 3, [8 if deflate else 1]),
        (262, 3, [photometric]),
        (273, 4, [0]),
        (277, 3, [channels]),
        (278, 3, [height]),
        (279, 4, [len(data)]),
        (339, 3, [2 if signed else 1] * channels),
    ]
    after = 8 + 2 + 12 * len(entries) + 4
    extra = b""
    directory = struct.pack(f"{order}H", len(entries))
    extra_size = sum(2 * len(v) for _, k, v in entries if k == 3 and len(v) > 2)
    for tag, kind, values in entries:
        if tag == 273:
            values = [after + extra_size]
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", after + len(extra)), extra + packed
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8) + directory + bytes(4) + extra + data


def ramp(top, height=5, width=7):
    """[H, W] int64 from 0 to `top`, both included."""
    return np.linspace(0, top, height * width).round().astype(np.int64).reshape(height, width)


def scaled(samples, top):
    """The 8-bit values that `samples` of [0, top] should have, in float64."""
    return np.floor(samples * 255.0 / top + 0.5).astype(np.uint8)
