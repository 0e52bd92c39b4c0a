"""Emulation at hand-made values, at sizes where int64 ends, and against the reference. See also properties/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from accaware.formats import Accumulator, IntFormat
from accaware.integer import reference
from accaware.integer.emulate import emulate
from accaware.integer.layer import IntegerLayer


def layer(rows: Any, codes: IntFormat, accumulator: Accumulator, preload: Any = None) -> IntegerLayer:
    rows = np.array(rows)
    tiles = len(range(0, rows.shape[1], accumulator.tile or rows.shape[1]))
    preload = np.zeros((len(rows), tiles), int) if preload is None else preload
    return IntegerLayer("fc", "Linear", rows, codes, accumulator, preload, np.ones(len(rows)), 1.0, True, "projected")


BYTE = IntFormat.unsigned(8)


@pytest.mark.parametrize(
    ("accumulator", "preload", "total", "overflows"),
    [
        (Accumulator(16), None, 130, 0),
        (Accumulator(8), None, 130 - 256, 1),  # 100 + 100 - 70 = 130
        (Accumulator(8), [-3], 130, 0),  # 127 in the register
        (Accumulator(8), [-2], 130 - 256, 1),
        (Accumulator(8, "saturate"), None, 57, 1),  # 100, 200 -> 127, 57
        (Accumulator(8, "saturate"), [-73], 130, 0),  # -73, 27, 127, 57
        (Accumulator(8, "saturate"), [-72], 129, 1),
        (Accumulator(8, "saturate"), [-130], 132, 1),  # the start does not fit: -128, -28, 72, 2
        (Accumulator(8, tile=1, outer_bits=9), None, 130, 0),
        (Accumulator(8, tile=1, outer_bits=8), None, 130 - 256, 1),
        (Accumulator(8, tile=2, outer_bits=9), None, 200 - 256 - 70, 1),
        (Accumulator(8, tile=2, outer_bits=9), [[-80, 60]], 130, 0),
        (Accumulator(8, "saturate", tile=1, outer_bits=8), None, 57, 1),
        (Accumulator(8, "saturate", tile=2, outer_bits=9), None, 57, 1),
    ],
)
def test_one_sum(accumulator: Accumulator, preload: Any, total: int, overflows: int) -> None:
    made = layer([[100, 100, -70]], IntFormat.unsigned(1), accumulator, preload)
    got = emulate(made, [[1, 1, 1]])
    assert (got.sums.tolist(), got.overflows.tolist()) == ([[total]], [[overflows]])
    assert reference.run(made, 0, [1, 1, 1]) == total


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("bits", [10, 53, 54, 62, 63, 64])
@pytest.mark.parametrize("size", [2**4, 2**25, 2**28, 2**31, 2**62])
def test_numbers_of_any_size(size: int, bits: int, tile: int | None, overflow: Any) -> None:
    """int64 products, Python integers beyond, and the seam between them, are the reference's integers."""
    rng = np.random.default_rng(size % 97 + bits)
    rows = rng.integers(-size, size, (3, 7), endpoint=True)
    codes = IntFormat(-size, size)
    accumulator = Accumulator(bits, overflow, tile=tile, outer_bits=bits)
    tiles = len(range(0, 7, tile or 7))
    made = layer(rows, codes, accumulator, rng.integers(-size, size, (3, tiles)))
    inputs = np.vstack(
        [rng.integers(-size, size, (4, 7), endpoint=True), np.full((1, 7), size), np.full((1, 7), -size)]
    )
    expected = [[reference.run(made, row, x) for row in range(3)] for x in inputs.tolist()]
    assert emulate(made, inputs).sums.tolist() == expected


REGISTERS = [
    Accumulator(9, "saturate"),
    Accumulator(13, "saturate"),
    Accumulator(15, "saturate"),
    Accumulator(13, "saturate", tile=2, outer_bits=14),
    Accumulator(14, "saturate", tile=20, outer_bits=15),
    Accumulator(13, "wrap", tile=7, outer_bits=15),
    Accumulator(14, "wrap"),
]


def clips(made: IntegerLayer, row: int, inputs: Any, zero: int) -> int:
    """How often a running sum is clipped, by the definition."""
    lo, hi, total, count = made.accumulator.lo, made.accumulator.hi, int(made.starts[row, 0]), 0
    for q, x in zip([0, *made.weights()[row].tolist()], [zero, *inputs], strict=True):
        exact = total + q * (x if made.raw else x - zero)
        total = max(lo, min(exact, hi))
        count += exact != total
    return count


@pytest.mark.parametrize("unit", [1, 2**40])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("register", REGISTERS, ids=str)
def test_many_taps(register: Accumulator, raw: bool, unit: int) -> None:
    """Several blocks of taps, rows that can leave the register beside rows that cannot, and Python integers."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-60, 60, (5, 45)) // np.array([[1], [2], [8], [32], [1]]) * unit
    rows[4] = 0
    more = unit.bit_length() - 1
    register = replace(register, bits=register.bits + more, outer_bits=register.outer_bits + bool(register.tile) * more)
    starts = rng.integers(-99, 99, (5, len(range(0, 45, register.tile or 45)))) * unit
    made = layer(rows, BYTE, register, 0 * starts if raw else starts)
    made = replace(made, zero_points=(90,), raw=raw, weight_zero=np.arange(5)[::-1] * unit)
    made = replace(made, outer_start=starts[:, 0]) if register.tile else made
    inputs = rng.choice([0, 90, 91, 200, 255], (40, 45), p=[0.1, 0.4, 0.2, 0.2, 0.1])
    found = emulate(made, inputs)
    assert found.sums.dtype == (np.int64 if unit == 1 else object)
    assert found.sums.tolist() == [[reference.run(made, row, x, 90) for row in range(5)] for x in inputs.tolist()]
    exact = (inputs - 90).astype(object) @ rows.T
    assert found.overflows.any()
    assert not found.overflows.all()
    assert ((found.overflows > 0) | (found.sums == exact)).all()
    if register.overflow == "saturate" and register.tile is None:
        assert found.overflows.tolist() == [[clips(made, row, x, 90) for row in range(5)] for x in inputs.tolist()]


def test_the_largest_sums_that_float64_multiplies_are_exact() -> None:
    rows = np.array([[2**26 - 1, 2**26 - 1, 1], [-(2**26) + 1, 1 - 2**26, -1]])
    made = layer(rows, IntFormat.unsigned(25), Accumulator(60))
    x = [[2**25 - 1, 2**25 - 1, 1]]
    assert emulate(made, x).sums.tolist() == [[2 * (2**26 - 1) * (2**25 - 1) + 1, -2 * (2**26 - 1) * (2**25 - 1) - 1]]


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
def test_a_start_value_beyond_the_register(overflow: Any) -> None:
    made = layer([[1, 2]], BYTE, Accumulator(8, overflow), [-(2**63)])
    assert emulate(made, [[3, 200]]).sums.tolist() == [[reference.run(made, 0, [3, 200])]]


def test_small_layers_stay_in_int64() -> None:
    made = layer([[1, 2]], BYTE, Accumulator(62))
    assert emulate(made, np.array([[255, 255]], np.uint8)).sums.dtype == np.int64
    assert emulate(made, np.zeros((0, 2), int)).sums.shape == (0, 1)


def test_padded_taps_are_zero_also_where_codes_are_not() -> None:
    made = layer([[1, 2]], IntFormat(3, 7), Accumulator(8))
    assert emulate(made, [[0, 7]]).sums.tolist() == [[14]]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([1, 2], ValueError, r"fc: inputs must have shape \[B, 2\], not \[2\]"),
        ([[1, 2, 3]], ValueError, r"fc: inputs must have shape \[B, 2\], not \[1, 3\]"),
        ([[1.0, 2.0]], TypeError, "fc: inputs must be integers, not float64"),
        ([[-1, 3]], ValueError, r"fc: inputs must lie in \[0, 255\], not \[-1, 3\]"),
        ([[0, 256]], ValueError, r"fc: inputs must lie in \[0, 255\], not \[0, 256\]"),
    ],
)
def test_other_inputs_are_refused(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        emulate(layer([[1, 2]], BYTE, Accumulator(16)), inputs)


@pytest.mark.parametrize(
    ("value", "wrapped", "saturated"), [(7, 7, 7), (8, -8, 7), (-8, -8, -8), (-9, 7, -8), (24, -8, 7)]
)
def test_the_reference_register_by_hand(value: int, wrapped: int, saturated: int) -> None:
    assert reference.wrap(value, 4) == wrapped
    assert reference.saturate(value, 4) == saturated
