"""Formats refuse what cannot be, and say what can."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from accaware.formats import Accumulator, IntFormat, Spec


@pytest.mark.parametrize(
    ("made", "lo", "hi", "span", "magnitude", "signed"),
    [
        (IntFormat.unsigned(1), 0, 1, 1, 1, False),
        (IntFormat.unsigned(8), 0, 255, 255, 255, False),
        (IntFormat.signed(1), -1, 0, 1, 1, True),
        (IntFormat.signed(4), -8, 7, 15, 8, True),
        (IntFormat.narrow(2), -1, 1, 2, 1, True),
        (IntFormat.narrow(4), -7, 7, 14, 7, True),
        (IntFormat(3, 9), 3, 9, 6, 9, False),
        (IntFormat(-9, -3), -9, -3, 6, 9, True),
    ],
)
def test_ranges(made: IntFormat, lo: int, hi: int, span: int, magnitude: int, signed: bool) -> None:
    assert (made.lo, made.hi, made.span, made.magnitude, made.is_signed) == (lo, hi, span, magnitude, signed)


@pytest.mark.parametrize(
    ("codes", "wider"), [((3, 9), (0, 9)), ((-9, -3), (-9, 0)), ((-2, 5), (-2, 5)), ((0, 0), (0, 0))]
)
def test_with_zero(codes: tuple[int, int], wider: tuple[int, int]) -> None:
    assert IntFormat(*codes).with_zero() == IntFormat(*wider)


@pytest.mark.parametrize("bits", [2, 9, 32, 64])
def test_a_register_is_twos_complement(bits: int) -> None:
    register = Accumulator(bits)
    assert (register.lo, register.hi) == (-(1 << bits - 1), (1 << bits - 1) - 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IntFormat(1, 0), ValueError, "lo <= hi"),
        (lambda: IntFormat(0, 1.0), TypeError, "hi must be an integer"),  # type: ignore[arg-type]
        (lambda: IntFormat(True, 1), TypeError, "lo must be an integer"),
        (lambda: IntFormat(0, 2**63), ValueError, "hi must lie in"),
        (lambda: IntFormat.narrow(1), ValueError, r"bits must lie in \[2, "),
        (lambda: Accumulator(1), ValueError, r"acc_bits must lie in \[2, 64\], not 1"),
        (lambda: Accumulator(65), ValueError, "acc_bits"),
        (lambda: Accumulator(16, tile=0), ValueError, "tile"),
        (lambda: Accumulator(16, tile=4, outer_bits=15), ValueError, "outer_bits must be at least acc_bits=16, not 15"),
        (lambda: Accumulator(16, overflow="clip"), ValueError, "overflow must be one of wrap, saturate"),  # type: ignore[arg-type]
        (lambda: Accumulator(16, preload="some"), ValueError, "preload must be one of none, free"),  # type: ignore[arg-type]
        (lambda: Accumulator(16, order="whc"), ValueError, "order must be one of chw, hwc"),  # type: ignore[arg-type]
        (lambda: Spec(weight_bits=1), ValueError, r"weight_bits must lie in \[2, 8\], not 1"),
        (lambda: Spec(weight_bits=9), ValueError, "weight_bits"),
        (lambda: Spec(act_bits=0), ValueError, r"act_bits must lie in \[1, 8\], not 0"),
        (lambda: Spec(acc_bits=33), ValueError, r"acc_bits must lie in \[2, 32\], not 33"),
        (lambda: Spec(method="a3q"), ValueError, "method must be one of"),  # type: ignore[arg-type]
        (lambda: Spec(method="a2q", preload="free"), ValueError, "needs method 'projected', not 'a2q'"),
        (lambda: Spec(acc_bits=16, tile=2, outer_bits=8), ValueError, "outer_bits"),
        (lambda: Spec(per_channel="no"), TypeError, "per_channel must be True or False, not 'no'"),  # type: ignore[arg-type]
        (lambda: Spec(rotate=1), TypeError, "rotate must be True or False, not 1"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(make, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_formats_are_frozen() -> None:
    for record, field in ((IntFormat(0, 1), "lo"), (Accumulator(8), "bits"), (Spec(), "acc_bits")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, 5)


def test_a_spec_hands_everything_to_its_accumulator() -> None:
    spec = Spec(4, 6, 14, preload="free", tile=9, outer_bits=20, overflow="saturate", order="hwc")
    assert spec.accumulator == Accumulator(14, "saturate", "free", 9, 20, "hwc")
    assert spec.weight_format == IntFormat(-7, 7)
    assert spec.act_format(signed=True) == IntFormat(-32, 31)
    assert spec.act_format(signed=False) == IntFormat(0, 63)
    assert Spec(**spec.to_dict()) == spec
