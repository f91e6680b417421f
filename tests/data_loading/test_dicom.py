"""DICOM files: window, rescale, VOI LUT, photometric interpretation, refusals."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from data_loading.image_files import ramp, scaled

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.data.bit_depth import depth_notice
from diffmic_fast.data.decode import UnreadableImageError, load_image
from diffmic_fast.data.inputs import load_images
from diffmic_fast.data.transforms import evaluation_transform

pydicom = pytest.importorskip("pydicom", minversion="3")


@pytest.fixture
def write(tmp_path):
    def save(
        samples, *, bits=12, photometric="MONOCHROME2", signed=False, name="x.dcm", **elements
    ):
        allocated = 8 if bits <= 8 else 16
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        dataset.SOPInstanceUID = "1.2.3"
        dataset.Rows, dataset.Columns = samples.shape[:2]
        dataset.SamplesPerPixel = 3 if samples.ndim == 3 else 1
        if samples.ndim == 3:
            dataset.PlanarConfiguration = 0
        dataset.PhotometricInterpretation = photometric
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, bits, bits - 1
        dataset.PixelRepresentation = int(signed)
        kind = f"<{'i' if signed else 'u'}{allocated // 8}"
        data = samples.astype(kind).tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
        for key, value in elements.items():
            if value is None:
                delattr(dataset, key)
            else:
                setattr(dataset, key, value)
        path = tmp_path / name
        dataset.save_as(path, enforce_file_format=True)
        return path

    return save


def lookup(values, first=0, bits=8):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", [int(v) for v in values])
    return [item]


def test_a_path_becomes_the_tensor_of_the_command_line(write):
    path = write(ramp(4095), bits=16)
    settings = Preprocessing(bit_depth=12)
    expected = evaluation_transform(6, settings)(load_image(path, bit_depth=12))
    assert (load_images("test", [str(path)], 6, settings)[0] == expected).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 15])
def test_bits_stored_are_the_range_without_a_window(write, bits):
    samples = ramp(2**bits - 1)
    path = write(samples, bits=bits, name="image")  # known by its content
    for bit_depth in (12, 16):
        pixels = load_image(path, bit_depth=bit_depth)
        assert pixels.shape == (5, 7, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels[..., 1], scaled(samples, 2**bits - 1))


def test_16_bits_stored_follow_the_setting_and_are_noticed(write):
    path = write(ramp(4095), bits=16)
    assert np.array_equal(load_image(path, bit_depth=12)[..., 0], scaled(ramp(4095), 4095))
    assert "bit_depth=12" in depth_notice([path], 16)
    assert depth_notice([write(ramp(100), bits=12)], 16) is None


def test_monochrome1_is_inverted_once(write):
    plain = load_image(write(ramp(4095)))
    assert np.array_equal(load_image(write(ramp(4095), photometric="MONOCHROME1")), 255 - plain)
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    plain = load_image(write(ramp(4095), **window))
    path = write(ramp(4095), photometric="MONOCHROME1", PresentationLUTShape="INVERSE", **window)
    assert np.array_equal(load_image(path), 255 - plain)
    with pytest.raises(UnreadableImageError, match="Presentation LUT Shape must fit MONOCHROME2"):
        load_image(write(ramp(4095), PresentationLUTShape="INVERSE"))


@pytest.mark.parametrize("signed", [False, True])
def test_the_first_window_is_applied_after_rescaling(write, signed):
    """A CT: stored + intercept is in Hounsfield units, [-160, 240] is shown."""
    hounsfield = np.array([[-2000, -161, -159], [40, 239, 1000]])
    intercept = 0 if signed else -2048
    path = write(
        hounsfield - intercept,
        bits=16 if signed else 12,
        signed=signed,
        RescaleSlope=1,
        RescaleIntercept=intercept,
        WindowCenter=[40, 400],
        WindowWidth=[400, 2000],
    )
    # PS3.3 C.11.2.1.2: y = ((x - (c - 0.5)) / (w - 1) + 0.5) over the range of the output
    expected = [(x - 39.5) / 399 + 0.5 for x in hounsfield.ravel().tolist()]
    expected = np.floor(np.clip(expected, 0, 1) * 255 + 0.5).reshape(2, 3)
    assert np.array_equal(load_image(path)[..., 0], expected)


def test_sigmoid_and_exact_windows(write):
    samples = np.array([[0, 1000, 2000, 3000, 4095]])
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    path = write(samples, VOILUTFunction="LINEAR_EXACT", **window)
    assert load_image(path)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    path = write(samples, VOILUTFunction="SIGMOID", **window)
    expected = 255 / (1 + np.exp(-4 * (samples[0] - 2000) / 1000))
    np.testing.assert_allclose(load_image(path)[0, :, 0], expected, atol=0.51)


def test_lookup_tables_are_applied(write):
    samples = np.array([[0, 1, 2, 3]])
    path = write(samples, VOILUTSequence=lookup([10, 200, 30, 255]), WindowCenter=1, WindowWidth=2)
    assert load_image(path)[0, :, 0].tolist() == [10, 200, 30, 255]
    path = write(samples, ModalityLUTSequence=lookup([0, 128, 64, 255]))
    assert load_image(path)[0, :, 0].tolist() == [0, 128, 64, 255]
    path = write(
        samples, RescaleSlope=1, RescaleIntercept=1, VOILUTSequence=lookup([1, 2, 3, 4], first=1)
    )
    assert load_image(path)[0, :, 0].tolist() == [1, 2, 3, 4]


def test_a_negative_slope_inverts(write):
    path = write(ramp(4095), RescaleSlope=-1, RescaleIntercept=0)
    assert np.array_equal(load_image(path)[..., 0], 255 - scaled(ramp(4095), 4095))


def test_colour_is_converted_to_rgb(write):
    colour = np.array([[[255, 0, 0], [0, 128, 255]]])
    assert load_image(write(colour, bits=8, photometric="RGB")).tolist() == colour.tolist()
    ybr = np.array([[[76, 85, 255], [128, 128, 128]]])
    pixels = load_image(write(ybr, bits=8, photometric="YBR_FULL"))
    np.testing.assert_allclose(pixels, [[[254, 0, 0], [128, 128, 128]]], atol=2)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 3}, "single-frame image, got a multi-frame one with 3 frames"),
        ({"SharedFunctionalGroupsSequence": []}, "multi-frame one with 1 frame;"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "got PALETTE COLOR with 1"),
        ({"PixelData": None}, "must have Pixel Data"),
        ({"PixelRepresentation": 1}, "their range is not known"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "Window Width"),
        ({"Rows": 500}, "pixel data"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(write, elements, message):
    with pytest.raises(UnreadableImageError, match=message):
        load_image(write(ramp(4095), **elements))


def test_a_missing_pydicom_is_named(write, monkeypatch):
    path = write(ramp(4095))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnreadableImageError, match=r"pip install 'diffmic_fast\[dicom\]'"):
        load_image(path)
