"""The claims that every guarantee rests on, for random layers, against brute force and Python integers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accaware.bounds import (
    a2q_budget,
    a2q_plus_budget,
    bits_needed,
    budget,
    data_type_budget,
    free_preload,
    masses,
    minimal_width,
    witness,
    worst_case,
)
from accaware.certify.proof import prove
from accaware.formats import Accumulator, IntFormat
from accaware.integer import reference
from accaware.integer.emulate import emulate
from accaware.integer.layer import IntegerLayer

examples = settings(deadline=None)

Row = list[int]
small = st.integers(-9, 9)
huge = st.integers(-(2**63), 2**63 - 1)
rows_of = st.lists(small, min_size=1, max_size=12)


@st.composite
def ranges(draw: st.DrawFn, ends: st.SearchStrategy[int] = small) -> IntFormat:
    lo, hi = sorted((draw(ends), draw(ends)))
    return IntFormat(lo, hi)


def dot(row: Row, inputs: Any) -> int:
    return sum(int(q) * int(x) for q, x in zip(row, inputs, strict=True))


def extremes(row: Row, codes: IntFormat, preload: int = 0) -> tuple[int, int]:
    lo, hi = worst_case(row, codes, preload)
    return lo.item(), hi.item()


def exact_sums(layer: IntegerLayer, inputs: Any) -> list[list[int]]:
    (zero,) = layer.zero_points
    return [[dot(row, x) for row in layer.rows.tolist()] for x in (inputs - zero).tolist()]


@st.composite
def layers(draw: st.DrawFn) -> IntegerLayer:
    """Small layers of every kind, of which many overflow and many do not."""
    count, fan_in = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    q = draw(st.lists(small, min_size=count * fan_in, max_size=count * fan_in))
    rows = np.array(q).reshape(count, fan_in)
    codes = draw(ranges())
    tile = draw(st.none() | st.integers(1, fan_in + 1))
    bits = draw(st.integers(3, 12))
    overflow = draw(st.sampled_from(["wrap", "saturate"]))
    order = draw(st.sampled_from(["chw", "any"]))
    accumulator = Accumulator(bits, overflow, tile=tile, outer_bits=draw(st.integers(bits, 13)), order=order)
    starts = draw(st.lists(st.integers(-60, 60), min_size=count * fan_in, max_size=count * fan_in))
    preload = np.array(starts).reshape(count, fan_in)[:, : -(-fan_in // (tile or fan_in))]
    preload = preload[0, 0] if order == "any" else preload
    return IntegerLayer(
        *("fc", "Linear", rows, codes, accumulator, preload, np.ones(count), 1.0, True, "projected"),
        zero_points=draw(st.sampled_from([(0,), (0,), (2,), (-3,), (0, 3), (-2, 1)])),
        raw=draw(st.booleans()),
        weight_zero=np.array(draw(st.sampled_from([0, 0, 2, -3]))),
        outer_start=np.array(draw(st.lists(st.integers(-60, 60), min_size=count, max_size=count))),
    )


def settled(draw: st.DrawFn, layer: IntegerLayer) -> IntegerLayer:
    """The layer with one of the zero points that it allows."""
    zero = draw(st.integers(min(layer.zero_points), max(layer.zero_points)))
    # Also where the zero point is not among the codes of the layer: its padding is.
    return replace(layer, zero_points=(zero,))


def shuffled(layer: IntegerLayer, order: Any) -> IntegerLayer:
    return replace(layer, rows=layer.rows[:, order])


@st.composite
def runs(draw: st.DrawFn) -> tuple[IntegerLayer, IntegerLayer, np.ndarray[Any, Any]]:
    """A layer, the same with one of its zero points, and a few inputs for it, some of them padded."""
    layer = draw(layers())
    fixed = settled(draw, layer)
    code = st.integers(layer.codes.lo, layer.codes.hi) | st.just(fixed.zero_points[0])
    inputs = draw(st.lists(st.lists(code, min_size=layer.fan_in, max_size=layer.fan_in), min_size=1, max_size=4))
    return layer, fixed, np.array(inputs)


# Worst case


@examples
@given(rows_of, ranges(), st.integers(-99, 99))
def test_the_witness_attains_both_ends(row: Row, codes: IntFormat, start: int) -> None:
    inputs = [witness(row, codes, side) for side in ("lo", "hi")]
    assert all(codes.lo <= x <= codes.hi for x in np.concatenate(inputs))
    assert tuple(start + dot(row, x) for x in inputs) == extremes(row, codes, start)


@examples
@given(st.lists(small, min_size=1, max_size=4), ranges(st.integers(-4, 4)))
def test_brute_force_over_all_inputs_agrees(row: Row, codes: IntFormat) -> None:
    sums = [dot(row, x) for x in itertools.product(range(codes.lo, codes.hi + 1), repeat=len(row))]
    assert extremes(row, codes) == (min(sums), max(sums))


@examples
@given(rows_of, ranges(), st.integers(-99, 99), st.data())
def test_no_order_of_summation_leaves_the_range(row: Row, codes: IntFormat, start: int, data: st.DataObject) -> None:
    codes = codes.with_zero()
    lo, hi = extremes(row, codes, start)
    code = st.integers(codes.lo, codes.hi) | st.sampled_from([codes.lo, codes.hi])
    inputs = [data.draw(code) for _ in row]
    order = data.draw(st.permutations(range(len(row))))
    partial = list(itertools.accumulate((row[i] * inputs[i] for i in order), initial=start))
    assert lo <= min(partial) <= max(partial) <= hi


@examples
@given(rows_of, ranges(), st.integers(-99, 99))
def test_the_range_of_partial_sums_is_attained_too(row: Row, codes: IntFormat, start: int) -> None:
    """`with_zero` is not loose: some order of some input comes to each end."""
    for side, end in zip(("lo", "hi"), extremes(row, codes.with_zero(), start), strict=True):
        products = sorted(
            (q * int(x) for q, x in zip(row, witness(row, codes, side), strict=True)), reverse=side == "hi"
        )
        partial = list(itertools.accumulate(products, initial=start))
        assert (min if side == "lo" else max)(partial) == end


@examples
@given(st.lists(huge, min_size=1, max_size=6), ranges(huge), huge)
def test_sums_of_any_size_are_exact(row: Row, codes: IntFormat, start: int) -> None:
    ends = [(q * codes.lo, q * codes.hi) for q in row]
    expected = (start + sum(map(min, ends)), start + sum(map(max, ends)))
    assert extremes(row, codes, start) == expected
    assert tuple(start + dot(row, witness(row, codes, side)) for side in ("lo", "hi")) == expected


@examples
@given(st.integers(-(2**80), 2**80), st.integers(-(2**80), 2**80))
def test_bits_needed_is_the_smallest_register(a: int, b: int) -> None:
    lo, hi = sorted((a, b))
    bits = bits_needed(lo, hi)
    assert -(2 ** (bits - 1)) <= lo <= hi <= 2 ** (bits - 1) - 1
    assert bits == 1 or lo < -(2 ** (bits - 2)) or hi > 2 ** (bits - 2) - 1


@examples
@given(rows_of, ranges(), st.integers(-99, 99))
def test_minimal_width(row: Row, codes: IntFormat, start: int) -> None:
    assert minimal_width(row, codes, start) == [bits_needed(*extremes(row, codes.with_zero(), start))]


@examples
@given(st.lists(small, min_size=6, max_size=6), st.integers(1, 7), ranges())
def test_tiles_are_the_rows_of_their_taps(row: Row, tile: int, codes: IntFormat) -> None:
    lo, hi = worst_case(row, codes, tile=tile)
    parts = [row[i : i + tile] for i in range(0, len(row), tile)]
    assert list(zip(lo[0], hi[0], strict=True)) == [extremes(part, codes) for part in parts]


# Budgets


@examples
@given(rows_of, ranges(), st.integers(2, 12), st.integers(-40, 40))
def test_a_budget_allows_exactly_what_fits(row: Row, codes: IntFormat, bits: int, start: int) -> None:
    register = Accumulator(bits)
    (p,), (n,) = masses(row)
    lo, hi = extremes(row, codes.with_zero(), start)
    fits = register.lo <= lo and hi <= register.hi
    try:
        limits = budget(codes, register, start)
    except ValueError:
        assert codes.with_zero().span == 0 or not fits or not (p or n)
        return
    assert limits.allows(p, n) == fits
    if limits.positive is not None and limits.negative is not None:
        assert (p <= limits.positive and n <= limits.negative) == fits
    else:
        assert limits.up
        assert limits.down


@examples
@given(rows_of, ranges(), st.integers(2, 10))
def test_a_free_preload_exists_exactly_within_its_budget(row: Row, codes: IntFormat, bits: int) -> None:
    register, codes = Accumulator(bits, preload="free"), codes.with_zero()
    assume(codes.span)
    lo, hi = extremes(row, codes)
    fitting = [b for b in range(register.lo, register.hi + 1) if register.lo <= b + lo and b + hi <= register.hi]
    within = sum(map(abs, row)) * codes.span <= 2**bits - 1
    assert bool(fitting) == within
    if fitting:
        (found,) = free_preload(row, codes, register)
        assert found in fitting
        assert abs(found) == min(map(abs, fitting))
    else:
        with pytest.raises(ValueError, match="fits no start value"):
            free_preload(row, codes, register)
    if codes.span < 2**bits:
        (p,), (n,) = masses(row)
        assert budget(codes, register).allows(p, n) == within


@examples
@given(rows_of, st.integers(1, 4), st.booleans(), st.integers(2, 12))
def test_the_papers_sets_lie_within_the_exact_ones(row: Row, act_bits: int, signed: bool, bits: int) -> None:
    codes = IntFormat.signed(act_bits) if signed else IntFormat.unsigned(act_bits)
    (p,), (n,) = masses(row)
    smallest = minimal_width(row, codes)[0]
    try:
        inside_a2q = p + n <= a2q_budget(codes, bits)
        inside_types = max(map(abs, row)) <= data_type_budget(len(row), codes, bits)
        limit = a2q_plus_budget(codes, bits)
    except ValueError:
        return
    assert smallest <= bits or not inside_a2q
    assert smallest <= bits or not inside_types
    assert smallest <= bits or not (2 * p <= limit and 2 * n <= limit)  # what truncation of zero-centred weights leaves
    if inside_a2q:
        assert budget(codes, Accumulator(bits)).allows(p, n)


@examples
@given(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=12), st.integers(1, 8), st.integers(3, 20))
def test_truncated_zero_centred_weights_within_a2q_plus_fit(v: Row, act_bits: int, bits: int) -> None:
    codes = IntFormat.signed(act_bits)
    assume(bits > act_bits)
    centred = [len(v) * x - sum(v) for x in v]  # times K, so that it stays an integer
    mass = sum(map(abs, centred))
    assume(mass)
    limit = a2q_plus_budget(codes, bits)
    row = [int(limit * x / mass) for x in centred]  # int truncates
    for c in (codes, IntFormat.unsigned(act_bits)):
        assert minimal_width(row, c)[0] <= bits


# Emulation


Run = tuple[IntegerLayer, IntegerLayer, Any]


@examples
@given(runs())
def test_emulation_is_the_reference(run: Run) -> None:
    layer, fixed, inputs = run
    (zero,) = fixed.zero_points
    expected = [[reference.run(fixed, row, x, zero) for row in range(len(layer.rows))] for x in inputs.tolist()]
    assert emulate(fixed, inputs).sums.tolist() == expected
    assert emulate(layer, inputs, zero).sums.tolist() == expected


@examples
@given(runs())
def test_wrap_around_is_the_exact_sum_folded(run: Run) -> None:
    _, layer, inputs = run
    register = replace(layer.accumulator, tile=None, overflow="wrap")
    layer = replace(layer, accumulator=register, preload=layer.starts[:, 0])
    got = emulate(layer, inputs)
    difference = got.sums - exact_sums(layer, inputs)
    assert not (difference % 2**register.bits).any()
    assert ((difference != 0) == (got.overflows > 0)).all()
    if not layer.raw:
        held = got.sums + layer.preload
        assert register.lo <= held.min() <= held.max() <= register.hi


@examples
@given(runs(), st.data())
def test_a_proven_layer_never_overflows_in_any_order(run: Run, data: st.DataObject) -> None:
    layer, fixed, inputs = run
    verdict = prove(layer).verdict
    if layer.accumulator.tile is None or layer.accumulator.order == "any":
        order = data.draw(st.permutations(range(layer.fan_in)))
        fixed, inputs = shuffled(fixed, order), inputs[:, order]
    for overflow in ("wrap", "saturate"):
        got = emulate(replace(fixed, accumulator=replace(fixed.accumulator, overflow=overflow)), inputs)
        if verdict == "proven":
            assert not got.overflows.any()
        if not got.overflows.any():
            assert got.sums.tolist() == exact_sums(fixed, inputs)


@examples
@given(layers())
def test_a_refuted_layer_has_a_witness_that_overflows(layer: IntegerLayer) -> None:
    operation = prove(layer)
    if operation.verdict == "unproven":
        assert any(codes != codes.with_zero() for codes in (*layer.centred, layer.codes))
    found = operation.witness
    assert (found is not None) == (operation.verdict == "refuted")
    if found is None:
        return
    assert all(layer.stored.lo <= x <= layer.stored.hi for x in found.inputs)
    orders = [range(layer.fan_in)]
    if layer.accumulator.order == "any":  # some choice of the taps that share a tile overflows
        factors = (layer.weights() if found.register == "inner" else layer.rows)[found.row]
        codes = np.array(found.inputs) - (0 if layer.raw else found.zero_point)
        by_product = np.argsort(factors * codes).tolist()
        orders = [by_product, by_product[::-1]]
    for overflow in ("wrap", "saturate"):
        counts = []
        for order in orders:
            risky = replace(shuffled(layer, order), accumulator=replace(layer.accumulator, overflow=overflow))
            inputs = np.array([found.inputs])[:, order]
            counts.append(emulate(risky, inputs, found.zero_point).overflows[0, found.row])
        assert max(counts) > 0


@examples
@given(layers())
def test_the_verdict_is_that_of_brute_force(layer: IntegerLayer) -> None:
    """With 0 among the codes, a layer is proven exactly if no input overflows (the ends suffice: sums are linear)."""
    assume(layer.fan_in <= 4)
    ends = (0, layer.codes.lo, layer.codes.hi, *layer.zero_points)
    layer = replace(layer, codes=IntFormat(min(ends), max(ends)))
    overflows = False
    orders = itertools.permutations(range(layer.fan_in)) if layer.accumulator.order == "any" else [range(layer.fan_in)]
    for order, zero in itertools.product(orders, layer.zero_points):
        codes = {layer.codes.lo, 0, zero, layer.codes.hi}
        inputs = list(itertools.product(codes, repeat=layer.fan_in))
        overflows = overflows or bool(emulate(shuffled(layer, order), inputs, zero).overflows.any())
    assert prove(layer).verdict == ("refuted" if overflows else "proven")
