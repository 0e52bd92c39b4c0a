"""What an accumulator must hold in the worst case, and which weights are safe for it. Integers only.

One output sums b + sum_i q_i x_i with integer weights q, codes x in [mu, nu] and a start value (preload) b. With
p = sum of the positive weights and n = sum of the magnitudes of the negative ones,

    lo = b + mu p - nu n        hi = b + nu p - mu n,

and both are attained (see `witness`). If 0 lies in [mu, nu], every partial sum of one running sum that starts at b lies
in [lo, hi] as well, whatever the order of the products. Everything that decides is a Python integer; numpy only adds
weights, in int64, where that sum cannot reach 2^63.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accaware.formats import Accumulator, IntFormat

Integers = NDArray[Any]  # int64, or dtype object that holds Python integers
Side = Literal["lo", "hi"]

_BLOCK = 2**20  # weights per step: bounds the memory of temporaries


def as_integers(values: ArrayLike, name: str = "rows") -> Integers:
    """`values` as an array of integers, unchanged. Raises `TypeError` for anything that is not an integer."""
    array = np.asarray(values)
    python_ints = array.dtype == object and all(type(v) is int for v in array.flat)
    if array.dtype.kind not in "iu" and not python_ints:
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    return array


def largest(values: Integers) -> int:
    """max |v|, exactly (0 for no values)."""
    return max(int(values.max()), -int(values.min())) if values.size else 0


def masses(rows: ArrayLike, tile: int | None = None) -> tuple[Integers, Integers]:
    """p = sum of positive weights and n = sum of magnitudes of negative weights of every row.

    rows: integers [R, K] (or [K], one row), K >= 1. Returns two arrays of Python integers [R], or [R, ceil(K / tile)]
    with one column for each tile of consecutive taps.

    >>> masses([3, -2, 0, 1])
    (array([4], dtype=object), array([2], dtype=object))
    """
    rows = np.atleast_2d(as_integers(rows))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"rows must have shape [R, K] with K >= 1, not {list(rows.shape)}")
    fan_in = rows.shape[1]
    dtype = np.int64 if fan_in * largest(rows) < 2**63 else object
    starts = range(0, fan_in, tile or fan_in)
    p, n = np.empty((2, len(rows), len(starts)), dtype)
    for block in _blocks(rows):
        p[block], n[block] = _masses(rows[block].astype(dtype), starts)
    shape = (len(rows), len(starts)) if tile else (len(rows),)
    return p.astype(object).reshape(shape), n.astype(object).reshape(shape)


def _blocks(rows: Integers) -> Iterator[slice]:
    step = max(1, _BLOCK // rows.shape[1])
    return (slice(i, i + step) for i in range(0, len(rows), step))


def _masses(weights: Integers, starts: Sequence[int]) -> tuple[Integers, Integers]:
    positive = np.add.reduceat(np.maximum(weights, 0), starts, axis=1)
    return positive, -np.add.reduceat(np.minimum(weights, 0), starts, axis=1)


def worst_case(
    rows: ArrayLike, codes: IntFormat, preload: ArrayLike = 0, tile: int | None = None
) -> tuple[Integers, Integers]:
    """The smallest and the largest sum of every row over all inputs, both attained.

    rows: integers [R, K] or [K]; preload: one integer, or integers of the shape of the result. Returns (lo, hi), arrays
    of Python integers [R], or [R, tiles] with `tile`. For codes without 0 these bound the final sums only: use
    `codes.with_zero()` for partial sums and for padded taps.

    >>> worst_case([[3, -2]], IntFormat.unsigned(4))
    (array([-30], dtype=object), array([45], dtype=object))
    """
    p, n = masses(rows, tile)
    start = as_integers(preload, "preload").astype(object)
    if start.shape not in ((), p.shape):
        raise ValueError(f"preload must be one integer or have shape {list(p.shape)}, not {list(start.shape)}")
    return start + codes.lo * p - codes.hi * n, start + codes.hi * p - codes.lo * n


def worst_tile(
    rows: ArrayLike, codes: IntFormat, tile: int | None = None, preload: ArrayLike = 0, any_taps: bool = False
) -> tuple[Integers, Integers]:
    """The smallest and the largest sum that a tile of each row comes to, over all inputs and tiles; both attained.

    rows: integers [R, K]; tile: products in one sum, None for all K; preload: integers that broadcast to [R, tiles].
    any_taps: any `tile` taps may share a sum, rather than consecutive ones. Returns two arrays of Python integers [R].

    >>> worst_tile([[3, 2, -2, 4]], IntFormat.unsigned(4), tile=2)
    (array([-30], dtype=object), array([75], dtype=object))
    >>> worst_tile([[3, 2, -2, 4]], IntFormat.unsigned(4), tile=2, any_taps=True)
    (array([-30], dtype=object), array([105], dtype=object))
    """
    rows = np.atleast_2d(as_integers(rows))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"rows must have shape [R, K] with K >= 1, not {list(rows.shape)}")
    fan_in = rows.shape[1]
    starts = range(0, fan_in, tile or fan_in)
    begin = np.broadcast_to(as_integers(preload, "preload"), (len(rows), len(starts)))
    reach = fan_in * largest(rows) * codes.magnitude + largest(begin)
    dtype = np.int64 if reach < 2**62 else object
    lo, hi = np.empty((2, len(rows)), dtype)
    for block in _blocks(rows):
        weights, start = rows[block].astype(dtype), begin[block].astype(dtype)
        if any_taps and tile is not None and tile < fan_in:
            ends = np.stack([weights * codes.lo, weights * codes.hi])
            low = np.sort(ends.min(axis=0), axis=1)[:, :tile].sum(axis=1)
            high = np.sort(ends.max(axis=0), axis=1)[:, -tile:].sum(axis=1)
            lo[block], hi[block] = low + start.min(axis=1), high + start.max(axis=1)
        else:
            p, n = _masses(weights, starts)
            lo[block] = (start + codes.lo * p - codes.hi * n).min(axis=1)
            hi[block] = (start + codes.hi * p - codes.lo * n).max(axis=1)
    return lo.astype(object), hi.astype(object)


def witness(row: ArrayLike, codes: IntFormat, which: Side) -> Integers:
    """The input codes [K] that attain one side of `worst_case(row, codes)`; weights of 0 get the code nearest 0.

    >>> witness([3, -2, 0], IntFormat.signed(4), "hi")
    array([ 7, -8,  0])
    """
    q = as_integers(row, "row")
    if q.ndim != 1 or which not in ("lo", "hi"):
        raise ValueError(f"a witness needs one row and 'lo' or 'hi', not shape {list(q.shape)} and {which!r}")
    positive, negative = (codes.hi, codes.lo) if which == "hi" else (codes.lo, codes.hi)
    idle = min(max(0, codes.lo), codes.hi)
    return np.where(q > 0, positive, np.where(q < 0, negative, idle))


def bits_needed(lo: int, hi: int) -> int:
    """The smallest P >= 1 with -2^(P-1) <= lo and hi <= 2^(P-1) - 1.

    >>> bits_needed(-8, 7), bits_needed(0, 8)
    (4, 5)
    """
    if lo > hi:
        raise ValueError(f"bits_needed wants lo <= hi, not [{lo}, {hi}]")
    return 1 + max((v if v >= 0 else ~v).bit_length() for v in (int(lo), int(hi)))


def minimal_width(rows: ArrayLike, codes: IntFormat, preload: ArrayLike = 0) -> list[int]:
    """For every row, the smallest register that holds every partial sum of any input in any order (bits).

    >>> minimal_width([[3, -2], [0, 0]], IntFormat.unsigned(4))
    [7, 1]
    """
    lo, hi = worst_case(rows, codes.with_zero(), preload)
    return [bits_needed(*ends) for ends in zip(lo, hi, strict=True)]


def code_bits(codes: IntFormat) -> int:
    """N: the bits of the smallest unsigned (or, where codes are negative, signed) type that holds `codes`."""
    return bits_needed(codes.lo, codes.hi) if codes.is_signed else max(1, codes.hi.bit_length())


@dataclass(frozen=True, slots=True)
class Budget:
    """All weights that are safe for one register: linear limits on p = sum q+ and n = sum |q-| of one running sum.

    For codes in [-down, up], `up` >= 0 and `down` >= 0:

        up p + down n <= hi  and  down p + up n <= lo,        or, where `l1` is given,        p + n <= l1.

    Both forms are exact, that is necessary and sufficient.
    """

    up: int
    down: int
    hi: int | None = None
    lo: int | None = None
    l1: int | None = None

    @property
    def positive(self) -> int | None:
        """The largest p where the sides do not depend on each other (codes of one sign); None where they do."""
        return self._cap(self.hi, self.lo)

    @property
    def negative(self) -> int | None:
        """The largest n where the sides do not depend on each other (codes of one sign); None where they do."""
        return self._cap(self.lo, self.hi)

    @property
    def simple(self) -> Budget:
        """The largest part of this set that knows only p + n, for signed codes; else, or where that is 0, this one.

        It lacks a unit or so, and a projection onto it need not split it between the signs.
        """
        if self.hi is None or self.lo is None or self.positive is not None:
            return self
        l1 = min(self.hi, self.lo) // max(self.up, self.down)
        return Budget(self.up, self.down, l1=l1) if l1 else self

    def _cap(self, limit_up: int | None, limit_down: int | None) -> int | None:
        if limit_up is None or limit_down is None or (self.up and self.down):
            return None
        return limit_up // self.up if self.up else limit_down // self.down

    def allows(self, p: ArrayLike, n: ArrayLike) -> Any:
        """Whether weights with masses p and n are safe: bool, or an array of bool for arrays [...] of integers."""
        p = as_integers(p, "p").astype(object)
        n = as_integers(n, "n").astype(object)
        if self.l1 is not None:
            return p + n <= self.l1
        return (self.up * p + self.down * n <= self.hi) & (self.down * p + self.up * n <= self.lo)


def budget(codes: IntFormat, accumulator: Accumulator, preload: int | None = None, where: str = "") -> Budget:
    """The exact safe set of one running sum in `accumulator` (of each tile, if it has tiles).

    preload: the start value b (None: 0, or free where `accumulator.preload` is "free": then safe means that some b
    exists, `free_preload` finds it). where: the layer's name, for the message. Codes without 0 count as
    `codes.with_zero()`. Raises `ValueError` if neither q = +1 nor q = -1 is safe, or if all codes are 0.

    >>> b = budget(IntFormat.unsigned(4), Accumulator(12))
    >>> b.positive, b.negative
    (136, 136)
    """
    codes = codes.with_zero()
    if codes.span == 0:
        raise ValueError(f"{_at(where)}input codes that are all 0 need no accumulator, so there is no budget")
    if preload is None and accumulator.preload == "free":
        _refuse_below_one(codes, accumulator.bits, codes.span.bit_length(), "exact free-preload", where)
        return Budget(codes.hi, -codes.lo, l1=(accumulator.hi - accumulator.lo) // codes.span)
    b = preload or 0
    smallest = min(bits_needed(b + codes.lo, b + codes.hi), bits_needed(b - codes.hi, b - codes.lo))
    _refuse_below_one(codes, accumulator.bits, smallest, f"exact (preload {b})" if b else "exact", where)
    return Budget(codes.hi, -codes.lo, hi=accumulator.hi - b, lo=b - accumulator.lo)


def free_preload(rows: ArrayLike, codes: IntFormat, accumulator: Accumulator, where: str = "") -> NDArray[np.int64]:
    """For every row (and tile) the start value nearest 0 with which every partial sum fits the register.

    rows: integers [R, K]. Returns int64 [R], or [R, tiles] if `accumulator` has tiles. Raises `ValueError` where none
    exists, which is where (p + n) (nu - mu) > 2^P - 1.

    >>> free_preload([[7, 1]], IntFormat.unsigned(4), Accumulator(7))
    array([-57])
    """
    lo, hi = worst_case(rows, codes.with_zero(), tile=accumulator.tile)
    low, high = accumulator.lo - lo, accumulator.hi - hi
    if (low > high).any():
        row = int(np.argwhere(low > high)[0][0])
        raise ValueError(f"{_at(where)}row {row} fits no start value in acc_bits={accumulator.bits}")
    nearest: Integers = np.minimum(np.maximum(low, 0), high)
    return nearest.astype(np.int64)


def data_type_bits(fan_in: int, weights: IntFormat, codes: IntFormat) -> int:
    """The smallest P that the types alone prove: K max|q| max|x| <= 2^(P-1) - 1.

    >>> data_type_bits(64, IntFormat.narrow(4), IntFormat.unsigned(4))
    14
    """
    reach = fan_in * weights.magnitude * codes.magnitude
    return bits_needed(-reach, reach)


def data_type_budget(fan_in: int, codes: IntFormat, bits: int, where: str = "") -> int:
    """The largest max|q| that the types alone prove safe. Raises `ValueError` below 1.

    >>> data_type_budget(64, IntFormat.unsigned(4), 14)
    8
    """
    _refuse_below_one(codes, bits, data_type_bits(fan_in, IntFormat(-1, 1), codes), "data-type", where)
    reach = fan_in * max(1, codes.magnitude)
    return (int(2 ** (bits - 1)) - 1) // reach


def a2q_budget(codes: IntFormat, bits: int, where: str = "") -> Fraction:
    """A2Q (arXiv 2308.13504): ||q||_1 <= (2^(P-1) - 1) 2^(signed - N). Raises `ValueError` below 1.

    >>> a2q_budget(IntFormat.unsigned(4), 12)
    Fraction(2047, 16)
    """
    log2_magnitude = code_bits(codes) - codes.is_signed
    _refuse_below_one(codes, bits, log2_magnitude + 2, "A2Q", where)
    return Fraction(2 ** (bits - 1) - 1, 2**log2_magnitude)


def a2q_plus_budget(codes: IntFormat, bits: int, where: str = "") -> Fraction:
    """A2Q+ (arXiv 2401.10432): ||q||_1 <= (2^P - 2) / (2^N - 1), for q truncated from zero-centred float weights.

    Truncation leaves at most half of that on either side, so nu p - mu n <= (nu - mu) max(p, n) <= 2^(P-1) - 1.
    Raises `ValueError` below 1.

    >>> a2q_plus_budget(IntFormat.unsigned(4), 12)
    Fraction(4094, 15)
    """
    n = code_bits(codes)
    _refuse_below_one(codes, bits, n + 1, "A2Q+", where)
    return Fraction(2**bits - 2, 2**n - 1)


def _refuse_below_one(codes: IntFormat, bits: int, smallest: int, name: str, where: str) -> None:
    if bits < smallest:
        raise ValueError(
            f"{_at(where)}acc_bits={bits} is too small for input codes in [{codes.lo}, {codes.hi}] "
            f"(act_bits={code_bits(codes)}): the {name} budget is below 1; acc_bits must be at least {smallest}"
        )


def _at(where: str) -> str:
    return f"{where}: " if where else ""
