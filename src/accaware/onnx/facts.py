"""What is known of a tensor: the integers it holds, an interval of reals, or a constant.

A tensor of codes holds scale * (code - zero) with integer codes in [lo, hi]. That is a dequantized tensor, and with
scale 1 and zero 0 an integer-typed one. Where it is constant too, it is a tensor of quantized weights.

Float operations round. By how much is carried along: codes have an error, and the ends of an interval move outward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accaware.formats import IntFormat
from accaware.onnx.graph import Node, Shape
from accaware.onnx.tensors import Array, Constant, UnreadableError

Reals64 = NDArray[np.float64]
Floats = np.dtype[Any]

ONE: Reals64 = np.float64(1).reshape(())
ZERO: Reals64 = np.float64(0).reshape(())


@dataclass(frozen=True, eq=False)
class Codes:
    """value = scale * (code - zero + e), code an integer in [lo, hi] and |e| <= error.

    scale: float64, one number [], or [n] along dimension `axis` (negative: counted from the last); None where it is
    only known at run time. zero: the same, or the range of one zero-point that is only known at run time. type: the
    integers of an integer-typed tensor, whose arithmetic wraps around and whose scale is 1 and zero 0; None for a
    float tensor. stored: of a float tensor, the type that its codes had before; None where they had none. values: the
    codes of a constant tensor. dialect: who wrote the quantizer. error: what the float operations after the quantizer
    have rounded away, in codes; from 0.5 on the codes are lost. floats: the type of a float tensor, where it is known.
    """

    lo: int
    hi: int
    scale: Reals64 | None = None
    zero: Reals64 | IntFormat = ZERO
    axis: int = 0
    type: IntFormat | None = None
    values: Constant | None = None
    dialect: str = ""
    stored: IntFormat | None = None
    error: float = 0.0
    floats: Floats | None = None

    @property
    def per_axis(self) -> bool:
        """Whether scale or zero vary along `axis`."""
        return any(p is not None and not isinstance(p, IntFormat) and p.ndim > 0 for p in (self.scale, self.zero))

    @property
    def plain(self) -> bool:
        """Whether the values are the codes themselves."""
        return _is(self.scale, 1) and _is(self.zero, 0)

    @property
    def format(self) -> IntFormat:
        """The codes."""
        return IntFormat(self.lo, self.hi)


def _is(parameter: Reals64 | IntFormat | None, number: int) -> bool:
    return (
        parameter is not None
        and not isinstance(parameter, IntFormat)
        and not parameter.ndim
        and bool(parameter == number)
    )


@dataclass(frozen=True)
class Reals:
    """A tensor whose values are no known codes, because of `reason`; they lie in [lo, hi] if they are numbers.

    floats: their type, where it is known.
    """

    reason: str
    lo: float = -math.inf
    hi: float = math.inf
    floats: Floats | None = None


Fact = Codes | Reals | Constant


@dataclass(frozen=True, eq=False)
class Call:
    """A node and what is known of its inputs.

    shape: the dimensions of a tensor, where the file gives them, which is good for a report. known: those that hold in
    every run: of the model's own inputs, which runtimes check, and what follows from them.
    """

    node: Node
    facts: Sequence[Fact | None]
    shape: Callable[[str], Shape | None]
    known: Callable[[str], Shape | None]

    def has(self, index: int) -> bool:
        """Whether the optional input is there."""
        return index < len(self.facts) and self.facts[index] is not None

    def fact(self, index: int) -> Fact:
        """What is known of an input. Raises `UnreadableError` where it is absent."""
        found = self.facts[index] if index < len(self.facts) else None
        if found is None:
            raise UnreadableError(f"its input {index} is missing")
        return found

    def array(self, index: int, what: str) -> Array:
        """The values of a small constant input. Raises `UnreadableError` for anything else."""
        array = constant(self.fact(index))
        if array is None:
            raise UnreadableError(f"its {what} is not constant")
        return array

    def one(self, index: int, what: str, default: float | None = None) -> float:
        """The value of a constant input of one element."""
        if default is not None and not self.has(index):
            return default
        array = self.array(index, what)
        if array.size != 1:
            raise UnreadableError(f"its {what} has {array.size} elements, not one")
        number = float(array.reshape(()))
        if array.dtype.kind in "iu" and int(number) != int(array.reshape(())):
            raise UnreadableError(f"its {what} is an integer that is no float64")
        return number

    def unknown(self) -> Reals:
        """An output of which nothing is known."""
        return Reals(f"it is the float output of {self.node.kind} '{self.node.name}'")


def constant(fact: Fact) -> Array | None:
    """The values of a small constant; None for anything else."""
    if isinstance(fact, Codes) and fact.values is not None:
        codes = fact.values.small
        if fact.error:
            return None
        if fact.plain:
            return codes
        if fact.scale is None or isinstance(fact.zero, IntFormat) or fact.per_axis or fact.floats is None:
            return None
        return np.asarray(fact.scale * (codes - fact.zero), fact.floats)
    if not isinstance(fact, Constant):
        return None
    array = fact.small
    if array.dtype.kind not in "fiub":
        raise UnreadableError(f"the elements of '{fact.origin.name}' are no numbers")
    return array


def integers(fact: Fact, dialect: str = "") -> Codes | None:
    """An integer tensor as codes with scale 1 and zero 0; None where it is none."""
    if isinstance(fact, Codes):
        return fact if fact.plain and not fact.error else None
    if isinstance(fact, Constant) and fact.codes is not None:
        return Codes(fact.codes.lo, fact.codes.hi, ONE, type=fact.codes, values=fact, dialect=dialect)
    return None


def interval(fact: Fact) -> tuple[float, float]:
    """The reals that a tensor's values lie in."""
    if isinstance(fact, Reals):
        return fact.lo, fact.hi
    if isinstance(fact, Constant):
        array = constant(fact) if fact.codes is not None or fact.size <= 4096 else None
        if array is None or not array.size or not np.isfinite(array).all():
            return -math.inf, math.inf
        return float(array.min()), float(array.max())
    if fact.scale is None or isinstance(fact.zero, IntFormat):
        return -math.inf, math.inf
    lo, hi = fact.scale * (fact.lo - fact.zero - fact.error), fact.scale * (fact.hi - fact.zero + fact.error)
    if fact.values is not None and fact.type is None and fact.floats:  # rounded, which is no error of its codes
        return outward(lo, hi, fact.floats, _times_rounded(fact, fact.floats))
    return float(np.min(lo)), float(np.max(hi))


def floats_of(*facts: Fact | None) -> Floats | None:
    """The type of float tensors, the coarsest of several; None where none is known."""
    types = [f.dtype if isinstance(f, Constant) else f.floats for f in facts if f is not None]
    return max((t for t in types if t is not None and t.kind == "f"), key=unit, default=None)


def unit(floats: Floats | None) -> float:
    """How much of a result an operation of this type can round away; infinite where the type is not known."""
    # What is computed here is computed in float64, and no more exact than that.
    return math.inf if floats is None else max(float(np.finfo(floats).eps) / 2, 2.0**-48)


def outward(
    lo: Any, hi: Any, floats: Floats | None, operations: int = 1, beside: tuple[Any, Any] = (0.0, 0.0)
) -> tuple[float, float]:
    """The interval of what float operations make of exact results in [lo, hi]; arrays give the widest.

    Rounding is monotone, so that the ends bound everything between. beside: the absolute values that meet on the way to
    either end, where they exceed the end itself. What is too large for the type is infinite, and 0 is 0.
    """
    u = unit(floats) * operations
    tiny, largest = (0.0, math.inf) if floats is None else map(float, (_smallest(floats), np.finfo(floats).max))

    def moved(end: Any, more: Any, sign: int) -> Any:
        size = np.abs(end) + more
        slack = np.where(size == 0, 0.0, (u if u <= 0.5 else math.inf) * size + operations * tiny)
        return np.where(np.isinf(end), end, np.where(size + slack > largest, sign * math.inf, end + sign * slack))

    return float(np.min(moved(lo, beside[0], -1))), float(np.max(moved(hi, beside[1], 1)))


def _smallest(floats: Floats) -> Any:
    return np.finfo(floats).smallest_subnormal


def rounded(fact: Codes, floats: Floats | None, operations: int = 1, beside: float = 0.0) -> Codes:
    """Codes after float operations whose exact result they are: exact where that is exact, else with a larger error.

    beside: as in `outward`, in codes.
    """
    fact = replace(fact, floats=floats)
    if fact.scale is None or isinstance(fact.zero, IntFormat):
        return fact
    if floats is None:
        return replace(fact, error=math.inf)
    far = np.maximum(np.abs(fact.lo - fact.zero), np.abs(fact.hi - fact.zero)) + fact.error + beside
    if not (fact.scale * far <= np.finfo(floats).max).all():
        return replace(fact, error=math.inf)
    grid = (np.frexp(fact.scale)[0] == 0.5) & (fact.scale >= _smallest(floats)) & (np.rint(fact.zero) == fact.zero)
    if not fact.error and (grid & (far * float(np.finfo(floats).eps) <= 2)).all():  # integers of these have no rounding
        return fact
    lost = operations * (unit(floats) * far + _smallest(floats) / fact.scale)
    return replace(fact, error=fact.error + float(np.max(lost)))


def parameter(array: Array, what: str) -> tuple[Reals64, int]:
    """A constant that broadcasts over a tensor, as one number, or as [n] along a dimension counted from the last."""
    if not array.size or not np.isfinite(array).all():
        raise UnreadableError(f"its {what} is not finite, or empty")
    wide = array.astype(np.float64)
    if (wide == wide.flat[0]).all():
        return wide.reshape(-1)[0].reshape(()), 0
    long = [i for i, size in enumerate(array.shape) if size > 1]
    if len(long) > 1:
        raise UnreadableError(f"its {what} of shape {list(array.shape)} varies along more than one dimension")
    return wide.reshape(-1), long[0] - array.ndim


def common_axis(rank: int | None, *parameters: tuple[Reals64, int]) -> int:
    """The dimension along which parameters vary, in a tensor of `rank`, if known. Raises `UnreadableError` for two."""
    axes = {axis % rank if rank else axis for values, axis in parameters if values.ndim}
    if len(axes) > 1:
        raise UnreadableError("its scale and its offset vary along different dimensions")
    return axes.pop() if axes else 0


def affine(fact: Fact, factor: Array, offset: Array, floats: Floats | None = None) -> Fact:
    """factor * x + offset, of which one does something, for constants that broadcast over x; computed in `floats`."""
    if isinstance(fact, Codes) and fact.type is not None:
        return _integer_affine(fact, factor, offset)
    if isinstance(fact, Codes) and fact.scale is not None and not isinstance(fact.zero, IntFormat):
        (a, a_axis), (b, b_axis) = parameter(factor, "factor"), parameter(offset, "offset")
        one_sign = bool((a > 0).all() or ((a < 0).all() and fact.values is None))
        if one_sign:
            rank = None if fact.values is None else len(fact.values.shape)
            axis = common_axis(rank, (a, a_axis), (b, b_axis), (fact.scale, fact.axis), (fact.zero, fact.axis))
            scale = fact.scale * a
            if not (np.isfinite(scale) & (scale != 0)).all():
                raise UnreadableError("its scale overflows")
            zero = fact.zero - b / scale
            exact = np.array_equal((fact.zero - zero) * scale, b + 0 * zero)
            error = fact.error if exact else fact.error + float(np.max(np.spacing(np.abs(zero) + np.abs(fact.zero))))
            moved = replace(fact, scale=scale, zero=zero, axis=axis, error=error)
            return rounded(moved if (scale > 0).all() else _flipped(moved), floats)
    ends = [np.nan_to_num(factor * end, nan=0, posinf=math.inf, neginf=-math.inf) + offset for end in interval(fact)]
    reason = fact.reason if isinstance(fact, Reals) else "its codes are scaled in a way that leaves no integers"
    return Reals(reason, *outward(np.minimum(*ends), np.maximum(*ends), floats), floats)


def _flipped(fact: Codes) -> Codes:
    assert fact.scale is not None
    assert not isinstance(fact.zero, IntFormat)
    return replace(fact, lo=-fact.hi, hi=-fact.lo, scale=-fact.scale, zero=-fact.zero)


def _integer_affine(fact: Codes, factor: Array, offset: Array) -> Codes:
    assert fact.type is not None
    if fact.values is not None:
        raise UnreadableError("it computes with large integer constants")
    factors, offsets = ((int(p.min()), int(p.max())) for p in (factor, offset))
    ends = [a * end + b for end in (fact.lo, fact.hi) for a in factors for b in offsets]
    fits = fact.type.lo <= min(ends) and max(ends) <= fact.type.hi and max(map(abs, ends)) < 2**53
    return replace(fact, lo=min(ends) if fits else fact.type.lo, hi=max(ends) if fits else fact.type.hi)


def clipped(fact: Fact, low: float, high: float) -> Fact:
    """min(max(x, low), high). Raises `UnreadableError` for a bound that is no number."""
    if math.isnan(low) or math.isnan(high):
        raise UnreadableError("a bound is no number")
    low = min(low, high)  # the same, and then a range that lies below `low` is not taken to be there already
    if isinstance(fact, Codes):
        codes = _clipped_codes(fact, low, high)
        if codes is not None:
            return codes
    lo, hi = (min(max(end, low), high) for end in interval(fact))
    reason = fact.reason if isinstance(fact, Reals) else "it is clipped between two codes, or is a float constant"
    return Reals(reason, lo, hi, floats_of(fact))


def _clipped_codes(fact: Codes, low: float, high: float) -> Codes | None:
    """The codes of a clipped tensor; None where they are lost or a bound that matters is no code."""
    if fact.scale is None or isinstance(fact.zero, IntFormat) or not fact.error < 0.5:
        return None
    lo, hi, error = fact.lo, fact.hi, fact.error
    bounds: list[tuple[int, int] | None] = []
    for bound, all_inside in ((low, interval(fact)[0] >= low), (high, interval(fact)[1] <= high)):
        if all_inside:
            bounds.append(None)
            continue
        found = _code(fact.scale, fact.zero, bound)
        if found is None:
            return None
        bounds.append(found[:2])
        error = max(error, found[2])
    if bounds[0]:
        lo, hi = max(lo, bounds[0][0]), max(hi, bounds[0][1])
    if bounds[1]:
        lo, hi = min(lo, bounds[1][0]), min(hi, bounds[1][1])
    values = fact.values
    if values is not None and (lo, hi) != (fact.lo, fact.hi):
        held = np.iinfo(values.dtype)
        if fact.per_axis or not held.min <= lo <= hi <= held.max:
            return None
        values = values.computed(IntFormat(lo, hi), lambda block, _: np.clip(block, lo, hi), values.dtype)
    dialect = "qcdq" if fact.dialect == "qdq" and fact.type is not None else fact.dialect
    return replace(fact, lo=lo, hi=hi, values=values, dialect=dialect, error=error)


def _code(scale: Reals64, zero: Reals64, value: float) -> tuple[int, int, float] | None:
    """The smallest and the largest code that a number is along an axis, and how far it is off; None for no code."""
    code = np.atleast_1d(value / scale + zero)
    whole = np.rint(code)
    off = float(np.abs(code - whole).max())
    # Larger ones are not exact in float64, in which the number came.
    return (int(whole.min()), int(whole.max()), off) if off <= 1e-5 and np.abs(whole).max() < 2**53 else None


def dequantized_to(fact: Codes, floats: Floats | None) -> Codes:
    """Codes that a run makes floats of."""
    return rounded(fact, floats, 1 if floats is None else _times_rounded(fact, floats))


def _times_rounded(fact: Codes, floats: Floats) -> int:
    """Of a dequantization: the codes are made floats, which rounds those beyond the mantissa, and these are scaled."""
    return 1 if max(-fact.lo, fact.hi) * float(np.finfo(floats).eps) <= 2 else 2


def at_run_time(fact: Codes) -> Codes:
    """Codes without the constant that holds them, which stands for its integers: real ones are rounded like any."""
    held = replace(fact, values=None)
    return dequantized_to(held, fact.floats) if fact.values is not None and fact.type is None else held


def with_value(fact: Fact, value: float) -> Fact:
    """A tensor that holds this value too."""
    fact = at_run_time(fact) if isinstance(fact, Codes) else fact
    lo, hi = interval(fact)
    if isinstance(fact, Codes) and fact.scale is not None and not isinstance(fact.zero, IntFormat):
        found = _code(fact.scale, fact.zero, value)
        if found is not None:
            error = max(fact.error, found[2])
            return replace(fact, lo=min(fact.lo, found[0]), hi=max(fact.hi, found[1]), error=error)
    if isinstance(fact, Codes) and value == 0 and isinstance(fact.zero, IntFormat):
        return replace(fact, lo=min(fact.lo, fact.zero.lo), hi=max(fact.hi, fact.zero.hi))
    reason = fact.reason if isinstance(fact, Reals) else f"it is padded with {value}, which is no code"
    return Reals(reason, min(lo, value), max(hi, value), floats_of(fact))


def union(facts: Sequence[Fact]) -> Fact:
    """A tensor that holds values of any of these."""
    first = facts[0]
    if isinstance(first, Codes) and all(isinstance(f, Codes) and _same_grid(first, f) for f in facts):
        codes = [at_run_time(f) for f in facts if isinstance(f, Codes)]
        lo, hi = min(c.lo for c in codes), max(c.hi for c in codes)
        return replace(codes[0], lo=lo, hi=hi, error=max(c.error for c in codes), floats=floats_of(*facts))
    spans = [interval(fact) for fact in facts]
    reason = next((f.reason for f in facts if isinstance(f, Reals)), "it joins tensors of different scales")
    return Reals(reason, min(lo for lo, _ in spans), max(hi for _, hi in spans), floats_of(*facts))


def _same_grid(a: Codes, b: Codes) -> bool:
    if a.per_axis or b.per_axis or a.scale is None or b.scale is None or a.type != b.type:
        return False
    if isinstance(a.zero, IntFormat) or isinstance(b.zero, IntFormat):
        return False
    return bool(a.scale == b.scale and a.zero == b.zero)
