"""Constant tensors: what the file says of them at once, and their values when they are first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from accaware.formats import IntFormat

Array = NDArray[Any]
Step = tuple[Literal["transpose", "reshape"], tuple[int, ...]]

BLOCK = 2**20  # elements per step where values are computed: bounds the memory of temporaries
SMALL = 2**20  # elements of the largest constant that is computed rather than read


class UnreadableError(ValueError):
    """Why the integers of a tensor or of a node are not known. It ends in the list of what is unproven."""


@dataclass(frozen=True)
class Element:
    """A type of elements: how numpy holds it, its bits in the file, and the integers it has (None: floats)."""

    dtype: np.dtype[Any]
    bits: int
    codes: IntFormat | None
    field: str = "int32_data"


def _elements() -> Iterator[tuple[int, Element]]:
    for name in ("UINT8", "INT8", "UINT16", "INT16", "INT32"):
        info = np.iinfo(name.lower())
        yield getattr(TensorProto, name), Element(info.dtype, info.bits, IntFormat(int(info.min), int(info.max)))
    for bits in (2, 4):
        for name, dtype, codes in (
            (f"UINT{bits}", np.uint8, IntFormat.unsigned(bits)),
            (f"INT{bits}", np.int8, IntFormat.signed(bits)),
        ):
            if hasattr(TensorProto, name):  # two bits came with onnx 1.20
                yield getattr(TensorProto, name), Element(np.dtype(dtype), bits, codes)
    yield TensorProto.UINT32, Element(np.dtype(np.uint32), 32, IntFormat(0, 2**32 - 1), "uint64_data")
    yield TensorProto.INT64, Element(np.dtype(np.int64), 64, IntFormat(-(2**63), 2**63 - 1), "int64_data")
    yield TensorProto.BOOL, Element(np.dtype(np.bool_), 8, IntFormat(0, 1))
    yield TensorProto.FLOAT16, Element(np.dtype(np.float16), 16, None)
    yield TensorProto.FLOAT, Element(np.dtype(np.float32), 32, None, "float_data")
    yield TensorProto.DOUBLE, Element(np.dtype(np.float64), 64, None, "double_data")


#: Types of elements that are read, by ONNX's number. Others (strings, 8-bit floats, complex) are not.
ELEMENTS = dict(_elements())


@dataclass(frozen=True)
class Origin:
    """Where an array comes from: tensor `name` of this shape, through `steps`.

    computed: its values are not the tensor's own, but were computed from them (quantized, clipped).
    """

    name: str
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    computed: bool = False

    def replay(self, array: Array) -> Array:
        """The steps, done to any array of the tensor's shape."""
        for kind, argument in self.steps:
            array = array.transpose(argument) if kind == "transpose" else array.reshape(argument)
        return array


@dataclass(frozen=True, eq=False)
class Constant:
    """An array that the file fixes. codes: the integers that its type has, None for floats.

    `array` is read or computed when first asked for, once, and raises `UnreadableError` where that cannot be done.
    """

    origin: Origin
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codes: IntFormat | None
    load: Callable[[], Array] = field(repr=False)

    @classmethod
    def of(cls, name: str, array: Array) -> Constant:
        """A constant with these values."""
        codes = next((e.codes for e in ELEMENTS.values() if e.dtype == array.dtype and e.bits >= 8), None)
        return cls(Origin(name, array.shape, computed=True), array.shape, array.dtype, codes, lambda: array)

    @cached_property
    def array(self) -> Array:
        """The values."""
        return self.load()

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def small(self) -> Array:
        """The values of a constant that may be computed with. Raises `UnreadableError` for a large one."""
        if self.size > SMALL:
            raise UnreadableError(f"constant '{self.origin.name}' of {self.size} elements is too large to compute with")
        return self.array

    def transposed(self, order: tuple[int, ...]) -> Constant:
        """A view with the dimensions in this order."""
        if sorted(order) != list(range(len(self.shape))):
            raise UnreadableError(
                f"constant '{self.origin.name}' of shape {list(self.shape)} is transposed by {list(order)}"
            )
        shape = tuple(self.shape[i] for i in order)
        return self._moved(("transpose", order), shape, lambda: self.array.transpose(order))

    def reshaped(self, shape: tuple[int, ...]) -> Constant:
        """The same values in another shape."""
        if math.prod(shape) != self.size:
            raise UnreadableError(
                f"constant '{self.origin.name}' of shape {list(self.shape)} is reshaped to {list(shape)}"
            )
        return self._moved(("reshape", shape), shape, lambda: self.array.reshape(shape))

    def _moved(self, step: Step, shape: tuple[int, ...], load: Callable[[], Array]) -> Constant:
        origin = replace(self.origin, steps=(*self.origin.steps, step))
        return replace(self, origin=origin, shape=shape, load=load)

    def computed(self, codes: IntFormat | None, block: Callable[[Array, slice], Array], dtype: Any = None) -> Constant:
        """New values from these, one block along the first dimension at a time: `block` gets it and its slice.

        codes: the integers that they are; None for floats, of which `dtype` is the type.
        """
        dtype = np.dtype(dtype) if codes is None or dtype else smallest(codes)

        def load() -> Array:
            source = self.array if self.shape else self.array.reshape(1)
            result = np.empty(source.shape, dtype)
            step = max(1, BLOCK // max(1, source[:1].size))
            for part in (slice(i, i + step) for i in range(0, len(source), step)):
                result[part] = block(source[part], part)
            result.flags.writeable = False
            return result.reshape(self.shape)

        return replace(self, origin=replace(self.origin, computed=True), dtype=dtype, codes=codes, load=load)


def smallest(codes: IntFormat) -> np.dtype[Any]:
    """The smallest type of numpy that holds these integers."""
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64):
        info = np.iinfo(dtype)
        if info.min <= codes.lo and codes.hi <= info.max:
            return info.dtype
    raise AssertionError(codes)


def shape_of(tensor: TensorProto) -> tuple[int, ...]:
    """The dimensions of a tensor message. Raises `ValueError` where they are impossible."""
    shape = tuple(tensor.dims)
    if any(d < 0 for d in shape) or len(shape) > 32 or math.prod(d for d in shape if d) >= 2**62:
        raise ValueError(f"tensor '{tensor.name}' has impossible dimensions {list(shape)[:8]}")
    return shape


def packed_bytes(element: Element, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor in the file."""
    return -(-math.prod(shape) * element.bits // 8)


def unpack(element: Element, shape: tuple[int, ...], data: Any) -> Array:
    """The array [shape] in `data`, little-endian bytes; a view, unless several elements share a byte."""
    if element.bits >= 8:
        return np.frombuffer(data, element.dtype.newbyteorder("<"), math.prod(shape)).reshape(shape)
    packed = np.frombuffer(data, np.uint8)
    per_byte = 8 // element.bits
    values = np.empty((len(packed), per_byte), element.dtype)
    for i in range(per_byte):
        if element.dtype == np.int8:  # shift the sign bit to the top, and back with copies of it
            values[:, i] = (packed << (8 - element.bits * (i + 1))).view(np.int8) >> (8 - element.bits)
        else:
            values[:, i] = packed >> element.bits * i & (2**element.bits - 1)
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)


def listed(element: Element, shape: tuple[int, ...], values: Any) -> Array:
    """The array [shape] in `values`, the numbers of a typed field of a tensor message."""
    if element.bits < 8:
        return unpack(element, shape, np.fromiter((v & 255 for v in values), np.uint8, len(values)))
    if element.codes is None and element.bits == 16:  # half floats are listed as their bits
        bits = np.fromiter((v & 65535 for v in values), np.uint16, len(values))
        return bits.view(element.dtype).reshape(shape)
    wide = np.fromiter(values, np.float64 if element.codes is None else np.int64, len(values))
    if element.codes and wide.size and not element.codes.lo <= wide.min() <= wide.max() <= element.codes.hi:
        raise UnreadableError(f"values outside [{element.codes.lo}, {element.codes.hi}], which their type has")
    return wide.astype(element.dtype).reshape(shape)
