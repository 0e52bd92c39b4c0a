"""A few hundred random graphs; `tests/onnx_graphs.py` runs more."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_graphs import attempt, case

GRAPHS = 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(6))
def test_what_is_claimed_of_every_tensor_holds(seed, tmp_path) -> None:
    with np.errstate(all="ignore"):
        for number in range(GRAPHS):
            assert attempt(case(seed, number), tmp_path) == "", f"graph {number} of seed {seed}"


@pytest.mark.filterwarnings("ignore")
def test_a_constant_that_is_cast_keeps_what_its_own_type_rounded(tmp_path) -> None:
    with np.errstate(all="ignore"):
        assert attempt(case(1, 11398), tmp_path) == ""
