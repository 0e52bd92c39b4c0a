"""What runtimes feed to the register of a kernel: which codes, taps in which order. Measured, not read from manuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    Only a left operand of unsigned bytes times a right one of signed bytes goes there.
    """
    codes, weights, zeros = product.codes, product.rows.codes, product.zero_range
    if not (_within_a_byte(codes) and _within_a_byte(weights)):
        return None
    signed, unsigned = (_can_be(kind, codes, product.stored) for kind in ("signed", "unsigned"))
    if product.kind == "ConvInteger" or product.left:  # the weights are its left operand
        return Feed(codes, zeros, "chw") if signed and _can_be("unsigned", weights) else None
    if not _can_be("signed", weights) or _depthwise(product):
        return None
    order: TapOrder = "hwc"
    if product.dialect == "qoperator" or product.kind in ("MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm"):
        return Feed(codes, zeros, order) if unsigned else None
    higher = Feed(_raised(codes), _raised(zeros), order)
    if not unsigned:
        return higher
    return Feed(IntFormat(codes.lo, higher.codes.hi) if signed else codes, zeros, order)


def _can_be(kind: Literal["signed", "unsigned"], codes: IntFormat, stored: IntFormat | None = None) -> bool:
    """Whether these codes can lie in bytes of that kind: of any that holds them, where their type is not known.

    The type of weights is not: those of a narrower range may be clipped ones.
    """
    if stored is not None:
        return (stored.lo < 0) == (kind == "signed")
    return codes.hi <= 127 if kind == "signed" else codes.lo >= 0


def _raised(codes: IntFormat) -> IntFormat:
    """Signed codes as the kernel of unsigned ones gets them."""
    return IntFormat(codes.lo + 128, codes.hi + 128)


def _within_a_byte(codes: IntFormat) -> bool:
    return codes.span <= _BYTE.span and codes.lo >= -128 and codes.hi <= (127 if codes.lo < 0 else 255)


def _depthwise(product: Product) -> bool:
    """One input channel and one output channel in each group; a kernel of its own, which widens."""
    inputs = product.rows.layout.inputs
    return "Conv" in product.kind and inputs is not None and len(set(inputs.tolist())) == len(inputs)
