"""What is known of a tensor: the integers it holds, an interval of reals, or a constant.

A tensor of codes holds scale * (code - zero) with integer codes in [lo, hi]. That is a dequantized tensor, and with
scale 1 and zero 0 an integer-typed one. Where it is constant too, it is a tensor of quantized weights.
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

ONE: Reals64 = np.float64(1).reshape(())
ZERO: Reals64 = np.float64(0).reshape(())


@dataclass(frozen=True, eq=False)
class Codes:
    """value = scale * (code - zero), code an integer in [lo, hi].

    scale: float64, one number [], or [n] along dimension `axis` (negative: counted from the last); None where it is
    only known at run time. zero: the same, or the range of one zero-point that is only known at run time. type: the
    integers of an integer-typed tensor, whose arithmetic wraps around and whose scale is 1 and zero 0; None for a
    float tensor. stored: of a float tensor, the type that its codes had before; None where they had none. values: the
    codes of a constant tensor. dialect: who wrote the quantizer.
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
    """A tensor whose values are no known codes, because of `reason`; they lie in [lo, hi] if they are numbers."""

    reason: str
    lo: float = -math.inf
    hi: float = math.inf


Fact = Codes | Reals | Constant


@dataclass(frozen=True, eq=False)
class Call:
    """A node and what is known of its inputs. shape: the dimensions of a tensor, where the file gives them."""

    node: Node
    facts: Sequence[Fact | None]
    shape: Callable[[str], Shape | None]

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
        return float(array.reshape(()))

    def unknown(self) -> Reals:
        """An output of which nothing is known."""
        return Reals(f"it is the float output of {self.node.kind} '{self.node.name}'")


def constant(fact: Fact) -> Array | None:
    """The values of a small constant; None for anything else."""
    if isinstance(fact, Codes) and fact.values is not None:
        codes = fact.values.small
        if fact.plain:
            return codes
        if fact.scale is None or isinstance(fact.zero, IntFormat) or fact.per_axis:
            return None
        return np.asarray(fact.scale * (codes - fact.zero))
    if not isinstance(fact, Constant):
        return None
    array = fact.small
    if array.dtype.kind not in "fiub":
        raise UnreadableError(f"the elements of '{fact.origin.name}' are no numbers")
    return array


def integers(fact: Fact, dialect: str = "") -> Codes | None:
    """An integer tensor as codes with scale 1 and zero 0; None where it is none."""
    if isinstance(fact, Codes):
        return fact if fact.plain else None
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
    ends = [fact.scale * (fact.lo - fact.zero), fact.scale * (fact.hi - fact.zero)]
    return float(np.min(ends)), float(np.max(ends))


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


def affine(fact: Fact, factor: Array, offset: Array) -> Fact:
    """factor * x + offset for constants that broadcast over x."""
    if isinstance(fact, Codes) and fact.type is not None:
        return _integer_affine(fact, factor, offset)
    if isinstance(fact, Codes) and fact.scale is not None and not isinstance(fact.zero, IntFormat):
        (a, a_axis), (b, b_axis) = parameter(factor, "factor"), parameter(offset, "offset")
        one_sign = bool((a > 0).all() or ((a < 0).all() and fact.values is None))
        if one_sign:
            rank = None if fact.values is None else len(fact.values.shape)
            if rank is not None and max(factor.ndim, offset.ndim) > rank:
                raise UnreadableError("it is scaled by a tensor of more dimensions")
            axis = common_axis(rank, (a, a_axis), (b, b_axis), (fact.scale, fact.axis), (fact.zero, fact.axis))
            scale = fact.scale * a
            if not (np.isfinite(scale) & (scale != 0)).all():
                raise UnreadableError("its scale overflows")
            moved = replace(fact, scale=scale, zero=fact.zero - b / scale, axis=axis)
            return moved if (scale > 0).all() else _flipped(moved)
    lo, hi = interval(fact)
    ends = [np.nan_to_num(factor * end, nan=0, posinf=math.inf, neginf=-math.inf) + offset for end in (lo, hi)]
    reason = fact.reason if isinstance(fact, Reals) else "its codes are scaled in a way that leaves no integers"
    return Reals(reason, float(np.min(ends)), float(np.max(ends)))


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
    """min(max(x, low), high)."""
    if isinstance(fact, Codes):
        codes = _clipped_codes(fact, low, high)
        if codes is not None:
            return codes
    lo, hi = (min(max(end, low), high) for end in interval(fact))
    reason = fact.reason if isinstance(fact, Reals) else "it is clipped between two codes, or is a float constant"
    return Reals(reason, lo, hi)


def _clipped_codes(fact: Codes, low: float, high: float) -> Codes | None:
    """The codes of a clipped tensor; None where a bound that matters is no code."""
    if fact.scale is None or isinstance(fact.zero, IntFormat):
        return None
    lo, hi = fact.lo, fact.hi
    bounds: list[tuple[int, int] | None] = []
    for bound, all_inside in ((low, interval(fact)[0] >= low), (high, interval(fact)[1] <= high)):
        if all_inside or not math.isfinite(bound):
            bounds.append(None)
            continue
        code = np.atleast_1d(bound / fact.scale + fact.zero)
        if np.abs(code - np.rint(code)).max() > 1e-5 or np.abs(code).max() > 2**53:
            return None
        bounds.append((int(np.rint(code.min())), int(np.rint(code.max()))))
    if bounds[0]:
        lo, hi = max(lo, bounds[0][0]), max(hi, bounds[0][1])
    if bounds[1]:
        lo, hi = min(lo, bounds[1][0]), min(hi, bounds[1][1])
    values = fact.values
    if values is not None and (lo, hi) != (fact.lo, fact.hi):
        if fact.per_axis:
            return None
        values = values.computed(IntFormat(lo, hi), lambda block, _: np.clip(block, lo, hi), values.dtype)
    dialect = "qcdq" if fact.dialect == "qdq" and fact.type is not None else fact.dialect
    return replace(fact, lo=lo, hi=hi, values=values, dialect=dialect)


def with_value(fact: Fact, value: float) -> Fact:
    """A tensor that holds this value too."""
    lo, hi = interval(fact)
    if isinstance(fact, Codes) and fact.scale is not None and not isinstance(fact.zero, IntFormat):
        code = np.atleast_1d(value / fact.scale + fact.zero)
        whole = np.rint(code)
        if np.abs(code - whole).max() <= 1e-5 and np.abs(whole).max() < 2**53:
            return replace(fact, lo=min(fact.lo, int(whole.min())), hi=max(fact.hi, int(whole.max())), values=None)
    if isinstance(fact, Codes) and value == 0 and isinstance(fact.zero, IntFormat):
        return replace(fact, lo=min(fact.lo, fact.zero.lo), hi=max(fact.hi, fact.zero.hi), values=None)
    reason = fact.reason if isinstance(fact, Reals) else f"it is padded with {value}, which is no code"
    return Reals(reason, min(lo, value), max(hi, value))


def union(facts: Sequence[Fact]) -> Fact:
    """A tensor that holds values of any of these."""
    first = facts[0]
    if isinstance(first, Codes) and all(isinstance(f, Codes) and _same_grid(first, f) for f in facts):
        codes: list[Any] = list(facts)
        return replace(first, lo=min(c.lo for c in codes), hi=max(c.hi for c in codes), values=None)
    spans = [interval(fact) for fact in facts]
    reason = next((f.reason for f in facts if isinstance(f, Reals)), "it joins tensors of different scales")
    return Reals(reason, min(lo for lo, _ in spans), max(hi for _, hi in spans))


def _same_grid(a: Codes, b: Codes) -> bool:
    if a.per_axis or b.per_axis or a.scale is None or b.scale is None or a.type != b.type:
        return False
    if isinstance(a.zero, IntFormat) or isinstance(b.zero, IntFormat):
        return False
    return bool(a.scale == b.scale and a.zero == b.zero)
