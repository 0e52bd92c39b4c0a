"""Which kernels of onnxruntime saturate: the table that was measured, as verdicts on one dangerous pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from accaware.certify.files import certify_file
from accaware.certify.second import disagreements
from accaware.certify.targets import TARGETS
from onnx_helpers import model, node, save, tensor

TYPES = {"u8": np.uint8, "s8": np.int8}
WHERE = TARGETS["onnxruntime-avx2"]


def parameters(x, w):
    return {
        "s": np.float32(0.5),
        "zx": TYPES[x](0),
        "zw": TYPES[w](0),
        "one": np.float32(1),
    }


def network(folder, kind, x, w, weights, left=False):
    """One operation on codes of type `x` with weights of type `w`, [O, C, k] or, for matrices, [K, O], left [O, K]."""
    weights = np.asarray(weights, TYPES[w])
    code = tensor("x", TYPES[x](0)).data_type
    shape = [1, *weights.shape[1:-1], 6] if weights.ndim == 3 else [2, len(weights)]
    shape = [weights.shape[1], 2] if left else shape
    group = {"group": len(weights)} if weights.ndim == 3 and weights.shape[1] == 1 and len(weights) > 1 else {}
    if group:
        shape[1] = len(weights)
    given = {
        "QLinearConv": ("x s zx w s zw s zx", {"kernel_shape": weights.shape[2:], **group}),
        "ConvInteger": ("x w zx zw", {"kernel_shape": weights.shape[2:], **group}),
        "QLinearMatMul": ("x s zx w s zw s zx", {}),
        "MatMulInteger": ("x w zx zw", {}),
    }
    inputs, attributes = given[kind]
    if left:
        inputs = {"QLinearMatMul": "w s zw x s zx s zx", "MatMulInteger": "w x zw zx"}[kind]
    out = code if kind.startswith("QLinear") else 6
    made = model([node(kind, inputs, "y", "op", **attributes)], {"x": (code, shape)}, {"y": (out, None)},
                 {**parameters(x, w), "w": weights})  # fmt: skip
    return save(made, folder)


def qdq(folder, kind, x, w, weights, left=False):
    """The same between DequantizeLinear and QuantizeLinear, on codes that the graph computes."""
    weights = np.asarray(weights, TYPES[w])
    shape = [1, *weights.shape[1:-1], 6] if weights.ndim == 3 else [2, len(weights)]
    shape = [weights.shape[1], 2] if left else shape
    nodes = [
        node("QuantizeLinear", "x s zx", "q"),
        node("DequantizeLinear", "q s zx", "a"),
        node("DequantizeLinear", "w s zw", "b"),
        node(
            kind,
            "b a" if left else "a b",
            "c",
            "op",
            **({"kernel_shape": weights.shape[2:]} if weights.ndim == 3 else {}),
        ),
        node("QuantizeLinear", "c s zx", "d"),
        node("DequantizeLinear", "d s zx", "y"),
    ]
    return save(model(nodes, {"x": shape}, {"y": None}, {**parameters(x, w), "w": weights}), folder)


def verdict(path):
    certificate = certify_file(path, WHERE)
    assert disagreements(certificate, path) == []
    (op,) = certificate.operations
    return op.verdict, op.raw


PAIR_OF_TAPS, PAIR_OF_CHANNELS = [[[127, 127], [0, 0]]], [[[127, 0], [127, 0]]]
MATRIX = [[127], [127], [0]]


@pytest.mark.parametrize(
    ("kind", "x", "w", "weights", "expected"),
    [
        ("QLinearConv", "u8", "s8", PAIR_OF_CHANNELS, ("refuted", True)),  # channels fastest
        ("QLinearConv", "u8", "s8", PAIR_OF_TAPS, ("proven", True)),
        ("QLinearConv", "u8", "u8", PAIR_OF_CHANNELS, ("proven", False)),
        ("QLinearConv", "s8", "s8", PAIR_OF_CHANNELS, ("proven", False)),
        ("QLinearConv", "u8", "s8", [[[127, 127, 127]]] * 3, ("proven", False)),  # depthwise
        ("ConvInteger", "u8", "s8", PAIR_OF_CHANNELS, ("proven", False)),
        ("ConvInteger", "s8", "u8", [[[255, 2], [0, 0]]], ("refuted", True)),  # the order of the file
        ("ConvInteger", "s8", "u8", [[[255, 0], [2, 0]]], ("proven", True)),
        ("QLinearMatMul", "u8", "s8", MATRIX, ("refuted", True)),
        ("QLinearMatMul", "u8", "s8", [[127], [0], [127]], ("proven", True)),
        ("QLinearMatMul", "u8", "u8", MATRIX, ("proven", False)),
        ("MatMulInteger", "u8", "s8", MATRIX, ("refuted", True)),
        ("MatMulInteger", "s8", "s8", MATRIX, ("proven", False)),
    ],
)
def test_operators(kind, x, w, weights, expected, tmp_path):
    assert verdict(network(tmp_path, kind, x, w, weights)) == expected


@pytest.mark.parametrize(
    ("kind", "x", "w", "weights", "expected"),
    [
        ("Conv", "u8", "s8", PAIR_OF_CHANNELS, ("refuted", True)),
        ("Conv", "u8", "s8", PAIR_OF_TAPS, ("proven", True)),
        ("Conv", "s8", "s8", PAIR_OF_CHANNELS, ("refuted", True)),  # runs as u8 codes, 128 higher
        ("Conv", "s8", "s8", [[[64, 0], [64, 0]]], ("proven", True)),
        ("Conv", "u8", "u8", PAIR_OF_CHANNELS, ("proven", False)),
        ("MatMul", "u8", "s8", MATRIX, ("refuted", True)),
        ("MatMul", "s8", "s8", MATRIX, ("refuted", True)),
    ],
)
def test_qdq(kind, x, w, weights, expected, tmp_path):
    assert verdict(qdq(tmp_path, kind, x, w, weights)) == expected


@pytest.mark.parametrize(
    ("x", "w", "weights", "expected"),
    [
        ("s8", "u8", [[255, 3, 0]], ("refuted", True)),  # the left operand is the unsigned one
        ("s8", "u8", [[255, 0, 255]], ("proven", True)),
        ("u8", "u8", [[255, 255, 0]], ("proven", False)),
        ("u8", "s8", [[127, 127, 0]], ("proven", False)),
        ("s8", "s8", [[-128, -128, 0]], ("proven", False)),
    ],
)
@pytest.mark.parametrize("kind", ["MatMulInteger", "QLinearMatMul", "MatMul", "Gemm"])
def test_weights_on_the_left(kind, x, w, weights, expected, tmp_path):
    made = qdq if kind in ("MatMul", "Gemm") else network
    assert verdict(made(tmp_path, kind, x, w, weights, left=True)) == expected


def test_clipped_weights_keep_the_type_of_their_bytes(tmp_path):
    """Those from 0 to 127 can be signed ones, which saturate."""
    nodes = [node("Clip", "w low high", "v"), node("MatMulInteger", "x v zx zw", "y", "op")]
    constants = {**parameters("u8", "s8"), "w": np.int8([[127], [127]]), "low": np.int8(0), "high": np.int8(127)}
    made = model(nodes, {"x": (2, [2, 2])}, {"y": (6, None)}, constants)
    assert verdict(save(made, tmp_path)) == ("refuted", True)


def test_a_certificate_of_the_wrong_kernel_is_found(tmp_path):
    path = network(tmp_path, "QLinearConv", "u8", "s8", PAIR_OF_CHANNELS)
    claimed = certify_file(path, TARGETS["int32"])
    named = TARGETS["onnxruntime-avx2"]
    claimed = replace(claimed, target=named.name, assumes=named.assumes, bias=named.bias)
    assert disagreements(claimed, path) == ["op: its kernel adds stored codes in pairs"]
