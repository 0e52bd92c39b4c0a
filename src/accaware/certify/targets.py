"""Targets: the registers of machines that people run quantized networks on, and what each of them does with codes.

A target turns an operation of a file, whose integers say nothing of any register, into an integer layer. `TARGETS` is
the table; `Target.load` reads others from JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from accaware.certify.kernels import onnxruntime_feed
from accaware.formats import Accumulator
from accaware.integer.layer import IntegerLayer
from accaware.onnx.read import Product

__all__ = ["TARGETS", "Target", "target"]

OTHER_WIDTHS = " with "  # in a certificate, between a target's name and the widths, by pattern, that are not its own
Bias = Literal["inside", "outside"]
Runtime = Literal["", "onnxruntime"]


@dataclass(frozen=True, slots=True)
class Target:
    """A register and how it is fed.

    raw: whether it adds products of codes as they are stored, and zero points are corrected afterwards, in the outer
    register; else of codes less their zero point. bias: whether an operator's integer bias is added in the register
    (in the outer one, where there are tiles) or elsewhere. only: the runtime that feeds this register in some of its
    kernels only (`accaware.certify.kernels`); others add in int32. assumes: what must be true of the machine, for
    its user to judge. source: where that is known from. Raises `ValueError` or `TypeError` for values not allowed.
    """

    name: str
    accumulator: Accumulator
    raw: bool = False
    bias: Bias = "inside"
    only: Runtime = ""
    assumes: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "assumes", "source"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} of a target must be text, not {getattr(self, name)!r}")
        if not isinstance(self.raw, bool):
            raise TypeError(f"raw must be true or false, not {self.raw!r}")
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be inside or outside, not {self.bias!r}")
        if self.only not in get_args(Runtime):
            raise ValueError(f"only must be empty or onnxruntime, not {self.only!r}")
        if self.raw and self.accumulator.tile is None and self.bias == "inside":
            raise ValueError("a register of raw codes holds no bias; bias must be outside, or a tile given")
        if self.accumulator.preload != "none":
            raise ValueError("a target says nothing of start values; preload must be none")

    def with_bits(self, bits: int) -> Target:
        """The same with another width."""
        return replace(self, accumulator=replace(self.accumulator, bits=bits))

    def layer(self, product: Product) -> IntegerLayer:
        """The integers that this register adds for one operation of a file.

        Raises `ValueError` where they are no integer layer (weights beyond 64 bits, phases with raw zero points).
        """
        if self.only:
            return self._of_kernel(product)
        register, rows = self.accumulator, product.rows
        order: Literal["chw", "hwc"] = "hwc" if register.order == "hwc" else "chw"
        weights = rows.centred(order)
        start = np.zeros((), np.int64) if product.bias is None or self.bias == "outside" else product.bias
        if self.raw and rows.layout.phases > 1 and rows.zero_points.any():
            raise ValueError("weights of phases that differ in length have a zero point, and raw codes are asked for")
        tiled = register.tile is not None
        zeros = product.zero_range
        return IntegerLayer(
            name=product.name,
            kind=product.kind,
            rows=weights,
            codes=product.codes,
            accumulator=register,
            preload=np.zeros((), np.int64) if tiled else start,
            scale=_scale(product),
            act_scale=1.0,
            inside=True,
            method=product.dialect,
            note=product.note,
            zero_points=(zeros.lo,) if zeros.span == 0 else (zeros.lo, zeros.hi),
            raw=self.raw,
            weight_zero=rows.zero_points if self.raw else np.zeros((), np.int64),
            outer_start=start if tiled else np.zeros((), np.int64),
        )

    def _of_kernel(self, product: Product) -> IntegerLayer:
        feed = onnxruntime_feed(product)
        if feed is None:
            exact = Accumulator(self.accumulator.outer_bits)
            return replace(self, accumulator=exact, raw=False, only="").layer(product)
        plain = replace(self, accumulator=replace(self.accumulator, order=feed.order), only="")
        return plain.layer(replace(product, codes=feed.codes, zero_range=feed.zero_range))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Target:
        """The inverse of `to_dict`; what is left out has its default. Raises `ValueError` or `TypeError`."""
        if not isinstance(values, dict) or not isinstance(values.get("accumulator"), dict):
            raise ValueError("a target is an object with a name and an accumulator, itself an object with bits")
        own, register = _known(cls, values), _known(Accumulator, values["accumulator"])
        for kind, given in ((cls, own), (Accumulator, register)):
            if missing := [f.name for f in fields(kind)[:2] if f.name not in given and f.name != "overflow"]:
                raise ValueError(f"a target needs {missing[0]}")
        return cls(**{**own, "accumulator": Accumulator(**register)})

    @classmethod
    def load(cls, path: str | Path) -> Target:
        """Read a target from a JSON file. Raises `OSError`, or `ValueError` with the path."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"a target has no {unknown[0]!r}; known are {', '.join(sorted(names))}")
    return values


def _scale(product: Product) -> Any:
    """Units of the sums, float64 [R]; 1 where they are known at run time only, or make no sense."""
    scale = np.ones(product.rows.count)
    for factor in (product.rows.scale, product.act_scale):
        if factor is not None:
            scale = scale * factor
    return np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)


_PLAIN = "Codes less their zero points; one running sum that starts at the bias, products in any order."
_PAIRS = (
    "Stored u8 codes times stored s8 weights; two products are added in a saturating int16, pairs in a wrapping int32, "
    "where zero points and bias are corrected. "
)


def _table() -> dict[str, Target]:
    pair = Accumulator(16, "saturate", tile=2)
    targets = [
        Target(
            "file",
            Accumulator(32),
            assumes="What a file that was exported says of each of its operations; int32 for all others.",
        ),
        Target("int16", Accumulator(16), assumes=_PLAIN),
        Target("int32", Accumulator(32), assumes=_PLAIN, source="ONNX operators: ConvInteger, QLinearConv"),
        Target(
            "avx2-u8s8",
            replace(pair, order="hwc"),
            raw=True,
            assumes=_PAIRS
            + "Pairs are neighbouring taps, channels fastest, as in a matrix product over unfolded inputs.",
            source="Intel intrinsics guide, _mm256_maddubs_epi16; onnxruntime documentation, 'Quantize ONNX models'",
        ),
        Target(
            "onnxruntime-avx2",
            replace(pair, order="hwc"),
            raw=True,
            only="onnxruntime",
            assumes="onnxruntime 1.31 on x86 without VNNI, default options: stored u8 codes times stored s8 weights, "
            "two neighbouring products in a saturating int16, pairs in a wrapping int32. So do QLinearMatMul, QGemm, "
            "MatMulInteger and QDQ products (k, k + 1), and QLinearConv and QDQ convolutions (channels fastest) that "
            "are not depthwise; QDQ graphs of s8 codes run as u8 codes 128 higher. Of ConvInteger, and of matrix "
            "products whose left operand holds the weights, only s8 codes times u8 weights (in the order of the file). "
            "All else adds in int32.",
            source="measured: every pair of taps in every kernel of 1.31.1, on an emulated Haswell",
        ),
        Target(
            "avx2-u8s8-any",
            replace(pair, order="any"),
            raw=True,
            assumes=_PAIRS + "Any two taps of an output may form a pair.",
            source="Intel intrinsics guide, _mm256_maddubs_epi16",
        ),
        Target(
            "neon-s8s8-int16",
            Accumulator(16, "wrap", tile=2, order="any"),
            raw=True,
            assumes="Stored s8 codes times stored s8 weights; SMULL and SMLAL add any two products in int16, SADALP "
            "adds pairs in int32, where zero points and bias are corrected.",
            source="Arm architecture reference: SMULL, SMLAL, SADALP",
        ),
        Target(
            "wasm-relaxed",
            replace(pair, order="chw"),
            raw=True,
            assumes="i16x8.relaxed_dot_i8x16_i7x16_s: two neighbouring products in int16, which saturates or wraps as "
            "the machine likes, pairs in int32; stored codes.",
            source="WebAssembly relaxed SIMD proposal, relaxed integer dot product",
        ),
        Target(
            "fp16-exact",
            Accumulator(12),
            bias="outside",
            assumes="Half precision holds integers up to 2^11 exactly, so sums within 12 signed bits are exact in any "
            "order; codes less their zero points.",
            source="IEEE 754 binary16: 11 bits of significand",
        ),
        Target(
            "fp32-exact",
            Accumulator(25),
            bias="outside",
            assumes="Single precision holds integers up to 2^24 exactly, so sums within 25 signed bits are exact in "
            "any order; codes less their zero points.",
            source="IEEE 754 binary32: 24 bits of significand",
        ),
    ]
    for bits in (16, 8):
        targets.append(
            Target(
                f"fhe-{bits}",
                Accumulator(bits),
                assumes=f"Encrypted integers of {bits} bits, codes less their zero points, the bias added to them.",
                source="Concrete: table lookups take at most 16 bits, and cost more with each",
            )
        )
    return {t.name: t for t in targets}


#: Named targets. `avx2-u8s8` and its like know nothing of which kernel a runtime chooses.
TARGETS = _table()


def target(name: str) -> Target:
    """A named target, or one from a JSON file if `name` ends in ".json". Raises `ValueError` or `OSError`."""
    if name in TARGETS:
        return TARGETS[name]
    if name.endswith(".json"):
        own = Target.load(name)
        if own.name.partition(OTHER_WIDTHS)[0] in TARGETS and own != TARGETS.get(own.name):
            raise ValueError(f"{name}: {own.name!r} is the name of another target; see `accaware targets`")
        return own
    raise ValueError(f"unknown target {name!r}; known are {', '.join(TARGETS)}, or give a JSON file of your own")
