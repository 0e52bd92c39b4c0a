"""QONNX files in the tools of FINN: their own clean-up, inference of types, and the width that they find."""

from __future__ import annotations

import math

import numpy as np
import pytest

import accaware as aa
from accaware.certify.files import certify_file, file_layers
from accaware.certify.targets import TARGETS
from accaware.integer.network import integer_network
from exporter.helpers import operands, prepared

pytest.importorskip("onnxscript")
pytest.importorskip("qonnx")


def finn_width(rows, type_):
    """The register for integer rows [R, K] and inputs of a type of qonnx, as FINN's MinimizeAccumulatorWidth sizes it:
    the worst case of the whole matrix, and the narrowest type for that."""
    from qonnx.util.basic import calculate_matvec_accumulator_range

    lo, hi = calculate_matvec_accumulator_range(rows.T, type_)
    return math.ceil(math.log2(hi + 1)) if lo >= 0 else math.ceil(math.log2(max(-lo, hi + 1)) + 1)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("name", ["mobile", "residual"])
def test_finn_finds_registers_no_wider(name, bits, tmp_path, monkeypatch) -> None:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul
    from qonnx.util.cleanup import cleanup

    monkeypatch.setattr("onnx.IR_VERSION", 10)  # of the models of one node that qonnx runs, which onnxruntime must know
    model, x = prepared(name, acc_bits=bits)
    paths = tmp_path / "net.onnx", tmp_path / "clean.onnx"
    aa.export(model, paths[0], "qonnx", sample=x[:2])
    cleanup(str(paths[0]), out_file=str(paths[1]), override_inpsize=str(tuple(x.shape)))
    clean = ModelWrapper(str(paths[1])).transform(InferShapes()).transform(InferDataTypes())
    values = execute_onnx(clean, {clean.graph.input[0].name: x.numpy()}, return_full_exec_context=True)
    out, _ = operands(integer_network(model, x), x)
    assert np.allclose(values[clean.graph.output[0].name], out, rtol=1e-5, atol=1e-5)

    certified = {op.name: op for op in certify_file(paths[0]).inside}
    layers = list(file_layers(paths[0]))
    products = [node for node in clean.graph.node if node.op_type in ("Conv", "MatMul")]
    assert len(products) == len(layers) == len(certified)
    for node, layer in zip(products, layers, strict=True):
        weights = values[node.input[1]]
        rows = weights.T if node.op_type == "MatMul" else weights.reshape(len(weights), -1)
        assert np.array_equal(rows, layer.rows)
        type_ = clean.get_tensor_datatype(node.input[0])
        assert (type_.min(), type_.max()) == (layer.codes.lo, layer.codes.hi)
        width = finn_width(rows, type_)
        assert width == certified[layer.name].bits_needed
        assert width <= bits
    assert max(op.bits_needed for op in certified.values()) >= 10  # else there is nothing to keep within

    if name == "residual":  # qonnx lowers no groups but those of depthwise layers
        lowered = clean.transform(LowerConvsToMatMul())
        assert not lowered.get_nodes_by_op_type("Conv")


def test_the_clean_file_is_certified_by_width(tmp_path) -> None:
    """qonnx renames the nodes, so the registers in the metadata are nobody's; what the user states is proven."""
    from qonnx.util.cleanup import cleanup

    model, x = prepared("linear", acc_bits=10)
    aa.export(model, tmp_path / "net.onnx", "qonnx", sample=x[:2])
    cleanup(str(tmp_path / "net.onnx"), out_file=str(tmp_path / "clean.onnx"))
    with pytest.raises(ValueError, match="carries a register for '0', an operation that it does not have"):
        certify_file(tmp_path / "clean.onnx")
    before = certify_file(tmp_path / "net.onnx")
    after = certify_file(tmp_path / "clean.onnx", TARGETS["int32"].with_bits(10))
    assert after.holds
    assert [(op.lo, op.hi) for op in after.inside] == [(op.lo, op.hi) for op in before.inside]
