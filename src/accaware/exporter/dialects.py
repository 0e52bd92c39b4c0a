"""The four ways in which quantized networks are written, each from a captured graph of `Layer` and `Stream` nodes.

A layer is the codes of its input, a product with integer weights, and a rescale by the floats of the integer network.
Products are in units of codes: they are dequantized by 1, not by their scales, which the rescale holds. So a runtime
that multiplies floats adds integers, without any rounding, and every dialect gives the integer network's codes to the
bit, as far as runtimes compute the floats between layers alike. The bias is in none of them in the register.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
from onnx import ModelProto, NodeProto, TensorProto, helper

from accaware.onnx.build import Writer
from accaware.onnx.tensors import Array

__all__ = ["DIALECTS", "Dialect", "write_dialect"]

_DOMAIN = "accaware"
_BYTES = ("uint8", "int8")


@dataclass(frozen=True)
class Grid:
    """Integer codes [lo, hi] of a tensor, in units of `step`, which the tensor called `scale` holds."""

    scale: str = field(compare=False)
    step: float
    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class Layer:
    """What a `Layer` node says. name: unique. kind: "Linear", "Conv2d" and so on, and options those of its operator.

    q: int8 weights as the operator reads them (a linear layer's are [in, out]), of `bits` bits. rescale, shift: float32
    [C], of the output channels.
    """

    name: str
    kind: str
    bits: int
    q: Array
    rescale: Array
    shift: Array
    options: Mapping[str, Any]

    @property
    def operator(self) -> str:
        """ONNX's product of reals."""
        return "MatMul" if self.kind == "Linear" else self.kind[:-2]  # without 1d, 2d or 3d


class Dialect:
    """Subclasses say how codes and integer weights are written, and maybe their product."""

    name: str
    opset: int
    domain: str | None = None

    def operand(self, writer: Writer, x: str, grid: Grid, out: str = "") -> str:
        """The codes of x, as products read them; if `out` is given, that tensor becomes codes * scale."""
        raise NotImplementedError

    def weights(self, writer: Writer, layer: Layer) -> str:
        """The integers q, as products read them."""
        raise NotImplementedError

    def product(self, writer: Writer, layer: Layer, codes: str) -> str:
        """The sums, as float32."""
        return writer.add(layer.operator, codes, self.weights(writer, layer), name=layer.name, **layer.options)

    def layer(self, writer: Writer, layer: Layer, codes: str, out: str) -> None:
        """The nodes of a layer whose operand is `codes`."""
        rescale, shift = (v.reshape(-1, *[1] * (layer.q.ndim - 2)) for v in (layer.rescale, layer.shift))
        shifted = bool(shift.any())
        sums = self.product(writer, layer, codes)
        y = writer.add("Mul", sums, writer.constant(rescale), out="" if shifted else out)
        if shifted:
            writer.add("Add", y, writer.constant(shift), out=out)


class Qdq(Dialect):
    """QuantizeLinear and DequantizeLinear with 4-bit types; codes of other widths are clipped in 8 bits."""

    name, opset = "qdq", 21
    types: tuple[str, ...] = ("uint4", "int4", *_BYTES)

    def codes(self, writer: Writer, x: str, grid: Grid, out: str = "") -> tuple[str, str]:
        """The codes of x in an integer type, and a zero of that type."""
        bytes_ = _limits(_smallest(self.types, grid.lo, grid.hi)) != (grid.lo, grid.hi)  # ONNX clips no nibbles
        bytes_ = bytes_ or _nibbles_fail(writer, x, grid, out)
        type_ = _smallest(_BYTES if bytes_ else self.types, grid.lo, grid.hi)
        zero = writer.constant(0, type_)
        codes = writer.add("QuantizeLinear", x, grid.scale, zero)
        if _limits(type_) != (grid.lo, grid.hi):
            codes = writer.add("Clip", codes, *(writer.constant(end, type_) for end in (grid.lo, grid.hi)))
        if out:
            # Where onnxruntime 1.31 repeats both nodes behind a Reshape, it takes another type for their zero: in opset
            # 21 if there is one, and before if there is none.
            zeros = [] if self.opset >= 21 else [zero]
            writer.add("DequantizeLinear", codes, grid.scale, *zeros, out=out)
        return codes, zero

    def operand(self, writer: Writer, x: str, grid: Grid, out: str = "") -> str:
        codes, zero = self.codes(writer, x, grid, out)
        return writer.add("DequantizeLinear", codes, writer.constant(1), zero)

    def weights(self, writer: Writer, layer: Layer) -> str:
        largest = 2 ** (layer.bits - 1) - 1
        type_ = _smallest(self.types, -largest, largest)
        q = self.held(writer, writer.constant(layer.q, type_), largest)
        return writer.add("DequantizeLinear", q, writer.constant(1), writer.constant(0, type_))

    def held(self, writer: Writer, q: str, largest: int) -> str:
        """Weights in their type, of which they may use a part only."""
        return q


class Qcdq(Qdq):
    """QuantizeLinear, Clip, DequantizeLinear, all in 8 bits."""

    name, opset = "qcdq", 18
    types = _BYTES

    def held(self, writer: Writer, q: str, largest: int) -> str:
        return writer.add("Clip", q, *(writer.constant(end, "int8") for end in (-largest, largest)))


class QOperator(Qcdq):
    """ConvInteger and MatMulInteger; codes of fewer than 8 bits are clipped in 8."""

    name = "qoperator"

    def operand(self, writer: Writer, x: str, grid: Grid, out: str = "") -> str:
        codes, _ = self.codes(writer, x, grid, out)
        return codes

    def product(self, writer: Writer, layer: Layer, codes: str) -> str:
        if layer.operator == "ConvTranspose":
            raise ValueError("qoperator has no transposed convolution; qdq, qcdq and qonnx have")
        q = writer.constant(layer.q, "int8")
        sums = writer.add(f"{layer.operator}Integer", codes, q, name=layer.name, **layer.options)
        return writer.add("Cast", sums, to=TensorProto.FLOAT)


class Qonnx(Dialect):
    """The Quant nodes of QONNX, of any width."""

    name, opset, domain = "qonnx", 18, "qonnx.custom_op.general"

    def operand(self, writer: Writer, x: str, grid: Grid, out: str = "") -> str:
        if (grid.lo, grid.hi) == (-1, 0):
            raise ValueError("codes of one signed bit are -1 and 1 in qonnx, not -1 and 0; qdq and qcdq have them")
        bits, signed = (grid.hi - grid.lo).bit_length(), grid.lo < 0
        if out:
            self._quant(writer, x, grid.scale, bits, signed, out=out)
        return self._quant(writer, writer.add("Div", x, grid.scale), writer.constant(1), bits, signed)

    def weights(self, writer: Writer, layer: Layer) -> str:
        return self._quant(writer, writer.constant(layer.q), writer.constant(1), layer.bits, True, narrow=True)

    def _quant(
        self, writer: Writer, x: str, scale: str, bits: int, signed: bool, narrow: bool = False, out: str = ""
    ) -> str:
        inputs = [x, scale, writer.constant(0), writer.constant(bits)]
        options = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return writer.add("Quant", *inputs, out=out, domain=self.domain or "", **options)


DIALECTS: dict[str, Dialect] = {d.name: d for d in (Qdq(), Qcdq(), Qonnx(), QOperator())}


_MOVES = {"Reshape", "Flatten", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Identity", "Dropout", "Cast"}


def _nibbles_fail(writer: Writer, x: str, grid: Grid, out: str) -> bool:
    """Whether onnxruntime 1.31 fails, or drops a Relu, when x is quantized to 4 bits and dequantized as `out`.

    It moves both past operators that move values, and has no largest of nibbles. Of codes from 0 on it may drop a Relu.
    """
    before, passed = writer.producer(x), _MOVES | ({"Relu"} if grid.lo >= 0 else set())
    while before is not None and before.op_type in passed:
        before = writer.producer(before.input[0])
    if before is not None and before.op_type in ("Clip", "MaxPool", "Relu"):
        return True
    reached = [out] if out else []
    for tensor in reached:  # which grows meanwhile
        after = writer.consumers(tensor)
        if any(node.op_type in ("MaxPool", "ReduceMax", "ReduceMin") for node in after):
            return True
        reached += [node.output[0] for node in after if node.op_type in _MOVES]
    return False


def _smallest(types: tuple[str, ...], lo: int, hi: int) -> str:
    """The smallest of these types (shorter ones stand first), of the same sign, that holds [lo, hi]."""
    fitting = [t for t in types if _limits(t)[0] <= lo and hi <= _limits(t)[1] and (lo < 0) == (_limits(t)[0] < 0)]
    return fitting[0]


def _limits(type_: str) -> tuple[int, int]:
    info: Any = ml_dtypes.iinfo(type_)  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def write_dialect(model: ModelProto, dialect: Dialect) -> dict[str, str]:
    """Replace the nodes of this library in a captured graph, in place. Returns the layer by the name of its product.

    Raises `ValueError` with the layer's name where the dialect has no word for it.
    """
    writer = Writer(model)
    operands: dict[tuple[str, Grid], str] = {}  # what products read of a tensor on a grid, once it is written
    layers: dict[str, str] = {}
    attributes = (a for node in writer.originals() if node.domain == _DOMAIN for a in node.attribute)
    ours = {a.s.decode() for a in attributes if a.name == "name"}
    for node in writer.originals():
        if node.domain != _DOMAIN:
            if node.name in ours:
                node.name += "_"
            writer.keep(node)
            continue
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        x, out, scale = node.input[0], node.output[0], node.input[1]
        grid = Grid(scale, float(_value(writer, scale)), said.pop("lo"), said.pop("hi"))
        name = said.pop("name").decode()
        try:
            if node.op_type == "Stream":
                operands[out, grid] = dialect.operand(writer, x, grid, out)
                continue
            if (x, grid) not in operands:
                operands[x, grid] = dialect.operand(writer, x, grid)
            layer = _layer(writer, node, said, _unused(name, layers))
            layers[layer.name] = name
            dialect.layer(writer, layer, operands[x, grid], out)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    writer.finish([], dialect.domain)
    imports = [entry for entry in model.opset_import if entry.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    return layers


def _layer(writer: Writer, node: NodeProto, said: dict[str, Any], name: str) -> Layer:
    q, rescale, shift = (_value(writer, tensor) for tensor in node.input[2:])
    kind, bits = said.pop("kind").decode(), said.pop("bits")
    return Layer(name, kind, bits, q.T if kind == "Linear" else q, rescale, shift, said)


def _value(writer: Writer, tensor: str) -> Array:
    value = writer.value(tensor)
    assert value is not None, f"{tensor} is a buffer of the integer network"
    return value


def _unused(name: str, taken: Collection[str]) -> str:
    """A layer that runs twice is two operations."""
    names = (name if i == 1 else f"{name}#{i}" for i in itertools.count(1))
    return next(n for n in names if n not in taken)
