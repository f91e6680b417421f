"""DICOM files, read by pydicom (the extra `dicom`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffmic_fast._optional import require
from diffmic_fast.data.samples import Decoded, SampleRange, as_rgb, scale, setting_range

PREAMBLE = 128
_MAGIC = b"DICM"
_GREY = ("MONOCHROME1", "MONOCHROME2")
# Far outside any window, so that pydicom returns the ends of the range that it maps a window to.
_OUTSIDE = np.array([-1e12, 1e12])


def is_dicom(head: bytes) -> bool:
    """Whether a file begins like a DICOM file (PS3.10, section 7.1), by its first 132 bytes."""
    return head[PREAMBLE : PREAMBLE + len(_MAGIC)] == _MAGIC


def decode_dicom(path: str | Path, bit_depth: int) -> Decoded:
    """Decode a DICOM file with one frame.

    Grey: Modality LUT or rescale slope and intercept, then VOI LUT or window (the first of several), as pydicom applies
    them; the range that these map to becomes [0, 255], and MONOCHROME1 is inverted after that. Without a window the
    range is that of Bits Stored, and for 16 bits stored that of `bit_depth`. Colour (RGB, YBR) is converted to RGB.

    Args:
        path: the file.
        bit_depth: bits in use of files with 16 bits stored, unsigned, that have no window.

    Raises:
        MissingPackageError: pydicom is not installed.
        ValueError: the file has several frames, no pixels, a photometric interpretation that is not supported, or
            signed or more than 16-bit samples without a window.
        Exception: what pydicom raises on damaged files and on compressions that it has no decoder for.
    """
    pydicom = require("pydicom", extra="dicom", purpose="reading DICOM")
    pixels = require("pydicom.pixels", extra="dicom", purpose="reading DICOM")
    dataset = pydicom.dcmread(path)
    _check(dataset)
    samples = pixels.pixel_array(dataset, raw=False)
    bits = int(dataset.BitsStored)
    declared = SampleRange(2**bits - 1, f"the file has {bits} bits stored")
    if dataset.SamplesPerPixel == 3:
        return Decoded(scale(samples, declared))
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    shape = str(dataset.get("PresentationLUTShape", "INVERSE" if inverted else "IDENTITY"))
    if shape != ("INVERSE" if inverted else "IDENTITY"):
        raise ValueError(
            f"its Presentation LUT Shape must fit {dataset.PhotometricInterpretation}, got {shape}"
        )
    largest = None
    if dataset.get("VOILUTSequence") or "WindowWidth" in dataset or "WindowCenter" in dataset:
        grey = _windowed(pixels, dataset, samples)
    elif dataset.get("ModalityLUTSequence"):
        top = 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
        grey = scale(
            pixels.apply_modality_lut(samples, dataset), SampleRange(top, "its Modality LUT")
        )
    else:
        if dataset.PixelRepresentation != 0 or bits > 16:
            raise ValueError(
                "its samples are signed or have more than 16 bits and it has no window (Window Center, Window "
                "Width), so their range is not known"
            )
        limits = setting_range(bit_depth) if bits == 16 else declared
        grey = scale(samples, limits)
        if float(dataset.get("RescaleSlope") or 1) < 0:
            inverted = not inverted
        largest = int(samples.max()) if limits.from_setting else None
    return Decoded(as_rgb(255 - grey if inverted else grey), largest)


def _check(dataset: Any) -> None:
    """Raise a ValueError that names what of the file is not supported."""
    if "PixelData" not in dataset:
        raise ValueError("it must have Pixel Data of whole numbers, got none")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1 or "SharedFunctionalGroupsSequence" in dataset:
        raise ValueError(
            f"it must be a single-frame image, got a multi-frame one with {frames} frame{'s' * (frames != 1)}; "
            "save each frame as a file"
        )
    photometric = str(dataset.get("PhotometricInterpretation", "none"))
    planes = dataset.get("SamplesPerPixel")
    colour = photometric == "RGB" or photometric.startswith("YBR_")
    if not (planes == 1 and photometric in _GREY) and not (planes == 3 and colour):
        raise ValueError(
            f"its Photometric Interpretation must be {', '.join(_GREY)} (1 sample per pixel), RGB or YBR (3), got "
            f"{photometric} with {planes}"
        )


def _windowed(pixels: Any, dataset: Any, samples: np.ndarray) -> np.ndarray:
    """[H, W] uint8: modality and first VOI transform, whose output range becomes [0, 255]."""
    values = pixels.apply_modality_lut(samples, dataset)
    if dataset.get("VOILUTSequence"):
        whole = np.rint(values).astype(np.int64)
        if not np.array_equal(whole, values):
            raise ValueError(
                "its VOI LUT needs whole numbers, but its rescale slope gives fractions"
            )
        top = 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return scale(pixels.apply_voi(whole, dataset, index=0), SampleRange(top, "its VOI LUT"))
    mapped = pixels.apply_windowing(values, dataset, index=0)
    with np.errstate(over="ignore"):  # the exponential of a sigmoid window
        low, high = pixels.apply_windowing(_OUTSIDE, dataset, index=0)
    if not np.isfinite([low, high]).all() or low == high:
        raise ValueError(f"its window must map to a finite range, got {low} … {high}")
    return np.floor((mapped - low) / (high - low) * 255 + 0.5).clip(0, 255).astype(np.uint8)
