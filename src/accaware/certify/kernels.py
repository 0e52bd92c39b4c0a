"""What runtimes feed to the register of a kernel: which codes, taps in which order. Measured, not read from manuals."""

from __future__ import annotations

from dataclasses import dataclass

from accaware.formats import IntFormat, TapOrder
from accaware.onnx.read import Product

__all__ = ["Feed", "onnxruntime_feed"]

_BYTE = IntFormat.unsigned(8)


@dataclass(frozen=True, slots=True)
class Feed:
    """The codes that a kernel multiplies, their zero point, and the order of the taps."""

    codes: IntFormat
    zero_range: IntFormat
    order: TapOrder


def onnxruntime_feed(product: Product) -> Feed | None:
    """What onnxruntime 1.31 feeds to AVX2's saturating pairs (`vpmaddubsw`); None where its kernel is exact.

    Only unsigned times signed bytes go there. Where the file leaves open whether codes are stored signed (floats in a
    range of [0, 127]), both count.
    """
    codes, weights, zeros = product.codes, product.rows.codes, product.zero_range
    signed_codes, signed_weights = (product.stored or codes).lo < 0, weights.lo < 0
    if not (_within_a_byte(codes) and _within_a_byte(weights)):
        return None
    if product.kind == "ConvInteger":  # the weights are its left operand
        return Feed(codes, zeros, "chw") if signed_codes and not signed_weights else None
    if not signed_weights or _depthwise(product):
        return None
    order: TapOrder = "hwc"
    if product.dialect == "qoperator" or product.kind in ("MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm"):
        return None if signed_codes else Feed(codes, zeros, order)
    higher = Feed(_raised(codes), _raised(zeros), order)
    if signed_codes:
        return higher
    if product.stored is None and codes.hi <= 127:  # codes of either type
        return Feed(IntFormat(min(codes.lo, higher.codes.lo), max(codes.hi, higher.codes.hi)), zeros, order)
    return Feed(codes, zeros, order)


def _raised(codes: IntFormat) -> IntFormat:
    """Signed codes as the kernel of unsigned ones gets them."""
    return IntFormat(codes.lo + 128, codes.hi + 128)


def _within_a_byte(codes: IntFormat) -> bool:
    return codes.span <= _BYTE.span and codes.lo >= -128 and codes.hi <= (127 if codes.lo < 0 else 255)


def _depthwise(product: Product) -> bool:
    """One input channel and one output channel in each group; a kernel of its own, which widens."""
    inputs = product.rows.layout.inputs
    return "Conv" in product.kind and inputs is not None and len(set(inputs.tolist())) == len(inputs)
