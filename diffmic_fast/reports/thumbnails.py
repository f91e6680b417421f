"""Small pictures for pages, as data URIs."""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffmic_fast._optional import require

SIDE = 224  # pixels
# With base64, the overlay and the text of an image, 1,000 images stay below 50 MB.
MAX_BYTES = 24_000
_QUALITIES = (82, 70, 55, 40, 25, 10)
_OVERLAY_SIDE = 56
_LEVELS = 64


def thumbnail(image: NDArray[np.uint8]) -> str:
    """A JPEG of at most `SIDE` pixels a side and, except for noise at the lowest quality, `MAX_BYTES`.

    Args:
        image: [H, W, 3].
    """
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= MAX_BYTES:
            break
    return _uri("image/jpeg", content)


def heat_map(saliency: NDArray[np.float32]) -> str:
    """A transparent PNG of saliency, more opaque where it is higher, to be stretched over the image.

    Args:
        saliency: [h, w]; its smallest value is drawn as 0 and its largest as 1.
    """
    low, high = float(saliency.min()), float(saliency.max())
    heat = (saliency - low) / (high - low) if high > low else np.zeros_like(saliency)
    large = Image.fromarray(heat.astype(np.float32)).resize(
        (_OVERLAY_SIDE, _OVERLAY_SIDE), Image.Resampling.BILINEAR
    )
    levels = np.clip(np.asarray(large) * (_LEVELS - 1) + 0.5, 0, _LEVELS - 1).astype(np.uint8)
    picture = Image.fromarray(levels)
    colours, alpha = _palette()
    picture.putpalette(colours)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, transparency=alpha)
    return _uri("image/png", file.getvalue())


@functools.cache
def _palette() -> tuple[bytes, bytes]:
    """Colours and opacities of the levels: nothing at 0, two thirds opaque at 1."""
    matplotlib = require("matplotlib", extra="report", purpose="writing a report")
    heat = np.linspace(0, 1, _LEVELS)
    colours = matplotlib.colormaps["inferno"](heat, bytes=True)[:, :3]
    alpha = np.round(255 * 0.65 * heat).astype(np.uint8)
    return np.ascontiguousarray(colours).tobytes(), alpha.tobytes()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
