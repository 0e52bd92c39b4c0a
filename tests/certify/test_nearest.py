"""The closest safe weights: compared with every combination of small weights, for every kind of register."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from accaware.certify.nearest import ImpossibleError, Problem, _project, nearest, with_rows
from accaware.certify.proof import prove
from accaware.formats import Accumulator, IntFormat
from accaware.integer.layer import IntegerLayer
from accaware.projections import project_any

U4, S4 = IntFormat.unsigned(4), IntFormat.signed(4)
LOW, HIGH, FAN_IN, ROWS = -4, 3, 4, 12


def layer(rows, codes=U4, register=None, *, bias=0, **fields):
    tiled = register.tile is not None
    bias = np.broadcast_to(np.asarray(bias), (len(rows),)) if np.any(bias) else np.zeros((), np.int64)
    return IntegerLayer(
        name="op",
        kind="Conv",
        rows=rows,
        codes=codes,
        accumulator=register,
        preload=np.zeros((), np.int64) if tiled else bias,
        outer_start=bias if tiled else np.zeros((), np.int64),
        scale=np.ones(len(rows)),
        act_scale=1.0,
        inside=True,
        method="",
        **fields,
    )


def problem(layers, *, low=LOW, high=HIGH, groups=None, importance=None, scale=None):
    count = len(layers[0].rows)
    ends = [np.broadcast_to(end, (count,)) for end in (low, high)]
    return Problem(layers, *ends, np.ones(count) if scale is None else scale, groups, importance)


def fits(one):
    """Which rows of a layer fit every register."""
    good = np.ones(len(one.rows), bool)
    for sums in prove(one).sums():
        limit = 2 ** (sums.bits - 1)
        good &= (np.array(sums.lo) >= -limit) & (np.array(sums.hi) < limit)
    return good


def best_error(one, row, importance, low, high):
    """The smallest error of any safe weights of one row, by trying all."""
    every = np.array(list(itertools.product(range(low, high + 1), repeat=one[0].rows.shape[1])))
    safe = np.ones(len(every), bool)
    for part in one:
        repeated = {
            name: np.repeat(getattr(part, name)[row : row + 1], len(every), axis=0)
            for name in ("preload", "outer_start", "weight_zero")
            if getattr(part, name).ndim
        }
        safe &= fits(replace(part, rows=every, scale=np.ones(len(every)), **repeated))
    errors = (importance * (every - one[0].rows[row]) ** 2).sum(axis=1)
    return errors[safe].min()


KINDS = {
    "unsigned": {"register": Accumulator(7)},
    "unsigned with a bias": {"register": Accumulator(8), "bias": True},
    "signed": {"codes": S4, "register": Accumulator(7)},
    "signed with a bias": {"codes": S4, "register": Accumulator(7), "bias": True},
    "a range with a zero point": {"codes": U4, "register": Accumulator(7), "zero_points": (5,), "bias": True},
    "any zero point": {"register": Accumulator(7), "zero_points": (0, 15), "bias": True},
    "some zero points": {"register": Accumulator(7), "zero_points": (3, 9)},
    "negative codes": {"codes": IntFormat(-12, -2), "register": Accumulator(7)},
    "tiles": {"register": Accumulator(6, tile=2)},
    "tiles of three": {"register": Accumulator(7, tile=3)},
    "signed tiles": {"codes": S4, "register": Accumulator(6, tile=2)},
    "tiles in a narrow register": {"register": Accumulator(7, tile=2, outer_bits=7), "bias": True},
    "any two taps": {"register": Accumulator(6, tile=2, order="any")},
    "any two taps, any zero point": {"register": Accumulator(6, tile=2, order="any"), "zero_points": (0, 15)},
    "raw codes": {"register": Accumulator(6, tile=2), "raw": True, "zero_points": (7,), "weight_zero": -1},
    "raw codes, any two taps": {"register": Accumulator(6, tile=2, order="any"), "raw": True, "weight_zero": 2},
}


def drawn(rng, kind):
    options = dict(KINDS[kind])
    rows = rng.integers(LOW, HIGH + 1, (ROWS, FAN_IN))
    if options.get("bias"):
        options["bias"] = rng.integers(-30, 31, ROWS)
    if "weight_zero" in options:
        options["weight_zero"] = np.full(ROWS, options["weight_zero"])
    return layer(rows, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_closest_weights_are_found(kind, weighted) -> None:
    rng = np.random.default_rng(len(kind))
    one = drawn(rng, kind)
    h = rng.uniform(0.1, 2, (ROWS, FAN_IN)) if weighted else np.ones((ROWS, FAN_IN))
    before = fits(one)
    assert not before.all(), "the problem must be one"
    found = nearest(problem([one], importance=h if weighted else None))
    after = with_rows(one, found)
    assert (found.broken == ~before).all()
    assert (found.rows[before] == one.rows[before]).all()
    assert prove(after).verdict == "proven"
    assert found.rows.min() >= LOW
    assert found.rows.max() <= HIGH
    for row in range(ROWS):
        error = (h[row] * (found.rows[row] - one.rows[row]) ** 2).sum()
        assert error == pytest.approx(best_error([one], row, h[row], LOW, HIGH))


def test_any_three_taps_without_importance() -> None:
    rng = np.random.default_rng(3)
    one = layer(rng.integers(LOW, HIGH + 1, (ROWS, FAN_IN)), register=Accumulator(7, tile=3, order="any"))
    found = nearest(problem([one]))
    for row in range(ROWS):
        error = ((found.rows[row] - one.rows[row]) ** 2).sum()
        assert error == best_error([one], row, np.ones(FAN_IN), LOW, HIGH)


@pytest.mark.parametrize("codes", [S4, IntFormat(-3, 12), IntFormat(-8, 8)])
def test_any_two_taps_of_signed_codes_are_safe_and_close(codes) -> None:
    rng = np.random.default_rng(3)
    one = layer(rng.integers(LOW, HIGH + 1, (ROWS, FAN_IN)), codes, Accumulator(6, tile=2, order="any"))
    found = nearest(problem([one]))
    assert prove(with_rows(one, found)).verdict == "proven"
    gaps = [
        ((found.rows[row] - one.rows[row]) ** 2).sum() - best_error([one], row, np.ones(FAN_IN), LOW, HIGH)
        for row in range(ROWS)
    ]
    assert codes != IntFormat(-8, 8) or not any(gaps)
    assert min(gaps) >= 0


def test_weights_that_two_operations_share_fit_both() -> None:
    rng = np.random.default_rng(4)
    rows = rng.integers(LOW, HIGH + 1, (ROWS, FAN_IN))
    both = [
        layer(rows, S4, Accumulator(7)),
        layer(rows, IntFormat(0, 20), Accumulator(7), bias=rng.integers(-9, 9, ROWS)),
    ]
    found = nearest(problem(both))
    for one in both:
        assert not fits(one).all()
        assert prove(with_rows(one, found)).verdict == "proven"
    for row in range(ROWS):
        error = ((found.rows[row] - rows[row]) ** 2).sum()
        assert error == best_error(both, row, np.ones(FAN_IN), LOW, HIGH)


WIDE = {"low": -128, "high": 127}


def relative(one, found, scale):
    new = found.rows * (found.ratio * scale)[:, None]
    return ((new - one.rows * scale[:, None]) ** 2).sum(axis=1)


@pytest.mark.parametrize("register", [Accumulator(13), Accumulator(12, tile=2)], ids=["sum", "tiles"])
def test_a_scale_of_its_own_lowers_the_error_of_a_row(register) -> None:
    rng = np.random.default_rng(5)
    one = layer(
        rng.integers(-128, 128, (ROWS, 9)) // rng.choice([1, 16], (ROWS, 1)),
        register=register,
        bias=rng.integers(-90, 90, ROWS),
    )
    fixed = nearest(problem([one], **WIDE))
    free = nearest(problem([one], **WIDE, groups=np.arange(ROWS)))
    safe = ~free.broken
    assert 0 < safe.sum() < ROWS
    assert (free.ratio[safe] == 1).all()
    assert (free.rows[safe] == one.rows[safe]).all()
    assert prove(with_rows(one, free)).verdict == "proven"
    ones = np.ones(ROWS)
    assert (relative(one, free, ones) <= relative(one, fixed, ones)).all()
    assert relative(one, free, ones).sum() < 0.6 * relative(one, fixed, ones).sum()
    assert (free.ratio >= 1).all()


def test_one_scale_for_all_changes_only_if_that_is_better_for_all() -> None:
    rng = np.random.default_rng(6)
    count = 300
    rows = rng.integers(-40, 41, (count, 8))
    rows[0, :2] = 69  # the only tile that does not fit: requantizing all weights for it does not pay
    one = layer(rows, register=Accumulator(12, tile=2))
    kept = nearest(problem([one], **WIDE, groups=np.zeros(count, np.int64)))
    assert (kept.ratio == 1).all()
    assert (kept.rows[1:] == rows[1:]).all()
    one = layer(3 * rows.clip(-42, 42), register=Accumulator(12, tile=2))
    changed = nearest(problem([one], **WIDE, groups=np.zeros(count, np.int64)))
    assert len(set(changed.ratio)) == 1
    assert changed.ratio[0] > 1
    fixed = nearest(problem([one], **WIDE))
    assert relative(one, changed, np.ones(count)).sum() < relative(one, fixed, np.ones(count)).sum()


def test_a_bias_is_in_units_of_the_new_scale() -> None:
    rows = np.array([[100, -90, 80, 70]])
    one = layer(rows, register=Accumulator(12), bias=[3000])  # the bias alone does not fit
    with pytest.raises(ImpossibleError, match="op: row 0 has no budget for weights other than 0, with the bias"):
        nearest(problem([one], **WIDE))
    found = nearest(problem([one], **WIDE, groups=np.zeros(1, np.int64)))
    after = with_rows(one, found)
    assert prove(after).verdict == "proven"
    assert after.preload[0] == round(3000 / found.ratio[0])
    assert found.rows.any()


def test_the_tap_that_exceeds_the_others_is_the_one_that_gains_most_in_its_room() -> None:
    """Alone, up to the limit, the first would gain more; with what the second tap leaves it, less."""
    q = project_any(torch.tensor([[10.0, 4.0]]), 2, 5, 5, qmax=15, importance=torch.tensor([[1.0, 8.0]]))
    assert q.tolist() == [[2, 3]]


@pytest.mark.parametrize("sign", [1, -1])
def test_finer_scales_leave_the_weights_in_their_type(sign) -> None:
    one = layer(np.full((1, 3), 100 * sign), register=Accumulator(20))
    rows, _ = _project(problem([one], **WIDE), np.arange(1), np.array([0.5]))
    assert set(rows.ravel()) == {127 if sign > 0 else -128}


def test_a_budget_below_one_is_refused() -> None:
    one = layer(np.array([[1, -1]]), register=Accumulator(4))
    with pytest.raises(ImpossibleError, match=r"op: row 0 has no budget for weights other than 0$"):
        nearest(problem([one], groups=np.zeros(1, np.int64)))


def test_weights_that_cannot_be_0_are_refused() -> None:
    one = layer(np.array([[3, 3]]), register=Accumulator(6))
    with pytest.raises(ImpossibleError, match="op: its weights cannot be 0"):
        nearest(problem([one], low=2, high=3))


def test_a_zero_point_is_shared_by_all_codes_and_either_end_binds() -> None:
    """Codes of dynamic quantization: each side alone, with the smaller of the two rooms."""
    one = layer(
        np.array([[100, 100, -100, -100]]), IntFormat.unsigned(8), Accumulator(16), bias=[7767], zero_points=(0, 255)
    )
    found = nearest(problem([one], **WIDE))
    limit = (32767 - 7767) // 255
    assert found.rows.clip(min=0).sum() == limit
    assert found.rows.clip(max=0).sum() == -limit
    assert prove(with_rows(one, found)).verdict == "proven"
