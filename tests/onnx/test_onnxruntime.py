"""Files that onnxruntime.quantization writes: QDQ, QOperator and dynamic."""

from __future__ import annotations

import pytest
from onnxruntime import quantization as q

from accaware.onnx.read import Other, Product, read
from onnx_helpers import check_sums, save
from onnx_networks import LAYERS, NETWORKS, quantized, residual

T = q.QuantType


def products(network):
    return {op.name.removesuffix("_quant"): op for op in network.operations if isinstance(op, Product)}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("acts", "weights"),
    [(T.QUInt8, T.QInt8), (T.QUInt8, T.QUInt8), (T.QInt8, T.QInt8), (T.QUInt16, T.QInt16), (T.QInt8, T.QInt4)],
    ids=lambda t: t.name,
)
@pytest.mark.parametrize("network", NETWORKS)
def test_qdq(network, acts, weights, per_channel, tmp_path) -> None:
    options = {"quant_format": q.QuantFormat.QDQ, "per_channel": per_channel}
    if T.QUInt16 in (acts, weights) or weights is T.QInt4:
        options["extra_options"] = {"UseQDQContribOps": True}
    made, path, feeds = quantized(network, tmp_path, activation_type=acts, weight_type=weights, **options)
    read_ = read(path)
    found = products(read_)
    assert list(found) == LAYERS[network]
    assert all(op.dialect == "qdq" for op in found.values())
    assert read_.unproven == ()
    if weights is T.QInt4 and network == "mlp":
        assert found["one"].rows.codes.lo == -8
    check_sums(made, read_, feeds)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("acts", "weights"), [(T.QUInt8, T.QInt8), (T.QUInt8, T.QUInt8), (T.QInt8, T.QInt8)], ids=lambda t: t.name
)
@pytest.mark.parametrize("network", ["residual", "mlp"])
def test_qoperator(network, acts, weights, per_channel, tmp_path) -> None:
    made, path, feeds = quantized(
        network,
        tmp_path,
        activation_type=acts,
        weight_type=weights,
        quant_format=q.QuantFormat.QOperator,
        per_channel=per_channel,
    )
    read_ = read(path)
    found = products(read_)
    assert list(found) == LAYERS[network]
    assert {op.kind for op in found.values()} <= {"QLinearConv", "QLinearMatMul", "QGemm"}
    assert read_.unproven == ()
    check_sums(made, read_, feeds)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weights", [T.QInt8, T.QUInt8])
@pytest.mark.parametrize("network", ["residual", "mlp"])
def test_dynamic(network, weights, per_channel, tmp_path) -> None:
    made, path, feeds = quantized(network, tmp_path, weight_type=weights, per_channel=per_channel, dynamic=True)
    read_ = read(path)
    found = list(read_.products)
    assert len(found) == len(LAYERS[network])
    assert all(op.dynamic and op.zero_point is None for op in found)
    assert all((op.codes.lo, op.codes.hi) == (0, 255) for op in found)
    assert all((op.zero_range.lo, op.zero_range.hi) == (0, 255) for op in found)
    check_sums(made, read_, feeds)


def test_the_other_sums_of_a_residual_network(tmp_path) -> None:
    _, path, _ = quantized("residual", tmp_path, quant_format=q.QuantFormat.QDQ)
    others = {op.name: op for op in read(path).others}
    assert others["add"].kind == "Add"
    assert others["add"].terms == 2
    assert others["pool"].kind == "GlobalAveragePool"


def test_a_float_network_is_unproven(tmp_path) -> None:
    for name, build in NETWORKS.items():
        network = read(save(build(), tmp_path))
        assert network.products == ()
        assert [op.name for op in network.unproven] == LAYERS[name]
        assert all("are floats" in op.reason for op in network.unproven)
    assert isinstance(read(save(residual(), tmp_path)).others[0], Other)
