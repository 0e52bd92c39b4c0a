"""Nodes of QONNX as operators of ONNX, value by value beside qonnx's executor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from accaware.certify.emulation import Emulator
from accaware.certify.targets import TARGETS
from onnx_helpers import model, node, run_qonnx, save

pytest.importorskip("qonnx")

DOMAIN = "qonnx.custom_op.general"
ROUNDINGS = ["ROUND", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN"]
VALUES = np.arange(-45, 46, dtype=np.float32).reshape(1, -1) / 4  # halves and quarters


def check(op, constants, folder, domain=DOMAIN):
    op.domain = domain
    made = model([op], {"x": [1, VALUES.size]}, {"y": [1, VALUES.size]}, constants, extra=[(domain, 1)])
    found = Emulator(save(made, folder), None).run({"x": VALUES}).outputs["y"]
    for other in made.opset_import, made.graph.node:
        for entry in other:
            if entry.domain == domain:
                entry.domain = DOMAIN
    assert np.array_equal(found, run_qonnx(made, {"x": VALUES}, ["y"])["y"])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("signed", "narrow"), [*itertools.product([0, 1], [0, 1])])
def test_quant(bits, signed, narrow, rounding, tmp_path) -> None:
    op = node("Quant", "x s z b", "y", signed=signed, narrow=narrow, rounding_mode=rounding)
    check(op, {"s": np.float32(0.5), "z": np.float32(1 - signed), "b": np.float32(bits)}, tmp_path)


@pytest.mark.parametrize("domain", ["onnx.brevitas", "finn.custom_op.general"])
def test_other_domains(domain, tmp_path) -> None:
    op = node("Quant", "x s z b", "y", signed=1, narrow=0, rounding_mode="ROUND")
    check(op, {"s": np.float32(0.5), "z": np.float32(0), "b": np.float32(3)}, tmp_path, domain)


def test_bipolar(tmp_path) -> None:
    check(node("BipolarQuant", "x s", "y"), {"s": np.float32(0.25)}, tmp_path)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_trunc(rounding, tmp_path) -> None:
    op = node("Trunc", "x s z i o", "y", rounding_mode=rounding)
    held = {"s": np.float32(0.25), "z": np.float32(0), "i": np.float32(8), "o": np.float32(6)}
    check(op, held, tmp_path)


LAYOUTS = [("", [3, 5]), ("", [2, 4, 5]), ("", [2, 5, 3, 4]), ("NHWC", [2, 3, 4, 5]), ("NCHW", [2, 5, 3, 4])]


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_multi_threshold(layout, shape, channels, tmp_path) -> None:
    from qonnx.custom_op.registry import getCustomOp

    generator = np.random.default_rng(1)
    x = generator.integers(-9, 9, shape).astype(np.float32)
    steps = np.sort(generator.integers(-9, 9, (channels, 7)), axis=1).astype(np.float32)
    given = {"out_dtype": "INT8", "out_scale": 0.3, "out_bias": -1.1}
    op = node("MultiThreshold", "x t", "y", domain=DOMAIN, **given, **({"data_layout": layout} if layout else {}))
    made = model([op], {"x": shape}, {"y": shape}, {"t": steps}, extra=[(DOMAIN, 1)])
    expected = {"x": x, "t": steps}
    getCustomOp(op).execute_node(expected, made.graph)
    found = Emulator(save(made, tmp_path), None).run({"x": x}).outputs["y"]
    assert np.array_equal(found, expected["y"])


def test_nodes_that_stay_say_so_in_one_line(tmp_path) -> None:
    """Thresholds for each channel, of a tensor of unknown rank without a layout."""
    op = node("MultiThreshold", "x t", "y", domain=DOMAIN, out_dtype="INT8")
    held = {"t": np.zeros((5, 7), np.float32)}
    made = model([op], {"x": None}, {"y": None}, held, extra=[(DOMAIN, 1)])
    with pytest.raises(ValueError, match="MultiThreshold") as caught:
        Emulator(save(made, tmp_path), None).run({"x": np.zeros((2, 5), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_network(tmp_path) -> None:
    """Sums of a layer between Quant nodes wrap around."""
    generator = np.random.default_rng(0)
    nodes = [
        node("Quant", "x s z four", "a", domain=DOMAIN, signed=0, narrow=0, rounding_mode="ROUND"),
        node("Quant", "w s zero three", "wq", domain=DOMAIN, signed=1, narrow=1, rounding_mode="ROUND"),
        node("MatMul", "a wq", "m", "op"),
        node("Quant", "m one zero eight", "y", domain=DOMAIN, signed=1, narrow=0, rounding_mode="ROUND"),
    ]
    numbers = {"s": 0.25, "z": 2, "zero": 0, "one": 1, "three": 3, "four": 4, "eight": 8}
    held = {name: np.float32(value) for name, value in numbers.items()}
    held["w"] = generator.normal(size=(VALUES.size, 6)).astype(np.float32)
    made = model(nodes, {"x": [1, VALUES.size]}, {"y": [1, 6]}, held, extra=[(DOMAIN, 1)])
    path = save(made, tmp_path)
    codes = np.rint(np.clip(VALUES * 4 + 2, 0, 15)).astype(int) - 2
    weights = np.rint(np.clip(held["w"] * 4, -3, 3)).astype(int)
    sums = codes @ weights
    wrapped = (sums + 128) % 256 - 128
    for target, kept in (("int32", sums), ("fhe-8", wrapped)):
        done = Emulator(path, TARGETS[target]).run({"x": VALUES})
        assert np.array_equal(done.outputs["y"], np.clip(np.rint(kept / 16), -128, 127))
        assert done.overflows == (sums != kept).sum()
    assert (sums != wrapped).any()
