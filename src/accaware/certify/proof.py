"""The proof: the verdict on one accumulating operation, and the numbers that it rests on.

A proof is interval arithmetic on integers: `prove` compares the exact worst case of every row (`accaware.bounds`) with
the register. A refutation is an input that overflows. Neither sees anything but the integer layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import le
from typing import Literal, get_args

import numpy as np

from accaware.bounds import Integers, Side, bits_needed, witness, worst_case, worst_tile
from accaware.formats import Accumulator, IntFormat
from accaware.integer.layer import IntegerLayer

Verdict = Literal["proven", "refuted", "unproven", "outside"]
Register = Literal["inner", "outer"]


@dataclass(frozen=True, slots=True)
class Witness:
    """An input that overflows: codes [K] for output `row`, whose exact sum `value` does not fit the `register`.

    "inner" is the accumulator (of one of the tiles, where there are tiles), "outer" the one that tiles spill to. Codes
    are as they are stored; `zero_point` is the one that they share.
    """

    register: Register
    row: int
    inputs: tuple[int, ...]
    value: int
    zero_point: int = 0


@dataclass(frozen=True, slots=True)
class Sums:
    """What a register of `bits` bits is asked to hold: lo and hi of every row [R]."""

    lo: tuple[int, ...]
    hi: tuple[int, ...]
    bits: int

    @property
    def bits_needed(self) -> int:
        """The width that the worst row needs."""
        return bits_needed(min(self.lo), max(self.hi))

    @property
    def fits(self) -> bool:
        """Whether the register is that wide."""
        return self.bits_needed <= self.bits


@dataclass(frozen=True, slots=True)
class Operation:
    """One accumulating operation and its verdict.

    "proven": no input, in any order of a register's products, takes a running sum out of `target`. "refuted":
    `witness` does. "unproven": neither is shown, because of `reason`. "outside": not part of the request; the width
    that it needs is in `bits_needed` (None: unknown, `note` says why).

    lo, hi: per row, the range of every running sum, start value included (of the worst tile, where there are tiles);
    outer_lo, outer_hi: per row, the range of the sum of all tiles. preload: start values, row by row, tile by tile
    (none: all 0). codes, zero_points and raw: as in `IntegerLayer`. zero_channels: rows of zeros. repaired: rows that
    the exact check had to repair. Raises `ValueError` for a verdict that the numbers beside it contradict.
    """

    name: str
    kind: str
    verdict: Verdict
    bits_needed: int | None = None
    target: Accumulator | None = None
    codes: IntFormat | None = None
    fan_in: int = 0
    method: str = ""
    preload: tuple[int, ...] = ()
    lo: tuple[int, ...] = ()
    hi: tuple[int, ...] = ()
    outer_lo: tuple[int, ...] = ()
    outer_hi: tuple[int, ...] = ()
    sparsity: float = 0.0
    zero_channels: int = 0
    repaired: int = 0
    note: str = ""
    reason: str = ""
    witness: Witness | None = None
    zero_points: tuple[int, ...] = (0,)
    raw: bool = False

    def __post_init__(self) -> None:
        rule = next((rule for rule, kept in self._rules() if not kept), None)
        if rule:
            raise ValueError(f"operation {self.name!r} contradicts itself: {rule}")

    def _rules(self) -> Iterable[tuple[str, bool]]:
        sums, found = self.sums(), self.witness
        yield f"verdict {self.verdict!r} is not one of {get_args(Verdict)}", self.verdict in get_args(Verdict)
        yield "a sparsity lies in [0, 1]", 0 <= self.sparsity <= 1
        yield "a target and codes come together", (self.target is None) == (self.codes is None)
        rows = self.lo or self.hi or self.outer_lo or self.outer_hi
        yield "rows come with a target", self.target is not None or not rows
        for s in sums:
            yield "every row has one lo <= hi", len(s.lo) == len(s.hi) == len(self.lo) > 0 and all(map(le, s.lo, s.hi))
        if sums:
            yield "bits_needed is that of its worst row", self.bits_needed == sums[0].bits_needed
        yield "proven sums fit", self.verdict != "proven" or (bool(sums) and all(s.fits for s in sums))
        yield "'unproven' comes with a reason, and only that", (self.verdict == "unproven") == bool(self.reason)
        yield "'refuted' comes with a witness, and only that", (self.verdict == "refuted") == (found is not None)
        if found:
            yield "a witness is an input of one of its rows", bool(sums) and found.row in range(len(self.lo))
            yield "a witness has one code for each tap", len(found.inputs) == self.fan_in
            s = sums[0 if found.register == "inner" else -1]
            yield "a witness attains a sum of its row", s.lo[found.row] <= found.value <= s.hi[found.row]
            yield "a witness overflows", not Sums((found.value,), (found.value,), s.bits).fits

    def sums(self) -> list[Sums]:
        """Of the accumulator and, with tiles, of the outer register; nothing for an operation without integers."""
        if self.target is None:
            return []
        inner = Sums(self.lo, self.hi, self.target.bits)
        outer = Sums(self.outer_lo, self.outer_hi, self.target.outer_bits)
        return [inner] if self.target.tile is None else [inner, outer]

    @property
    def row_bits(self) -> tuple[int, ...]:
        """The accumulator width that every row needs."""
        return tuple(map(bits_needed, self.lo, self.hi))

    @property
    def utilisation(self) -> float | None:
        """The largest share of its side of the accumulator that a row can reach; above 1 it does not fit."""
        if self.target is None:
            return None
        try:
            return max(max(self.hi) / self.target.hi, min(self.lo) / self.target.lo)
        except OverflowError:  # integers of any size can be in a file
            return math.inf


def prove(layer: IntegerLayer) -> Operation:
    """The verdict on one integer layer: for every input, in every order of its products, with taps padded or not."""
    inner, *outer = sums = _sums(layer)
    verdict: Verdict = "outside"
    reason, found = "", None
    if layer.inside:
        fit = all(s.fits for s in sums)
        found = None if fit else next(witnesses(layer), None)
        verdict = "proven" if fit else "refuted" if found else "unproven"
    if verdict == "unproven":
        reason = f"whole sums fit, but parts of them may not, or those with padded taps: codes in [{layer.codes.lo}, "
        reason += f"{layer.codes.hi}] lack 0 or the zero point"
    return Operation(
        name=layer.name,
        kind=layer.kind,
        verdict=verdict,
        bits_needed=inner.bits_needed,
        target=layer.accumulator,
        codes=layer.codes,
        fan_in=layer.fan_in,
        method=layer.method,
        preload=tuple(layer.preload.ravel().tolist()) if layer.preload.any() else (),
        lo=inner.lo,
        hi=inner.hi,
        outer_lo=outer[0].lo if outer else (),
        outer_hi=outer[0].hi if outer else (),
        sparsity=float((layer.rows == 0).mean()),
        zero_channels=int((layer.rows == 0).all(axis=1).sum()),
        repaired=int(layer.repaired),
        note=layer.note,
        reason=reason,
        witness=found,
        zero_points=layer.zero_points,
        raw=layer.raw,
    )


def outside(name: str, kind: str, bits: int | None, note: str) -> Operation:
    """An operation without integer rows (pooling, an addition, a float layer), with the width it needs where known."""
    return Operation(name, kind, "outside", bits_needed=bits, note=note)


def _sums(layer: IntegerLayer) -> list[Sums]:
    """Per row, what the accumulator (in its worst tile) and, with tiles, the outer register can come to hold."""
    sums = []
    for register, bits in _registers(layer):
        cases = [layer.stored] if register == "inner" and layer.raw else layer.centred
        lows, highs = zip(*(_worst(layer, register, codes.with_zero()) for codes in cases), strict=True)
        sums.append(Sums(tuple(np.minimum.reduce(lows).tolist()), tuple(np.maximum.reduce(highs).tolist()), bits))
    return sums


def _registers(layer: IntegerLayer) -> Iterable[tuple[Register, int]]:
    yield "inner", layer.accumulator.bits
    if layer.accumulator.tile is not None:
        yield "outer", layer.accumulator.outer_bits


def _cases(layer: IntegerLayer, register: Register) -> Iterable[tuple[int, IntFormat]]:
    """Zero points and the ranges of the factors that they leave; raw codes are the same with any zero point."""
    if register == "inner" and layer.raw:
        return [(layer.zero_points[0], layer.codes)]
    return zip(layer.zero_points, layer.centred, strict=True)


def _worst(layer: IntegerLayer, register: Register, codes: IntFormat) -> tuple[Integers, Integers]:
    if register == "outer":
        return worst_case(layer.rows, codes, layer.outer_start)
    tile, any_taps = layer.accumulator.tile, layer.accumulator.order == "any"
    return worst_tile(layer.weights(), codes, tile, layer.starts, any_taps)


def witnesses(layer: IntegerLayer) -> Iterator[Witness]:
    """An input that overflows for every row that has one, those that leave their register by most first.

    All rows of the accumulator come before those of the outer register. With tiles of any taps, taps of largest
    product share the one that overflows.
    """
    for register, bits in _registers(layer):
        limit = 2 ** (bits - 1)
        found: list[tuple[Integers, Side, int, IntFormat, Integers]] = []
        for zero_point, codes in _cases(layer, register):
            lo, hi = _worst(layer, register, codes)
            found += [(hi - limit + 1, "hi", zero_point, codes, hi), (-limit - lo, "lo", zero_point, codes, lo)]
        excess = np.array([entry[0] for entry in found])
        worst = excess.max(axis=0)
        for row in np.argsort(-worst, kind="stable")[: int((worst > 0).sum())].tolist():
            _, side, zero_point, codes, ends = found[int(np.argmax(excess[:, row]))]
            raw = register == "inner" and layer.raw
            weights = layer.weights(slice(row, row + 1))[0] if register == "inner" else layer.rows[row]
            inputs = witness(weights, codes, side) + (0 if raw else zero_point)
            yield Witness(register, row, tuple(inputs.tolist()), int(ends[row]), zero_point)
