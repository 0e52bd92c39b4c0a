"""The nodes of QONNX as operators of ONNX, in the order and precision of qonnx's executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from accaware.onnx.build import Writer
from accaware.onnx.graph import QONNX
from accaware.onnx.quantizers import limits

Lowering = Callable[[Writer, NodeProto, dict[str, Any]], bool]


def lower(writer: Writer, node: NodeProto) -> None:
    """Write what a node of QONNX does; other nodes, and those of what is not constant or not known, are kept."""
    lowering = _LOWERINGS.get(node.op_type) if node.domain in QONNX else None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if lowering is None or not lowering(writer, node, attributes):
        writer.keep(node)


def _quant(writer: Writer, node: NodeProto, attributes: dict[str, Any]) -> bool:
    """(round(clip(x / scale + zero)) - zero) * scale."""
    add, (x, scale, zero, width) = writer.add, node.input
    bits, signed = _number(writer, width), bool(attributes.get("signed", 1))
    if bits is None:
        return False
    y = add("Add", add("Div", x, scale), zero)
    if bits == 1 and signed:
        y = _signs(writer, y)
    else:
        low, high = limits(bits, signed, bool(attributes.get("narrow", 1)))
        y = _rounded(writer, _clipped(writer, y, low, high), attributes.get("rounding_mode", b"ROUND"))
    add("Mul", add("Sub", y, zero), scale, out=node.output[0])
    return True


def _bipolar(writer: Writer, node: NodeProto, attributes: dict[str, Any]) -> bool:
    """+scale where x >= 0, else -scale."""
    x, scale = node.input
    writer.add("Mul", _signs(writer, x), scale, out=node.output[0])
    return True


def _trunc(writer: Writer, node: NodeProto, attributes: dict[str, Any]) -> bool:
    """Drop low bits: version 1 keeps the scale, version 2 clips and has a scale of its own."""
    add, (x, scale, zero, *rest) = writer.add, node.input
    numbers = [_number(writer, name) for name in (scale, *rest)]
    if any(number is None for number in numbers):
        return False
    old, in_bits, *new, out_bits = numbers
    factor = np.exp2(np.round(np.log2(new[0] / old))) if new else np.exp2(in_bits - out_bits)
    shift = writer.constant(factor)
    y = add("Div", add("Round", add("Add", add("Div", x, scale), zero)), shift)
    if new:
        low, high = limits(out_bits, bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0)))
        y, zero = _clipped(writer, y, low, high), add("Div", zero, shift)
    y = _rounded(writer, y, attributes.get("rounding_mode", b"FLOOR"))
    add("Mul", add("Sub", y, zero), rest[1] if new else scale, out=node.output[0])
    return True


def _multi_threshold(writer: Writer, node: NodeProto, attributes: dict[str, Any]) -> bool:
    """out_scale * (how many thresholds [C or 1, T] x reaches) + out_bias."""
    add, constant, (x, steps) = writer.add, writer.constant, node.input
    thresholds, layout = writer.value(steps), attributes.get("data_layout", b"").decode()
    if not layout:  # as qonnx guesses it
        layout = {2: "NC", 3: "NWC", 4: "NCHW"}.get(writer.rank(x) or 0, "")
    if thresholds is None or thresholds.ndim != 2 or not (layout or len(thresholds) == 1):
        return False
    channels, count = thresholds.shape
    last = channels == 1 or layout.endswith("C")
    columns = add("Reshape", x, constant([-1, channels, 1, 1] if last else [0, channels, -1, 1], np.int64))
    reached = add("GreaterOrEqual", columns, constant(thresholds.reshape(channels, 1, count)))
    sums = add("MatMul", add("Cast", reached, to=TensorProto.FLOAT), constant(np.ones(count)))
    scaled = add("Mul", add("Reshape", sums, add("Shape", x)), constant(attributes.get("out_scale", 1.0)))
    add("Add", scaled, constant(attributes.get("out_bias", 0.0)), out=node.output[0])
    return True


_LOWERINGS: dict[str, Lowering] = {
    "Quant": _quant,
    "IntQuant": _quant,
    "BipolarQuant": _bipolar,
    "Trunc": _trunc,
    "MultiThreshold": _multi_threshold,
}


def _number(writer: Writer, tensor: str) -> Any:
    """A constant of one element; None for anything else."""
    value = writer.value(tensor)
    return None if value is None or value.size != 1 else value.reshape(())[()]


def _clipped(writer: Writer, x: str, low: Any, high: Any) -> str:
    return writer.add("Min", writer.add("Max", x, writer.constant(low)), writer.constant(high))


def _signs(writer: Writer, x: str) -> str:
    """1 where x >= 0, else -1."""
    reached = writer.add("GreaterOrEqual", x, writer.constant(0))
    return writer.add(
        "Sub",
        writer.add("Mul", writer.add("Cast", reached, to=TensorProto.FLOAT), writer.constant(2)),
        writer.constant(1),
    )


def _rounded(writer: Writer, x: str, mode: bytes) -> str:
    """x as an integer, by the names of qonnx."""
    add, constant, name = writer.add, writer.constant, mode.decode().upper()
    plain = {"ROUND": "Round", "HALF_EVEN": "Round", "CEIL": "Ceil", "FLOOR": "Floor"}
    if name in plain:
        return add(plain[name], x)
    size = add("Abs", x)
    if name.startswith("HALF"):
        size = add("Add" if name == "HALF_UP" else "Sub", size, constant(0.5))
    return add("Mul", add("Sign", x), add("Ceil" if name in ("UP", "HALF_DOWN") else "Floor", size))
