"""What really comes out when an integer layer runs on its register: exact wrap-around and saturation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from accaware.bounds import Integers, as_integers, largest
from accaware.integer.layer import IntegerLayer


@dataclass(frozen=True, eq=False)
class Emulation:
    """sums: integers [B, R], what the register delivers, preload subtracted. overflows: int64 [B, R].

    An overflow is, for wrap-around, a finished sum (of a tile, or of the outer register) that does not fit, since wraps
    on the way to a sum that fits undo each other; for saturation, a step that was clipped. Without overflows the sums
    are the dot products.
    """

    sums: Integers
    overflows: Integers


def emulate(layer: IntegerLayer, inputs: ArrayLike) -> Emulation:
    """Run `layer` on input codes, integers [B, K], whose taps are numbered, and added, in the order of the rows.

    Always exact: int64 where nothing comes near 2^63, Python integers elsewhere. Raises `ValueError` for a wrong shape
    and for inputs outside `layer.codes` (0 is always allowed: a padded tap).
    """
    x = _checked(layer, inputs)
    register = layer.accumulator
    dtype = np.int64 if _fits_int64(layer) else object
    rows, x, starts = layer.rows.astype(dtype), x.astype(dtype), layer.starts.astype(dtype)
    saturates = register.overflow == "saturate"
    overflows = np.zeros((len(x), len(rows)), np.int64)
    parts = []
    for start, taps in zip(starts.T, layer.tiles, strict=True):
        codes, weights = x[:, taps], rows[:, taps]
        if saturates:
            total, count = _saturate(start, (codes[:, k, None] * w for k, w in enumerate(weights.T)), register.bits)
        else:
            total, count = _wrap(start + _dot(codes, weights), register.bits)
        parts.append(total - start)
        overflows += count
    if register.tile is None:
        return Emulation(parts[0], overflows)
    if saturates:
        total, count = _saturate(np.zeros_like(starts[:, 0]), parts, register.outer_bits)
    else:
        total, count = _wrap(sum(parts), register.outer_bits)
    return Emulation(total, overflows + count)


def _wrap(exact: Integers, bits: int) -> tuple[Integers, Integers]:
    """Two's complement: the sum modulo 2^bits, which does not depend on the order of its terms."""
    lo = -(2 ** (bits - 1))
    folded = (exact - lo) % 2**bits + lo
    return folded, folded != exact


def _saturate(start: Integers, terms: Iterable[Integers], bits: int) -> tuple[Integers, Integers]:
    """Clip the start and the running sum after every term; counts the clipped steps."""
    lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    total = np.minimum(np.maximum(start, lo), hi)
    clipped = (total != start).astype(np.int64)
    for term in terms:
        exact = total + term
        total = np.minimum(np.maximum(exact, lo), hi)
        clipped = clipped + (total != exact)
    return total, clipped


def _dot(x: Integers, rows: Integers) -> Integers:
    """x [B, K] times rows [R, K], exactly: where it is int64, every sum stays below 2^53, so float64 holds it too."""
    exact = x.dtype if x.dtype == object else np.float64
    product: Integers = x.astype(exact) @ rows.T.astype(exact)
    return product.astype(x.dtype)


def _fits_int64(layer: IntegerLayer) -> bool:
    register = layer.accumulator
    reach = layer.fan_in * largest(layer.rows) * layer.codes.magnitude + largest(layer.preload) * len(layer.tiles)
    return reach < 2**53 and max(register.bits, register.outer_bits if register.tile else 0) < 63


def _checked(layer: IntegerLayer, inputs: ArrayLike) -> Integers:
    x = as_integers(inputs, f"{layer.name}: inputs")
    if x.ndim != 2 or x.shape[1] != layer.fan_in:
        raise ValueError(f"{layer.name}: inputs must have shape [B, {layer.fan_in}], not {list(x.shape)}")
    codes = layer.codes.with_zero()
    if x.size and not codes.lo <= int(x.min()) <= int(x.max()) <= codes.hi:
        raise ValueError(f"{layer.name}: inputs must lie in [{codes.lo}, {codes.hi}], not [{x.min()}, {x.max()}]")
    return x
