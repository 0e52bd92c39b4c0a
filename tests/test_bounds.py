"""Bounds and budgets at the values that the papers and the arithmetic name. See also properties/."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from accaware import bounds
from accaware.bounds import (
    a2q_budget,
    a2q_plus_budget,
    bits_needed,
    budget,
    code_bits,
    data_type_bits,
    data_type_budget,
    free_preload,
    masses,
    minimal_width,
    witness,
    worst_case,
)
from accaware.formats import Accumulator, IntFormat

U4, S4, U8 = IntFormat.unsigned(4), IntFormat.signed(4), IntFormat.unsigned(8)


@pytest.mark.parametrize(
    ("codes", "lo", "hi"), [(U4, -30, 75), (S4, -54, 51), (IntFormat(2, 5), 0, 21), (IntFormat(-5, -2), -21, 0)]
)
def test_worst_case_of_one_row(codes: IntFormat, lo: int, hi: int) -> None:
    row = np.array([3, -2, 0, 2])
    ends = [int(witness(row, codes, side) @ row) for side in ("lo", "hi")]
    assert ends == [lo, hi]
    found = worst_case(row, codes)
    assert [found[0].tolist(), found[1].tolist()] == [[lo], [hi]]


def test_worst_case_by_rows_and_tiles() -> None:
    rows = [[1, -2, 3, -4, 5], [0, 0, 0, 0, -1]]
    lo, hi = worst_case(rows, IntFormat(0, 10), [[1, 2, 3], [4, 5, 6]], tile=2)
    assert lo.tolist() == [[-19, -38, 3], [4, 5, -4]]
    assert hi.tolist() == [[11, 32, 53], [4, 5, 6]]
    assert [m.tolist() for m in masses(rows)] == [[9, 0], [6, 1]]


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(-128, 128, (50, 7), np.int8)
    whole = [m.tolist() for m in masses(rows, tile=3)]
    for block in (1, 7, 20, 49):
        monkeypatch.setattr(bounds, "_BLOCK", block)
        assert [m.tolist() for m in masses(rows, tile=3)] == whole


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_extreme_weights_of_every_type(dtype: Any) -> None:
    ends = np.iinfo(dtype)
    rows = np.array([[ends.min, ends.max], [ends.max, ends.max], [ends.min, ends.min]], dtype)
    p, n = masses(rows)
    expected = [[int(q) for q in row] for row in rows]
    assert p.tolist() == [sum(q for q in row if q > 0) for row in expected]
    assert n.tolist() == [-sum(q for q in row if q < 0) for row in expected]


def test_sums_beyond_64_bits() -> None:
    codes = IntFormat(-(2**63), 2**63 - 1)
    rows = np.full((1, 5), 2**62, np.int64)
    lo, hi = worst_case(rows, codes, 2**62)
    assert lo.tolist() == [2**62 - 5 * 2**125]
    assert hi.tolist() == [2**62 + 5 * 2**62 * (2**63 - 1)]
    assert minimal_width(rows, codes) == [129]
    assert worst_case([[2**70, -(2**70)]], U4)[1].tolist() == [15 * 2**70]


@pytest.mark.parametrize("rows", [[[0.5]], np.zeros((1, 2)), [[True]], np.array([[1.0]], object), ["1"]])
def test_only_integers_are_weights(rows: Any) -> None:
    with pytest.raises(TypeError, match="rows must be integers, not"):
        worst_case(rows, U4)


def test_shapes_are_checked() -> None:
    for rows in (np.zeros((2, 0), int), np.zeros((1, 2, 3), int)):
        with pytest.raises(ValueError, match=r"rows must have shape \[R, K\]"):
            worst_case(rows, U4)
    for start in ([1], [[1], [2]], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"preload must be one integer or have shape \[2\]"):
            worst_case(np.ones((2, 3), int), U4, start)
    with pytest.raises(ValueError, match="a witness needs one row"):
        witness([[1]], U4, "hi")
    with pytest.raises(ValueError, match="'up'"):
        witness([1], U4, "up")  # type: ignore[arg-type]
    assert worst_case(np.zeros((0, 3), int), U4)[0].tolist() == []


@pytest.mark.parametrize(
    ("lo", "hi", "bits"),
    [
        (0, 0, 1),
        (-1, 0, 1),
        (-2, 0, 2),
        (0, 1, 2),
        (-128, 127, 8),
        (-129, 0, 9),
        (0, 128, 9),
        (5, 6, 4),
        (0, 2**63, 65),
    ],
)
def test_bits_needed(lo: int, hi: int, bits: int) -> None:
    assert bits_needed(lo, hi) == bits


def test_bits_needed_refuses_an_empty_range() -> None:
    with pytest.raises(ValueError, match=r"not \[1, 0\]"):
        bits_needed(1, 0)


@pytest.mark.parametrize(
    ("codes", "bits"),
    [(U4, 4), (S4, 4), (IntFormat(0, 0), 1), (IntFormat(-7, 7), 4), (IntFormat(-10, 5), 5), (IntFormat(2, 17), 5)],
)
def test_code_bits(codes: IntFormat, bits: int) -> None:
    assert code_bits(codes) == bits


def test_the_budgets_of_the_five_sets_at_p_12() -> None:
    register = Accumulator(12)
    assert data_type_budget(16, U4, 12) == 8
    assert a2q_budget(U4, 12) == Fraction(2047, 16)
    assert a2q_budget(S4, 12) == Fraction(2047, 8)
    assert a2q_plus_budget(U4, 12) == a2q_plus_budget(S4, 12) == Fraction(4094, 15)
    unsigned = budget(U4, register)
    assert (unsigned.positive, unsigned.negative) == (2047 // 15, 2048 // 15)
    signed = budget(S4, register)
    assert (signed.up, signed.down, signed.hi, signed.lo) == (7, 8, 2047, 2048)
    assert (signed.positive, signed.negative) == (None, None)
    assert budget(U4, Accumulator(12, preload="free")).l1 == budget(S4, Accumulator(12, preload="free")).l1 == 273


def test_a_budget_with_a_given_start_value_or_negative_codes() -> None:
    moved = budget(U8, Accumulator(12), preload=-500)
    assert (moved.positive, moved.negative) == (2547 // 255, 1548 // 255)
    assert budget(U8, Accumulator(12, preload="free"), preload=-500) == moved
    mirrored = budget(IntFormat(-256, 0), Accumulator(12))
    assert (mirrored.positive, mirrored.negative) == (8, 7)
    assert budget(IntFormat(7, 15), Accumulator(12)) == budget(U4, Accumulator(12))


def test_the_simple_budget_is_the_largest_that_knows_only_the_sum() -> None:
    exact = budget(IntFormat.signed(4), Accumulator(9))
    size = exact.simple.l1
    assert size is not None
    assert all(exact.allows(p, size - p) for p in range(size + 1))
    assert not all(exact.allows(p, size + 1 - p) for p in range(size + 2))
    unsigned, one = budget(IntFormat.unsigned(4), Accumulator(9)), budget(IntFormat.signed(4), Accumulator(4))
    assert (unsigned.simple, one.simple) == (unsigned, one)  # the second would have no unit left


def test_allows_takes_arrays() -> None:
    p = np.array([136, 137, 136], np.int32)
    assert budget(U4, Accumulator(12)).allows(p, np.array([136, 0, 137])).tolist() == [True, False, False]
    assert budget(U4, Accumulator(12)).allows(2**62, np.int64(2**62)) is False


@pytest.mark.parametrize(
    ("call", "smallest"),
    [
        (lambda bits: budget(U8, Accumulator(bits), where="conv1"), 9),
        (lambda bits: budget(IntFormat.signed(8), Accumulator(bits), where="conv1"), 8),
        (lambda bits: budget(U8, Accumulator(bits, preload="free"), where="conv1"), 8),
        (lambda bits: budget(U8, Accumulator(bits), preload=-300, where="conv1"), 10),
        (lambda bits: a2q_budget(U8, bits, "conv1"), 10),
        (lambda bits: a2q_budget(IntFormat.signed(8), bits, "conv1"), 9),
        (lambda bits: a2q_plus_budget(U8, bits, "conv1"), 9),
        (lambda bits: data_type_budget(9, U8, bits, "conv1"), 13),
    ],
)
def test_a_budget_below_one_is_refused(call: Any, smallest: int) -> None:
    call(smallest)
    for bits in range(2, smallest):
        with pytest.raises(ValueError, match="below 1") as caught:
            call(bits)
        message = str(caught.value)
        assert message.startswith(f"conv1: acc_bits={bits} is too small for input codes in [")
        assert "(act_bits=8)" in message
        assert message.endswith(f"acc_bits must be at least {smallest}")


def test_codes_that_are_all_zero_have_no_budget() -> None:
    with pytest.raises(ValueError, match="fc: input codes that are all 0"):
        budget(IntFormat(0, 0), Accumulator(8), where="fc")


def test_data_type_bits() -> None:
    assert data_type_bits(1, IntFormat.narrow(2), IntFormat.unsigned(1)) == 2
    assert data_type_bits(576, IntFormat.narrow(4), U4) == 17
    assert data_type_bits(1, IntFormat(-1, 1), IntFormat(0, 128)) == 9


def test_free_preload_is_the_start_nearest_zero() -> None:
    assert free_preload([[7, 0], [9, -1], [-9, 0], [5, -5]], U4, Accumulator(8)).tolist() == [0, -8, 7, 0]
    tiled = free_preload([[9, 0, -9]], U4, Accumulator(8, preload="free", tile=1))
    assert tiled.tolist() == [[-8, 0, 7]]


def test_free_preload_refuses_rows_that_no_start_value_saves() -> None:
    with pytest.raises(ValueError, match="fc: row 1 fits no start value in acc_bits=8"):
        free_preload([[17, 0], [9, -9]], U4, Accumulator(8), "fc")
