"""What really comes out when an integer layer runs on its register: exact wrap-around and saturation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accaware.bounds import Integers, as_integers, largest
from accaware.formats import IntFormat
from accaware.integer.layer import IntegerLayer

Exact = NDArray[Any]  #: integers, held by float64 or as Python's own

_INPUTS, _TAPS = 4096, 16  # at a time: what caches hold


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

    zero_point: the code that stands for 0, where `layer` leaves it open. Always exact: float64 where every number stays
    below 2^53, Python integers elsewhere. Sums that cannot leave their register are a matrix product; only the rows of
    a tile that can are run on it. Raises `ValueError` for a wrong shape and for inputs outside `layer.codes` (the zero
    point is always allowed: a padded tap).
    """
    zero, given = _zero_point(layer, zero_point), _checked(layer, inputs)
    parts = [_block(layer, given[i : i + _INPUTS], zero) for i in range(0, max(1, len(given)), _INPUTS)]
    return Emulation(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _block(layer: IntegerLayer, inputs: Integers, zero: int) -> tuple[Integers, Integers]:
    """Sums and overflows of some inputs."""
    register = layer.accumulator
    small = _is_small(layer)
    dtype = np.float64 if small else object
    rows, starts, begin = (a.astype(dtype) for a in (layer.rows, layer.starts, layer.outer_start[:, None]))
    codes = inputs.T.astype(dtype, order="C")  # from here on, sums are [R, B]
    centred = codes - zero
    x, weights = (codes, layer.weights().astype(dtype)) if layer.raw else (centred, rows)
    run = _saturate if register.overflow == "saturate" else _wrap
    spills_clipped = register.tile is not None and run is _saturate and not layer.raw
    overflows = np.zeros((len(rows), codes.shape[1]), np.int64)
    if spills_clipped:
        total, clipped = _clip(np.broadcast_to(begin, overflows.shape), register.outer_bits)
        overflows += clipped
    else:  # raw products are more than these by what is taken off outside
        total = begin + rows @ centred
    factors = layer.stored if layer.raw else IntFormat(layer.stored.lo - zero, layer.stored.hi - zero)
    leaving = _leaving(weights, starts, layer.tiles, factors.with_zero(), register.bits)
    for start, taps, can in zip(starts.T, layer.tiles, leaving.T, strict=True):
        some = np.flatnonzero(can)
        part, held, first = x[taps], weights[some, taps], start[some, None]
        change: Any = 0
        overflow: Any = 0
        if some.size:
            sums, overflow = run(first, part, held, register.bits)
            change = sums - first - held @ part
        overflows[some] += overflow
        if spills_clipped:
            spilt = weights[:, taps] @ part
            spilt[some] += change
            total, clipped = _clip(total + spilt, register.outer_bits)
            overflows += clipped
        else:
            total[some] += change
    if register.tile is not None and not spills_clipped:
        total, folded = _fold(total, register.outer_bits)
        overflows += folded
    sums = (total - begin).T
    return sums.astype(np.int64) if small else sums, overflows.T


def _zero_point(layer: IntegerLayer, zero_point: int | None) -> int:
    known = layer.zero_points
    if zero_point is None and len(set(known)) > 1:
        raise ValueError(f"{layer.name}: zero_point must be given, between {min(known)} and {max(known)}")
    zero = known[0] if zero_point is None else zero_point
    if not min(known) <= zero <= max(known):
        raise ValueError(f"{layer.name}: zero_point must lie in [{min(known)}, {max(known)}], not {zero}")
    return zero


def _leaving(weights: Exact, starts: Exact, tiles: Sequence[slice], codes: IntFormat, bits: int) -> NDArray[np.bool_]:
    """Which running sums can leave the register for any codes of a range with 0, bool [R, tiles]."""
    products = weights * codes.lo, weights * codes.hi
    first = [taps.start for taps in tiles]
    high = starts + np.add.reduceat(np.maximum(*products), first, axis=1)
    low = starts + np.add.reduceat(np.minimum(*products), first, axis=1)
    found: NDArray[np.bool_] = ((high >= 2 ** (bits - 1)) | (low < -(2 ** (bits - 1)))).astype(bool)
    return found


def _wrap(start: Exact, x: Exact, weights: Exact, bits: int) -> tuple[Exact, NDArray[np.int64]]:
    """The sum modulo 2^bits, which does not depend on the order of its terms."""
    return _fold(start + weights @ x, bits)


def _fold(exact: Exact, bits: int) -> tuple[Exact, NDArray[np.int64]]:
    """Two's complement, and 1 where that is another number."""
    k = (exact + 2 ** (bits - 1)) // 2**bits
    return exact - k * 2**bits, (k != 0).astype(np.int64)


def _saturate(start: Exact, x: Exact, weights: Exact, bits: int) -> tuple[Exact, NDArray[np.int64]]:
    """Clip the start and the running sum after every product; counts the clipped steps.

    A block of taps goes at once where a sum cannot leave the register within it: where neither its positive products
    alone nor its negative ones take it there.
    """
    total, clipped = _clip(np.broadcast_to(start, (len(weights), x.shape[1])), bits)
    for first in range(0, len(x), _TAPS):
        part, held = x[first : first + _TAPS], weights[:, first : first + _TAPS]
        p, n, up, down = (np.maximum(a, 0) for a in (part, -part, held, -held))
        high, low = up @ p + down @ n, up @ n + down @ p
        r, b = np.nonzero((total + high >= 2 ** (bits - 1)) | (total - low < -(2 ** (bits - 1))))
        one, count = total[r, b], np.zeros(len(b), np.int64)
        for k in range(len(part) if len(b) else 0):
            one, beyond = _clip(one + held[r, k] * part[k, b], bits)
            count += beyond
        total = total + (high - low)
        total[r, b] = one
        clipped[r, b] += count
    return total, clipped


def _clip(exact: Exact, bits: int) -> tuple[Exact, NDArray[np.int64]]:
    """The nearest numbers in the register, and 1 where that is another one."""
    held = np.minimum(np.maximum(exact, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return held, (held != exact).astype(np.int64)


def _is_small(layer: IntegerLayer) -> bool:
    """Whether every number on the way stays below 2^53, so that float64 holds it, or far from any register's end."""
    weight = largest(layer.rows) + largest(layer.weight_zero)
    code = layer.stored.magnitude + max(map(abs, layer.zero_points))
    starts = largest(layer.preload) * len(layer.tiles) + largest(layer.outer_start)
    return 3 * layer.fan_in * weight * code + starts < 2**52


def _checked(layer: IntegerLayer, inputs: ArrayLike) -> Integers:
    x = as_integers(inputs, f"{layer.name}: inputs")
    if x.ndim != 2 or x.shape[1] != layer.fan_in:
        raise ValueError(f"{layer.name}: inputs must have shape [B, {layer.fan_in}], not {list(x.shape)}")
    codes = layer.stored
    if x.size and not codes.lo <= int(x.min()) <= int(x.max()) <= codes.hi:
        raise ValueError(f"{layer.name}: inputs must lie in [{codes.lo}, {codes.hi}], not [{x.min()}, {x.max()}]")
    return x
