"""The integer layer: everything that a proof, an emulation or an export needs to know of one operation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from accaware.bounds import Integers, as_integers
from accaware.formats import Accumulator, IntFormat


def _nothing() -> Integers:
    return np.zeros((), np.int64)


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """Rows of integer weights and the register that adds their products.

    rows: integers [R, K], zero points subtracted: one row for each output channel (for each channel and phase of a
        strided transposed convolution), taps in the order `accumulator.order`, in which they are added too.
    codes: range of the input codes as they are stored. zero_points: the code that stands for 0, or the smallest and
        the largest that may (dynamic quantization: all codes of one input share one).
    preload: one integer, or integers [R], or [R, tiles], that the register starts from (one, for tiles of any taps).
    scale: float64 [R] and act_scale: output = scale * act_scale * sum of products. None: each token has its own.
    inside: False for an operation outside the request, of which only the width is reported.
    method: the set or quantizer that the weights come from. repaired: rows that the exact check had to repair.
    raw: whether the register adds the products of stored codes, (q + weight_zero) * code with integers `weight_zero`
        [R], and what that is more than q * (code - zero point) is taken off outside.

    With `accumulator.tile` = T, taps [0, T), [T, 2T), ... are the tiles: a tile's running sum starts at its preload,
    and the spill adds that sum less its preload to the outer register, which starts at `outer_start`, integers [R].
    With raw codes what is too much is taken off there, by arithmetic modulo 2^outer_bits. The arrays are copied (but
    for those that nobody can write to) and read-only, so what was proven stays what it was. Raises `ValueError` or
    `TypeError`, with the layer's name, where a field does not fit the others.
    """

    name: str
    kind: str
    rows: Integers
    codes: IntFormat
    accumulator: Accumulator
    preload: Integers
    scale: NDArray[np.float64]
    act_scale: float | None
    inside: bool
    method: str
    repaired: int = 0
    note: str = ""
    zero_points: tuple[int, ...] = (0,)
    raw: bool = False
    weight_zero: Integers = field(default_factory=_nothing)
    outer_start: Integers = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        rows = self._freeze("rows", as_integers(self.rows, f"{self.name}: rows"))
        if rows.ndim != 2 or rows.size == 0 or rows.dtype == object or rows.max() >= 2**63:
            raise ValueError(f"{self.name}: rows must be int64 [R, K] with R, K >= 1, not {rows.dtype} {rows.shape}")
        preload = self._freeze("preload", as_integers(self.preload, f"{self.name}: preload"))
        count, tiles = len(rows), len(self.tiles)
        if preload.shape not in ((), (count, tiles)) and (tiles > 1 or preload.shape != (count,)):
            raise ValueError(f"{self.name}: preload must have shape {[count, tiles]}, not {list(preload.shape)}")
        if tiles > 1 and self.accumulator.order == "any" and preload.ndim:
            raise ValueError(f"{self.name}: preload must be one integer where any taps share a tile")
        scale = self._freeze("scale", np.asarray(self.scale, np.float64))
        if scale.shape != (count,) or not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"{self.name}: scale must be {count} positive numbers, not {scale}")
        if self.act_scale is not None and not (np.isfinite(self.act_scale) and self.act_scale > 0):
            raise ValueError(f"{self.name}: act_scale must be a positive number, not {self.act_scale}")
        for name in ("weight_zero", "outer_start"):
            values = as_integers(getattr(self, name), f"{self.name}: {name}")
            if values.shape not in ((), (count,)):
                raise ValueError(f"{self.name}: {name} must be one integer or {count}, not {list(values.shape)}")
            self._freeze(name, np.broadcast_to(values, (count,)))
        if not self.zero_points or any(type(z) is not int for z in self.zero_points):
            raise ValueError(f"{self.name}: zero_points must be integers, at least one, not {self.zero_points}")

    def _freeze(self, name: str, array: NDArray[np.generic]) -> Integers:
        root: object = array
        while isinstance(root, np.ndarray):
            root = root.base
        copy = array if isinstance(root, bytes) else np.array(array)  # bytes cannot change
        copy.flags.writeable = False
        object.__setattr__(self, name, copy)
        return copy

    @property
    def fan_in(self) -> int:
        """K, the products of one output."""
        return int(self.rows.shape[1])

    @property
    def centred(self) -> tuple[IntFormat, ...]:
        """The ranges that codes less their zero point lie in, one for each of `zero_points`."""
        return tuple(IntFormat(self.codes.lo - z, self.codes.hi - z) for z in self.zero_points)

    @property
    def stored(self) -> IntFormat:
        """The range that stored codes lie in, those of padded taps too: there the code is the zero point."""
        ends = (self.codes.lo, self.codes.hi, *self.zero_points)
        return IntFormat(min(ends), max(ends))

    def weights(self, part: slice = slice(None)) -> Integers:
        """The weights that the accumulator multiplies, integers [R, K] of the rows `part`."""
        rows = self.rows[part]
        return rows + self.weight_zero[part, None] if self.raw and self.weight_zero.any() else rows

    def part(self, index: NDArray[np.int64]) -> IntegerLayer:
        """The layer of these rows only."""
        fields = ("rows", "preload", "scale", "weight_zero", "outer_start")
        arrays = {name: getattr(self, name) for name in fields}
        return replace(self, **{name: array[index] if array.ndim else array for name, array in arrays.items()})

    @property
    def tiles(self) -> list[slice]:
        """The taps of every inner running sum; one slice of all taps where there are no tiles."""
        step = self.accumulator.tile or self.fan_in
        return [slice(start, min(start + step, self.fan_in)) for start in range(0, self.fan_in, step)]

    @property
    def starts(self) -> Integers:
        """`preload` as [R, tiles]."""
        shape = len(self.rows), len(self.tiles)
        return self.preload.reshape(shape) if self.preload.ndim else np.broadcast_to(self.preload, shape)
