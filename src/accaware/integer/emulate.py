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
    """sums: integers [B, R], what the register delivers, start values subtracted. overflows: int64 [B, R].

    An overflow is, for wrap-around, a finished sum (of a tile, or of the outer register) that does not fit, since wraps
    on the way to a sum that fits undo each other; for saturation, a step that was clipped. Without overflows the sums
    are the dot products.
    """

    sums: Integers
    overflows: Integers


def emulate(layer: IntegerLayer, inputs: ArrayLike, zero_point: int | None = None) -> Emulation:
    """Run `layer` on stored input codes, integers [B, K], whose taps are numbered, and added, in the order of the rows.

    zero_point: the code that stands for 0, where `layer` leaves it open. Always exact: int64 where nothing comes near
    2^63, Python integers elsewhere. Raises `ValueError` for a wrong shape and for inputs outside `layer.codes` (the
    zero point is always allowed: a padded tap).
    """
    zero = _zero_point(layer, zero_point)
    codes = _checked(layer, inputs)
    register = layer.accumulator
    dtype = np.int64 if _fits_int64(layer) else object
    rows, codes, starts = layer.rows.astype(dtype), codes.astype(dtype), layer.starts.astype(dtype)
    centred = codes - zero
    x, weights = (codes, layer.weights().astype(dtype)) if layer.raw else (centred, rows)
    saturates = register.overflow == "saturate"
    overflows = np.zeros((len(x), len(rows)), np.int64)
    parts = []
    for start, taps in zip(starts.T, layer.tiles, strict=True):
        if saturates:
            products = (x[:, k, None] * weights[:, k] for k in range(taps.start, taps.stop))
            total, count = _saturate(start, products, register.bits)
        else:
            total, count = _wrap(start + _dot(x[:, taps], weights[:, taps]), register.bits)
        parts.append(total - start)
        overflows += count
    if layer.raw:  # (q + weight_zero) code is more than q (code - zero) by this much
        parts.append(_dot(centred, rows) - _dot(x, weights))
    if register.tile is None:
        return Emulation(sum(parts), overflows)
    begin = layer.outer_start.astype(dtype)
    if saturates and not layer.raw:
        total, count = _saturate(np.broadcast_to(begin, parts[0].shape), parts, register.outer_bits)
    else:
        total, count = _wrap(begin + sum(parts), register.outer_bits)
    return Emulation(total - begin, overflows + count)


def _zero_point(layer: IntegerLayer, zero_point: int | None) -> int:
    known = layer.zero_points
    if zero_point is None and len(set(known)) > 1:
        raise ValueError(f"{layer.name}: zero_point must be given, between {min(known)} and {max(known)}")
    zero = known[0] if zero_point is None else zero_point
    if not min(known) <= zero <= max(known):
        raise ValueError(f"{layer.name}: zero_point must lie in [{min(known)}, {max(known)}], not {zero}")
    return zero


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
    weight = largest(layer.rows) + largest(layer.weight_zero)
    code = layer.stored.magnitude + max(map(abs, layer.zero_points))
    starts = largest(layer.preload) * len(layer.tiles) + largest(layer.outer_start)
    reach = 3 * layer.fan_in * weight * code + starts
    return reach < 2**53 and max(register.bits, register.outer_bits if register.tile else 0) < 63


def _checked(layer: IntegerLayer, inputs: ArrayLike) -> Integers:
    x = as_integers(inputs, f"{layer.name}: inputs")
    if x.ndim != 2 or x.shape[1] != layer.fan_in:
        raise ValueError(f"{layer.name}: inputs must have shape [B, {layer.fan_in}], not {list(x.shape)}")
    codes = layer.stored
    if x.size and not codes.lo <= int(x.min()) <= int(x.max()) <= codes.hi:
        raise ValueError(f"{layer.name}: inputs must lie in [{codes.lo}, {codes.hi}], not [{x.min()}, {x.max()}]")
    return x
