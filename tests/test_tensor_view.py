"""The border of the extension: what arrays it reads, what it refuses, and whose memory it gives back.

`_C.cut_crops` is the probe: images are an input of several types, crops an output.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffmic_fast import _native

_C = _native.extension()


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Legacy(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = [ctypes.py_object]


class Producer:
    """An array of another library, every field of whose DLPack description can be set.

    The description stays alive for as long as the producer does, so a deleter that runs late or
    twice is counted instead of crashing.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        versioned: bool = True,
        compact: bool = False,
        keyword: bool = True,
        deleter: bool = True,
        device: tuple[int, int] = (1, 0),
        **fields: Any,
    ) -> None:
        self.array = array
        self.deleted = 0
        self.asked: list[dict[str, Any]] = []
        self.device = device
        self.keyword = keyword
        kinds = {"u": 1, "i": 0, "f": 2}
        self.managed = _Versioned() if versioned else _Legacy()
        self.name = b"dltensor_versioned" if versioned else b"dltensor"
        tensor = self.managed.tensor
        tensor.data = array.ctypes.data
        tensor.device_type, tensor.device_id = device
        tensor.ndim = array.ndim
        tensor.code, tensor.bits = kinds[array.dtype.kind], array.itemsize * 8
        tensor.lanes = 1
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        tensor.shape = self.shape
        if not compact:
            tensor.strides = self.strides
        self.managed.deleter = _DELETER(self._delete) if deleter else _DELETER()
        if versioned:
            self.managed.major, self.managed.minor = 1, 0
        for name, value in fields.items():
            setattr(self.managed if hasattr(self.managed, name) else tensor, name, value)

    def _delete(self, _: int) -> None:
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **keywords: Any) -> object:
        self.asked.append(keywords)
        if keywords and not self.keyword:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.capsule = _new_capsule(ctypes.addressof(self.managed), self.name, None)
        return self.capsule


_FROM_OBJECT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


class _Exchange(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_object", _FROM_OBJECT),
    ]


def exchanging(major: int = 1, older: int | None = None) -> type[Producer]:
    """A class of producers with a C exchange table; `served` counts what went through it."""

    def from_object(address: int, out: Any) -> int:
        array = ctypes.cast(address, ctypes.py_object).value
        array.served += 1
        out[0] = ctypes.addressof(array.managed)
        return 0

    table = _Exchange(major, 3, older, None, _FROM_OBJECT(from_object))

    class Exchanging(Producer):
        __dlpack_c_exchange_api__ = _new_capsule(
            ctypes.addressof(table), b"dlpack_exchange_api", None
        )
        _table = table
        served = 0

    return Exchanging


@pytest.fixture
def pixels() -> np.ndarray:
    return np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)


ORIGINS = np.zeros((2, 1, 2), dtype=np.int64)


def cut(images: Any, origins: Any = ORIGINS, out: Any = None) -> np.ndarray:
    crops = np.empty((2, 1, 3, 4, 5), np.float32) if out is None else out
    _C.cut_crops(images, origins, False, crops)
    return crops


def whole(crops: np.ndarray) -> np.ndarray:
    return crops[:, 0]


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("compact", [True, False])
def test_reads_either_capsule_and_gives_it_back_once(
    pixels: np.ndarray, versioned: bool, compact: bool
) -> None:
    producer = Producer(pixels, versioned=versioned, compact=compact)
    np.testing.assert_array_equal(whole(cut(producer)), pixels)
    assert producer.deleted == 1
    assert _capsule_name(producer.capsule) == b"used_" + producer.name
    assert producer.asked == [{"max_version": (1, 0)}]


def test_a_producer_of_the_first_protocol_is_asked_without_the_keyword(pixels: np.ndarray) -> None:
    producer = Producer(pixels, versioned=False, keyword=False)
    np.testing.assert_array_equal(whole(cut(producer)), pixels)
    assert producer.asked == [{"max_version": (1, 0)}, {}]
    assert producer.deleted == 1


def test_a_null_deleter_is_allowed(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(whole(cut(Producer(pixels, deleter=False))), pixels)


def test_byte_offset_is_added(pixels: np.ndarray) -> None:
    producer = Producer(pixels)
    producer.managed.tensor.data -= 64
    producer.managed.tensor.byte_offset = 64
    np.testing.assert_array_equal(whole(cut(producer)), pixels)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"major": 2}, ValueError, "comes in DLPack version 2.0, version 1 was asked for"),
        ({"lanes": 4}, TypeError, "got float32 in vectors of 4 lanes"),
        ({"code": 5, "bits": 64}, TypeError, "got complex64"),
        ({"code": 6, "bits": 8}, TypeError, "got bool$"),
        ({"code": 17, "bits": 4}, TypeError, "got DLPack type code 17 of bits 4"),
        ({"code": 0}, TypeError, "got int32"),
        ({"ndim": 3}, ValueError, r"must be \[B, Ch, H, W\], got \(2, 3, 4\)"),
        ({"ndim": -1}, ValueError, "damaged"),
        ({"data": None}, ValueError, "data pointer is NULL"),
        ({"byte_offset": 2}, ValueError, "multiple of its element size, 4 bytes"),
        ({"device_type": 2, "device_id": 3}, ValueError, "must be on the CPU, got cuda:3"),
    ],
)
def test_a_refused_description_is_still_given_back_once(
    pixels: np.ndarray, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    producer = Producer(pixels, **fields)
    with pytest.raises(error, match=r"^rois\.cut_crops: images .*" + message):
        cut(producer)
    assert producer.deleted == 1


@pytest.mark.parametrize(
    ("sizes", "strides", "message"),
    [
        ((2, 3, -4, 5), None, "negative size"),
        ((2**40, 2**40, 1, 1), None, "more memory than an address can name"),
        ((2, 3, 4, 5), (2**62, 2**62, 5, 1), "more memory than an address can name"),
    ],
)
def test_sizes_that_overflow_are_refused(
    pixels: np.ndarray, sizes: tuple[int, ...], strides: tuple[int, ...] | None, message: str
) -> None:
    producer = Producer(pixels)
    producer.shape[:] = sizes
    if strides is not None:
        producer.strides[:] = strides
    with pytest.raises(ValueError, match=message):
        cut(producer)
    assert producer.deleted == 1


def test_another_device_is_refused_before_its_capsule_is_asked_for(pixels: np.ndarray) -> None:
    producer = Producer(pixels, device=(2, 1))
    with pytest.raises(
        ValueError, match=r"^rois\.cut_crops: images must be on the CPU, got cuda:1"
    ):
        cut(producer)
    assert producer.asked == []


def test_pinned_memory_is_host_memory(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(whole(cut(Producer(pixels, device=(3, 0)))), pixels)


def test_a_used_capsule_is_refused(pixels: np.ndarray) -> None:
    producer = Producer(pixels)
    producer.name = b"used_dltensor_versioned"
    with pytest.raises(ValueError, match="no DLPack capsule that is still unused"):
        cut(producer)
    assert producer.deleted == 0


def test_read_only_memory_is_an_input_but_no_output(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(whole(cut(Producer(pixels, flags=1))), pixels)
    crops = Producer(np.zeros((2, 1, 3, 4, 5), np.float32), flags=1)
    with pytest.raises(ValueError, match=r"^rois\.cut_crops: crops is read-only memory"):
        cut(pixels, out=crops)
    assert crops.deleted == 1
    assert not crops.array.any()


def test_read_only_numpy_arrays(pixels: np.ndarray) -> None:
    pixels.flags.writeable = False
    np.testing.assert_array_equal(whole(cut(pixels)), pixels)
    crops = np.zeros((2, 1, 3, 4, 5), np.float32)
    crops.flags.writeable = False
    with pytest.raises(ValueError, match="crops"):
        cut(pixels, out=crops)


def test_a_later_argument_that_fails_gives_the_earlier_ones_back(pixels: np.ndarray) -> None:
    producer = Producer(pixels)
    with pytest.raises(TypeError, match=r"origins must be int64, got float32"):
        cut(producer, ORIGINS.astype(np.float32))
    assert producer.deleted == 1


def test_no_reference_is_left_behind(pixels: np.ndarray) -> None:
    tensor = torch.from_numpy(pixels)
    before = sys.getrefcount(pixels), sys.getrefcount(tensor)
    for _ in range(3):
        cut(pixels)
        cut(tensor)
        with pytest.raises(TypeError):
            cut(tensor, ORIGINS.astype(np.float32))
    gc.collect()
    assert (sys.getrefcount(pixels), sys.getrefcount(tensor)) == before


def test_the_exchange_table_of_a_type_is_used(pixels: np.ndarray) -> None:
    producer = exchanging()(pixels)
    np.testing.assert_array_equal(whole(cut(producer)), pixels)
    assert (producer.served, producer.asked, producer.deleted) == (1, [], 1)
    read_only = exchanging()(np.empty((2, 1, 3, 4, 5), np.float32), flags=1)
    with pytest.raises(ValueError, match="crops is read-only memory"):
        cut(pixels, out=read_only)
    assert read_only.deleted == 1
    elsewhere = exchanging()(pixels, device=(2, 1))
    with pytest.raises(ValueError, match="must be on the CPU, got cuda:1"):
        cut(elsewhere)
    assert elsewhere.deleted == 1


def test_a_subclass_and_a_later_version_are_asked_by_the_protocol(pixels: np.ndarray) -> None:
    base = exchanging()
    for kind in (type("Sub", (base,), {}), exchanging(major=2)):
        producer = kind(pixels)
        np.testing.assert_array_equal(whole(cut(producer)), pixels)
        assert (producer.served, len(producer.asked), producer.deleted) == (0, 1, 1)
    newer = exchanging(major=2, older=ctypes.addressof(base._table))(pixels)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(whole(cut(newer)), pixels)
    assert (newer.served, newer.asked) == (1, [])


def test_layouts_that_are_no_memory_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images cannot be read through DLPack"):
        cut(torch.from_numpy(pixels).to_sparse())
    with pytest.raises(ValueError, match="images"):
        cut(torch.empty(2, 3, 4, 5, device="meta"))


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[:, :, ::-1],
        lambda a: a[:, ::-1, :, ::-1],
        lambda a: a.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2),
        lambda a: np.broadcast_to(a[:1, :1], a.shape),
        lambda a: np.stack([a, -a], axis=-1)[..., 1],
    ],
    ids=["rows reversed", "two reversed", "transposed", "broadcast", "every second"],
)
def test_strides_of_numpy(pixels: np.ndarray, view: Callable[[np.ndarray], np.ndarray]) -> None:
    array = view(pixels)
    np.testing.assert_array_equal(whole(cut(array)), array)


def test_an_unaligned_array_is_refused() -> None:
    memory = np.zeros(2 * 3 * 4 * 5 * 4 + 1, np.uint8)
    start = 1 if memory.ctypes.data % 4 == 0 else 0
    array = np.ndarray((2, 3, 4, 5), np.float32, memory, offset=start)
    with pytest.raises(ValueError, match="must start at a multiple of its element size, 4 bytes"):
        cut(array)


def test_another_byte_order_is_refused(pixels: np.ndarray) -> None:
    swapped = pixels.astype(pixels.dtype.newbyteorder())
    with pytest.raises(ValueError, match=r"images cannot be read through DLPack: .*byte order"):
        cut(swapped)


def test_a_tensor_that_requires_grad_is_refused_with_the_reason(pixels: np.ndarray) -> None:
    tensor = torch.from_numpy(pixels).requires_grad_()
    with pytest.raises(ValueError, match=r"images cannot be read through DLPack: .*grad"):
        cut(tensor)


def test_a_pending_negation_is_refused() -> None:
    tensor = torch.zeros(2, 3, 4, 5, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    with pytest.raises(ValueError, match="lazily negated"):
        cut(tensor)


@pytest.mark.parametrize("value", [None, [[1.0]], 3, "images"])
def test_no_array_at_all(value: object) -> None:
    with pytest.raises(TypeError, match=rf"images must be an array .*got {type(value).__name__}"):
        cut(value)


def test_an_interrupt_passes_through(pixels: np.ndarray) -> None:
    class Interrupted(Producer):
        def __dlpack__(self, **keywords: Any) -> object:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(Interrupted(pixels))


def test_outputs_must_be_compact_and_apart_from_the_inputs(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="crops must be compact and row-major"):
        cut(pixels, out=np.empty((2, 1, 3, 4, 10), np.float32)[..., ::2])
    both = np.zeros(2 * 2 * 3 * 4 * 5 - 1, np.float32)
    crops = both[119:].reshape(2, 1, 3, 4, 5)
    images = both[:120].reshape(2, 3, 4, 5)
    with pytest.raises(ValueError, match="crops must not share memory with images"):
        cut(images, out=crops)


def test_outputs_must_have_their_shape_and_type(pixels: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"crops must have shape \(2, 1, 3, 4, 5\), got \(2, 2, 3, 4, 5\)"
    ):
        cut(pixels, out=np.empty((2, 2, 3, 4, 5), np.float32))
    with pytest.raises(TypeError, match="crops must be float32, got float64"):
        cut(pixels, out=np.empty((2, 1, 3, 4, 5), np.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.float64])
def test_types_of_torch(dtype: torch.dtype) -> None:
    images = torch.arange(120).reshape(2, 3, 4, 5).to(dtype)
    crops = torch.empty(2, 1, 3, 4, 5, dtype=dtype)
    cut(images, out=crops)
    assert torch.equal(crops[:, 0], images)
