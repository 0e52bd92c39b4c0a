"""Ranges hold in onnxruntime: what arrives at a product lies in the codes that are claimed for it, or none are."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from accaware.onnx.read import Unproven
from onnx_helpers import model, node, read_model, run

INTS = {name: getattr(TensorProto, name.upper()) for name in ("uint8", "int8", "uint16", "int32", "int64")}


def half(value):
    return np.asarray(value, np.float16)


def f32(value):
    return np.asarray(value, np.float32)


def last(made, folder):
    """The operation of that name."""
    (op,) = [op for op in read_model(made, folder).operations if op.name == "last"]
    return op


def claimed(nodes, x, constants, folder, shape=None, opset=21):
    """Of x [*shape] -> nodes -> e -> product: centred codes claimed for e (None: none), real ones, why none are."""
    constants = {"s": f32(1), "w": np.ones((2, 1), np.int8), **constants}
    constants = {"ws": constants["s"], **constants}
    kind = next(kind for name, kind in INTS.items() if np.dtype(name) == x.dtype)
    kind_of_product = "MatMul" if constants["w"].ndim == 2 else "Conv"
    made = model(
        [*nodes, node("DequantizeLinear", "w ws", "f"), node(kind_of_product, "e f", "y", "last")],
        {"x": (kind, shape or [None] * x.ndim)},
        {"y": None},
        constants,
        opset=opset,
    )
    product = last(made, folder)
    real = run(made, {"x": x}, ["e"])["e"].astype(np.float64)
    if isinstance(product, Unproven):
        return None, real, product.reason
    return product.centred_codes, real / product.act_scale[0], ""


DQ = node("DequantizeLinear", "x s", "d")
REQUANTIZED = [node("QuantizeLinear", "c s z", "q"), node("DequantizeLinear", "q s z", "e")]
INTEGERS = [node("QuantizeLinear", "c s z", "q"), node("Cast", "q", "e", to=1)]
U8, I8 = np.full((1, 2), 255, np.uint8), np.full((1, 2), -128, np.int8)
LARGE = np.full((1, 2), 2**62, np.int64)

#: nodes, x, constants, and the range that is claimed; None where none is.
CASES = {
    "cropping pads with 0": (
        [
            node("DequantizeLinear", "x s", "d"),
            node("Relu", "d", "r"),
            node("QuantizeLinear", "r s z", "q"),
            node("CenterCropPad", "q to", "p"),
            node("DequantizeLinear", "p s z", "e"),
        ],
        U8,
        {"z": np.uint8(128), "to": np.array([1, 4]), "w": np.ones((4, 1), np.int8)},
        (-128, 127),
    ),
    "the smallest integer has no absolute value": (
        [node("Abs", "x", "a"), node("Cast", "a", "e", to=1)],
        I8,
        {},
        (-128, 127),
    ),
    "nor where the file does not say that it is one": (
        [
            node("Neg", "x", "n"),
            node("Abs", "n", "a"),
            node("Clip", "a none u", "c"),
            node("Cast", "c", "i", to=6),
            node("DequantizeLinear", "i s", "e"),
        ],
        I8,
        {"none": np.int8(-128), "u": np.int8(10)},
        (-128, 10),
    ),
    "clipped between bounds in the wrong order": (
        [node("Min", "x fifty", "n"), node("Clip", "n l u", "c"), node("Cast", "c", "e", to=1)],
        I8,
        {"fifty": np.int8(50), "l": np.int8(120), "u": np.int8(100)},
        (100, 100),
    ),
    "large codes, which become floats before they are scaled": (
        [
            node("Clip", "x some many", "i"),
            node("DequantizeLinear", "i t", "d"),
            node("Cast", "d", "l", to=7),
            node("Sub", "l most", "o"),
            node("Max", "o none", "p"),
            node("Cast", "p", "u", to=2),
            node("DequantizeLinear", "u s", "e"),
        ],
        np.full((1, 2), 16781759, np.int32),
        {
            "t": f32(2.0162911),
            "some": np.int32(2**24),
            "many": np.int32(16781759),
            "most": np.int64(np.floor(16781759 * float(f32(2.0162911)))),
            "none": np.int64(0),
        },
        (0, 5),
    ),
    "a tanh above 1": (
        [
            DQ,
            node("Div", "d eleven", "h"),
            node("Tanh", "h", "t"),
            node("Sub", "t s", "o"),
            node("Mul", "o much", "c"),
            *REQUANTIZED,
        ],
        np.full((1, 2), 100, np.uint8),
        {"eleven": f32(11.8), "much": f32(1e8), "z": np.uint8(0)},
        (0, 24),
    ),
    "a bound that is no float64": (
        [
            node("Clip", "x one large", "l"),
            node("Cast", "l", "m", to=7),
            node("Sub", "m less", "o"),
            node("Max", "o none", "p"),
            node("Cast", "p", "i", to=2),
            node("DequantizeLinear", "i s", "e"),
        ],
        LARGE,
        {"one": np.int64(1), "none": np.int64(0), "large": np.int64(2**53 + 1), "less": np.int64(2**53)},
        (0, 255),
    ),
    "a constant in half floats, as a tensor of the run": (
        [node("DequantizeLinear", "k h", "c"), node("Expand", "c to", "b"), node("Cast", "b", "e", to=1)],
        U8,
        {"k": np.array([[32767, 32765]], np.int16), "h": half(0.001), "to": np.array([3, 2])},
        None,
    ),
    "an absolute value": (
        [node("Clip", "x l u", "c"), node("Abs", "c", "a"), node("Cast", "a", "e", to=1)],
        I8,
        {"l": np.int8(-100), "u": np.int8(-3)},
        (3, 100),
    ),
    "a constant that is padded": (
        [node("Pad", "k to v", "c"), *REQUANTIZED],
        U8,
        {"k": f32([[1.0]]), "to": np.array([0, 0, 0, 1]), "v": f32(200), "z": np.uint8(0)},
        (1, 200),
    ),
    "clipped from infinity": (
        [DQ, node("Min", "d k", "m"), node("Max", "m inf", "c"), *REQUANTIZED],
        U8,
        {"k": f32(15), "inf": f32(np.inf), "z": np.uint8(0)},
        (0, 255),
    ),
    "clipped by large integers": (
        [node("Clip", "x k k1", "c"), node("Sub", "c k", "b"), node("Cast", "b", "e", to=1)],
        LARGE,
        {"k": np.int64(2**53), "k1": np.int64(2**53 + 1)},
        None,
    ),
    "a large number and back": (
        [DQ, node("Add", "d big", "a"), node("Sub", "a big", "e")],
        U8,
        {"big": f32(2**31)},
        None,
    ),
    "an exact number and back": (
        [DQ, node("Add", "d big", "a"), node("Sub", "a big", "e")],
        U8,
        {"big": f32(2**23)},
        (0, 255),
    ),
    "too large for float32": (
        [node("DequantizeLinear", "x big", "d"), node("Mul", "d small", "c"), *REQUANTIZED],
        U8,
        {"big": f32(3e36), "small": f32(1e-37), "z": np.uint8(0)},
        (0, 255),
    ),
    "half floats that add": (
        [DQ, node("Add", "d k", "c"), *INTEGERS],
        U8,
        {"s": half(1), "ws": f32(1), "k": half(3841), "z": np.uint16(0)},
        (3808, 4129),
    ),
    "half floats on another grid": (
        [node("DequantizeLinear", "x t", "c"), *INTEGERS],
        U8,
        {"t": half(0.1001), "s": half(0.00078), "ws": f32(1), "z": np.uint16(0)},
        (0, 32992),
    ),
    "half floats of too many steps": (
        [node("DequantizeLinear", "x t", "d"), node("Max", "d k", "c"), *INTEGERS],
        U8,
        {"t": half(200), "s": half(1e-5), "ws": f32(1), "k": half(1), "z": np.uint16(0)},
        (0, 65535),
    ),
    "half floats that no longer tell codes apart": (
        [DQ, node("Add", "d k", "e")],
        U8,
        {"s": half(1), "k": half(3841)},
        None,
    ),
    "half floats that add little": (
        [DQ, node("Add", "d k", "c"), *REQUANTIZED],
        U8,
        {"s": half(1), "k": half(-3), "z": np.uint8(0)},
        (0, 254),
    ),
    "half floats that hold their codes": (
        [node("DequantizeLinear", "x s", "e")],
        U8,
        {"s": half(0.1001)},
        (0, 255),
    ),
    "cast to half floats": (
        [DQ, node("Clip", "d lo hi", "c"), node("Cast", "c", "h", to=10), node("Cast", "h", "e", to=1)],
        np.full((1, 2), 32767, np.uint16),
        {"lo": f32(0), "hi": f32(32767)},
        None,
    ),
    "cast to half floats that hold them": (
        [DQ, node("Cast", "d", "h", to=10), node("Cast", "h", "e", to=1)],
        U8,
        {},
        (0, 255),
    ),
    "an average in half floats": (
        [node("DequantizeLinear", "x s z", "d"), node("AveragePool", "d", "e", kernel_shape=[8, 8])],
        np.full((1, 1, 8, 8), 255, np.uint8),
        {"s": half(0.1001), "z": np.uint8(3), "w": np.ones((1, 1, 1, 1), np.int8)},
        None,
    ),
    "the largest of none": (
        [
            node("Clip", "x l", "c"),
            node("Slice", "c at at ax", "n"),
            node("ReduceMax", "n ax", "m", keepdims=1),
            node("DequantizeLinear", "m s", "e"),
        ],
        I8,
        {"l": np.int8(0), "at": np.array([0]), "ax": np.array([1]), "w": np.ones((1, 1), np.int8)},
        (-128, 127),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_range_holds(name, tmp_path) -> None:
    nodes, x, constants, wanted = CASES[name]
    found, real, reason = claimed(nodes, x, constants, tmp_path)
    assert (found and (found.lo, found.hi)) == wanted, reason
    if found is not None:
        assert found.lo - 0.5 < real.min()
        assert real.max() < found.hi + 0.5


@pytest.mark.parametrize(
    ("attributes", "size", "safe"),
    [
        ({"pads": [1, 1, 1, 1], "dilations": [5, 5]}, (4, 4), False),
        ({"pads": [1, 0, 1, 0], "dilations": [2, 1]}, (1, 4), False),
        ({"pads": [1, 0, 0, 0], "dilations": [2, 1]}, (2, 4), True),
        ({"pads": [1, 1, 1, 1], "dilations": [5, 5], "kernel_shape": [3, 3]}, (9, 9), True),
        ({"pads": [2, 2, 2, 2], "dilations": [2, 2], "kernel_shape": [3, 3]}, (1, 3), True),
        ({"pads": [1, 1, 1, 1]}, (4, 4), True),
        ({"dilations": [2, 2]}, (4, 4), True),
        ({"ceil_mode": 1, "strides": [2, 2]}, (4, 4), True),
        ({"ceil_mode": 1, "strides": [3, 3]}, (4, 4), False),
        ({"auto_pad": "SAME_UPPER", "dilations": [2, 2]}, (4, 4), False),
    ],
)
def test_windows_of_padding_alone(attributes, size, safe, tmp_path) -> None:
    pool = node("MaxPool", "c", "m", **{"kernel_shape": [2, 2], **attributes})
    nodes = [node("Clip", "x l", "c"), pool, node("DequantizeLinear", "m s", "e")]
    x = np.full((1, 1, *size), 5, np.int8)
    found, real, _ = claimed(nodes, x, {"l": np.int8(0), "w": np.ones((1, 1, 1, 1), np.int8)}, tmp_path)
    assert (found.lo, found.hi) == (0 if safe else -128, 127)
    assert found.lo <= real.min()
    if "dilations" in attributes and "pads" in attributes:
        assert real.min() == (5 if safe else -128)


@pytest.mark.parametrize(
    ("shape", "axes", "safe"),
    [
        ([None, 3, 4], [2], True),
        ([None, 3, 4], [1, -1], True),
        ([None, 3, 4], [0], False),
        ([None, 3, 4], [], False),
        ([2, 3, 4], [], True),
        ([2, 3, 0], [], False),
        ([None, 3, None], [2], False),
        ([None, 3, -1], [2], False),
    ],
)
def test_the_largest_of_some(shape, axes, safe, tmp_path) -> None:
    """Of none it is the smallest number of the type, which is no code of floats."""
    nodes = [DQ, node("Relu", "d", "r"), node("ReduceMax", "r axes", "m"), node("Flatten", "m", "e")]
    x = np.full([2 if size is None else max(0, size) for size in shape], 5, np.int8)
    kept = [1 if i in [a % 3 for a in axes or range(3)] else size for i, size in enumerate(x.shape)]
    constants = {"axes": np.asarray(axes, np.int64), "w": np.ones((kept[1] * kept[2], 1), np.int8)}
    found, real, _ = claimed(nodes, x, constants, tmp_path, shape)
    assert (found and (found.lo, found.hi)) == ((0, 127) if safe else None)
    assert safe or x.size or np.isneginf(real).all()


@pytest.mark.parametrize(("shape", "safe"), [([2, 3], True), ([None, 3], False)])
def test_the_largest_along_what_a_run_says(shape, safe, tmp_path) -> None:
    nodes = [DQ, node("ReduceMax", "d i", "e"), node("Identity", "axes", "i")]
    made = model(
        [nodes[2], *nodes[:2], node("DequantizeLinear", "w s", "f"), node("MatMul", "e f", "y", "last")],
        {"x": (INTS["uint8"], shape), "axes": (INTS["int64"], [1])},
        {"y": None},
        {"s": f32(1), "w": np.ones((3, 1), np.int8)},
        opset=21,
    )
    assert bool(read_model(made, tmp_path).products) == safe


@pytest.mark.parametrize(
    ("kind", "shape", "attributes"),
    [
        ("MaxPool", [1, 1, 1, 1], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
        ("MaxPool", [1, 1, 3, 3], {"kernel_shape": [2, 2], "dilations": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("PRelu", [1, 1, 1, 1], {}),
    ],
)
def test_shapes_that_runtimes_see_otherwise(kind, shape, attributes, tmp_path) -> None:
    """An average of n values is n times finer: n must be that of the run."""
    first = node(kind, "d" if kind == "MaxPool" else "d k", "m", **attributes)
    again = [node("QuantizeLinear", "m s z", "q"), node("DequantizeLinear", "q s z", "r")]
    constants = {"k": np.ones((1, 1, 2, 2), np.float32), "w": np.ones((1, 1, 1, 1), np.int8), "z": np.uint8(0)}
    x = np.full(np.abs(shape), 5, np.uint8)
    found, _, _ = claimed([DQ, first, *again, node("GlobalAveragePool", "r", "e")], x, constants, tmp_path, shape)
    assert found is None


@pytest.mark.parametrize(("floats", "finite"), [(np.float16, False), (np.float32, True)])
def test_averages_of_unknown_size(floats, finite, tmp_path) -> None:
    """Half floats may overflow on the way; the others round to at most twice the average."""
    nodes = [node("DequantizeLinear", "x s", "d"), node("GlobalAveragePool", "d", "c"), *INTEGERS]
    constants = {"s": np.asarray(1, floats), "ws": f32(1), "z": np.uint16(0), "w": np.ones((1, 1, 1, 1), np.int8)}
    x = np.full((1, 1, 64, 64), 255, np.uint8)
    found, real, _ = claimed(nodes, x, constants, tmp_path)
    assert (found.lo, found.hi) == (0, 510 if finite else 65535)
    assert real.max() <= found.hi


def test_averages_that_overflow_on_the_way(tmp_path) -> None:
    nodes = [node("DequantizeLinear", "x s", "d"), node("AveragePool", "d", "c", kernel_shape=[32, 32]), *INTEGERS]
    constants = {"s": half(1), "ws": f32(1), "z": np.uint16(0), "w": np.ones((1, 1, 1, 1), np.int8)}
    found, _, _ = claimed(nodes, np.full((1, 1, 32, 32), 255, np.uint8), constants, tmp_path)
    assert found.hi == 65535


def test_pooled_weights_are_no_weights(tmp_path) -> None:
    """A filter that one large weight fills."""
    weights = np.zeros((1, 1, 2, 2), np.int8)
    weights[..., 1, 1] = 127
    pool = node("MaxPool", "w", "p", kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    nodes = [DQ, pool, node("DequantizeLinear", "p s", "g"), node("Conv", "d g", "y", "last")]
    made = model(nodes, {"x": (TensorProto.UINT8, [1, 1, 3, 3])}, {"y": None}, {"s": f32(1), "w": weights})
    (op,) = read_model(made, tmp_path).operations
    assert "weights are not constant" in op.reason
    assert run(made, {"x": np.full((1, 1, 3, 3), 255, np.uint8)}, ["y"])["y"].item() == 4 * 127 * 255


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8", "INT32"])
def test_constants_are_cast_to_integers_that_the_type_has(kind, tmp_path) -> None:
    to = getattr(TensorProto, kind)
    nodes = [node("Cast", "k", "c", to=to), node("DequantizeLinear", "c s", "g"), node("MatMul", "d g", "y", "last")]

    def read_with(*numbers):
        constants = {"s": f32(1), "k": f32(numbers).reshape(-1, 1)}
        made = model([DQ, *nodes], {"x": (TensorProto.UINT8, [1, None])}, {"y": None}, constants, opset=21)
        return read_model(made, tmp_path).operations[0]

    assert read_with(7.9, 1.0).rows.raw().tolist() == [[7, 1]]
    for number in (2.0**31, 3e38, np.nan, np.inf):
        assert "the type does not have" in read_with(number, 0.0).reason
    if kind == "INT4":
        assert "the type does not have" in read_with(8.0, -8.0).reason  # onnxruntime makes -8 of both


def test_constants_of_every_size_are_cast(tmp_path) -> None:
    nodes = [
        node("Cast", "x", "d", to=10),
        node("Cast", "k", "c", to=10),
        node("QuantizeLinear", "c t i", "q"),
        node("DequantizeLinear", "q t i", "g"),
        node("MatMul", "d g", "y", "last"),
    ]
    constants = {"k": np.full((80, 80), 0.3, np.float32), "t": half(2.0**-16), "i": np.int16(0)}
    made = model(nodes, {"x": (TensorProto.UINT8, [1, 80])}, {"y": None}, constants, opset=21)
    (op,) = read_model(made, tmp_path).operations
    real = run(made, {"x": np.ones((1, 80), np.uint8)}, ["q"])["q"]
    assert (op.rows.raw() == real.T).all()


POOLED = {"kernel_shape": [2], "pads": [0, 1]}
TURNED = node("Transpose", "m", "e", perm=[0, 2, 1])


@pytest.mark.parametrize(
    ("moves", "axis", "known"),
    [
        ([node("Pad", "d by_one", "e")], 1, False),
        ([node("MaxPool", "d", "m", **POOLED), TURNED], 2, False),
        ([node("AveragePool", "d", "m", **POOLED), TURNED], 2, False),
        ([node("MaxPool", "d", "e", **POOLED)], 1, True),
        ([node("Identity", "d", "m"), TURNED], 2, True),
    ],
    ids=["padded", "largest", "average", "largest of a channel", "turned"],
)
def test_scales_of_channels_that_move(moves, axis, known, tmp_path) -> None:
    """Each channel has a scale of its own; what moves values from one to another leaves no codes."""
    nodes = [
        node("DequantizeLinear", "x s", "d", axis=axis),
        *moves,
        node("DequantizeLinear", "w one", "f"),
        node("Conv", "e f", "y", "last", group=2),
    ]
    constants = {"s": f32([1, 16]), "by_one": [0, 1, 0, 0, -1, 0], "one": f32(1), "w": np.ones((2, 1, 1), np.int8)}
    made = model(nodes, {"x": (TensorProto.UINT8, [1, 2, 2])}, {"y": None}, constants, opset=21)
    op = last(made, tmp_path)
    assert isinstance(op, Unproven) != known


@pytest.mark.parametrize("kind", ["Mul", "Max"])
@pytest.mark.parametrize(
    ("shape", "dims", "known"), [([2, 2, 2], 4, False), ([2, 2, 2, 2], 4, True), (None, 4, False), (None, 2, True)]
)
def test_scales_of_channels_beside_a_constant_of_more_dimensions(kind, shape, dims, known, tmp_path) -> None:
    nodes = [
        node("DequantizeLinear", "x s", "d", axis=1),
        node(kind, "d flat", "e"),
        node("DequantizeLinear", "w one", "f"),
        node("Conv", "e f", "y", "last", group=2),
    ]
    constants = {"s": f32([1, 16]), "one": f32(1), "w": np.ones((2, 1, 1, 1), np.int8)}
    constants["flat"] = np.full([1] * dims, 1 if kind == "Mul" else 0, np.float32)
    made = model(nodes, {"x": (TensorProto.UINT8, shape)}, {"y": None}, constants, opset=21)
    op = last(made, tmp_path)
    assert isinstance(op, Unproven) != known


@pytest.mark.parametrize(
    ("kind", "shape", "known"),
    [
        ("Mul", [64, 1], False),
        ("Add", [64, 1], False),
        ("Max", [1, 1, 1], False),
        ("Mul", [1, 1], True),
        ("Max", [1], True),
    ],
)
def test_weights_that_a_constant_makes_larger(kind, shape, known, tmp_path) -> None:
    """One row of weights becomes 64, or another dimension is taken for the rows."""
    nodes = [
        DQ,
        node("DequantizeLinear", "w s", "f"),
        node(kind, "f other", "g"),
        node("Reshape", "g to", "r"),
        node("MatMul", "d r", "y", "last"),
    ]
    number = {"Mul": 1, "Add": 0, "Max": -500}[kind]
    constants = {"s": f32(1), "w": np.full([1, 2], 127, np.int8), "to": [-1, 0]}
    constants["other"] = np.full(shape, number, np.float32)
    made = model(nodes, {"x": (TensorProto.UINT8, [1, None])}, {"y": None}, constants, opset=21)
    op = last(made, tmp_path)
    assert isinstance(op, Unproven) != known


@pytest.mark.parametrize("kind", ["Quant", "BipolarQuant"])
def test_weights_that_their_scale_makes_larger(kind, tmp_path) -> None:
    inputs = "w t" + (" zero bits" if kind == "Quant" else "")
    nodes = [DQ, node(kind, inputs, "f", domain="qonnx.custom_op.general"), node("MatMul", "d f", "y", "last")]
    constants = {"s": f32(1), "w": np.ones([1, 2**19], np.float32), "t": np.ones([64, 1], np.float32)}
    constants |= {"zero": f32(0), "bits": f32(4)}
    extra = [("qonnx.custom_op.general", 1)]
    made = model(nodes, {"x": (TensorProto.UINT8, [1, None])}, {"y": None}, constants, opset=21, extra=extra)
    op = last(made, tmp_path)
    assert "makes larger" in op.reason


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "given", "safe"),
    [
        (3, 2, 2, True, False),
        (3, 2, 2, False, False),
        (3, 2, 3, True, True),
        (3, 1, 3, False, True),
        (2, 2, 1, False, True),
    ],
)
def test_averages_over_more_than_there_is(kernel, stride, size, given, safe, tmp_path) -> None:
    """onnxruntime has one window even then, and averages fewer values than its kernel has."""
    x = np.arange(1, size + 1, dtype=np.uint8).reshape(1, 1, size)
    pool = node("AveragePool", "d", "e", kernel_shape=[kernel], strides=[stride])
    shape = [1, 1, size if given else None]
    found, real, _ = claimed([DQ, pool], x, {"w": np.ones((1, 1, 1), np.int8)}, tmp_path, shape)
    assert (found is not None) == safe
    assert (kernel * x.mean() % 1 == 0) == safe
    assert found is None or np.allclose(real, np.rint(real))


def test_bounds_in_half_floats(tmp_path) -> None:
    """The type of the tensor rounds an attribute, unless the runtime computes in float32."""
    nodes = [
        node("Cast", "x", "h", to=10),
        node("Clip", "h", "c", max=0.3),
        node("Cast", "c", "b", to=1),
        node("QuantizeLinear", "b s z", "q"),
        node("MatMulInteger", "q w", "y", "last"),
    ]
    constants = {"s": f32(0.3 / 100.499), "z": np.uint8(0), "w": np.ones((1, 1), np.int8)}
    made = model(nodes, {"x": (TensorProto.UINT8, [1, 1])}, {"y": None}, constants, opset=10)
    op = last(made, tmp_path)
    assert run(made, {"x": np.ones((1, 1), np.uint8)}, ["c"])["c"].item() == float(half(0.3)) > 0.3
    assert op.codes.hi == 101


def test_averages_that_count_what_is_not_there(tmp_path) -> None:
    pool = node("AveragePool", "c", "e", kernel_shape=[2], strides=[2], count_include_pad=1)
    nodes = [DQ, node("Clip", "d l", "c"), pool]
    x = np.full((1, 1, 1), 100, np.uint8)
    found, real, _ = claimed(nodes, x, {"l": f32(100), "w": np.ones((1, 1, 1), np.int8)}, tmp_path, [1, 1, 1], opset=13)
    assert found is None
    assert real.item() == 50


def test_a_bound_above_everything_in_half_floats(tmp_path) -> None:
    nodes = [
        node("Cast", "x", "h", to=10),
        node("Mul", "h less", "n"),
        node("Clip", "n", "c", min=0.3),
        node("Flatten", "c", "b"),
        node("Cast", "b", "f", to=1),
        node("QuantizeLinear", "f s z", "q"),
        node("MatMulInteger", "q w", "y", "last"),
    ]
    constants = {"s": f32(0.3 / 100.499), "z": np.uint8(0), "less": half(-1), "w": np.ones((1, 1), np.int8)}
    made = model(nodes, {"x": (TensorProto.UINT8, [1, 1])}, {"y": None}, constants, opset=10)
    op = last(made, tmp_path)
    assert run(made, {"x": np.ones((1, 1), np.uint8)}, ["y"])["y"].item() == 101
    assert (op.codes.lo, op.codes.hi) == (100, 101)


@pytest.mark.parametrize(("dilations", "safe"), [([5, 5], False), ([1, 1], True)])
def test_windows_of_padding_alone_with_channels_last(dilations, safe, tmp_path) -> None:
    pool = {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "dilations": dilations}
    nodes = [
        DQ,
        node("MaxPoolNHWC", "d", "m", domain="qonnx.custom_op.general", **pool),
        node("Reshape", "m to", "r"),
        node("DequantizeLinear", "w s", "f"),
        node("MatMul", "r f", "y", "last"),
    ]
    constants = {"s": f32(1), "w": np.ones((2, 1), np.int8), "to": [-1, 2]}
    extra = [("qonnx.custom_op.general", 1)]
    made = model(nodes, {"x": (TensorProto.UINT8, [1, 4, 4, 2])}, {"y": None}, constants, opset=21, extra=extra)
    op = last(made, tmp_path)
    assert isinstance(op, Unproven) != safe
