"""E[x^2] of the inputs of operations: what numpy computes from the tensors that onnxruntime delivers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from accaware.formats import IntFormat
from accaware.onnx.moments import mean_squares
from accaware.onnx.tensors import Origin
from accaware.onnx.weights import Rows, convolution, matrix, tap_values, transposed
from onnx_helpers import model, node, run, save


def made():
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "s": np.float32(0.02),
        "z": np.uint8(9),
        "v": rng.integers(-9, 9, (16, 5)).astype(np.int8),
        "shape": np.array([-1, 16]),
    }
    nodes = [
        node("Conv", "x w", "c", "conv"),
        node("QuantizeLinear", "c s z", "q"),
        node("Reshape", "q shape", "f"),
        node("MatMulInteger", "f v z", "y", "product"),
    ]
    return model(nodes, {"x": ["n", 3, 4, 4]}, {"y": (TensorProto.INT32, ["n", 5])}, constants)


def test_they_are_those_of_the_real_inputs(tmp_path) -> None:
    path, x = save(made(), tmp_path), np.random.default_rng(1).normal(size=(100, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, other=np.zeros(3))
    found = mean_squares(path, tmp_path / "data.npz")
    assert set(found) == {"conv", "product"}
    np.testing.assert_allclose(found["conv"], (x.astype(np.float64) ** 2).mean(axis=(0, 2, 3)))
    codes = run(made(), {"x": x}, ["f"])["f"].astype(np.float64) - 9
    np.testing.assert_allclose(found["product"], (codes**2).mean(axis=0))
    np.savez(tmp_path / "data.npz", images=x)
    assert all((mean_squares(path, tmp_path / "data.npz")[name] == found[name]).all() for name in found)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros(3)}, "there is no array 'x'; the graph has inputs x"),
        ({"x": np.zeros((0, 3, 4, 4), np.float32)}, "its arrays have no rows"),
        ({"x": np.zeros((1, 2, 4, 4), np.float32)}, "onnxruntime cannot run"),
        ({"x": np.zeros((1, 3, 4, 4))}, "onnxruntime cannot run"),
    ],
)
def test_data_that_do_not_fit_are_refused(arrays, message, tmp_path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        mean_squares(save(made(), tmp_path), tmp_path / "data.npz")


def test_every_tap_has_the_number_of_its_channel() -> None:
    def rows(layout, shape):
        return Rows(
            layout, np.zeros(shape, np.int8), IntFormat(-1, 1), np.zeros((), np.int64), None, Origin("w", shape)
        )

    grouped = rows(convolution((4, 2, 1, 2), 2), (4, 2, 1, 2))
    numbers = np.array([1.0, 2, 3, 4])
    assert tap_values(grouped, "Conv", numbers).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    assert tap_values(grouped, "QLinearConv", numbers, "hwc").tolist() == [[1, 2, 1, 2]] * 2 + [[3, 4, 3, 4]] * 2
    back = rows(transposed((4, 1, 1, 2), 2, (), ()), (4, 1, 1, 2))
    assert tap_values(back, "ConvTranspose", numbers).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert tap_values(rows(matrix((4, 3), -2), (4, 3)), "MatMul", numbers).tolist() == [[1, 2, 3, 4]] * 3
    for layer, kind in ((grouped, "Conv"), (back, "ConvTranspose"), (rows(matrix((4, 3), -2), (4, 3)), "Gemm")):
        with pytest.raises(ValueError, match="3 input channels do not fit weights of shape"):
            tap_values(layer, kind, numbers[:3])
