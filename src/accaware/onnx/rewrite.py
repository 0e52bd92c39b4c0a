"""An ONNX network whose integer sums are exact and then fold into a register, as operators of ONNX.

Every operation that multiplies by integer weights becomes

    codes less zero point  ->  exact sums  ->  one fold  ->  what the operator did with its sums.

The sums are a Conv, ConvTranspose or MatMul of float32 on integers. That is exact, in any order of the additions,
where |start| + sum |q| max |x| + 2^(P-1) <= 2^24 for every row, which is decided in integers. Where it is not, the
weights are split into digits for which it is, and those sums are joined and folded in float64. Where that does not
help, or where a register needs more than one fold, a node of domain `OUTSIDE` stands for the sums.

Two's complement is r - 2^P floor(r / 2^P + 1/2), with r the start value and all products. The weights are scaled by
2^-P beforehand, which is exact too, so that a fold costs an addition, a floor and a subtraction.

What follows the sums is what onnxruntime does. Operators on codes multiply by (x scale * w scale) / y scale in float32,
in that order, and round halves to even: without overflow they are onnxruntime's to the bit (on machines whose kernels
do not saturate). Operators on floats multiply the exact sum by one float32 scale and add the float bias, two roundings.
A runtime that adds products of dequantized floats rounds up to K times, so its outputs differ by a few units of 2^-24
of the largest partial sum, and by one code where they are quantized again that close to the middle between two codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from accaware.bounds import Integers, largest, masses
from accaware.onnx.build import Writer, bodies
from accaware.onnx.graph import inlined, message, unique_name
from accaware.onnx.lower import lower
from accaware.onnx.products import Product
from accaware.onnx.tensors import Array, UnreadableError

__all__ = ["OUTSIDE", "Fold", "Outside", "Rewritten", "rewrite"]

OUTSIDE = "accaware"
FLOAT, DOUBLE, INT32 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32
_FLOAT32, _FLOAT64 = 2**24, 2**53  # up to here, every integer is exact
_MOST_DIGITS = 4


@dataclass(frozen=True)
class Fold:
    """What becomes of the sums of one operation.

    bits: the register that they wrap around in; None: none, they stay exact. bias: whether the register starts from
    the integer bias of the operator, if that has one; else it is added afterwards. outside: the sums are computed
    elsewhere.
    """

    bits: int | None = None
    bias: bool = True
    outside: bool = False


@dataclass(frozen=True, eq=False)
class Outside:
    """An operation whose sums are computed elsewhere: the original node, and the node that stands for its sums.

    That is given codes less their zero point, float32 in the shape of the operator's input, and where the zero point
    is computed at run time that as well; it must return float64 sums in the shape of the operator's output, without
    start values.
    """

    original: NodeProto
    stand_in: str


@dataclass(frozen=True, eq=False)
class Rewritten:
    """model: the network. overflows: of every operation that folds, an output whose elements count, in parts, the sums
    that did not fit.

    sums: of every operation that is computed here, the output that counts its sums. outside: those that are not. left:
    operations that run as they are, with the reason.
    """

    model: ModelProto
    overflows: dict[str, str] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    outside: dict[str, Outside] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def rewrite(path: str | Path, products: Mapping[str, Product], folds: Mapping[str, Fold]) -> Rewritten:
    """The network in `path` with the sums of `products` folded as `folds` says, both by the names that `read` gives.

    Nodes of QONNX become operators of ONNX. Raises `OSError`, or `ValueError` for a file that onnx cannot load.
    """
    model = inlined(message(path))
    writer, done = Writer(model), Rewritten(model)
    taken: dict[str, int] = {}
    with np.errstate(all="ignore"):  # hostile scales overflow, as they do when the network runs
        for node in writer.originals():
            name = unique_name(node, taken)
            inner = [unique_name(n, taken) for n in _inside(node)]
            done.left.update((n, "it is in a subgraph") for n in inner if n in products)
            if name not in folds:
                lower(writer, node)
                continue
            try:
                _Sums(writer, node, products[name], folds[name], done).write()
            except UnreadableError as error:
                done.left[name] = str(error)
                writer.keep(node)
    writer.finish([*done.overflows.values(), *done.sums.values()], OUTSIDE if done.outside else None)
    return done


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes of a node's subgraphs, in the order in which they are read."""
    for graph in bodies(node):
        for inner in graph.node:
            yield inner
            yield from _inside(inner)


@dataclass(frozen=True)
class _Operands:
    """The numbers of a node's inputs; None where the operator has none."""

    x: int
    x_scale: int | None = None
    w_scale: int | None = None
    x_zero: int | None = None
    bias: int | None = None
    y_scale: int | None = None
    y_zero: int | None = None


_OPERANDS = {
    "Conv": _Operands(0, bias=2),
    "ConvTranspose": _Operands(0, bias=2),
    "MatMul": _Operands(0),
    "Gemm": _Operands(0, bias=2),
    "QLinearConv": _Operands(0, 1, 4, 2, 8, 6, 7),
    "QLinearMatMul": _Operands(0, 1, 4, 2, None, 6, 7),
    "QGemm": _Operands(0, 1, 4, 2, 6, 7, 8),
    "ConvInteger": _Operands(0, x_zero=2),
    "MatMulInteger": _Operands(0, x_zero=2),
    "DynamicQuantizeMatMul": _Operands(0, None, 2, None, 4),
    "MatMulIntegerToFloat": _Operands(0, 2, 3, 4, 6),
}
#: Where the weights are the left operand of a matrix product.
_LEFT = {
    "MatMul": _Operands(1),
    "Gemm": _Operands(1, bias=2),
    "QLinearMatMul": _Operands(3, 4, 1, 5, None, 6, 7),
    "QGemm": _Operands(3, 4, 1, 5, 6, 7, 8),
    "MatMulInteger": _Operands(1, x_zero=3),
    "MatMulIntegerToFloat": _Operands(1, 3, 2, 5, 6),
}


@dataclass
class _Register:
    """A tensor of sums: what the register holds is `name` times 2^shift. wide: it is float64 rather than float32."""

    name: str
    shift: int = 0
    wide: bool = False


class _Sums:
    """Writes what replaces one operation."""

    def __init__(self, writer: Writer, node: NodeProto, product: Product, fold: Fold, done: Rewritten) -> None:
        self.writer, self.node, self.product, self.fold, self.done = writer, node, product, fold, done
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.kind, self.convolves = node.op_type, "Conv" in node.op_type
        table = _LEFT if product.left else _OPERANDS
        if self.kind not in table:
            raise UnreadableError(f"weights on the left of {self.kind} are not emulated")
        if product.rows.scale is None and self.kind in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            raise UnreadableError("the scale of its weights is computed at run time")
        self.at = table[self.kind]
        self.floats = self.kind in ("Conv", "ConvTranspose", "MatMul", "Gemm")
        origin = product.rows.origin
        self.weights = origin.replay(product.rows.restore(product.rows.centred()))
        self.channels = self._channels(2 if "Gemm" in self.kind else writer.rank(self.input(self.at.x)))
        has_bias = product.bias is not None
        self.starts = has_bias and fold.bias  # the register starts from it
        self.bias = product.bias if product.bias is not None else np.zeros(1, np.int64)

    def write(self) -> None:
        x, zero, unit = self._codes()
        register = self._exact(x, zero)
        self._finish(register, unit)

    def input(self, index: int | None) -> str:
        """The name of an input of the node, "" where there is none."""
        return "" if index is None or index >= len(self.node.input) else self.node.input[index]

    # What goes in.

    def _codes(self) -> tuple[str, str, str]:
        """Codes less their zero point in float32, their zero point, and their scale where it is not constant."""
        add, x = self.writer.add, self.input(self.at.x)
        if self.kind == "DynamicQuantizeMatMul":
            x, unit, zero = self.writer.several("DynamicQuantizeLinear", [x], 3)
            return self._centred(x, zero), zero, unit
        if not self.floats:
            return self._centred(x, self.input(self.at.x_zero)), self.input(self.at.x_zero), self.input(self.at.x_scale)
        source = self.writer.producer(x)
        if source is not None and source.op_type == "DequantizeLinear":
            zero = source.input[2] if len(source.input) > 2 else ""
            if self.product.act_scale is None or self._single(source.input[1]):
                return self._centred(source.input[0], zero, source.domain), zero, source.input[1]
        if self.product.act_scale is None:
            raise UnreadableError("its codes have a scale that is computed at run time, and not where they are made")
        self._type = self.writer.type(x)
        if self.product.centred_codes.magnitude >= (2**9 if self._type == TensorProto.FLOAT16 else 2**21):
            raise UnreadableError("its codes are too large to be found again in floats")
        x = x if self._type in (0, FLOAT) else add("Cast", x, to=FLOAT)
        step = self._input_scale()
        return (x if (step == 1).all() else add("Round", add("Div", x, self.writer.constant(step)))), "", ""

    def _centred(self, codes: str, zero: str, domain: str = "") -> str:
        """Integers less their zero point, as floats."""
        one = self.writer.constant(1)
        return self.writer.add("DequantizeLinear", codes, one, *([self._scalar(zero)] if zero else []), domain=domain)

    def _scalar(self, name: str) -> str:
        """A tensor of one element, without dimensions."""
        value = self.writer.value(name)
        if value is not None and not value.ndim:
            return name
        return self.writer.add("Reshape", name, self.writer.constant([], np.int64))

    def _single(self, name: str) -> bool:
        value = self.writer.value(name)
        return value is not None and value.size == 1

    def _input_scale(self) -> Array:
        """The scale of the input, to broadcast over it."""
        scale, layout = self.product.act_scale, self.product.rows.layout
        assert scale is not None
        if (scale == scale[0]).all():
            return scale[:1].reshape(())
        assert layout.inputs is not None
        channels = np.ones(int(layout.inputs.max()) + 1)
        channels[layout.inputs] = scale[:: layout.phases]
        return channels.reshape(-1, *[1] * (self.weights.ndim - 2))

    # The sums.

    def _exact(self, x: str, zero: str) -> _Register:
        """The register once all products are in it, exact and then folded."""
        rows, fold = self.product.rows.centred(), self.fold
        start = np.broadcast_to(self.bias, len(rows)).astype(object) * self.starts
        positive, negative = masses(rows)
        mass = (positive + negative) * self.product.centred_codes.magnitude
        reach = int((mass + abs(start)).max())
        half = 0 if fold.bits is None else 2 ** (fold.bits - 1)
        folds = half > 0 and (reach >= half or reach + half <= _FLOAT32)  # else no sum can leave the register
        bits = fold.bits if folds and fold.bits else 0
        room = reach + half * folds
        if not fold.outside and room <= _FLOAT32:
            return self._narrow(x, start, bits, folds)
        digits = None if fold.outside or room > _FLOAT64 else self._digits(rows)
        return self._outside(x, zero) if digits is None else self._wide(x, digits, start, bits, folds)

    def _narrow(self, x: str, start: Integers, bits: int, folds: bool) -> _Register:
        """In float32. The weights come scaled, and so does the sum."""
        unit = 2.0**-bits
        y = self._sum(x, self.weights * unit, start.astype(np.float64) * unit)
        return self._folded(y, bits, folds, wide=False)

    def _wide(self, x: str, digits: list[Array], start: Integers, bits: int, folds: bool) -> _Register:
        """The sums of every digit in float32, joined in float64."""
        add, constant = self.writer.add, self.writer.constant
        total = constant(self._along(start.astype(np.float64)) * 2.0**-bits, np.float64)
        base = self._base(len(digits))
        for i, digit in enumerate(digits):
            part = add("Cast", self._sum(x, digit, None), to=DOUBLE)
            total = add("Add", total, add("Mul", part, constant(2.0 ** (base * i - bits), np.float64)))
        return self._folded(total, bits, folds, wide=True)

    def _digits(self, rows: Integers) -> list[Array] | None:
        """The weights as sum_i 2^(base i) digit_i, each with sums that are exact in float32; None if there are none."""
        magnitude = self.product.centred_codes.magnitude
        for count in range(1, _MOST_DIGITS + 1):
            base = self._base(count)
            parts = list(_split(rows.astype(np.int64), count, base))
            if all(int(np.add(*masses(p)).max()) * magnitude <= _FLOAT32 for p in parts):
                return list(_split(self.weights.astype(np.int64), count, base))
        return None

    def _base(self, count: int) -> int:
        return -(-(largest(self.weights).bit_length() + 1) // count)

    def _folded(self, r: str, bits: int, folds: bool, wide: bool) -> _Register:
        """r - floor(r + 1/2), counted where that is not r. r: the register in units of 2^bits."""
        add, constant = self.writer.add, self.writer.constant
        name = self.product.name
        self.done.sums[name] = add("Size", r)
        if not folds:
            return _Register(r, bits, wide)
        k = add("Floor", add("Add", r, constant(0.5, np.float64 if wide else np.float32)))
        self.done.overflows[name] = self._counted(add("Cast", add("Cast", k, to=TensorProto.BOOL), to=FLOAT))
        return _Register(add("Sub", r, k), bits, wide)

    def _counted(self, ones: str) -> str:
        """Sums over the places of every channel, or over the columns of a matrix: few enough to be exact in float32."""
        if self.weights.ndim == 1:
            return self.writer.add("ReduceSum", ones, keepdims=0)
        axes = list(range(2, self.weights.ndim)) if self.convolves else [-1]
        if self.writer.opset < 13:
            return self.writer.add("ReduceSum", ones, axes=axes, keepdims=0)
        return self.writer.add("ReduceSum", ones, self.writer.constant(axes, np.int64), keepdims=0)

    def _outside(self, x: str, zero: str) -> _Register:
        inputs = [x, zero] if self.product.dynamic else [x]
        name = self.writer.add("Sums", *inputs, domain=OUTSIDE)
        self.done.outside[self.product.name] = Outside(self.node, name)
        if self.starts:
            name = self.writer.add("Add", name, self.writer.constant(self._along(self.bias), np.float64))
        return _Register(name, wide=True)

    def _sum(self, x: str, weights: Array, start: Array | None) -> str:
        """One operator that multiplies by these weights, which have the shape of the original ones."""
        add, constant = self.writer.add, self.writer.constant
        if self.convolves:
            start = None if start is None else start[:: self.product.rows.layout.phases]
            bias = [] if start is None or not start.any() else [constant(start)]
            kind = "ConvTranspose" if self.kind == "ConvTranspose" else "Conv"
            geometry = {k: v for k, v in self.attributes.items() if k != "channels_last"}
            return add(kind, x, constant(weights), *bias, **geometry)
        w = constant(weights.T if self.attributes.get("transA" if self.product.left else "transB") else weights)
        if self.attributes.get("transB" if self.product.left else "transA"):
            x = add("Transpose", x, perm=[1, 0])
        y = add("MatMul", w, x) if self.product.left else add("MatMul", x, w)
        return y if start is None or not start.any() else add("Add", y, constant(self._along(start)))

    def _along(self, values: Array) -> Array:
        """Values of every row, [R] or one, to broadcast over the output."""
        if values.size == 1:
            return values.reshape(())
        phases, batch = self.product.rows.layout.phases, () if self.convolves else self.weights.shape[:-2]
        return values[::phases].reshape(*batch, *self.channels)

    def _channels(self, rank: int | None) -> tuple[int, ...]:
        """The shape of one value for every channel, or every row of a matrix, to broadcast over the output.

        rank: of the input, None where it is not known. Raises `UnreadableError` where that matters: the output for a
        vector has a dimension less.
        """
        if self.convolves:
            return -1, *[1] * (self.weights.ndim - 2)
        if self.weights.ndim < (2 if self.product.left else 3) or rank == 1:
            return (-1,)
        if rank is None:
            raise UnreadableError("whether its input is a vector or a matrix is not known")
        return (-1, 1) if self.product.left else (1, -1)

    # What comes out.

    def _finish(self, register: _Register, unit: str) -> None:
        """What the operator does with its sums."""
        add, out = self.writer.add, self.node.output[0]
        if not self.floats and self.product.bias is not None and not self.starts:
            register = self._biased(register)
        y, shift = register.name, register.shift
        if register.wide:
            if shift:
                y, shift = add("Mul", y, self.writer.constant(2.0**shift, np.float64)), 0
            y = add("Cast", y, to=FLOAT if self.kind not in ("ConvInteger", "MatMulInteger") else INT32)
        if self.kind in ("ConvInteger", "MatMulInteger"):
            if not register.wide:
                y = add("Mul", y, self.writer.constant(2.0**shift)) if shift else y
            add("Cast", y, to=INT32, out=out)
            return
        scale = self._scale(unit)
        if self.at.y_scale is not None and self.input(self.at.y_scale):
            factor = add("Div", scale, self._scalar(self.input(self.at.y_scale)))
            y = add("Mul", y, self._shifted(factor, shift))
            zero = self.input(self.at.y_zero)
            add("QuantizeLinear", y, self.writer.constant(1), *([self._scalar(zero)] if zero else []), out=out)
            return
        self._floats_out(add("Mul", y, self._shifted(scale, shift)), out)

    def _biased(self, register: _Register) -> _Register:
        """With the integer bias that the register left out, in float64."""
        add, constant = self.writer.add, self.writer.constant
        y = register.name if register.wide else add("Cast", register.name, to=DOUBLE)
        y = add("Mul", y, constant(2.0**register.shift, np.float64))
        return _Register(add("Add", y, constant(self._along(self.bias), np.float64)), wide=True)

    def _shifted(self, factor: str, shift: int) -> str:
        return self.writer.add("Mul", factor, self.writer.constant(2.0**shift)) if shift else factor

    def _scale(self, unit: str) -> str:
        """The unit of the sums, to broadcast over them, multiplied in the order in which onnxruntime does."""
        add, constant = self.writer.add, self.writer.constant
        rows, act = self.product.rows, self.product.act_scale
        if not self.floats:
            given = self.input(self.at.w_scale)
            scale = self._scalar(unit)
            if self.kind == "QGemm" and self.attributes.get("alpha", 1.0) != 1:
                scale = add("Mul", constant(self.attributes["alpha"]), scale)
            shape = self.channels if self.writer.size(given) != 1 else ()
            return add("Mul", scale, add("Reshape", given, constant(shape, np.int64)))
        assert rows.scale is not None
        if act is None:
            return add("Mul", self._scalar(unit), constant(self._along(rows.scale)))
        return constant(self._along(act * rows.scale))

    def _floats_out(self, y: str, out: str) -> None:
        """Add the bias that the register does not hold, and turn back to the type of the original."""
        add, bias = self.writer.add, self.input(self.at.bias)
        if bias and not (self.starts or (not self.floats and self.product.bias is not None)):
            if self.convolves:
                bias = add("Reshape", bias, self.writer.constant([-1, *[1] * (self.weights.ndim - 2)], np.int64))
            if self.kind == "Gemm" and self.attributes.get("beta", 1.0) != 1:
                bias = add("Mul", bias, self.writer.constant(self.attributes["beta"]))
            y = add("Add", y, bias)
        kind = self.writer.type(self.input(self.at.x)) if self.floats else FLOAT
        add("Identity", y, out=out) if kind in (0, FLOAT) else add("Cast", y, out=out, to=kind)


def _split(values: Integers, count: int, base: int) -> Iterator[Integers]:
    """Digits, the lowest first: in [-2^(base-1), 2^(base-1)) but for the last, which holds the rest."""
    for _ in range(count - 1):
        digit = (values + 2 ** (base - 1)) % 2**base - 2 ** (base - 1)
        yield digit
        values = (values - digit) >> base
    yield values
