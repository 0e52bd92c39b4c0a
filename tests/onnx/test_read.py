"""Files made by hand: every way to write weights, how ranges pass through, and what must be listed as unproven."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from accaware.formats import IntFormat
from accaware.onnx.facts import Codes
from accaware.onnx.read import Other, Unproven, parse_input, read
from onnx_helpers import check_sums, model, node, only, read_model, run, run_qonnx, save, tensor

RNG = np.random.default_rng(1)
INT4 = TensorProto.INT4 if hasattr(TensorProto, "INT4") else None
QONNX = ["qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general"]


def scalar(value, dtype=np.float32):
    return np.asarray(value, dtype)


GRID = {"s": scalar(0.5), "z": scalar(3, np.uint8), "ws": scalar(0.25)}


def quantized(x="x", out="d"):
    return [node("QuantizeLinear", f"{x} s z", f"{x}_q"), node("DequantizeLinear", f"{x}_q s z", out)]


def ints(*shape, lo=-8, hi=7, dtype=np.int8):
    return RNG.integers(lo, hi + 1, shape, dtype)


def qdq(weights, nodes, shape, opset=21, **constants):
    """A model x -> Q -> DQ -> d -> nodes -> y, with weights w."""
    return model([*quantized(), *nodes], {"x": shape}, {"y": None}, {**GRID, "w": weights, **constants}, opset)


def feeds(shape):
    return {"x": (3 * RNG.normal(size=shape)).astype(np.float32)}


DQ = node("DequantizeLinear", "w ws", "f")
WEIGHTS = {
    "plain": (ints(6, 4), [DQ, node("MatMul", "d f", "y")], {}),
    "transposed": (ints(4, 6), [DQ, node("Transpose", "f", "t"), node("MatMul", "d t", "y")], {}),
    "reshaped": (ints(24), [DQ, node("Reshape", "f to", "t"), node("MatMul", "d t", "y")], {"to": np.array([6, -1])}),
    "gemm": (ints(4, 6), [DQ, node("Gemm", "d f", "y", transB=1, alpha=2.0)], {}),
    "not folded": (
        RNG.normal(size=(6, 4)).astype(np.float32),
        [node("QuantizeLinear", "w ws i", "q"), node("DequantizeLinear", "q ws i", "f"), node("MatMul", "d f", "y")],
        {"i": scalar(-2, np.int8)},
    ),
    "per channel": (
        ints(6, 4),
        [node("DequantizeLinear", "w wc", "f", axis=1), node("MatMul", "d f", "y")],
        {"wc": np.array([1, 2, 4, 8], np.float32)},
    ),
    "per channel, transposed": (
        ints(4, 6, dtype=np.uint8, lo=0),
        [
            node("DequantizeLinear", "w wc wz", "f", axis=0),
            node("Transpose", "f", "t", perm=[1, 0]),
            node("MatMul", "d t", "y"),
        ],
        {"wc": np.array([1, 2, 4, 8], np.float32), "wz": np.array([1, 2, 3, 4], np.uint8)},
    ),
    "per channel, reshaped": (
        ints(6, 2, 2),
        [
            node("DequantizeLinear", "w wc", "f", axis=0),
            node("Reshape", "f to", "t"),
            node("Transpose", "t", "u"),
            node("Unsqueeze", "u ax", "v"),
            node("Squeeze", "v ax", "r"),
            node("Gemm", "d4 r", "y"),
        ],
        {"wc": np.array([1, 2, 4, 8, 16, 32], np.float32), "to": np.array([6, 4]), "ax": np.array([0])},
    ),
    "cast and scaled": (
        ints(6, 4),
        [node("Cast", "w", "c", to=1), node("Sub", "c n", "e"), node("Mul", "e wc", "f"), node("MatMul", "d f", "y")],
        {"wc": np.array([[1, 2, 4, 8]], np.float32), "n": scalar(3)},
    ),
    "batched": (ints(2, 6, 4), [DQ, node("MatMul", "d f", "y")], {}),
    "16 bits": (ints(6, 4, lo=-3000, hi=3000, dtype=np.int16), [DQ, node("MatMul", "d f", "y")], {}),
}


@pytest.mark.parametrize("way", WEIGHTS)
def test_weights_of_qdq(way, tmp_path) -> None:
    weights, nodes, constants = WEIGHTS[way]
    shape = [5, 6]
    if way == "per channel, reshaped":
        shape = [5, 4]
        nodes = [node("Identity", "d", "d4"), *nodes]
    made = qdq(weights, nodes, shape, **constants)
    network = read_model(made, tmp_path)
    product = only(network)
    assert product.dialect == "qdq"
    assert (product.codes, product.zero_point) == (IntFormat(0, 255), 3)
    assert product.rows.raw().dtype.itemsize <= 2
    if way != "batched":  # whose outputs have one more dimension than rows
        check_sums(made, network, feeds(shape))
    else:
        assert (product.rows.raw() == weights.swapaxes(1, 2).reshape(8, 6)).all()
    new = RNG.integers(0, 8, product.rows.raw().shape, np.int8)
    restored = product.rows.restore(new)
    assert restored.shape == weights.shape
    assert sorted(restored.ravel()) == sorted(new.ravel())


@pytest.mark.skipif(INT4 is None, reason="this onnx has no int4")
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
def test_four_bit_weights(kind, raw, tmp_path) -> None:
    lo, hi = (-8, 7) if kind == "INT4" else (0, 15)
    values = ints(5, 3, lo=lo, hi=hi, dtype=np.int64)
    packed = helper.make_tensor("w", getattr(TensorProto, kind), [5, 3], values.ravel().tolist())
    if raw:
        data = bytes(packed.int32_data)
        del packed.int32_data[:]
        packed.raw_data = data
    made = qdq(packed, [node("DequantizeLinear", "w ws", "f"), node("MatMul", "d f", "y")], [2, 5])
    product = only(read_model(made, tmp_path))
    assert product.rows.codes == IntFormat(lo, hi)
    assert (product.rows.raw() == values.T).all()


def test_blocked_scales_are_unproven(tmp_path) -> None:
    nodes = [node("DequantizeLinear", "w wc", "f", axis=0, block_size=3), node("MatMul", "d f", "y")]
    made = qdq(ints(6, 4), nodes, [5, 6], wc=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32))
    (op,) = read_model(made, tmp_path).unproven
    assert "several scales" in op.reason


def test_a_scale_for_each_tap_is_unproven(tmp_path) -> None:
    nodes = [node("DequantizeLinear", "w wc", "f", axis=0), node("MatMul", "d f", "y")]
    made = qdq(ints(6, 4), nodes, [5, 6], wc=np.arange(1, 7, dtype=np.float32))
    (op,) = read_model(made, tmp_path).unproven
    assert "different scales" in op.reason


@pytest.mark.parametrize("order", ["chw", "hwc"])
@pytest.mark.parametrize("zero", [0, 5])
def test_the_order_of_taps(order, zero, tmp_path) -> None:
    weights = ints(4, 3, 2, 2, lo=0, dtype=np.uint8)
    nodes = [node("DequantizeLinear", "w ws wz", "f"), node("Conv", "d f", "y")]
    product = only(read_model(qdq(weights, nodes, [1, 3, 4, 4], wz=scalar(zero, np.uint8)), tmp_path))
    taps = weights if order == "chw" else weights.transpose(0, 2, 3, 1)
    assert (product.rows.raw(order) == taps.reshape(4, 12)).all()
    assert (product.rows.centred(order) == taps.reshape(4, 12).astype(int) - zero).all()
    assert (product.rows.restore(product.rows.raw(order), order) == weights).all()


def phase_taps(size, stride, dilation):
    """By definition: which taps an output far from the borders sums, one set for each residue."""
    found = {}
    for k in range(size):
        found.setdefault(k * dilation % stride, []).append(k)
    return [found[r] for r in sorted(found)]


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 2, 1), (2, 2, 1), (1, 3, 2), (4, 2, 1), (1, 5, 1)])
def test_transposed_convolutions(groups, stride, dilation, tmp_path) -> None:
    weights = ints(4, 3, 3, 3)
    attributes = {"group": groups, "strides": [stride, stride], "dilations": [dilation, dilation]}
    nodes = [node("DequantizeLinear", "w wc wz", "f", axis=1), node("ConvTranspose", "d f", "y", **attributes)]
    constants = {"wc": np.array([1, 2, 4], np.float32), "wz": np.array([2, 2, 2], np.int8)}
    made = qdq(weights, nodes, [2, 4, 5, 5], **constants)
    network = read_model(made, tmp_path)
    product = only(network)
    check_sums(made, network, feeds([2, 4, 5, 5]))
    taps = phase_taps(3, stride, dilation)
    wanted = []
    for o in range(3 * groups):
        channels = range(o // 3 * (4 // groups), (o // 3 + 1) * (4 // groups))
        for rows in taps:
            for cols in taps:
                wanted.append([weights[c, o % 3, i, j] - 2 for c in channels for i in rows for j in cols])
    longest = max(map(len, wanted))
    assert (product.rows.centred() == [row + [0] * (longest - len(row)) for row in wanted]).all()
    assert product.rows.fan_in == longest
    assert (product.rows.restore(product.rows.raw("hwc"), "hwc") == weights).all()
    assert product.padded


def test_biases(tmp_path) -> None:
    def bias(scale):
        nodes = [DQ, node("DequantizeLinear", "b bs", "bf"), node("Conv", "d f bf", "y")]
        made = qdq(ints(2, 3, 1, 1), nodes, [1, 3, 4, 4], b=np.array([1000, -7], np.int32), bs=scalar(scale))
        return made, read_model(made, tmp_path)

    made, network = bias(0.125)  # 0.5 * 0.25
    assert only(network).bias.tolist() == [1000, -7]
    check_sums(made, network, feeds([1, 3, 4, 4]))
    assert only(bias(0.25)[1]).bias is None
    assert "scale" in only(bias(0.25)[1]).note


# How ranges pass through.

PASSED = {
    "relu": ([node("Relu", "d", "e")], (3, 255)),
    "clip": ([node("Clip", "d lo hi", "e")], (1, 9)),
    "pool": ([node("MaxPool", "d", "e", kernel_shape=[2, 2])], (0, 255)),
    "identity": ([node("Identity", "d", "i"), node("Dropout", "i", "e")], (0, 255)),
    "pad": ([node("Clip", "d two five", "c"), node("Pad", "c pads", "e")], (3, 13)),
    "pad with value": ([node("Clip", "d lo hi", "c"), node("Pad", "c pads five", "e")], (1, 13)),
    "concat": ([node("Clip", "d lo hi", "c"), node("Relu", "d", "r"), node("Concat", "c r", "e", axis=1)], (1, 255)),
    "scaled": ([node("Mul", "d two", "m"), node("Div", "m five", "e")], (0, 255)),
    "shifted": ([node("Add", "d five", "e")], (0, 255)),
    "negated": ([node("Mul", "d minus", "e")], (-255, 0)),
    "quantized again": ([node("Relu", "d", "r"), *quantized("r", "e")], (3, 255)),
    "bounded": ([node("Sigmoid", "d", "r"), *quantized("r", "e")], (3, 5)),
    "relu 6": ([node("Clip", "y0 nought six", "r"), *quantized("r", "e")], (3, 15)),
    "max": ([node("Max", "d five", "e")], (13, 255)),
    "transposed": ([node("Transpose", "d", "e", perm=[0, 1, 3, 2])], (0, 255)),
    "sliced": ([node("Split", "d", "e e2", axis=0, num_outputs=2)], (0, 255)),
    "doubled": ([node("Add", "d d", "e")], (0, 510)),
    "averaged": ([node("AveragePool", "d", "e", kernel_shape=[2, 2])], (0, 1020)),
    "in integers": (
        [node("MaxPool", "x_q", "p", kernel_shape=[2, 2]), node("DequantizeLinear", "p s z", "e")],
        (0, 255),
    ),
}


@pytest.mark.parametrize("way", PASSED)
def test_ranges(way, tmp_path) -> None:
    nodes, wanted = PASSED[way]
    channels = 4 if way == "concat" else 2
    constants = {
        "lo": scalar(-1),
        "hi": scalar(3),
        "two": scalar(2),
        "five": scalar(5),
        "six": scalar(6),
        "nought": scalar(0),
        "minus": scalar(-2),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "w0": ints(2, 2, 1, 1),
    }
    first = [node("DequantizeLinear", "w0 ws", "f0"), node("Conv", "d f0", "y0", "before")]
    made = qdq(
        ints(3, channels, 2, 2), [*first, *nodes, DQ, node("Conv", "e f", "y", "last")], [2, 2, 6, 6], **constants
    )
    network = read_model(made, tmp_path)
    product = network.products[-1]
    assert product.name == "last", network.operations
    assert (product.codes.lo, product.codes.hi) == wanted
    check_sums(made, network, feeds([2, 2, 6, 6]))


def test_affine_inputs_move_the_zero_point(tmp_path) -> None:
    nodes = [node("Add", "d five", "e"), DQ, node("MatMul", "e f", "y")]
    product = only(read_model(qdq(ints(6, 4), nodes, [5, 6], five=scalar(5)), tmp_path))
    assert (product.codes, product.zero_point) == (IntFormat(0, 255), 3 - 10)
    made = qdq(ints(6, 4), nodes, [5, 6], five=scalar(0.3))
    (op,) = read_model(made, tmp_path).unproven
    assert "no integer" in op.reason


def test_inputs(tmp_path) -> None:
    made = model(
        [node("DequantizeLinear", "w ws", "f"), node("MatMul", "x f", "y", "m")],
        {"x": [2, 6]},
        {"y": None},
        {"w": ints(6, 4), "ws": scalar(0.5)},
    )
    path = save(made, tmp_path)
    (op,) = read(path).unproven
    assert "'x' is a float input" in op.reason
    name, codes = parse_input("x=uint3:0.25:2")
    network = read(path, {name: codes})
    product = only(network)
    assert (product.codes, product.zero_point, product.act_scale[0]) == (IntFormat(0, 7), 2, 0.25)
    assert network.inputs == {"x": codes}
    with pytest.raises(ValueError, match="'z' is no graph input"):
        read(path, {"z": codes})


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "=uint8",
        "x=float",
        "x=uint0",
        "x=int33",
        "x=uint8:0",
        "x=uint8:nan",
        "x=uint8:1:y",
        "x=int8:1:0:0",
        "x=uint\u0663",
    ],
)
def test_malformed_inputs(text) -> None:
    with pytest.raises(ValueError, match="NAME=uint8"):
        parse_input(text)


def test_integer_inputs_have_their_type(tmp_path) -> None:
    made = model(
        [node("Cast", "x", "c", to=1), node("DequantizeLinear", "w ws", "f"), node("MatMul", "c f", "y")],
        {"x": (TensorProto.UINT8, [2, 6])},
        {"y": None},
        {"w": ints(6, 4), "ws": scalar(0.5)},
    )
    path = save(made, tmp_path)
    assert only(read(path)).codes == IntFormat(0, 255)
    assert only(read(path, dict([parse_input("x=uint4")]))).codes == IntFormat(0, 15)
    with pytest.raises(ValueError, match="holds integers"):
        read(path, dict([parse_input("x=int8")]))
    check_sums(made, read(path), {"x": RNG.integers(0, 256, (2, 6), np.uint8)})


def annotated(made, **datatypes):
    for name, kind in datatypes.items():
        entry = made.graph.quantization_annotation.add(tensor_name=name)
        entry.quant_parameter_tensor_names.add(key="finn_datatype", value=kind)
    return made


def test_finn_datatypes(tmp_path) -> None:
    weights = ints(6, 4, lo=-2, hi=1).astype(np.float32)
    made = model([node("MatMul", "x w", "y")], {"x": [2, 6]}, {"y": None}, {"w": weights})
    product = only(read_model(annotated(made, x="UINT4", w="INT2"), tmp_path))
    assert (product.codes, product.rows.codes, product.dialect) == (IntFormat(0, 15), IntFormat(-2, 1), "qonnx")
    assert (product.rows.raw() == weights.T).all()
    assert product.rows.raw().dtype == np.int8
    for kinds in ({"x": "UINT4", "w": "BIPOLAR"}, {"x": "UINT4"}, {"w": "INT2"}, {"x": "FLOAT32", "w": "INT2"}):
        del made.graph.quantization_annotation[:]
        assert len(read_model(annotated(made, **kinds), tmp_path).unproven) == 1


# QONNX.


def qonnx(domain, nodes, constants, shape):
    constants = {
        "one": scalar(1),
        "nought": scalar(0),
        "four": scalar(4),
        "s": scalar(0.5),
        "bits": scalar(3),
        **constants,
    }
    nodes = [node("Quant", "x s nought four", "d", domain=domain, signed=1, narrow=0), *nodes]
    return model(nodes, {"x": shape}, {"y": None}, constants, extra=[(domain, 1)])


@pytest.mark.parametrize("domain", QONNX)
@pytest.mark.parametrize("mode", ["ROUND", "CEIL", "FLOOR", "UP", "DOWN", "HALF_EVEN", "HALF_UP", "HALF_DOWN"])
def test_weights_follow_the_rounding_of_the_executor(domain, mode, tmp_path) -> None:
    weights = (RNG.integers(-12, 13, (4, 3, 2, 2)) / 4).astype(np.float32)  # many ties
    attributes = {"signed": 1, "narrow": 1, "rounding_mode": mode, "domain": domain}
    nodes = [
        node("Quant", "w wc nought bits", "f", **attributes),
        node("Conv", "d f", "c", kernel_shape=[2, 2], pads=[1, 1, 0, 0]),
        node("BatchNormalization", "c g b m v", "n"),
        node("Relu", "n", "r"),
        node("Quant", "r s nought four", "e", domain=domain, signed=0, narrow=0),
        node("Transpose", "e", "t", perm=[0, 2, 3, 1]),
        node("IntQuant", "w2 one nought bits", "f2", domain=domain, signed=0, narrow=0),
        node("MatMul", "t f2", "y"),
    ]
    constants = {
        "w": weights,
        "wc": np.array([0.5, 0.25, 1, 2], np.float32).reshape(4, 1, 1, 1),
        "w2": RNG.normal(size=(4, 5), scale=4).astype(np.float32),
        **{name: np.array([1, 2, 3, 4], np.float32) for name in "gbmv"},
    }
    made = qonnx(domain, nodes, constants, [2, 3, 4, 4])
    network = read_model(made, tmp_path)
    first, second = network.products
    assert (first.codes, first.rows.codes, first.padded) == (IntFormat(-8, 7), IntFormat(-3, 3), True)
    assert (second.codes, second.rows.codes) == (IntFormat(0, 15), IntFormat(0, 7))
    check_sums(made, network, feeds([2, 3, 4, 4]), run_qonnx)


@pytest.mark.parametrize("height", [9, None])
def test_an_average_that_is_truncated(height, tmp_path) -> None:
    """As Brevitas writes its pooling: averaged, times the number of values again, and cut to fewer bits."""
    d = QONNX[0]
    nodes = [
        node("Quant", "w s nought bits", "f", domain=d, signed=1, narrow=1),
        node("Conv", "d f", "c"),
        node("Relu", "c", "r"),
        node("Quant", "r s nought four", "a", domain=d, signed=0, narrow=0),
        node("GlobalAveragePool", "a", "g"),
        node("Mul", "g n", "m"),
        node("Trunc", "m s nought ten four", "t", domain=d),
        node("Flatten", "t", "e"),
        node("Quant", "w2 s nought bits", "f2", domain=d, signed=1, narrow=1),
        node("MatMul", "e f2", "y", "last"),
        node("Quant", "g s nought ten", "h", domain=d, signed=1, narrow=0),
        node("Flatten", "h", "i"),
        node("MatMul", "i f2", "y2", "rounded"),
    ]
    constants = {
        "w": RNG.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "w2": RNG.normal(size=(8, 4)).astype(np.float32),
        "n": scalar(49),
        "ten": scalar(10),
    }
    made = qonnx(d, nodes, constants, [1, 3, height, height])
    network = read_model(made, tmp_path)
    codes = {op.name: (op.codes.lo, op.codes.hi) for op in network.products}
    if height:
        assert (codes["last"], codes["rounded"]) == ((0, 11), (0, 15))
    else:  # however many it averages, it is at most twice as large
        assert (codes["last"], codes["rounded"]) == ((0, 22), (0, 30))
    check_sums(made, network, {"x": 20 * feeds([1, 3, 9, 9])["x"]}, run_qonnx)


def test_bipolar_truncated_and_thresholded(tmp_path) -> None:
    d = QONNX[0]
    nodes = [
        node("BipolarQuant", "w one", "f", domain=d),
        node("MatMul", "d f", "m", "bipolar"),
        node("Quant", "m one nought four", "n", domain=d, signed=1, narrow=1),
        node("Trunc", "n one nought four bits", "e", domain=d),
        node("MatMul", "e f", "o", "truncated"),
        node("MultiThreshold", "o steps", "h", domain=d, out_scale=2.0, out_bias=-3.0),
        node("MatMul", "h f", "k", "thresholds"),
        node("BipolarQuant", "k half", "j", domain=d),
        node("MatMul", "j f", "y", "signs"),
    ]
    constants = {
        "w": RNG.normal(size=(4, 4)).astype(np.float32),
        "half": scalar(0.5),
        "steps": np.sort(RNG.normal(size=(4, 3), scale=4).astype(np.float32)),
    }
    made = qonnx(d, nodes, constants, [16, 4])
    network = read_model(made, tmp_path)
    assert {op.name: (op.codes.lo, op.codes.hi) for op in network.products} == {
        "bipolar": (-8, 7),
        "truncated": (-4, 3),
        "thresholds": (-3, 3),
        "signs": (-1, 1),
    }
    assert set(np.unique(network.products[0].rows.raw())) == {-1, 1}
    check_sums(made, network, feeds([16, 4]), run_qonnx)


def test_a_scale_for_each_channel_of_a_depthwise_convolution(tmp_path) -> None:
    for groups, count, shape in ((3, 3, (1, 3, 1, 1)), (1, 1, (1, 3, 1, 1)), (3, 1, (3, 1))):
        made = qonnx(
            QONNX[0],
            [
                node("Quant", "x c nought four", "e", domain=QONNX[0], signed=0, narrow=0),
                node("Quant", "w one nought bits", "f", domain=QONNX[0]),
                node("Conv", "e f", "y", kernel_shape=[2, 2], group=groups),
            ],
            {
                "c": np.array([0.5, 1, 2], np.float32).reshape(shape),
                "w": 2 * RNG.normal(size=(6, 3 // groups, 2, 2)).astype(np.float32),
            },
            [2, 3, 4, 4],
        )
        network = read_model(made, tmp_path)
        if count == 1:
            assert "several scales" in network.unproven[0].reason
        else:
            assert only(network).act_scale.tolist() == [0.5, 0.5, 1, 1, 2, 2]
            check_sums(made, network, feeds([2, 3, 4, 4]), run_qonnx)


# What is unproven, and what adds something else.


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("MatMul", "d d", "y")], "not constant"),
        ([node("Einsum", "d d", "y", equation="ij,ij->i")], "no reader knows"),
        (
            [node("MatMulNBits", "d w ws", "y", domain="com.microsoft", K=6, N=4)],
            "com.microsoft.MatMulNBits is not known",
        ),
        ([node("Fancy", "d", "y", domain="some.where")], "some.where.Fancy is not known"),
        ([node("NoSuchOperator", "d", "y")], "not known"),
        ([DQ, node("MatMul", "x f", "y")], "'x' is a float input"),
        ([DQ, node("Exp", "d", "e"), node("MatMul", "e f", "y")], "float output of Exp"),
        ([node("Conv", "d", "y")], "missing"),
        ([DQ, node("Conv", "d f", "y", group=5)], "do not fit"),
    ],
)
def test_unproven(nodes, reason, tmp_path) -> None:
    network = read_model(qdq(ints(6, 4), nodes, [6, 6]), tmp_path)
    assert network.products == ()
    assert [reason in op.reason for op in network.unproven] == [True], network.unproven


def test_other_sums(tmp_path) -> None:
    nodes = [
        node("Add", "d d", "a", "sum of two"),
        node("Add", "d s", "b", "of a constant"),
        node("AveragePool", "d", "c", "pool", kernel_shape=[2, 3]),
        node("ReduceSum", "d", "e", "reduce"),
        node("Softmax", "d", "f", "softmax"),
        node("ReduceMax", "d", "y", "largest"),
    ]
    network = read_model(qdq(ints(1), nodes, [2, 2, 4, 4]), tmp_path)
    assert network.operations == (
        Other("sum of two", "Add", "tensors, each with its own scale", 2, IntFormat(-3, 252)),
        Other("pool", "AveragePool", "values of one tensor", 6, IntFormat(-3, 252)),
        Other("reduce", "ReduceSum", "values of one tensor", None, IntFormat(-3, 252)),
        Other("softmax", "Softmax", "floats within one tensor"),
    )


def test_how_many_a_reduction_adds(tmp_path) -> None:
    """onnxruntime counts them, of a tensor of ones."""
    axes = {"all": np.zeros(0, np.int64), "one": np.array([-1]), "two": np.array([1, 3])}
    nodes = [node("ReduceSum", f"x {name}", f"y_{name}", name) for name in axes]
    nodes += [
        node("ReduceSum", "x all", "y_noop", "noop", noop_with_empty_axes=1),
        node("ReduceSum", "x", "y_no", "no"),
    ]
    nodes += [node("Identity", "axes", "i"), node("ReduceSum", "x i", "y_late", "late")]
    inputs = {"x": [2, 3, 4, 5], "axes": (TensorProto.INT64, [1])}
    made = model(nodes, inputs, {f"y_{name}": None for name in (*axes, "noop", "no", "late")}, axes)
    terms = {op.name: op.terms for op in read_model(made, tmp_path).others}
    assert terms.pop("late") is None
    data = {"x": np.ones((2, 3, 4, 5), np.float32), "axes": np.array([0])}
    real = run(made, data, [f"y_{name}" for name in terms])
    assert terms == {name: real[f"y_{name}"].flat[0] for name in terms}


def branch(name, weights):
    nodes = [
        node("DequantizeLinear", f"{weights} ws", f"f_{name}"),
        node("MatMul", f"d f_{name}", f"y_{name}", "same name"),
    ]
    return helper.make_graph(
        nodes, name, [], [helper.make_tensor_value_info(f"y_{name}", 1, None)], [tensor(weights, ints(6, 4))]
    )


def test_subgraphs(tmp_path) -> None:
    then, other = branch("then", "w1"), branch("else", "w2")
    nodes = [node("If", "c", "y", then_branch=then, else_branch=other), node("MatMul", "d w", "y2", "same name")]
    network = read_model(qdq(ints(6, 4), nodes, [5, 6], c=scalar(True, np.bool_)), tmp_path)
    assert [op.name for op in network.operations] == ["same name", "same name#2", "same name#3"]
    assert [op.rows.raw().shape for op in network.products] == [(4, 6)] * 3


def with_functions(*functions, calls):
    made = qdq(ints(6, 4), calls, [5, 6])
    made.opset_import.append(helper.make_opsetid("local", 1))
    made.functions.extend(functions)
    return made


def function(name, nodes):
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a", "b"], ["c"], nodes, opsets)


def test_local_functions_are_read_where_they_are_called(tmp_path) -> None:
    made = with_functions(
        function("Dense", [node("MatMul", "a b", "c")]),
        calls=[DQ, node("Dense", "d f", "y", domain="local"), node("Dense", "x f", "y2", domain="local")],
    )
    network = read_model(made, tmp_path)
    assert [type(op).__name__ for op in network.operations] == ["Product", "Unproven"]


def test_functions_without_end_are_refused(tmp_path) -> None:
    loop = function("F", [node("F", "a b", "c", domain="local")])
    with pytest.raises(ValueError, match="without end"):
        read_model(with_functions(loop, calls=[DQ, node("F", "d f", "y", domain="local")]), tmp_path)
    bombs = [function("B0", [node("MatMul", "a b", "c")])]
    for i in range(1, 12):
        calls = [node(f"B{i - 1}", "a b", "c" if j == 9 else f"t{j}", domain="local") for j in range(10)]
        bombs.append(function(f"B{i}", calls))
    with pytest.raises(ValueError, match="expand to more than"):
        read_model(with_functions(*bombs, calls=[DQ, node("B11", "d f", "y", domain="local")]), tmp_path)


def test_operators_on_codes(tmp_path) -> None:
    """Contributed operators and biases that are inside whatever their scale."""
    made = model(
        [
            node("QGemm", "x xs xz w wc wz b ys yz", "q", "gemm", domain="com.microsoft", transB=1),
            node("MatMulInteger", "q v", "y", "integers"),
        ],
        {"x": (TensorProto.UINT8, [3, 6])},
        {"y": (TensorProto.INT32, [3, 2])},
        {
            "w": ints(4, 6, lo=-127, hi=127),
            "v": ints(4, 2),
            "b": np.array([5, -6, 700, 0], np.int32),
            "xs": scalar(0.5),
            "xz": scalar(9, np.uint8),
            "wc": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
            "wz": np.zeros(4, np.int8),
            "ys": scalar(4),
            "yz": scalar(100, np.uint8),
        },
        extra=[("com.microsoft", 1)],
    )
    network = read_model(made, tmp_path)
    first, second = network.products
    assert first.bias.tolist() == [5, -6, 700, 0]
    assert (first.codes, first.zero_point, second.zero_point) == (IntFormat(0, 255), 9, 0)
    check_sums(made, network, {"x": RNG.integers(0, 256, (3, 6), np.uint8)})


@pytest.mark.parametrize("kind", ["QLinearConv", "QGemm"])
def test_a_bias_of_run_time_is_in_the_register(kind, tmp_path) -> None:
    inputs = {"QLinearConv": "x s z w s i s z a", "QGemm": "x s z w s i a s z"}[kind]
    shape = [1, 1, 1, 1] if kind == "QLinearConv" else [1, 1]
    domain = "com.microsoft" if kind == "QGemm" else ""
    made = model(
        [node("Abs", "b", "a"), node(kind, inputs, "y", domain=domain)],
        {"x": (TensorProto.UINT8, shape), "b": (TensorProto.INT32, [1])},
        {"y": (TensorProto.UINT8, None)},
        {**GRID, "w": np.full(shape, 127, np.int8), "i": scalar(0, np.int8)},
        extra=[("com.microsoft", 1)],
    )
    (op,) = read_model(made, tmp_path).operations
    assert isinstance(op, Unproven)
    assert op.reason == "its bias is not constant"
    x = np.full(shape, 255, np.uint8)
    assert run(made, {"x": x, "b": np.array([2**31 - 1], np.int32)}, ["y"])["y"].item() == 0  # it wrapped around


def test_values_that_a_run_may_feed(tmp_path) -> None:
    made = qdq(ints(6, 4), [DQ, node("MatMul", "d f", "y")], [5, 6])
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT8, [6, 4]))
    assert only(read_model(made, tmp_path)).note == "presumes that no run feeds another value to 'w'"
    values = run(made, {**feeds([5, 6]), "w": np.zeros((6, 4), np.int8)}, ["y"])
    assert not values["y"].any()
    made.ir_version = 3  # inputs are all that this version has
    assert only(read_model(made, tmp_path)).note == ""


def test_shapes_that_nobody_checks(tmp_path) -> None:
    """What a file says of the shapes between nodes may be wrong; onnxruntime warns and goes on."""
    nodes = [node("Identity", "d", "i"), node("GlobalAveragePool", "i", "p"), DQ, node("Conv", "p f", "y")]
    for size, claim in (([1, 1, 2, 2], "value_info"), ([None] * 4, "value_info"), ([1, 1, -1, 2], "output")):
        made = qdq(ints(1, 1, 1, 1), nodes, size)
        getattr(made.graph, claim).append(helper.make_tensor_value_info("i", 1, [1, 1, 1, 2]))
        network = read_model(made, tmp_path)
        if size == [1, 1, 2, 2]:  # from which it follows how many there are
            assert [product.codes for product in network.products] == [IntFormat(0, 1020)]
        else:
            assert "no known codes" in network.unproven[0].reason
        assert run(made, feeds([1, 1, 2, 2]), ["p"])["p"].shape == (1, 1, 1, 1)
    nodes = [node("GlobalAveragePool", "x", "p"), DQ, node("Conv", "p f", "y")]
    made = model(nodes, {"x": [1, 1, 2, 2]}, {"y": None}, {"w": ints(1, 1, 1, 1), "ws": scalar(0.5)})
    (product,) = read_model(made, tmp_path, dict([parse_input("x=uint4")])).products
    assert product.codes == IntFormat(0, 60)


@pytest.mark.parametrize("zero", [None, 7])
def test_contributed_operators_that_quantize_at_run_time(zero, tmp_path) -> None:
    wz = "" if zero is None else "wz"
    nodes = [
        node("DynamicQuantizeMatMul", ["x", "w", "wc", wz, "b"], "y", "fused", domain="com.microsoft"),
        node("DynamicQuantizeLinear", "x", "q qs qz"),
        node("MatMulIntegerToFloat", ["q", "w", "qs", "wc", "qz", wz, "b"], "z", "apart", domain="com.microsoft"),
    ]
    constants = {"w": ints(6, 4), "wc": scalar(0.5), "wz": scalar(zero or 0, np.int8), "b": np.ones(4, np.float32)}
    made = model(nodes, {"x": [2, 6]}, {"y": None, "z": None}, constants, extra=[("com.microsoft", 1)])
    network = read_model(made, tmp_path)
    values = run(made, feeds([2, 6]), ["q", "qs", "qz", "y", "z"])
    for product, out in zip(network.products, (values["y"], values["z"]), strict=True):
        assert (product.dynamic, product.codes, product.bias) == (True, IntFormat(0, 255), None)
        sums = (values["q"].astype(int) - values["qz"]) @ product.rows.centred().T.astype(int)
        assert (np.rint((out - 1) / (values["qs"] * 0.5)) == sums).all()


def test_what_follows_a_dynamic_quantizer(tmp_path) -> None:
    made = model(
        [
            node("DynamicQuantizeLinear", "x", "q qs qz"),
            node("ConvInteger", "q w qz", "y", "conv", pads=[1, 1, 1, 1]),
            node("DequantizeLinear", "q qs qz", "d"),
            node("DequantizeLinear", "w ws", "f"),
            node("Conv", "d f", "z", "float conv"),
        ],
        {"x": [1, 2, 5, 5]},
        {"y": None, "z": None},
        {"w": ints(3, 2, 3, 3), "ws": scalar(0.5)},
    )
    network = read_model(made, tmp_path)
    for product in network.products:
        assert product.dynamic
        assert (product.zero_point, product.zero_range) == (None, IntFormat(0, 255))
        assert product.centred_codes == IntFormat(-255, 255)
    values = run(made, feeds([1, 2, 5, 5]), ["q", "qz", "y"])
    assert values["q"].max() <= 255
    assert isinstance(network.inputs, dict)
    assert isinstance(network.operations[0].codes, IntFormat)
    assert not isinstance(network.operations[0], Unproven | Codes)
