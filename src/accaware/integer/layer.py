"""The integer layer: everything that a proof, an emulation or an export needs to know of one operation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accaware.bounds import Integers, as_integers
from accaware.formats import Accumulator, IntFormat


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """Rows of integer weights and the register that adds their products.

    rows: integers [R, K], one row for each output channel (for each channel and phase of a strided transposed
        convolution), taps in the order `accumulator.order`, which is also the order they are added in.
    codes: range of the input codes. preload: integers [R], or [R, tiles], that the register starts from.
    scale: float64 [R] and act_scale: output = scale * act_scale * sum of products.
    inside: False for an operation outside the request, of which only the width is reported.
    method: the set or quantizer that the weights come from. repaired: rows that the exact check had to repair.

    With `accumulator.tile` = T, taps [0, T), [T, 2T), ... are the tiles: a tile's running sum starts at its preload,
    and the spill adds that sum less its preload to the outer register, which starts at 0. The arrays are copied and
    read-only, so what was proven stays what it was. Raises `ValueError` or `TypeError`, with the layer's name, where
    a field does not fit the others.
    """

    name: str
    kind: str
    rows: Integers
    codes: IntFormat
    accumulator: Accumulator
    preload: Integers
    scale: NDArray[np.float64]
    act_scale: float
    inside: bool
    method: str
    repaired: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        rows = self._freeze("rows", as_integers(self.rows, f"{self.name}: rows"))
        if rows.ndim != 2 or rows.size == 0 or rows.dtype == object or rows.max() >= 2**63:
            raise ValueError(f"{self.name}: rows must be int64 [R, K] with R, K >= 1, not {rows.dtype} {rows.shape}")
        preload = self._freeze("preload", as_integers(self.preload, f"{self.name}: preload"))
        count, tiles = len(rows), len(self.tiles)
        if preload.shape != (count, tiles) and (tiles > 1 or preload.shape != (count,)):
            raise ValueError(f"{self.name}: preload must have shape {[count, tiles]}, not {list(preload.shape)}")
        scale = self._freeze("scale", np.asarray(self.scale, np.float64))
        if scale.shape != (count,) or not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"{self.name}: scale must be {count} positive numbers, not {scale}")
        if not (np.isfinite(self.act_scale) and self.act_scale > 0):
            raise ValueError(f"{self.name}: act_scale must be a positive number, not {self.act_scale}")

    def _freeze(self, name: str, array: NDArray[np.generic]) -> Integers:
        copy = np.array(array)
        copy.flags.writeable = False
        object.__setattr__(self, name, copy)
        return copy

    @property
    def fan_in(self) -> int:
        """K, the products of one output."""
        return int(self.rows.shape[1])

    @property
    def tiles(self) -> list[slice]:
        """The taps of every inner running sum; one slice of all taps where there are no tiles."""
        step = self.accumulator.tile or self.fan_in
        return [slice(start, min(start + step, self.fan_in)) for start in range(0, self.fan_in, step)]

    @property
    def starts(self) -> Integers:
        """`preload` as [R, tiles]."""
        return self.preload.reshape(len(self.rows), -1)
