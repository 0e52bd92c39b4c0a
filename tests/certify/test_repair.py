"""Repaired files: proven by both checkers, the same graph in the same format, and close to what they were."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as q

from accaware.certify.certificate import Certificate
from accaware.certify.files import certify_file
from accaware.certify.repair import ImpossibleError, repair_file
from accaware.certify.second import disagreements
from accaware.certify.targets import TARGETS, Target
from accaware.cli import run
from accaware.formats import Accumulator
from accaware.onnx.read import read
from accaware.onnx.write import File
from onnx_helpers import model, node, save
from onnx_networks import quantize

T = q.QuantType
AVX2 = TARGETS["avx2-u8s8"]


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def small():
    """Convolutions, a transposed one and a linear layer; few enough taps for 16 bits not to hurt."""
    nodes = [
        node("Conv", "x w1 b1", "c1", "first", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2", "depthwise", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=4),
        node("Relu", "c2", "r2"),
        node("Conv", "r2 w3 b3", "c3", "grouped", kernel_shape=[2, 2], strides=[2, 2], group=2),
        node("Relu", "c3", "r3"),
        node("GlobalAveragePool", "r3", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f w5 b5", "y", "head", transB=1),
    ]
    constants = {"w1": normal(4, 3, 3, 3), "b1": normal(4), "w2": normal(4, 1, 3, 3), "w3": normal(6, 2, 2, 2)}
    constants |= {"b3": normal(6), "w5": normal(5, 6), "b5": normal(5)}
    return model(nodes, {"x": [2, 3, 8, 8]}, {"y": [2, 5]}, constants)


def mlp():
    nodes = [
        node("MatMul", "x w1", "m1", "one"),
        node("Add", "m1 b1", "a1"),
        node("Relu", "a1", "r1"),
        node("MatMul", "r1 w2", "y", "two"),
    ]
    constants = {"w1": normal(7, 9), "b1": normal(9), "w2": normal(9, 3)}
    return model(nodes, {"x": [5, 7]}, {"y": [5, 3]}, constants)


NETWORKS = {"small": small, "mlp": mlp}


def quantized(network, folder, **options):
    path, shape = quantize(NETWORKS[network](), folder, np.random.default_rng(0), **options)
    return path, {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def outputs(path, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def distance(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


def changed_tensors(before, after) -> set[str]:
    """The names of the tensors in which two files differ; everything else must be the same."""
    left, right = onnx.load(before), onnx.load(after)
    names = set()

    def strip(made) -> bytes:
        for tensor in made.graph.initializer:
            tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
        for one in made.graph.node:
            for attribute in one.attribute:
                if one.op_type == "Constant" and attribute.name == "value":
                    attribute.t.CopyFrom(TensorProto(data_type=attribute.t.data_type, dims=attribute.t.dims))
        return made.SerializeToString(deterministic=True)

    values = [dict(all_tensors(made)) for made in (left, right)]
    for name in values[0].keys() | values[1].keys():
        a, b = values[0][name], values[1][name]
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not (a == b).all():
            names.add(name)
    assert strip(left) == strip(right)
    return names


def all_tensors(made) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in made.graph.initializer:
        yield tensor.name, numpy_helper.to_array(tensor)
    for one in made.graph.node:
        for attribute in one.attribute:
            if one.op_type == "Constant" and attribute.name == "value":
                yield one.output[0], numpy_helper.to_array(attribute.t)


def parameters(path) -> set[str]:
    """The tensors that a repair may change: what the weight and bias inputs of the products come from."""
    made = onnx.load(path)
    makers = {name: one for one in made.graph.node for name in one.output}
    products = {op.name for op in read(path).products}
    places = {"QLinearConv": (3, 4, 8), "QLinearMatMul": (3, 4), "QGemm": (3, 4, 6)}
    waiting = [
        one.input[i]
        for one in made.graph.node
        if {one.name, *one.output} & products
        for i in places.get(one.op_type, (1, 2))
        if i < len(one.input)
    ]
    found = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            maker = makers.get(name)
            zero_point = maker is not None and maker.op_type in ("QuantizeLinear", "DequantizeLinear")
            waiting += [] if maker is None else maker.input[: 2 if zero_point else None]
    return found


def repaired(path, target, near=0.05, feeds=None, **options):
    """Repair `path`, check everything that must be true of the result, and return what changed."""
    before = certify_file(path, target)
    out = path.with_name("out.onnx")
    done = repair_file(path, out, target, **options)
    assert not before.holds
    assert done.certificate.holds
    assert certify_file(out, target) == done.certificate
    assert disagreements(Certificate.from_json(done.certificate.to_json()), out) == []
    assert sorted(p.name for p in path.parent.iterdir() if p.name.startswith(".")) == []
    names = changed_tensors(path, out)
    assert names <= parameters(path) | {name for name in names if name.endswith("_scale") and "w" in name}
    assert names
    verdicts = {op.name: op.verdict for op in before.operations}
    for change in done.changes:
        assert (change.weights_changed > 0) == (verdicts[change.name] == "refuted"), change
        assert change.bits_after <= target.accumulator.bits
    if feeds is not None:
        assert distance(outputs(out, feeds), outputs(path, feeds)) < near
    old, new = ({op.name: op for op in read(p).products} for p in (path, out))
    for change in done.changes:
        a, b = (net[change.name].rows.centred().astype(int) for net in (old, new))
        assert change.weights_changed == (a != b).sum()
        assert (old[change.name].rows.zero_points == new[change.name].rows.zero_points).all()
        scales = [net[change.name].rows.scale for net in (old, new)]
        if scales[0] is not None and "Integer" not in change.kind:  # those have their scale behind them
            real = [w * s[:, None] for w, s in zip((a, b), scales, strict=True)]
            assert change.error == pytest.approx(distance(real[1], real[0]), rel=1e-3, abs=1e-12)
    return done, names


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize(
    ("acts", "weights"), [(T.QUInt8, T.QInt8), (T.QInt8, T.QInt8), (T.QUInt8, T.QUInt8)], ids=lambda t: t.name
)
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("network", NETWORKS)
def test_files_of_static_quantization(network, form, acts, weights, per_channel, tmp_path) -> None:
    options = {"quant_format": q.QuantFormat[form], "per_channel": per_channel}
    path, feeds = quantized(network, tmp_path, activation_type=acts, weight_type=weights, **options)
    done, names = repaired(path, TARGETS["int16"], 0.1, feeds)
    assert any(change.scales for change in done.changes)
    assert any("scale" in name for name in names)
    if network == "small":
        assert any(name.startswith("b") for name in names)
    if weights is T.QInt8 and acts is T.QUInt8:
        repaired(path, AVX2, 1e-3, feeds)


def test_channels_that_are_safe_keep_their_weights_and_scales(tmp_path) -> None:
    path, feeds = quantized(
        "small", tmp_path, quant_format=q.QuantFormat.QOperator, per_channel=True, activation_type=T.QUInt8
    )
    done, _ = repaired(path, AVX2, 1e-3, feeds)
    certificate = certify_file(path, AVX2)
    old, new = ({op.name: op for op in read(p).products} for p in (path, path.with_name("out.onnx")))
    safe_rows = 0
    for op in certificate.inside:
        safe = np.array([bits <= 16 for bits in op.row_bits])
        safe_rows += safe.sum()
        a, b = old[op.name], new[op.name]
        assert (a.rows.raw()[safe] == b.rows.raw()[safe]).all()
        assert (a.rows.scale[safe] == b.rows.scale[safe]).all()
        if a.bias is not None:
            assert (a.bias[safe] == b.bias[safe]).all()
        change = next(c for c in done.changes if c.name == op.name)
        assert (change.rows, change.broken) == (len(safe), (~safe).sum())
    assert safe_rows


def test_integer_biases_follow_their_scale(tmp_path) -> None:
    for form in (q.QuantFormat.QOperator, q.QuantFormat.QDQ):
        path, feeds = quantized("small", tmp_path, quant_format=form, per_channel=True, activation_type=T.QUInt8)
        repaired(path, TARGETS["int16"], 0.1, feeds)
        old, new = ({op.name: op for op in read(p).products} for p in (path, path.with_name("out.onnx")))
        (name,) = (n for n in old if n.startswith("first"))
        units = [net[name].rows.scale * net[name].act_scale for net in (old, new)]
        assert (units[0] != units[1]).any()
        assert new[name].bias is not None  # the reader knows its unit
        assert np.abs(new[name].bias * units[1] - old[name].bias * units[0]).max() <= units[1].max()


def test_scales_stay_on_request(tmp_path) -> None:
    path, feeds = quantized("small", tmp_path, quant_format=q.QuantFormat.QDQ, activation_type=T.QUInt8)
    done, names = repaired(path, AVX2, 0.05, feeds, rescale=False)
    assert not any(change.scales for change in done.changes)
    assert all(name.endswith("_quantized") and "bias" not in name for name in names)


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("network", NETWORKS)
def test_files_of_dynamic_quantization(network, per_channel, tmp_path) -> None:
    """Any zero point; raw codes are the same for all of them. The scale is one of the output."""
    path, feeds = quantized(network, tmp_path, weight_type=T.QInt8, per_channel=per_channel, dynamic=True)
    done, names = repaired(path, AVX2, 2e-3, feeds)
    assert sum("scale" in name for name in names) == sum(change.scales > 0 for change in done.changes) > 0
    repaired(path, Target("int17", Accumulator(17)), 0.02, feeds)


def test_four_bit_weights_stay_in_their_type(tmp_path) -> None:
    options = {"quant_format": q.QuantFormat.QDQ, "extra_options": {"UseQDQContribOps": True}}
    path, _ = quantized("mlp", tmp_path, activation_type=T.QInt8, weight_type=T.QInt4, **options)
    repaired(path, Target("int12", Accumulator(12)))
    codes = [op.rows.raw() for op in read(path.with_name("out.onnx")).products]
    assert all(c.min() >= -8 and c.max() <= 7 for c in codes)


def test_the_error_counts_as_much_as_the_data_say(tmp_path) -> None:
    path, feeds = quantized("mlp", tmp_path, quant_format=q.QuantFormat.QDQ, activation_type=T.QUInt8)
    power = {"one": np.array([1e4, 1, 1, 1, 1, 1, 1.0]), "two": np.ones(9)}
    repaired(path, Target("int15", Accumulator(15)), 10, feeds, rescale=False)
    old, first = (read(p).products[0].rows for p in (path, path.with_name("out.onnx")))
    repaired(path, Target("int15", Accumulator(15)), 10, feeds, power=power, rescale=False)
    second = read(path.with_name("out.onnx")).products[0].rows
    wrong = [np.abs(r.centred() * r.scale[:, None] - old.centred() * old.scale[:, None])[:, 0] for r in (first, second)]
    assert wrong[1].sum() < 0.2 * wrong[0].sum()


# Files of Brevitas, and by hand.


@pytest.mark.parametrize("dialect", ["qcdq", "qonnx"])
def test_files_of_brevitas(dialect, tmp_path) -> None:
    import torch

    pytest.importorskip("onnxoptimizer")
    qnn, export, quant = (pytest.importorskip(f"brevitas.{name}") for name in ("nn", "export", "quant"))
    torch.manual_seed(0)
    each = quant.Int8WeightPerChannelFloat
    net = torch.nn.Sequential(
        qnn.QuantIdentity(bit_width=4, act_quant=quant.Int8ActPerTensorFloat, return_quant_tensor=True),
        qnn.QuantConv2d(3, 4, 3, padding=1, weight_bit_width=4, weight_quant=each, bias=True),
        qnn.QuantReLU(bit_width=4, return_quant_tensor=True),
        qnn.QuantConvTranspose2d(4, 2, 3, stride=2, weight_bit_width=5, bias=False, weight_quant=each),
        qnn.QuantReLU(bit_width=4, act_quant=quant.Uint8ActPerTensorFloat, return_quant_tensor=True),
        qnn.QuantConv2d(2, 4, 3, groups=2, weight_bit_width=3, bias=False),
    )
    net.train()
    net(torch.randn(8, 3, 8, 8))
    path = tmp_path / "net.onnx"
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and Brevitas' own
        write = export.export_onnx_qcdq if dialect == "qcdq" else export.export_qonnx
        write(net.eval(), torch.randn(2, 3, 8, 8), path)
    logging.disable(logging.NOTSET)
    made = onnx.load(path)
    feeds = {made.graph.input[0].name: np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    done, _ = repaired(path, Target("int9", Accumulator(9)), 0.2, feeds if dialect == "qcdq" else None)
    assert any(change.scales for change in done.changes)


def integer_matmul(weights, *more, name="net.onnx", folder, **constants):
    """x, uint8, times int8 weights; nodes and constants beside."""
    constants = {"w": weights, "z": np.uint8(0), **constants}
    nodes = [node("MatMulInteger", "x w z", "y", "product"), *more]
    wide = {"y": (TensorProto.INT32, ["n", "m"])}
    return save(model(nodes, {"x": (TensorProto.UINT8, ["n", len(weights)])}, wide, constants), folder, name)


FULL = np.full((4, 2), 127, np.int8)


@pytest.mark.parametrize("rounding", ["ROUND", "FLOOR", "CEIL", "UP", "DOWN", "HALF_DOWN"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])  # scale times code is rounded in halves
def test_floats_that_a_quantizer_rounds_its_own_way(rounding, dtype, tmp_path) -> None:
    """Unchanged floats stay; the others are those that become the new codes."""
    weights = (normal(6, 4) * 2).astype(dtype)
    nodes = [
        helper.make_node(
            "Quant",
            ["w", "s", "z", "b"],
            ["wq"],
            domain="qonnx.custom_op.general",
            rounding_mode=rounding,
            signed=1,
            narrow=0,
        ),
        node("MatMul", "x wq", "y", "product"),
    ]
    constants = {"w": weights, "s": np.float32(0.3), "z": np.float32(0), "b": np.float32(5)}
    made = model(nodes, {"x": ["n", 6]}, {"y": ["n", 4]}, constants, extra=[("qonnx.custom_op.general", 1)])
    path = save(made, tmp_path)
    target, given = Target("int8", Accumulator(8)), ["x=uint4"]
    done = repair_file(path, tmp_path / "out.onnx", target, given, rescale=False)
    assert done.certificate.holds
    before, after = (read(p, dict.fromkeys([])) and File(p).array("w") for p in (path, tmp_path / "out.onnx"))
    assert (before != after).sum() == done.changes[0].weights_changed > 0


def test_weights_behind_moves_go_back_to_their_tensor(tmp_path) -> None:
    weights = np.random.default_rng(0).integers(-128, 128, (6, 8)).astype(np.int8)
    nodes = [
        node("Transpose", "w", "t", perm=[1, 0]),
        node("DequantizeLinear", "t s", "d"),
        node("Reshape", "d shape", "r"),
        node("DequantizeLinear", "x sx", "xd"),
        node("MatMul", "xd r", "y", "product"),
    ]
    constants = {"w": weights, "s": np.float32(0.1), "sx": np.float32(0.5), "shape": np.array([16, 3])}
    made = model(nodes, {"x": (TensorProto.UINT8, ["n", 16])}, {"y": ["n", 3]}, constants)
    path = save(made, tmp_path)
    feeds = {"x": np.random.default_rng(1).integers(0, 256, (5, 16), np.uint8)}
    _, names = repaired(path, TARGETS["int16"], 0.1, feeds)
    assert names == {"w", "s"}


def test_a_scale_that_is_used_elsewhere_stays(tmp_path) -> None:
    nodes = [
        node("DequantizeLinear", "x s", "xd"),
        node("DequantizeLinear", "w s", "d"),
        node("MatMul", "xd d", "y", "product"),
    ]
    made = model(nodes, {"x": (TensorProto.UINT8, ["n", 4])}, {"y": ["n", 2]}, {"w": FULL, "s": np.float32(0.1)})
    _, names = repaired(save(made, tmp_path), AVX2)
    assert names == {"w"}


def test_shared_weights_satisfy_both_operations(tmp_path) -> None:
    nodes = [
        node("DequantizeLinear", "w s", "d"),
        *(node("DequantizeLinear", f"{x} sx", f"{x}d") for x in "xu"),
        *(node("MatMul", f"{x}d d", f"{y}", y) for x, y in ("xy", "uv")),
    ]
    rows = np.random.default_rng(0).integers(-128, 128, (8, 5)).astype(np.int8)
    constants = {"w": rows, "s": np.float32(0.1), "sx": np.float32(0.5)}
    ends = {"x": (TensorProto.UINT8, ["n", 8]), "u": (TensorProto.INT8, ["n", 8])}
    made = model(nodes, ends, {"y": ["n", 5], "v": ["n", 5]}, constants)
    done, names = repaired(save(made, tmp_path), TARGETS["int16"])
    assert names == {"w"}
    assert len(done.changes) == 2


@pytest.mark.parametrize(
    ("left", "x", "w", "scale", "changes"),
    [
        (True, [4, 3], [4, 4], [4], False),  # a number for each column of the output, which are no rows of weights
        (True, [4], [4, 4], [4, 1], False),  # as many outputs of every row
        (True, [4, 3], [4, 4], [1], True),
        (False, [3, 4], [4, 4], [4], True),
        (False, [2, 3, 4], [2, 4, 1], [2], False),
    ],
)
def test_only_a_scale_of_the_rows_changes_with_them(left, x, w, scale, changes, tmp_path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(-9, 9, w).astype(np.int8)
    weights[0] = 127
    nodes = [
        node("MatMulInteger", "w x" if left else "x w", "y", "product"),
        node("Cast", "y", "f", to=TensorProto.FLOAT),
        node("Mul", "f w_scale", "z"),
    ]
    constants = {"w": weights, "w_scale": np.logspace(0, 3, scale[0], dtype=np.float32).reshape(scale)}
    path = save(model(nodes, {"x": (TensorProto.UINT8, x)}, {"z": None}, constants), tmp_path)
    assert repair_file(path, tmp_path / "out.onnx", Target("int13", Accumulator(13))).certificate.holds
    assert changed_tensors(path, tmp_path / "out.onnx") == ({"w", "w_scale"} if changes else {"w"})


@pytest.mark.parametrize(("x", "w", "scale"), [([1, 2, 6], [2, 2, 1], [2, 1]), ([1, 2, 6, 6], [2, 2, 1, 1], [2, 1, 1])])
def test_scales_behind_convolutions_of_any_dimensions(x, w, scale, tmp_path) -> None:
    for shape in ([2, 1], [2, 1, 1]):
        nodes = [
            node("ConvInteger", "x w", "y", "product"),
            node("Cast", "y", "f", to=TensorProto.FLOAT),
            node("Mul", "f w_scale", "z"),
        ]
        constants = {
            "w": np.array([127, 127, 3, 4], np.int8).reshape(w),
            "w_scale": np.float32([1, 100]).reshape(shape),
        }
        path = save(model(nodes, {"x": (TensorProto.UINT8, x)}, {"z": None}, constants), tmp_path)
        _, names = repaired(path, Target("int15", Accumulator(15)))
        assert names == ({"w", "w_scale"} if shape == scale else {"w"})


def impossible(path, target, message, **options):
    """The repair is refused, and nothing is written or left behind."""
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(ImpossibleError, match=message):
        repair_file(path, path.with_name("out.onnx"), target, **options)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_what_cannot_be_repaired_is_named(tmp_path) -> None:
    impossible(save(mlp(), tmp_path), AVX2, "2 operations are unproven: one .*are floats.*two")
    path = integer_matmul(FULL, folder=tmp_path)
    impossible(path, Target("int8", Accumulator(8)), "product: row 0 has no budget for weights other than 0")
    path = integer_matmul(FULL, node("Cast", "w", "c", "spy", to=TensorProto.FLOAT), folder=tmp_path)
    impossible(path, AVX2, "product: its weights 'w' are also what Cast 'spy' uses")
    path = integer_matmul(FULL, node("Gather", "w i", "c", "spy"), folder=tmp_path, i=np.array([0]))
    impossible(path, AVX2, "product: its weights 'w' are also what Gather 'spy' uses")
    path = integer_matmul(FULL, node("Gather", "w i", "c", "two\nlines"), folder=tmp_path, i=np.array([0]))
    impossible(path, AVX2, r"also what Gather 'two\\nlines' uses$")
    both = [node("DequantizeLinear", f"{n} s", f"{n}d") for n in "xw"] + [node("Gemm", "xd wd wd", "y", "product")]
    made = model(both, {"x": (TensorProto.UINT8, [1, 1])}, {"y": None}, {"w": FULL[:1], "s": np.float32(0.1)})
    message = "product: its weights 'w' are also what Gemm 'product' uses"
    impossible(save(made, tmp_path), Target("int12", Accumulator(12)), message)
    ends = [helper.make_tensor_value_info(n, TensorProto.INT8, [4, 2]) for n in "ab"]
    bodies = [helper.make_graph([node("Identity", "w", end.name)], end.name, [], [end]) for end in ends]
    branch = helper.make_node("If", ["c"], ["v"], then_branch=bodies[0], else_branch=bodies[1])
    path = integer_matmul(FULL, branch, folder=tmp_path, c=np.array(True))
    impossible(path, AVX2, "product: its weights 'w' are also what graph output '[ab]' uses")
    square = np.full((4, 4), 127, np.int8)
    turned = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMulInteger", "x t z", "v", "other")]
    impossible(
        integer_matmul(square, *turned, folder=tmp_path), AVX2, "product and other share the weights 'w', in dif"
    )
    nodes = [node("Relu", "x", "y")]
    impossible(save(model(nodes, {"x": [1]}, {"y": [1]}), tmp_path), AVX2, "no operation multiplies")


def test_bipolar_weights_cannot_become_0(tmp_path) -> None:
    nodes = [
        helper.make_node("BipolarQuant", ["w", "s"], ["wq"], domain="qonnx.custom_op.general"),
        node("MatMul", "x wq", "y", "product"),
    ]
    constants = {"w": normal(6, 4), "s": np.float32(0.3)}
    made = model(nodes, {"x": ["n", 6]}, {"y": ["n", 4]}, constants, extra=[("qonnx.custom_op.general", 1)])
    impossible(save(made, tmp_path), Target("int6", Accumulator(6)), "product: no values of", inputs=["x=uint4"])


def test_a_file_that_is_proven_already_is_copied(tmp_path) -> None:
    path = integer_matmul(FULL, folder=tmp_path)
    done = repair_file(path, tmp_path / "out.onnx", TARGETS["int32"])
    assert changed_tensors(path, tmp_path / "out.onnx") == set()
    assert [change.weights_changed for change in done.changes] == [0]


# The file that is written, and the command.


def test_external_data(tmp_path, monkeypatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    weights = np.random.default_rng(0).integers(-128, 128, (64, 40)).astype(np.int8)
    path = integer_matmul(weights, folder=tmp_path / "in")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)
    repair_file(path, tmp_path / "out" / "one.onnx", AVX2)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one.onnx"]
    monkeypatch.setattr("accaware.onnx.write._LARGEST", 1000)
    for name in ("two.onnx", "two.onnx"):  # twice: what is there is replaced
        done = repair_file(path, tmp_path / "out" / name, AVX2)
    assert len(list((tmp_path / "out").iterdir())) == 3
    for name in ("one.onnx", "two.onnx"):
        assert certify_file(tmp_path / "out" / name, AVX2).holds
    assert certify_file(tmp_path / "out" / "two.onnx", AVX2) == done.certificate
    one, two = (read(tmp_path / "out" / name).products[0].rows.raw() for name in ("one.onnx", "two.onnx"))
    assert (one == two).all()


def test_nothing_is_written_without_a_proof(tmp_path, monkeypatch) -> None:
    path = integer_matmul(FULL, folder=tmp_path)
    monkeypatch.setattr("accaware.certify.repair.certify_file", lambda *_: certify_file(path, AVX2))
    impossible(path, AVX2, "no proof of the repaired product")


def fails(words, capsys, code=2):
    capsys.readouterr()
    assert run(words) == code
    out, err = capsys.readouterr()
    message = err if code == 2 else out
    assert message.count("\n") == 1
    return message


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    path, feeds = quantized("small", tmp_path, quant_format=q.QuantFormat.QOperator, activation_type=T.QUInt8)
    out, certificate = tmp_path / "out.onnx", tmp_path / "cert.json"
    np.savez(tmp_path / "data.npz", **feeds)
    words = ["repair", str(path), "--target", "avx2-u8s8", "-o", str(out)]
    assert run([*words, "--json", str(certificate), "--data", str(tmp_path / "data.npz")]) == 0
    printed = capsys.readouterr().out
    assert "depthwise_quant: " in printed
    assert "relative squared error" in printed
    assert printed.endswith(f"{out}: every operation is proven for avx2-u8s8\n")
    assert run(["check", str(certificate), str(out)]) == 0
    assert run(["certify", str(out), "--target", "avx2-u8s8"]) == 0
    assert run(["repair", str(path), "--acc-bits", "18", "--acc-bits", "head*=16", "-o", str(out)]) == 0
    assert run(["certify", str(out), "--acc-bits", "18"]) == 0
    out.unlink()
    assert fails(["repair", str(path), "--acc-bits", "7", "-o", str(out)], capsys, 1).startswith(
        "repair is impossible: "
    )
    np.savez(tmp_path / "other.npz", y=feeds["x"])
    np.savez(tmp_path / "wrong.npz", x=feeds["x"][:, :1])
    (tmp_path / "no.npz").write_bytes(b"PK no")
    for name, message in {
        "missing.npz": "missing.npz: No such file",
        "other.npz": "there is no array 'x'; the graph has inputs x",
        "wrong.npz": "onnxruntime cannot run",
        "no.npz": "no .npz file of arrays",
    }.items():
        assert message in fails([*words, "--data", str(tmp_path / name)], capsys)
    assert "x.onnx: No such file" in fails(["repair", "x.onnx", "-o", str(out)], capsys)
    assert "is a folder" in fails([*words[:-1], str(tmp_path)], capsys)
    assert "nowhere: no such folder" in fails([*words[:-1], str(tmp_path / "nowhere" / "out.onnx")], capsys)
    assert "unknown target" in fails(["repair", str(path), "--target", "bogus", "-o", str(out)], capsys)
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert os.path.exists(path)
    assert "torch" in sys.modules
