"""The integer weights closest to given ones that fit a register, and the scale that suits them best.

For one scale the problem splits into rows, and rows into tiles, which `accaware.projections` solves. What a register
allows is a set of `Budget`s on the positive and the negative mass of each tile, one for each zero point:

A sum of factors (weights, or raw codes of weights) times codes less z is linear in the zero point z for
any fixed weights: lo(z) = b + (mu - z) p - (nu - z) n and hi(z) = b + (nu - z) p - (mu - z) n. A linear function is
largest at an end of an interval, so weights are safe for every zero point that can occur exactly where they are for
the smallest and for the largest one: both budgets must hold. For codes in [0, 255] with any zero point in [0, 255]
those are 255 p <= hi - b, 255 n <= b - lo (z = 0) and 255 n <= hi - b, 255 p <= b - lo (z = 255): each side has a
limit of its own, min(hi - b, b - lo) // 255.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accaware.bounds import Budget, Integers
from accaware.certify.certificate import printable
from accaware.certify.proof import prove
from accaware.formats import IntFormat
from accaware.integer.layer import IntegerLayer
from accaware.projections import project_any, project_capped, project_integers

__all__ = ["ImpossibleError", "Nearest", "Problem", "nearest"]

Reals = NDArray[np.float64]
Bools = NDArray[np.bool_]

_BLOCK = 2**20  # weights that are projected at once
_COARSE = 12  # scales that are tried between the file's and one so large that every weight fits
_LIMIT = 2**52  # sums of weights beyond which no limit binds


class ImpossibleError(ValueError):
    """No weights meet the request, or none can be written into the file; one line that says where and why."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names of files' operators may hold anything


@dataclass(frozen=True, eq=False)
class Problem:
    """Weights and the registers that they must fit.

    layers: the operations that multiply by these weights, with the same rows. weights: the integers that the rows may
    hold, zero points subtracted: low and high, int64 [R]. scale: float64 [R]. groups: which of the file's scales every
    row has, int64 [R]; None where scales must stay. importance: h > 0, float64 [R, K]; None: 1.
    """

    layers: Sequence[IntegerLayer]
    low: Integers
    high: Integers
    scale: Reals
    groups: Integers | None = None
    importance: Reals | None = None

    @property
    def rows(self) -> Integers:
        """The weights as they are."""
        return self.layers[0].rows

    @property
    def shift(self) -> Integers:
        """What the registers' factors are more than the weights, int64 [R]."""
        layer = self.layers[0]
        return layer.weight_zero if layer.raw else np.zeros(len(layer.rows), np.int64)


@dataclass(frozen=True, eq=False)
class Nearest:
    """rows: integers [R, K]; ratio: new scale over old, float64 [R]; broken: rows that did not fit before."""

    rows: Integers
    ratio: Reals
    broken: Bools


def nearest(problem: Problem) -> Nearest:
    """The weights that minimise sum_i h_i (s' q'_i - s q_i)^2 such that every row fits every layer's register.

    Rows that fit keep their weights, unless they share a scale with one that does not and another scale is better for
    all of them together. Start values are in units of the scale: with s' they become round(b s / s'). For one scale
    this is optimal, but for tiles of any taps (see `_any_taps`) and for outer registers that bind where codes have two
    signs, where it is safe and close. Raises `ImpossibleError` where a row fits with no scale that may be chosen.
    """
    broken = ~_fits(problem)
    here = np.flatnonzero(broken)
    rows, ratio = problem.rows.astype(np.int64), np.ones(len(broken))
    kept, error = _project(problem, here, ratio[here])
    if problem.groups is not None and len(here):
        members = np.flatnonzero(np.isin(problem.groups, problem.groups[here]))
        ratio[members] = _best_ratio(problem, members, here, error)
    same = ratio[here] == 1
    rows[here[same]] = kept[same]
    moved = np.flatnonzero(ratio != 1)
    rows[moved], found = _project(problem, moved, ratio[moved])
    if not np.isfinite(np.concatenate([error[same], found])).all():
        bad = np.concatenate([here[same], moved])[~np.isfinite(np.concatenate([error[same], found]))]
        names = " and ".join(layer.name for layer in problem.layers)
        starts = "" if not any(_starts(layer).any() for layer in problem.layers) else ", with the bias that it has"
        raise ImpossibleError(f"{names}: row {bad[0]} has no budget for weights other than 0{starts}")
    return Nearest(rows, ratio, broken)


def _best_ratio(problem: Problem, members: Integers, broken: Integers, error: Reals) -> Reals:
    """For every member row the factor of its scale that gives its group the smallest error: coarse, then finer."""
    assert problem.groups is not None
    groups = np.unique(problem.groups[members], return_inverse=True)[1]
    count = int(groups.max()) + 1

    def total(rows: Integers, errors: Reals) -> Reals:
        weighted = errors * problem.scale[rows] ** 2
        return np.bincount(groups[np.searchsorted(members, rows)], weighted, count).astype(np.float64)

    top = np.ones(count)
    np.maximum.at(top, groups, _overload(problem)[members])
    best, least = np.zeros(count), total(broken, error)  # the logarithm of the factor; at 1 only broken rows change
    step = np.log(1.1 * top) / _COARSE

    def attempt(logs: Reals) -> None:
        nonlocal best, least
        errors = total(members, _project(problem, members, np.exp(logs)[groups])[1])
        better = errors < least
        best, least = np.where(better, logs, best), np.minimum(errors, least)

    for i in (-1, *range(1, _COARSE + 1)):
        attempt(step * i)
    for _ in range(3):
        step = step / 2
        centre = best
        attempt(centre - step)
        attempt(centre + step)
    return np.exp(best)[groups]


def _overload(problem: Problem) -> Reals:
    """By how much every row exceeds its registers: weights and starts that much smaller fit. float64 [R]."""
    shares = [np.maximum(hi / max(limit - 1, 1), -lo / limit) for lo, hi, limit in _sums(problem)]
    return np.asarray(np.maximum.reduce(shares), np.float64)


def _fits(problem: Problem) -> Bools:
    """Which rows fit all registers as they are."""
    fits = [(-limit <= lo) & (hi < limit) for lo, hi, limit in _sums(problem)]
    return np.asarray(np.logical_and.reduce(fits), bool)


def _sums(problem: Problem) -> Iterable[tuple[Integers, Integers, int]]:
    """What every register must hold, Python integers [R], and the first that it does not: 2^(P-1)."""
    for layer in problem.layers:
        for sums in prove(layer).sums():
            yield np.array(sums.lo, object), np.array(sums.hi, object), 2 ** (sums.bits - 1)


def _project(problem: Problem, rows: Integers, ratio: Reals) -> tuple[Integers, Reals]:
    """The closest weights of some rows [n] for scales `ratio` times theirs: integers [n, K], and their errors in units
    of the old scale, float64 [n]; infinite where there are no safe ones."""
    fan_in = problem.rows.shape[1]
    weights, errors = np.empty((len(rows), fan_in), np.int64), np.empty(len(rows))
    step = max(1, _BLOCK // fan_in)
    for part in (slice(i, i + step) for i in range(0, len(rows), step)):
        weights[part], errors[part] = _block(problem, rows[part], ratio[part])
    return weights, errors


def _block(problem: Problem, rows: Integers, ratio: Reals) -> tuple[Integers, Reals]:
    old, shift = problem.rows[rows].astype(np.float64), problem.shift[rows, None]
    aim = torch.from_numpy(old / ratio[:, None] + shift)
    low, high = (torch.from_numpy(end[rows, None] + shift).double() for end in (problem.low, problem.high))
    if bool((low > 0).any() | (high < 0).any()):
        raise ImpossibleError(f"{problem.layers[0].name}: its weights cannot be 0")
    top = torch.where(aim >= 0, high, -low)
    h = None if problem.importance is None else torch.from_numpy(problem.importance[rows])
    factors, possible = _inner(problem.layers, rows, ratio, aim, top, h)
    for layer in problem.layers:
        if layer.accumulator.tile is not None:
            factors, fits = _outer(layer, rows, ratio, aim, factors, shift, h)
            possible &= fits
    new: Integers = factors.numpy().astype(np.int64) - shift
    for layer in problem.layers:  # a bias has 32 bits
        possible &= (ratio == 1) | (np.abs(_moved(layer, rows, ratio)) < 2**31)
    squares = (new * ratio[:, None] - old) ** 2
    errors = (squares if problem.importance is None else squares * problem.importance[rows]).sum(axis=1)
    return new, np.where(possible, errors, np.inf)


def _starts(layer: IntegerLayer) -> Integers:
    """The start values that depend on the scale: of the sum of all products."""
    return layer.outer_start if layer.accumulator.tile is not None else layer.starts[:, 0]


def _moved(layer: IntegerLayer, rows: Integers, ratio: Reals) -> Integers:
    """Those of some rows, [n], in units of other scales."""
    starts = _starts(layer)[rows]
    return np.where(ratio == 1, starts, np.rint(starts / ratio).astype(np.int64))


def _inner(
    layers: Sequence[IntegerLayer],
    rows: Integers,
    ratio: Reals,
    aim: torch.Tensor,
    top: torch.Tensor,
    h: torch.Tensor | None,
) -> tuple[torch.Tensor, Bools]:
    """The closest factors of some rows under the accumulator's budget; float64 [n, K], and for which rows it is one."""
    register = layers[0].accumulator
    tile = register.tile or aim.shape[1]
    if register.order == "any" and tile < aim.shape[1]:
        return _any_taps(layers, rows, aim, top, h)
    count = -(-aim.shape[1] // tile)

    def tiles(x: torch.Tensor, fill: float) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, count * tile - x.shape[1]), value=fill)
        return padded.reshape(-1, tile)

    starts = [
        layer.starts[rows].ravel() if layer.accumulator.tile is not None else _moved(layer, rows, ratio)
        for layer in layers
    ]
    aims, tops, weights = tiles(aim, 0), tiles(top, 0), None if h is None else tiles(h, 1)
    cases = [(layer, codes, start) for layer, start in zip(layers, starts, strict=True) for codes in _ranges(layer)]
    done, possible = _within(cases, aims, tops, weights)
    every = np.asarray(possible.reshape(len(rows), -1).all(axis=1))
    return done.reshape(len(rows), -1)[:, : aim.shape[1]], every


Case = tuple[IntegerLayer, IntFormat, Integers]


def _ranges(layer: IntegerLayer) -> Iterable[IntFormat]:
    """What the factors' partners in the accumulator lie in, with 0, for every zero point that matters."""
    return [codes.with_zero() for codes in ((layer.stored,) if layer.raw else layer.centred)]


def _within(
    cases: Sequence[Case], aim: torch.Tensor, top: torch.Tensor, h: torch.Tensor | None, outer: bool = False
) -> tuple[torch.Tensor, Bools]:
    """The closest factors of tiles [N, T], each a sum of its own with its own start value."""
    rooms = [(codes.hi, -codes.lo, *_room(layer, start, outer)) for layer, codes, start in cases]
    possible: Bools = np.logical_and.reduce([(hi >= 0) & (lo >= 0) for _, _, hi, lo in rooms])
    if all(up == 0 or down == 0 for up, down, _, _ in rooms):
        sides = [_caps(up, down, hi, lo) for up, down, hi, lo in rooms]
        positive, negative = (np.minimum.reduce(side) for side in zip(*sides, strict=True))
        possible &= (positive > 0) | (negative > 0)
        most, least = (torch.from_numpy(side.clip(0, _LIMIT)).double()[:, None] for side in (positive, negative))
        return project_capped(aim, most, least, top, h), possible
    rooms = [room for room in rooms if room[0] or room[1]]
    done = torch.zeros_like(aim)
    keys = np.stack([room for _, _, *both in rooms for room in both], axis=1)
    for key, index in _equal(keys):
        budgets = [
            Budget(up, down, hi=hi, lo=lo) for (up, down, _, _), hi, lo in zip(rooms, key[::2], key[1::2], strict=True)
        ]
        one = any(all(b.allows(p, 1 - p) for b in budgets) for p in (0, 1))
        possible[index] &= one
        if one:
            done[index] = project_integers(aim[index], budgets, top[index], None if h is None else h[index])
    return done, possible


def _room(layer: IntegerLayer, start: Integers, outer: bool) -> tuple[Integers, Integers]:
    """How far above and below its start a sum may go."""
    limit = 2 ** ((layer.accumulator.outer_bits if outer else layer.accumulator.bits) - 1)
    hi, lo = min(limit - 1, 2**62) - start, start + min(limit, 2**62)
    return hi.astype(np.int64), lo.astype(np.int64)


def _caps(up: int, down: int, hi: Integers, lo: Integers) -> tuple[Integers, Integers]:
    """The largest sums of positive and of negative factors, for codes of one sign."""
    span = up + down
    if not span:
        return np.full_like(hi, _LIMIT), np.full_like(lo, _LIMIT)
    return (hi // span, lo // span) if up else (lo // span, hi // span)


def _equal(keys: Integers) -> Iterable[tuple[list[int], NDArray[np.intp]]]:
    """Rows of the same numbers, and where they are."""
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(which.ravel(), kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(which.ravel()))[:-1])
    return zip(distinct.tolist(), parts, strict=True)


def _any_taps(
    layers: Sequence[IntegerLayer], rows: Integers, aim: torch.Tensor, top: torch.Tensor, h: torch.Tensor | None
) -> tuple[torch.Tensor, Bools]:
    """Tiles of any taps, which start at 0: a condition on the largest of each sign where codes have one sign.

    For codes of both signs the products of positive and negative factors add up, at most max(up, down) |f| each, so
    the same condition on |f| is safe. It is the exact one but for codes that reach farther on one side.
    """
    tile = layers[0].accumulator.tile or 1
    both, positive, negative = _LIMIT, _LIMIT, _LIMIT
    for layer in layers:
        for codes in _ranges(layer):
            up, down = codes.hi, -codes.lo
            hi, lo = (int(room) for room in _room(layer, np.zeros((), np.int64), False))
            if up and down:
                both = min(both, min(hi, lo) // max(up, down))
            elif up or down:
                p, n = (hi, lo) if up else (lo, hi)
                positive, negative = min(positive, p // (up + down)), min(negative, n // (up + down))
    if both < _LIMIT:
        limit = min(both, positive, negative)
        return project_any(aim.abs(), tile, limit, limit, top, h) * aim.sign(), np.full(len(rows), limit > 0)
    return project_any(aim, tile, positive, negative, top, h), np.full(len(rows), max(positive, negative) > 0)


def _outer(
    layer: IntegerLayer,
    rows: Integers,
    ratio: Reals,
    aim: torch.Tensor,
    factors: torch.Tensor,
    shift: Integers,
    h: torch.Tensor | None,
) -> tuple[torch.Tensor, Bools]:
    """The same factors, fewer units of them where the sum of all tiles does not fit the outer register.

    Limits on tiles and on their sum are nested, so giving up the units of least gain is optimal once more. Raw codes
    of weights with a zero point are not what the outer register bounds: there is no repair where it binds.
    """
    starts, weights = _moved(layer, rows, ratio), factors - torch.from_numpy(shift)
    p, n = (side.clamp(min=0).sum(dim=1).numpy() for side in (weights, -weights))
    fits = np.ones(len(rows), bool)
    cases = [(layer, codes.with_zero(), starts) for codes in layer.centred]
    for _, codes, start in cases:
        hi, lo = _room(layer, start, True)
        fits &= (codes.hi * p - codes.lo * n <= hi) & (codes.hi * n - codes.lo * p <= lo)
    bad = np.flatnonzero(~fits)
    if not len(bad):
        return factors, fits
    fits[bad] = not shift[bad].any()
    here = [(one, codes, start[bad]) for one, codes, start in cases]
    done, possible = _within(here, aim[bad], factors[bad].abs(), None if h is None else h[bad], outer=True)
    factors[bad] = done
    fits[bad] &= possible
    return factors, fits


def with_rows(layer: IntegerLayer, found: Nearest) -> IntegerLayer:
    """The layer with the weights that were found, and its start values in units of their scale."""
    every = np.arange(len(found.rows))
    starts: dict[str, Any] = {}
    if _starts(layer).any():
        name = "outer_start" if layer.accumulator.tile is not None else "preload"
        starts[name] = _moved(layer, every, found.ratio)
    return replace(layer, rows=found.rows, **starts)
