"""The operations that multiply by weights and add: every one becomes a `Product`, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accaware.bounds import Integers
from accaware.formats import IntFormat
from accaware.onnx.facts import ONE, Call, Codes, Fact, Reals, integers
from accaware.onnx.quantizers import dequantized
from accaware.onnx.tensors import Constant, UnreadableError
from accaware.onnx.weights import Layout, Rows, convolution, matrix, transposed

INT32 = IntFormat(-(2**31), 2**31 - 1)


@dataclass(frozen=True, eq=False)
class Product:
    """An accumulating operation whose integers are known: sums of input code * weight, raw or less their zero-points.

    name: of the node, unique in the file. kind: its operator. dialect: "qdq", "qcdq", "qonnx", "qoperator" or
    "integer" (plain integer tensors). rows: the weights. codes: the raw codes of the input. zero_range: where the
    input's zero-point lies, one number unless it is computed at run time, once for each tensor. bias: integers [R]
    that the operator itself adds in its register, in units of act_scale * rows.scale; None where it adds none, or a
    float one outside. act_scale: float64 [R], None where it is computed at run time. padded: some outputs may see
    fewer taps, as if the others read real 0, which is the zero-point in raw codes. note: what a reader of the
    certificate should know. left: the weights are the left operand of a matrix product. stored: the type that input
    codes are stored in; None where they are floats.
    """

    name: str
    kind: str
    dialect: str
    rows: Rows
    codes: IntFormat
    zero_range: IntFormat
    bias: Integers | None
    act_scale: NDArray[np.float64] | None
    padded: bool
    note: str = ""
    left: bool = False
    stored: IntFormat | None = None

    @property
    def dynamic(self) -> bool:
        """Whether the input's zero-point is computed at run time."""
        return self.zero_range.span > 0

    @property
    def zero_point(self) -> int | None:
        """The input's zero-point; None where it is computed at run time."""
        return None if self.dynamic else self.zero_range.lo

    @property
    def centred_codes(self) -> IntFormat:
        """Codes less zero-point, for any zero-point that the tensor can have."""
        return IntFormat(self.codes.lo - self.zero_range.hi, self.codes.hi - self.zero_range.lo)


Reader = Callable[[Call], tuple[Product, Fact]]


def _product(
    call: Call,
    dialect: str,
    x: Fact,
    w: Fact,
    layout: Callable[[tuple[int, ...]], Layout],
    *,
    bias: Fact | None = None,
    bias_factor: float = 1.0,
    padded: bool = False,
) -> Product:
    weights, codes = _operands(call, x, w)
    values = weights.values
    assert values is not None
    if not values.size or not values.shape:
        raise UnreadableError(f"its weights of shape {list(values.shape)} are empty or a single number")
    if values.dtype == np.bool_:
        raise UnreadableError("its weights are booleans")
    rank, fitted = len(values.shape), layout(values.shape)
    scale = None if weights.scale is None else _rows(fitted, fitted.per_output(weights.scale, weights.axis, rank))
    if isinstance(weights.zero, IntFormat):
        raise UnreadableError("the zero-point of its weights is not constant")
    zeros = _whole(fitted.per_output(weights.zero, weights.axis, rank), "zero-point of its weights")
    zeros = np.repeat(zeros, fitted.phases) if zeros.ndim else zeros
    index = None
    if weights.scale is not None and weights.scale.ndim:
        index = fitted.per_output(np.arange(len(weights.scale)), weights.axis, rank).repeat(fitted.phases)
    rows = Rows(fitted, values.array, weights.format, zeros, scale, values.origin, index)
    act_scale = _input_scale(codes, fitted, rank)
    for found in (scale, act_scale):
        if found is not None and not (np.isfinite(found) & (found > 0)).all():
            raise UnreadableError("one of its scales is not a positive number")
    start, note = _bias(bias, bias_factor, rows, act_scale, on_codes=dialect == "qoperator")
    if dialect != "qoperator":
        dialect = (
            "qcdq" if "qcdq" in (weights.dialect, codes.dialect) else weights.dialect or codes.dialect or "integer"
        )
    return Product(
        name=call.node.name,
        kind=call.node.kind,
        dialect=dialect,
        rows=rows,
        codes=codes.format,
        zero_range=_zero_range(codes),
        bias=start,
        act_scale=act_scale,
        padded=padded,
        note=note,
        stored=codes.type or codes.stored,
    )


def _operands(call: Call, x: Fact, w: Fact) -> tuple[Codes, Codes]:
    """Weights and input as codes. Raises `UnreadableError` with the reason where one is none."""
    weights, codes = integers(w) or w, integers(x) or x
    if isinstance(weights, Constant):
        raise UnreadableError(f"its weights '{weights.origin.name}' are floats")
    if isinstance(weights, Reals):
        raise UnreadableError(f"its weights are no known integers: {weights.reason}")
    if weights.values is None:
        raise UnreadableError("its weights are not constant")
    if isinstance(codes, Constant):
        raise UnreadableError(f"its input '{codes.origin.name}' is a float constant")
    if isinstance(codes, Reals):
        raise UnreadableError(f"its input has no known codes: {codes.reason}")
    for what, found in (("weights", weights), ("input", codes)):
        if not found.error < 0.5:
            raise UnreadableError(f"floats round its {what} by more than half of what lies between two codes")
    return weights, codes


def _rows(layout: Layout, values: NDArray[Any]) -> NDArray[np.float64]:
    """A parameter [] or [O] as float64 [R]."""
    return np.repeat(np.broadcast_to(values.astype(np.float64), (layout.outputs,)), layout.phases)


def _whole(values: NDArray[Any], what: str) -> NDArray[np.int64]:
    """Integers held as floats; small deviations come from dividing an offset by a scale."""
    whole = np.rint(values)
    if not ((np.abs(values - whole) <= 1e-6) & (np.abs(whole) < 2**53)).all():
        raise UnreadableError(f"the {what} is no integer, so real 0 is no code")
    integers_: NDArray[np.int64] = whole.astype(np.int64)
    return integers_


def _zero_range(codes: Codes) -> IntFormat:
    if isinstance(codes.zero, IntFormat):
        return codes.zero
    zeros = _whole(codes.zero, "zero-point of its input")
    if zeros.min() != zeros.max():
        raise UnreadableError("its input has several zero-points")
    return IntFormat(int(zeros.min()), int(zeros.min()))


def _input_scale(codes: Codes, layout: Layout, rank: int) -> NDArray[np.float64] | None:
    if codes.scale is None:
        return None
    scale = codes.scale
    if scale.ndim:
        if layout.inputs is None or codes.axis % rank != 1 or layout.inputs.max() >= len(scale):
            raise UnreadableError("its input has several scales, so the products of one output have different units")
        scale = scale[layout.inputs]
    return _rows(layout, scale)


def _bias(
    bias: Fact | None, factor: float, rows: Rows, act_scale: NDArray[np.float64] | None, *, on_codes: bool
) -> tuple[Integers | None, str]:
    """The integers that the operator starts from, and a note where it has a bias that is none.

    on_codes: the operator adds integers only. Raises `UnreadableError` where those are not constant.
    """
    if bias is None:
        return None, ""
    codes = integers(bias) or bias
    outside = "its bias is added outside the register"
    if not isinstance(codes, Codes) or codes.values is None or isinstance(codes.zero, IntFormat) or codes.error >= 0.5:
        if on_codes or (isinstance(codes, Codes) and codes.type is not None):
            raise UnreadableError("its bias is not constant")
        return None, outside
    layout, values = rows.layout, codes.values.small
    if values.size != 1 and (values.shape[-1] != layout.outputs or values.size != layout.outputs):
        raise UnreadableError(f"its bias of shape {list(values.shape)} does not fit its {layout.outputs} outputs")
    start = np.broadcast_to(values.reshape(-1).astype(np.int64), (layout.outputs,))
    start = np.repeat(start - _whole(codes.zero, "zero-point of its bias"), layout.phases)
    if codes.type is not None:  # an operator on codes adds it as it is
        return start, ""
    if codes.scale is None or act_scale is None or rows.scale is None:
        return None, outside
    units = codes.scale * factor
    if units.ndim and len(units) != layout.outputs:
        raise UnreadableError(f"its bias has {len(units)} scales, which do not fit its {layout.outputs} outputs")
    if not np.allclose(_rows(layout, units), act_scale * rows.scale, rtol=1e-4, atol=0):
        return None, f"{outside}: its scale is not that of the products"
    return start, ""


def _float_output(call: Call) -> Fact:
    return call.unknown()


def conv(call: Call) -> tuple[Product, Fact]:
    bias = call.fact(2) if call.has(2) else None
    return _conv(call, "", call.fact(0), call.fact(1), bias), _float_output(call)


def _conv(call: Call, dialect: str, x: Fact, w: Fact, bias: Fact | None) -> Product:
    groups = call.node.get("group", 1)
    if call.node.get("channels_last", 0):
        raise UnreadableError("its layout is channels last")
    return _product(call, dialect, x, w, lambda shape: convolution(shape, groups), bias=bias, padded=_padded(call))


def _padded(call: Call) -> bool:
    return any(call.node.ints("pads")) or call.node.get("auto_pad", "NOTSET").startswith("SAME")


def conv_transpose(call: Call) -> tuple[Product, Fact]:
    groups = call.node.get("group", 1)
    stride, dilation = call.node.ints("strides"), call.node.ints("dilations")
    product = _product(
        call,
        "",
        call.fact(0),
        call.fact(1),
        lambda shape: transposed(shape, groups, stride, dilation),
        bias=call.fact(2) if call.has(2) else None,
        padded=True,
    )
    return product, _float_output(call)


def _is_weight(fact: Fact) -> bool:
    return isinstance(fact, Constant) or (isinstance(fact, Codes) and fact.values is not None)


def _matmul(call: Call, dialect: str, a: Fact, b: Fact, inner: tuple[int, int] = (-1, -2), **bias: Any) -> Product:
    """a @ b, either of them the weights. inner: the dimension of each that is summed over."""
    if _is_weight(a) and not _is_weight(b):
        return replace(_product(call, dialect, b, a, lambda shape: matrix(shape, inner[0])), left=True)
    return _product(call, dialect, a, b, lambda shape: matrix(shape, inner[1]), **bias)


def matmul(call: Call) -> tuple[Product, Fact]:
    product = _matmul(call, "", call.fact(0), call.fact(1))
    types = [f.type for f in map(integers, (call.fact(0), call.fact(1))) if f is not None and f.type is not None]
    return product, Codes(types[0].lo, types[0].hi, ONE, type=types[0]) if types else _float_output(call)


def gemm(call: Call) -> tuple[Product, Fact]:
    return _gemm(call, "", call.fact(0), call.fact(1), call.fact(2) if call.has(2) else None), _float_output(call)


def _gemm(call: Call, dialect: str, a: Fact, b: Fact, bias: Fact | None) -> Product:
    alpha, beta = call.node.get("alpha", 1.0), call.node.get("beta", 1.0)
    if not 0 < alpha < np.inf:
        raise UnreadableError(f"its alpha is {alpha}")
    inner = (-2 if call.node.get("transA", 0) else -1, -1 if call.node.get("transB", 0) else -2)
    if bias is not None and _is_weight(a) and not _is_weight(b):
        raise UnreadableError("its first operand holds the weights, and its bias varies along the second one")
    product = _matmul(call, dialect, a, b, inner, bias=bias, bias_factor=beta / alpha)
    if product.rows.scale is None or alpha == 1:
        return product
    return replace(product, rows=replace(product.rows, scale=product.rows.scale * alpha))


def qlinear_conv(call: Call) -> tuple[Product, Fact]:
    x = dequantized(call, 0, 1, 2, 1, "qoperator")
    w = dequantized(call, 3, 4, 5, 0, "qoperator")
    return _conv(call, "qoperator", x, w, _integer_bias(call, 8)), _typed_output(call, 7)


def qlinear_matmul(call: Call) -> tuple[Product, Fact]:
    a, b = dequantized(call, 0, 1, 2, -2, "qoperator"), dequantized(call, 3, 4, 5, -1, "qoperator")
    return _matmul(call, "qoperator", a, b), _typed_output(call, 7)


def qgemm(call: Call) -> tuple[Product, Fact]:
    a = dequantized(call, 0, 1, 2, -2, "qoperator")
    b = dequantized(call, 3, 4, 5, 0 if call.node.get("transB", 0) else 1, "qoperator")
    product = _gemm(call, "qoperator", a, b, _integer_bias(call, 6))
    return product, _typed_output(call, 8) if call.has(8) else _float_output(call)


def conv_integer(call: Call) -> tuple[Product, Fact]:
    x, w = _unscaled(call, 0, 2, 1), _unscaled(call, 1, 3, 0)
    return _conv(call, "qoperator", x, w, None), Codes(INT32.lo, INT32.hi, ONE, type=INT32)


def matmul_integer(call: Call) -> tuple[Product, Fact]:
    a, b = _unscaled(call, 0, 2, -2), _unscaled(call, 1, 3, -1)
    return _matmul(call, "qoperator", a, b), Codes(INT32.lo, INT32.hi, ONE, type=INT32)


def _unscaled(call: Call, x: int, zero: int, axis: int) -> Codes:
    """An operand of an integer operator, in units of 1."""
    return dequantized(call, x, None, zero, axis, "qoperator")


def _integer_bias(call: Call, index: int) -> Fact | None:
    """The int32 bias of an operator on codes, in units of its products."""
    return (integers(call.fact(index)) or call.fact(index)) if call.has(index) else None


def _typed_output(call: Call, zero: int) -> Fact:
    fact = call.fact(zero) if call.has(zero) else None
    codes = integers(fact) if fact is not None else None
    if codes is None or codes.type is None:
        return call.unknown()
    return Codes(codes.type.lo, codes.type.hi, ONE, type=codes.type, dialect="qdq")


def dynamic_quantize_matmul(call: Call) -> tuple[Product, Fact]:
    """A (floats), B, b_scale, b_zero_point: A is quantized to 8 bits at run time."""
    a = Codes(0, 255, None, IntFormat(0, 255), dialect="dynamic")
    b = dequantized(call, 1, 2, 3, -1, "qoperator")
    return _matmul(call, "qoperator", a, b), _float_output(call)


def matmul_integer_to_float(call: Call) -> tuple[Product, Fact]:
    """A, B, a_scale, b_scale, a_zero_point, b_zero_point."""
    a, b = dequantized(call, 0, 2, 4, -2, "qoperator"), dequantized(call, 1, 3, 5, -1, "qoperator")
    return _matmul(call, "qoperator", a, b), _float_output(call)


#: How every operator that multiplies by weights is read.
PRODUCTS: dict[str, Reader] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MatMul": matmul,
    "Gemm": gemm,
    "QLinearConv": qlinear_conv,
    "com.microsoft.QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "ConvInteger": conv_integer,
    "MatMulInteger": matmul_integer,
    "com.microsoft.QGemm": qgemm,
    "com.microsoft.DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "com.microsoft.MatMulIntegerToFloat": matmul_integer_to_float,
}
