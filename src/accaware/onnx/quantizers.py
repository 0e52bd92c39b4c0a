"""The operations that make codes: QDQ and dynamic quantization of ONNX, and the nodes of QONNX.

Codes of constants are computed as the executors compute them: onnxruntime for QuantizeLinear, qonnx for Quant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from accaware.formats import IntFormat
from accaware.onnx.facts import (
    ONE,
    ZERO,
    Call,
    Codes,
    Fact,
    Floats,
    Reals,
    Reals64,
    common_axis,
    constant,
    dequantized_to,
    floats_of,
    integers,
    interval,
    parameter,
    rounded,
    unit,
)
from accaware.onnx.ranges import Handler
from accaware.onnx.tensors import ELEMENTS, Array, Constant, UnreadableError

UINT8 = IntFormat(0, 255)

#: By the names of qonnx, in capitals; numpy's round takes halves to even.
ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "ROUND": np.round,
    "HALF_EVEN": np.round,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": lambda x: np.sign(x) * np.ceil(np.abs(x)),
    "DOWN": np.trunc,
    "HALF_UP": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
    "HALF_DOWN": lambda x: np.sign(x) * np.ceil(np.abs(x) - 0.5),
}


_ROUNDINGS_OF_A_QUANTIZER = 16  # division and offset, and what kernels that join it to other operations do otherwise


def _reached(
    fact: Fact,
    scale: Reals64,
    zero: Reals64,
    codes: IntFormat,
    rounding: Callable[[Array], Array],
    floats: Floats | None,
) -> IntFormat:
    """The codes that a quantizer with range `codes`, computed in `floats`, gives the values of a tensor."""
    lo, hi = interval(fact)
    low, high = lo / scale, hi / scale
    room = _ROUNDINGS_OF_A_QUANTIZER * unit(floats)
    ends = []
    for end, slack in ((low, -room), (high, room)):
        moved = end + zero + slack * (np.abs(end) + np.abs(zero))
        # In half floats onnxruntime makes 32-bit integers of them before it saturates, whatever becomes of larger ones.
        if np.isnan(moved).any() or (floats == np.float16 and np.abs(moved).max() >= 2**31):
            return codes
        code = rounding(np.clip(moved, codes.lo, codes.hi))
        ends.append((int(code.min()), int(code.max())))
    return IntFormat(ends[0][0], ends[1][1])


def _scale(call: Call, index: int | None) -> Reals64 | None:
    """The scale in an input of a node: 1 where there is none, None where it is not constant."""
    if index is None:
        return ONE
    values = constant(call.fact(index))
    if values is None:
        return None
    if values.ndim > 1 and values.size > 1:
        raise UnreadableError("its scale varies in blocks, so taps of one output have several scales")
    scale, _ = parameter(values, "scale")
    if not (scale > 0).all():
        raise UnreadableError("its scale is not positive")
    return scale


def _zero(call: Call, index: int) -> Reals64 | IntFormat:
    """The zero-point in an input of a node: 0 where there is none, its range where it is not constant."""
    if not call.has(index):
        return ZERO
    fact = call.fact(index)
    values = constant(fact)
    if values is not None:
        if values.ndim > 1 and values.size > 1:
            raise UnreadableError("its zero-point varies in blocks, or from matrix to matrix")
        return parameter(values, "zero-point")[0]
    codes = integers(fact)
    if codes is None:
        raise UnreadableError("its zero-point is not known")
    return codes.format


def quantize_linear(call: Call) -> list[Fact]:
    zero = call.fact(2) if call.has(2) else None
    codes: IntFormat | None = UINT8
    if isinstance(zero, Constant):
        codes = zero.codes
    elif isinstance(zero, Codes):
        codes = zero.type
    elif zero is not None:
        codes = None
    elif call.node.get("output_dtype", 0):
        element = ELEMENTS.get(call.node.get("output_dtype", 0))
        codes = element.codes if element else None
    if codes is None:
        raise UnreadableError("it is quantized to a type that is not an integer, or not known")
    fact = call.fact(0)
    if isinstance(fact, Constant):
        return [_quantized_constant(call, fact, codes)]
    reached = codes
    scale, offset = _scale(call, 1), _zero(call, 2)
    if scale is not None and not isinstance(offset, IntFormat):
        precision = ELEMENTS.get(call.node.get("precision", 0))
        floats = floats_of(fact, call.fact(1), Reals("", floats=precision.dtype if precision else None))
        reached = _reached(fact, scale, offset, codes, np.rint, floats)
    return [Codes(reached.lo, reached.hi, ONE, type=codes, dialect="qdq")]


def _quantized_constant(call: Call, fact: Constant, codes: IntFormat) -> Codes:
    """saturate(round(x / scale) + zero) of a float constant, divided in float32."""
    _scale(call, 1)  # checks it
    if fact.codes is not None or fact.dtype.kind != "f":
        raise UnreadableError("it quantizes a constant that is not of floats")
    axis = call.node.get("axis", 1)
    scale = _along(call.array(1, "scale").astype(np.float32), fact, axis)
    offset = call.array(2, "zero-point") if call.has(2) else np.zeros((), np.int32)
    zero = _along(offset.astype(np.float64), fact, axis)

    def block(x: Array, part: slice) -> Array:
        code = np.rint(x.astype(np.float32) / _part(scale, fact, part)).astype(np.float64)
        return _finite(np.clip(code + _part(zero, fact, part), codes.lo, codes.hi))

    return Codes(codes.lo, codes.hi, ONE, type=codes, values=fact.computed(codes, block), dialect="qdq")


def _along(array: Array, fact: Constant, axis: int) -> Array:
    """A parameter, shaped to broadcast over a constant."""
    if array.size == 1:
        return array.reshape(())
    axis += len(fact.shape) if axis < 0 else 0
    if not 0 <= axis < len(fact.shape) or array.shape != (fact.shape[axis],):
        raise UnreadableError(f"{array.size} scales or zero-points do not fit its shape {list(fact.shape)}")
    return array.reshape([-1 if i == axis else 1 for i in range(len(fact.shape))])


def _part(array: Array, fact: Constant, part: slice) -> Array:
    """The part of a parameter that belongs to a block of rows of a constant."""
    return array[part] if array.ndim == len(fact.shape) and array.ndim and array.shape[0] > 1 else array


def _finite(codes: Array) -> Array:
    if not np.isfinite(codes).all():
        raise UnreadableError("it quantizes values that are no numbers")
    return codes


def dequantize_linear(call: Call) -> list[Fact]:
    output = ELEMENTS.get(call.node.get("output_dtype", 0))
    floats = output.dtype if output else floats_of(call.fact(1))
    return [_in_floats(dequantized(call, 0, 1, 2, call.node.get("axis", 1), "qdq"), floats)]


def _in_floats(codes: Codes, floats: Floats | None) -> Codes:
    """The float output of a quantizer. A constant stands for its integers, of any size."""
    return dequantized_to(codes, floats) if codes.values is None else replace(codes, floats=floats)


def dequantized(call: Call, x: int, scale: int | None, zero: int, axis: int, dialect: str) -> Codes:
    """(x - zero) * scale, for inputs of a node with these numbers; scale None means 1."""
    codes = integers(call.fact(x), dialect)
    if codes is None or codes.type is None:
        codes = _typed(call, x, zero, dialect)
    s, z = _scale(call, scale), _zero(call, zero)
    if codes.values is not None and (rank := len(codes.values.shape)):
        axis %= rank
    dialect = codes.dialect if codes.dialect and dialect == "qdq" else dialect
    return replace(codes, scale=s, zero=z, axis=axis, type=None, stored=codes.type, dialect=dialect)


def _typed(call: Call, x: int, zero: int, dialect: str) -> Codes:
    """An integer tensor of which nothing is known has the type of its zero-point."""
    z = call.fact(zero) if call.has(zero) else None
    type_ = z.codes if isinstance(z, Constant) else z.type if isinstance(z, Codes) else None
    if type_ is None:
        fact = call.fact(x)
        raise UnreadableError(fact.reason if isinstance(fact, Reals) else "its codes are of an unknown type")
    return Codes(type_.lo, type_.hi, ONE, type=type_, dialect=dialect)


def dynamic_quantize_linear(call: Call) -> list[Fact]:
    """Codes of 8 bits; scale and zero-point are computed at run time."""
    codes = Codes(0, 255, ONE, type=UINT8, dialect="dynamic")
    return [codes, Reals("it is a scale that is computed at run time", 0.0), codes]


def int_quant(call: Call) -> list[Fact]:
    """QONNX: (round(clip(x / scale + zero)) - zero) * scale, in the order and precision of qonnx's executor."""
    signed, narrow = bool(call.node.get("signed", 1)), bool(call.node.get("narrow", 1))
    name = call.node.get("rounding_mode", "ROUND").upper()
    if name not in ROUNDINGS:
        raise UnreadableError(f"its rounding mode '{name}' is not known")
    rounding = ROUNDINGS[name]
    bits = call.array(3, "bit width").reshape(-1)
    if bits.size != 1 or not 1 <= float(bits[0]) <= 32:
        raise UnreadableError("its bit width is not one number from 1 to 32")
    low, high = limits(bits[0], signed, narrow)
    bipolar = float(bits[0]) == 1 and signed
    codes = IntFormat(-1, 1) if bipolar else IntFormat(math.floor(low), math.ceil(high))
    scales, zeros = call.array(1, "scale"), call.array(2, "zero-point")
    (scale, s_axis), (zero, z_axis) = parameter(scales, "scale"), parameter(zeros, "zero-point")
    if not (scale > 0).all():
        raise UnreadableError("its scale is not positive")
    fact = call.fact(0)

    def code(x: Array, s: Array, z: Array) -> Array:
        y = x / s + z
        if bipolar:
            return _finite(np.where(y >= 0, 1, -1) + 0 * y)
        return _finite(rounding(np.clip(y, np.asarray(low, y.dtype), np.asarray(high, y.dtype))))

    values, rank = None, None
    if isinstance(fact, Constant):
        _check_quantized(fact, scales, zeros)
        rank = len(fact.shape)
        s_full, z_full = (_broadcast(p, fact) for p in (scales, zeros))
        values = fact.computed(codes, lambda x, part: code(x, _part(s_full, fact, part), _part(z_full, fact, part)))
    elif not bipolar:
        codes = _reached(fact, scale, zero, codes, rounding, floats_of(*call.facts[:3]))
    axis = common_axis(rank, (scale, s_axis), (zero, z_axis))
    made = Codes(codes.lo, codes.hi, scale, zero, axis, values=values, dialect="qonnx")
    return [_in_floats(made, floats_of(*call.facts[:3]))]


def _check_quantized(fact: Constant, *parameters: Array) -> None:
    shape = fact.shape or (1,)
    if fact.dtype.kind != "f" or np.broadcast_shapes(shape, *(p.shape for p in parameters)) != shape:
        raise UnreadableError("it quantizes integers, or a constant that its scale or zero-point makes larger")


def _broadcast(array: Array, fact: Constant) -> Array:
    if array.size == 1:
        return array.reshape(())
    return array.reshape([1] * (len(fact.shape) - array.ndim) + list(array.shape))


def limits(bits: Any, signed: bool, narrow: bool) -> tuple[Any, Any]:
    """The smallest and the largest code, in the float type of `bits`, as qonnx computes them."""
    two = np.asarray(2, bits.dtype)
    if not signed:
        return two * 0, two**bits - (2 if narrow else 1)
    half = two ** (bits - 1)
    return (-half + 1 if narrow else -half), half - 1


def bipolar_quant(call: Call) -> list[Fact]:
    """QONNX: +scale where x >= 0, else -scale."""
    scales = call.array(1, "scale")
    scale, axis = parameter(scales, "scale")
    if not (scale > 0).all():
        raise UnreadableError("its scale is not positive")
    fact, values = call.fact(0), None
    if isinstance(fact, Constant):
        _check_quantized(fact, scales)
        values = fact.computed(IntFormat(-1, 1), lambda x, _: np.where(x >= 0, 1, -1))
        axis = common_axis(len(fact.shape) or None, (scale, axis))
    made = Codes(-1, 1, scale, ZERO, axis, values=values, dialect="qonnx")
    return [_in_floats(made, floats_of(*call.facts[:2]))]


def trunc(call: Call) -> list[Fact]:
    """QONNX: drops the low bits of codes. Version 1 keeps the scale, version 2 clips and has a scale of its own."""
    name = call.node.get("rounding_mode", "FLOOR").upper()
    fact = call.fact(0)
    scale, zero, bits = call.one(1, "scale"), call.one(2, "zero-point"), call.one(3, "input bit width")
    newer = len(call.node.inputs) > 5
    out_scale = call.one(4, "output scale") if newer else scale
    out_bits = call.one(5 if newer else 4, "output bit width")
    if name not in ROUNDINGS or not (0 < scale < math.inf and 0 < out_scale < math.inf and 1 <= out_bits <= bits <= 64):
        raise UnreadableError("its rounding mode, scale or bit widths are not known")
    shift = 2.0 ** round(math.log2(out_scale / scale)) if newer else 2.0 ** (bits - out_bits)
    codes = IntFormat(-(2**62), 2**62)
    # The codes before: those of the input's own grid, whatever its range was declared to be.
    floats = floats_of(*call.facts)
    before = _reached(fact, np.float64(scale).reshape(()), np.float64(zero).reshape(()), codes, np.round, floats)
    ends = [float(ROUNDINGS[name](np.float64(end) / shift)) for end in (before.lo, before.hi)]
    out_zero = zero
    if newer:
        low, high = limits(np.float64(out_bits), bool(call.node.get("signed", 1)), bool(call.node.get("narrow", 0)))
        ends = [min(max(end, math.floor(low)), math.ceil(high)) for end in ends]
        out_zero = zero / shift
    if max(map(abs, ends)) > 2**53:
        raise UnreadableError("the range of the codes that it truncates is not known")
    step, offset = (np.float64(v).reshape(()) for v in (out_scale, out_zero))
    return [rounded(Codes(int(ends[0]), int(ends[1]), step, offset, dialect="qonnx"), floats)]


def multi_threshold(call: Call) -> list[Fact]:
    """QONNX: out_scale * (how many thresholds x reaches) + out_bias."""
    thresholds = call.fact(1)
    if not isinstance(thresholds, Constant) and not (isinstance(thresholds, Codes) and thresholds.values is not None):
        raise UnreadableError("its thresholds are not constant")
    held = thresholds if isinstance(thresholds, Constant) else thresholds.values
    assert held is not None
    steps = held.shape[-1] if held.shape else 1
    scale, bias = call.node.get("out_scale", 1.0), call.node.get("out_bias", 0.0)
    if not (0 < scale < math.inf and abs(bias) < math.inf):
        raise UnreadableError("its scale is not positive")
    if scale == int(scale) and bias == int(bias):  # the values are integers themselves
        made = Codes(int(bias), int(bias) + steps * int(scale), ONE, dialect="qonnx")
    else:
        step, zero = (np.float64(v).reshape(()) for v in (scale, -bias / scale))
        made = Codes(0, steps, step, zero, dialect="qonnx")
    return [rounded(made, floats_of(*call.facts), 2)]


def average_pool_quant(call: Call) -> list[Fact]:
    """QONNX: sums of a window of integers, shifted right by as much as brings sums of `ibits` bits to `obits` bits."""
    kernel, before, after = (call.node.get(name, 0) for name in ("kernel", "ibits", "obits"))
    if not (1 <= kernel <= 4096 and 1 <= before <= 32 and 1 <= after <= 32):
        raise UnreadableError("its kernel or its bit widths are not known")
    codes = integers(call.fact(0))
    if codes is None:
        raise UnreadableError("the integers that it averages are not known")
    shift = max(0, ((2**before - 1) * kernel**2).bit_length() - after)
    lo, hi = (end * kernel**2 >> shift for end in (codes.lo, codes.hi))
    # The executor averages in float32 and takes the average times the window for the sum.
    if max(-lo, hi) << shift >= 2**20:
        raise UnreadableError("its sums are too large for float32")
    return [Codes(lo, hi, ONE, dialect="qonnx", floats=np.dtype(np.float32))]


def requantized(zero: int) -> Handler:
    """An operator on codes whose output has the type of the zero-point that is its input number `zero`."""

    def handler(call: Call) -> list[Fact]:
        return [_typed(call, 0, zero, "qoperator")]

    return handler


QUANTIZERS: dict[str, Handler] = {
    **dict.fromkeys(("QuantizeLinear", "com.microsoft.QuantizeLinear"), quantize_linear),
    **dict.fromkeys(("DequantizeLinear", "com.microsoft.DequantizeLinear"), dequantize_linear),
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "qonnx.Quant": int_quant,
    "qonnx.IntQuant": int_quant,
    "qonnx.BipolarQuant": bipolar_quant,
    "qonnx.Trunc": trunc,
    "qonnx.MultiThreshold": multi_threshold,
    "qonnx.QuantAvgPool2d": average_pool_quant,
    "com.microsoft.QLinearAdd": requantized(7),
    "com.microsoft.QLinearMul": requantized(7),
    "com.microsoft.QLinearConcat": requantized(1),
    "com.microsoft.QLinearLeakyRelu": requantized(4),
    "com.microsoft.QLinearSigmoid": requantized(4),
    "com.microsoft.QLinearSoftmax": requantized(4),
    "com.microsoft.QLinearAveragePool": requantized(4),
    "com.microsoft.QLinearGlobalAveragePool": requantized(4),
}
