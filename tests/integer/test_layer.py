"""The integer layer validates itself and cannot be changed afterwards."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from accaware.formats import Accumulator, IntFormat
from accaware.integer.layer import IntegerLayer


def layer(**changes: Any) -> IntegerLayer:
    fields: dict[str, Any] = {
        "name": "block.conv1",
        "kind": "Conv2d",
        "rows": np.array([[1, -2, 3, 4, 5], [0, 7, 0, -7, 0]], np.int8),
        "codes": IntFormat.unsigned(4),
        "accumulator": Accumulator(12),
        "preload": np.zeros(2, np.int64),
        "scale": np.array([0.5, 0.25]),
        "act_scale": 0.125,
        "inside": True,
        "method": "projected",
    }
    return IntegerLayer(**(fields | changes))


def test_without_tiles_there_is_one_running_sum() -> None:
    made = layer(preload=[3, -4])
    assert made.fan_in == 5
    assert made.tiles == [slice(0, 5)]
    assert made.starts.tolist() == [[3], [-4]]
    assert (made.repaired, made.note) == (0, "")


@pytest.mark.parametrize(
    ("tile", "tiles"), [(2, [slice(0, 2), slice(2, 4), slice(4, 5)]), (5, [slice(0, 5)]), (9, [slice(0, 5)])]
)
def test_tiles_cover_every_tap_once(tile: int, tiles: list[slice]) -> None:
    made = layer(accumulator=Accumulator(12, tile=tile), preload=np.ones((2, len(tiles)), int))
    assert made.tiles == tiles
    assert made.starts.tolist() == [[1] * len(tiles)] * 2


def test_one_start_value_serves_all_tiles() -> None:
    made = layer(accumulator=Accumulator(12, tile=2), preload=np.array(-3))
    assert made.starts.tolist() == [[-3] * 3] * 2


def test_codes_and_zero_points() -> None:
    made = layer(codes=IntFormat(10, 200), zero_points=(0, 255), raw=True, weight_zero=[0, -128])
    assert made.centred == (IntFormat(10, 200), IntFormat(-245, -55))
    assert made.stored == IntFormat(0, 255)
    assert made.weights().tolist() == [[1, -2, 3, 4, 5], [-128, -121, -128, -135, -128]]
    assert made.weights(slice(0, 1)).tolist() == [[1, -2, 3, 4, 5]]
    assert layer(weight_zero=7).weights().tolist() == made.rows.tolist()


def test_arrays_over_bytes_are_not_copied() -> None:
    rows = np.frombuffer(bytes(10), np.int8).reshape(2, 5)
    assert np.shares_memory(layer(rows=rows).rows, rows)
    assert not np.shares_memory(layer(rows=np.array(rows)).rows, rows)


@pytest.mark.parametrize("name", ["rows", "preload", "scale"])
def test_what_was_proven_stays(name: str) -> None:
    source = np.ones((2, 5), np.int64) if name == "rows" else np.ones(2, np.int64)
    made = layer(**{name: source})
    source[:] = 2
    assert (getattr(made, name) == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        getattr(made, name)[:] = 2
    with pytest.raises(FrozenInstanceError):
        setattr(made, name, source)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": np.ones((2, 5))}, TypeError, "rows must be integers, not float64"),
        ({"rows": np.ones(5, int)}, ValueError, r"rows must be int64 \[R, K\]"),
        ({"rows": np.ones((0, 5), int)}, ValueError, "R, K >= 1"),
        ({"rows": np.ones((2, 0), int)}, ValueError, "R, K >= 1"),
        ({"rows": [[2**63] * 5] * 2}, ValueError, "rows must be int64"),
        ({"rows": [[2**70] * 5] * 2}, ValueError, "rows must be int64"),
        ({"preload": np.zeros(2)}, TypeError, "preload must be integers"),
        ({"preload": [0, 0, 0]}, ValueError, r"preload must have shape \[2, 1\], not \[3\]"),
        ({"preload": [0, 0], "accumulator": Accumulator(12, tile=2)}, ValueError, r"shape \[2, 3\], not \[2\]"),
        ({"scale": [1.0]}, ValueError, "scale must be 2 positive numbers"),
        ({"scale": [1.0, 0.0]}, ValueError, "scale must be 2 positive numbers"),
        ({"scale": [1.0, np.nan]}, ValueError, "scale must be 2 positive numbers"),
        ({"act_scale": np.inf}, ValueError, "act_scale must be a positive number, not inf"),
        ({"act_scale": 0.0}, ValueError, "act_scale must be a positive number, not 0.0"),
        ({"weight_zero": [1, 2, 3]}, ValueError, r"weight_zero must be one integer or 2, not \[3\]"),
        ({"outer_start": [0.5, 1.0]}, TypeError, "outer_start must be integers, not float64"),
        ({"zero_points": ()}, ValueError, r"zero_points must be integers, at least one, not \(\)"),
        ({"zero_points": (0, 1.5)}, ValueError, "zero_points must be integers"),
        (
            {"accumulator": Accumulator(12, tile=2, order="any"), "preload": np.ones((2, 3), int)},
            ValueError,
            "one integer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^block.conv1: .*{message}") as caught:
        layer(**changes)
    assert "\n" not in str(caught.value)
