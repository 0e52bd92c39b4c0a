"""A witness for every row that can overflow, as arrays in one file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from accaware.certify.proof import witnesses
from accaware.files import write_whole
from accaware.integer.layer import IntegerLayer

__all__ = ["save_witnesses"]


def save_witnesses(path: Path, layers: Iterable[IntegerLayer]) -> int:
    """Write `path` (.npz): NAME/inputs, NAME/rows, NAME/values and NAME/zero_points of operations that can overflow.

    inputs: stored codes [V, K], V the number of rows that can overflow (twice where the outer register can too); rows,
    values and zero_points: [V]; values are the exact sums, which do not fit. Returns how many. Raises `OSError`.
    """
    arrays: dict[str, Any] = {}
    count = 0
    for layer in layers:
        found = list(witnesses(layer))
        if found:
            count += len(found)
            arrays[f"{layer.name}/inputs"] = np.array([w.inputs for w in found])
            arrays[f"{layer.name}/rows"] = np.array([w.row for w in found])
            arrays[f"{layer.name}/values"] = np.array([w.value for w in found])
            arrays[f"{layer.name}/zero_points"] = np.array([w.zero_point for w in found])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())
    return count
