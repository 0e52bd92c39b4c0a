"""The operations that make codes, where they are read less than they say."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from accaware.formats import IntFormat
from accaware.onnx.read import parse_input
from onnx_helpers import model, node, read_model, run

QONNX = "qonnx.custom_op.general"


def test_zero_points_that_vary_from_matrix_to_matrix(tmp_path) -> None:
    made = model(
        [node("MatMulInteger", ["x", "w", "", "z"], "y")],
        {"x": (TensorProto.UINT8, [2, 1, 300])},
        {"y": None},
        {"w": np.zeros((2, 300, 1), np.uint8), "z": np.array([0, 255], np.uint8).reshape(2, 1, 1)},
    )
    (op,) = read_model(made, tmp_path).operations
    assert "zero-point varies" in op.reason
    assert run(made, {"x": np.full((2, 1, 300), 255, np.uint8)}, ["y"])["y"].min() == -(255**2) * 300


def pool(kernel, ibits, obits):
    attributes = {"kernel": kernel, "stride": kernel, "ibits": ibits, "obits": obits, "signed": 0}
    return node("QuantAvgPool2d", "x", "p", "pool", domain=QONNX, data_layout="NCHW", **attributes)


@pytest.mark.parametrize(
    ("kernel", "ibits", "obits", "wanted"),
    [
        (1, 1, 1, (0, 15)),
        (2, 4, 4, (0, 15)),
        (4, 4, 6, (0, 60)),
        (2, 2, 4, (0, 60)),
        (0, 4, 4, None),
        (4096, 4, 32, None),
    ],
)
def test_pools_shift_the_sums_that_come(kernel, ibits, obits, wanted, tmp_path) -> None:
    """And not those that their bit widths promise."""
    made = model(
        [pool(kernel, ibits, obits), node("DequantizeLinear", "w s", "f"), node("Conv", "p f", "y")],
        {"x": [1, 1, 8, 8]},
        {"y": None},
        {"w": np.ones((1, 1, 1, 1), np.int8), "s": np.float32(1)},
        extra=[(QONNX, 1)],
    )
    op = read_model(made, tmp_path, dict([parse_input("x=uint4")])).operations[-1]
    if wanted is None:
        assert "known" in op.reason or "too large" in op.reason
        return
    assert op.codes == IntFormat(*wanted)
    from qonnx.custom_op.general.quantavgpool2d import QuantAvgPool2d

    assert 15 * kernel**2 >> QuantAvgPool2d(made.graph.node[0], 17).get_shifts() == wanted[1]
