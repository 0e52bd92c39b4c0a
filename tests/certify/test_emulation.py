"""Networks on narrow accumulators: onnxruntime's rewritten graph, the integer layer and plain numpy agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime import quantization as q

from accaware.certify.emulation import Emulator, emulate_file
from accaware.certify.files import certify_file, file_layers
from accaware.certify.proof import witnesses
from accaware.certify.targets import TARGETS, Target
from accaware.formats import Accumulator
from accaware.onnx.read import read
from onnx_helpers import exact_sums, model, node, run, save
from onnx_networks import NETWORKS, quantized, signed_qdq

RNG = np.random.default_rng(0)
T = q.QuantType
QDQ, QOPERATOR = q.QuantFormat.QDQ, q.QuantFormat.QOperator


def plain(bits: int, **options) -> Target:
    return replace(TARGETS["int32"], accumulator=Accumulator(bits, **options))


def original(path, feeds):
    """The file in onnxruntime as it is, no operators fused."""
    made = onnx.load(path)
    return run(made, feeds, [info.name for info in made.graph.output])


class Unfolded(Emulator):
    """Every sum through the integer layer, on unfolded inputs."""

    def _fold(self, target):
        return replace(super()._fold(target), outside=True)


def agree(a, b):
    """The same outputs and the same counts."""
    assert a.counts == b.counts
    for name, array in a.outputs.items():
        assert array.dtype == b.outputs[name].dtype
        assert np.array_equal(array, b.outputs[name]), name


STATIC = {
    "u8s8": {"activation_type": T.QUInt8, "weight_type": T.QInt8, "reduce_range": True},  # no kernel saturates
    "u8u8": {"activation_type": T.QUInt8, "weight_type": T.QUInt8, "reduce_range": True},
    "s8s8": {"activation_type": T.QInt8, "weight_type": T.QInt8, "reduce_range": True},
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("types", STATIC)
@pytest.mark.parametrize("network", ["residual", "mlp"])
def test_qoperator_at_32_bits_is_onnxruntime_to_the_bit(network, types, per_channel, tmp_path) -> None:
    options = STATIC[types] | {"quant_format": QOPERATOR, "per_channel": per_channel}
    _, path, feeds = quantized(network, tmp_path, **options)
    done = emulate_file(path, TARGETS["int32"], feeds)
    assert done.overflows == 0
    assert done.left == {}
    assert sum(count.sums for count in done.counts) > 0
    for name, array in original(path, feeds).items():
        assert np.array_equal(done.outputs[name], array)


@pytest.mark.parametrize("types", STATIC)
@pytest.mark.parametrize("network", NETWORKS)
def test_qdq_at_32_bits_is_onnxruntime_within_float_rounding(network, types, tmp_path) -> None:
    _, path, feeds = quantized(network, tmp_path, **STATIC[types], quant_format=QDQ, per_channel=True)
    done = emulate_file(path, TARGETS["int32"], feeds)
    assert done.left == {}
    for name, array in original(path, feeds).items():
        step = np.diff(np.unique(array)).max()  # a float sum may fall on the other side of a rounding
        off = np.abs(done.outputs[name] - array)
        assert off.max() <= step * 1.01
        assert (off > 1e-5).mean() < 0.02


FORMS = {"qdq": {"quant_format": QDQ}, "qoperator": {"quant_format": QOPERATOR}, "dynamic": {"dynamic": True}}
FILES = [("deconvolution", "qdq"), *((network, form) for network in ("residual", "mlp") for form in FORMS)]


@pytest.mark.parametrize("bits", [9, 13, 24])
@pytest.mark.parametrize(("network", "form"), FILES)
def test_the_graph_and_the_integer_layer_agree(network, form, bits, tmp_path) -> None:
    _, path, feeds = quantized(network, tmp_path, per_channel=True, **FORMS[form])
    here, there = Emulator(path, plain(bits)).run(feeds), Unfolded(path, plain(bits)).run(feeds)
    agree(here, there)
    assert (here.overflows > 0) == (bits < 24)
    exact = Emulator(path, None).run(feeds)
    agree(exact, Unfolded(path, None).run(feeds))
    assert (bits < 24) != all(np.array_equal(here.outputs[n], exact.outputs[n]) for n in exact.outputs)


def test_16_bit_operands_are_split_into_digits(tmp_path) -> None:
    options = {"quant_format": QDQ, "extra_options": {"UseQDQContribOps": True}}
    _, path, feeds = quantized("mlp", tmp_path, activation_type=T.QUInt16, weight_type=T.QInt16, **options)
    emulator = Emulator(path, plain(30))
    assert sum(node.op_type == "MatMul" for node in emulator._net.model.graph.node) > 4
    here = emulator.run(feeds)
    assert here.overflows > 0
    agree(here, Unfolded(path, plain(30)).run(feeds))


# One operation, whose input is the graph's.

U8, I8, I32, F32 = TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.FLOAT


def integers(lo, hi, *shape, dtype=np.int8):
    return RNG.integers(lo, hi, shape, endpoint=True).astype(dtype)


def constants(w, bias, outputs, y_scale=2.0**-4):
    scales = 2.0 ** RNG.integers(-6, -3, outputs)
    found = {
        "xs": np.float32(0.25),
        "xz": np.uint8(3),
        "w": w,
        "ws": scales.astype(np.float32),
        "wz": np.zeros(outputs, np.int8),
        "ys": np.float32(y_scale),
        "yz": np.uint8(128),
    }
    return found | ({"b": bias} if bias is not None else {})


def single(kind):
    """A file of one operation, and a batch for it."""
    x = integers(0, 255, 5, 12, dtype=np.uint8)
    w = integers(-60, 60, 12, 6)
    bias = integers(-3000, 3000, 6, dtype=np.int32)
    if kind == "QLinearConv":
        x, w = integers(0, 255, 2, 4, 5, 6, dtype=np.uint8), integers(-60, 60, 6, 2, 3, 2)
        op = node(
            kind, "x xs xz w ws wz ys yz b", "y", "op", group=2, strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2]
        )
        made = model([op], {"x": (U8, x.shape)}, {"y": (U8, None)}, constants(w, bias, 6))
    elif kind == "ConvInteger":
        x, w = integers(0, 255, 2, 4, 9, dtype=np.uint8), integers(-60, 60, 6, 4, 3)
        op = node(kind, "x w xz", "y", "op", auto_pad="SAME_UPPER")
        made = model([op], {"x": (U8, x.shape)}, {"y": (I32, None)}, {"w": w, "xz": np.uint8(7)})
    elif kind == "QLinearMatMul":
        held = constants(w, None, 6)
        op = node(kind, "x xs xz w ws wz ys yz", "y", "op")
        made = model([op], {"x": (U8, x.shape)}, {"y": (U8, None)}, held)
    elif kind == "QGemm":
        op = node(kind, "x xs xz w ws wz b ys yz", "y", "op", "com.microsoft", transB=1, alpha=0.5)
        made = model(
            [op], {"x": (U8, x.shape)}, {"y": (U8, None)}, constants(w.T.copy(), bias, 6), extra=[("com.microsoft", 1)]
        )
    elif kind == "MatMulInteger":
        op = node(kind, "x w xz", "y", "op")
        made = model([op], {"x": (U8, x.shape)}, {"y": (I32, None)}, {"w": w, "xz": np.uint8(7)})
    elif kind == "MatMulInteger-left":
        x = integers(0, 255, 12, 5, dtype=np.uint8)
        op = node("MatMulInteger", "w x wz xz", "y", "op")
        made = model(
            [op], {"x": (U8, x.shape)}, {"y": (I32, None)}, {"w": w.T.copy(), "xz": np.uint8(7), "wz": np.int8(1)}
        )
    else:
        assert kind == "MatMulInteger-batch"
        x, w = integers(0, 255, 3, 5, 12, dtype=np.uint8), integers(-60, 60, 3, 12, 6)
        op = node("MatMulInteger", "x w xz", "y", "op")
        made = model([op], {"x": (U8, x.shape)}, {"y": (I32, None)}, {"w": w, "xz": np.uint8(7)})
    return made, {"x": x}


KINDS = [
    "QLinearConv",
    "ConvInteger",
    "QLinearMatMul",
    "QGemm",
    "MatMulInteger",
    "MatMulInteger-left",
    "MatMulInteger-batch",
]


@pytest.mark.parametrize("kind", KINDS)
def test_one_operation(kind, tmp_path) -> None:
    made, feeds = single(kind)
    path = save(made, tmp_path)
    exact = emulate_file(path, None, feeds).outputs["y"]
    if kind != "MatMulInteger-left":  # onnxruntime has no kernel for signed times unsigned
        assert np.array_equal(exact, original(path, feeds)["y"])
    for bias in ("inside", "outside"):
        target = replace(plain(14), bias=bias)
        here = Emulator(path, target).run(feeds)
        assert here.overflows > 0
        agree(here, Unfolded(path, target).run(feeds))
        if exact.dtype == np.int32:  # the sums themselves: fold them by hand
            wrapped = (exact.astype(int) + 2**13) % 2**14 - 2**13
            assert np.array_equal(here.outputs["y"], wrapped)
            assert here.overflows == (exact != wrapped).sum()
            assert here.counts[0].sums == exact.size


@pytest.mark.parametrize("bias", ["inside", "outside"])
def test_the_register_starts_from_the_bias(bias, tmp_path) -> None:
    made, feeds = single("QGemm")
    path = save(made, tmp_path)
    (product,) = read(path).products
    sums = exact_sums(made, product, feeds["x"].astype(np.int64) - 3)
    start = product.bias if bias == "inside" else 0 * product.bias
    register = sums - product.bias + start
    wrapped = (register + 2**13) % 2**14 - 2**13
    done = emulate_file(path, replace(plain(14), bias=bias), feeds)
    assert done.overflows == (register != wrapped).sum() > 0
    unit = product.rows.scale * product.act_scale / 2.0**-4
    expected = np.clip(np.rint((wrapped + product.bias - start) * unit) + 128, 0, 255)
    assert np.array_equal(done.outputs["y"], expected)


@pytest.mark.parametrize(
    "target", [plain(13, overflow="saturate"), TARGETS["avx2-u8s8"], TARGETS["neon-s8s8-int16"], plain(12, tile=5)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_saturation_and_tiles(kind, target, tmp_path) -> None:
    """Against the definition, for the operators whose outputs are their sums."""
    from accaware.integer.reference import run as reference

    made, feeds = single(kind)
    path = save(made, tmp_path)
    done = emulate_file(path, target, feeds)
    if kind != "MatMulInteger":
        assert len(done.counts) == 1
        return
    (layer,) = file_layers(path, target)
    expected = [[reference(layer, r, row.tolist(), 7) for r in range(6)] for row in feeds["x"]]
    assert np.array_equal(done.outputs["y"], expected)


@pytest.mark.parametrize("relu", [False, True])
def test_signed_codes_saturate_as_unsigned_ones_128_higher(relu, tmp_path) -> None:
    from accaware.integer.reference import run as reference

    made, feeds = signed_qdq(relu)
    made.graph.output.extend([onnx.ValueInfoProto(name="m")])
    path = save(made, tmp_path)
    (layer,) = file_layers(path, TARGETS["onnxruntime-avx2"])
    assert layer.stored.lo == (128 if relu else 0)
    zero = layer.zero_points[0]
    codes = np.clip(np.rint((np.maximum(feeds["x"], 0) if relu else feeds["x"]) / 0.5) + zero, 0, 255).astype(int)
    expected = [[reference(layer, r, row.tolist(), zero) for r in range(6)] for row in codes]
    assert np.any(expected != (codes - zero) @ layer.rows.T)
    done = emulate_file(path, TARGETS["onnxruntime-avx2"], feeds)
    assert done.overflows > 0
    assert np.array_equal(done.outputs["m"], np.array(expected) * np.float32(0.125))


# What is proven, and what is refuted.


@pytest.mark.parametrize("form", [QDQ, QOPERATOR], ids=["qdq", "qoperator"])
def test_a_certified_network_never_overflows(form, tmp_path) -> None:
    _, path, feeds = quantized("residual", tmp_path, quant_format=form, per_channel=True)
    proven = certify_file(path, TARGETS["int32"])
    widths = {op.name: op.bits_needed for op in proven.operations if op.target}
    assert certify_file(path, TARGETS["int32"], acc_bits=widths).holds
    emulator = Emulator(path, TARGETS["int32"], acc_bits=widths)
    assert len(emulator._net.overflows) == len(widths)  # the registers are there
    done = emulator.run(feeds)
    assert done.overflows == 0
    wide = emulate_file(path, TARGETS["int32"], feeds)
    assert all(np.array_equal(done.outputs[name], wide.outputs[name]) for name in wide.outputs)


def filled(kind, inputs):
    """Inputs [K] of one sum as the whole input of the operation."""
    if kind == "QLinearConv":
        return inputs.reshape(1, 3, 2, 3)
    return inputs.reshape(1, -1)


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize("kind", ["QLinearConv", "QLinearMatMul", "MatMulInteger"])
def test_witnesses_overflow(kind, overflow, tmp_path) -> None:
    if kind == "QLinearConv":
        w = integers(-60, 60, 6, 3, 2, 3)
        op = node(kind, "x xs xz w ws wz ys yz b", "y", "op")
        held = constants(w, integers(-3000, 3000, 6, dtype=np.int32), 6)
        made = model([op], {"x": (U8, [1, 3, 2, 3])}, {"y": (U8, None)}, held)
    else:
        made, _ = single(kind)
        made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    path = save(made, tmp_path)
    bits = certify_file(path, TARGETS["int32"]).operations[0].bits_needed - 1
    for width in (bits, bits - 2):
        target = plain(width, overflow=overflow)
        (layer,) = file_layers(path, target)
        found = list(witnesses(layer))
        assert found
        emulator, exact = Emulator(path, target), Emulator(path, None)
        for witness in found:
            feeds = {"x": filled(kind, np.array(witness.inputs, np.uint8))}
            done = emulator.run(feeds)
            assert done.overflows > 0
            if kind == "MatMulInteger":
                assert done.outputs["y"][0, witness.row] != exact.run(feeds).outputs["y"][0, witness.row]


def test_floats_run_as_they_are(tmp_path) -> None:
    made = NETWORKS["mlp"]()
    path = save(made, tmp_path)
    feeds = {"x": RNG.normal(size=(5, 7)).astype(np.float32)}
    done = emulate_file(path, plain(8), feeds)
    assert set(done.left) == {"one", "two"}
    assert done.counts == ()
    np.testing.assert_allclose(done.outputs["y"], original(path, feeds)["y"], rtol=1e-6)


def test_products_in_subgraphs_run_as_they_are_and_are_named(tmp_path) -> None:
    made, feeds = signed_qdq(relu=False)
    inner = onnx.helper.make_graph([made.graph.node[3]], "body", [], [onnx.ValueInfoProto(name="m")])
    made.graph.node[3].CopyFrom(node("If", "yes", "m", then_branch=inner, else_branch=inner))
    made.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    path = save(made, tmp_path)
    done = emulate_file(path, plain(8), feeds)
    assert done.left == dict.fromkeys(["op", "op#2"], "it is in a subgraph")
    assert done.counts == ()
    assert np.array_equal(done.outputs["y"], original(path, feeds)["y"])


def test_operators_without_a_kernel_run_in_the_reference_evaluator(tmp_path) -> None:
    x, w = RNG.normal(size=(1, 2, 5)), RNG.normal(size=(3, 2, 2))
    double = TensorProto.DOUBLE
    nodes = [node("Conv", "x w", "f", "float"), node("Cast", "x", "c", to=U8), node("MatMulInteger", "c q", "y", "op")]
    made = model(
        nodes, {"x": (double, [1, 2, 5])}, {"y": (I32, None), "f": (double, None)}, {"w": w, "q": integers(-9, 9, 5, 4)}
    )
    x = np.abs(np.rint(50 * x))
    done = emulate_file(save(made, tmp_path), plain(8), {"x": x})
    sums = x.astype(int) @ made_weights(made, "q")
    assert np.array_equal(done.outputs["y"], (sums + 128) % 256 - 128)
    assert list(done.left) == ["float"]
    assert done.outputs["f"].dtype == np.float64


def made_weights(made, name):
    return numpy_helper.to_array(next(i for i in made.graph.initializer if i.name == name)).astype(int)


def test_batches_add_up(tmp_path) -> None:
    made, feeds = single("MatMulInteger")
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    path = save(made, tmp_path)
    whole = emulate_file(path, plain(13), feeds)
    steps = []
    agree(whole, emulate_file(path, plain(13), feeds, batch_size=2, progress=steps.append))
    assert steps == [2, 2, 1]


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({}, "the network's inputs are x, not none"),
        ({"z": np.zeros(2)}, "the network's inputs are x, not z"),
        ({"x": np.zeros((5, 12))}, "input 'x' holds uint8, not float64"),
        ({"x": np.zeros((5, 11), np.uint8)}, r"input 'x' has shape \[5, 12\], not \[5, 11\]"),
        ({"x": np.full((5, 12), 256)}, "values that uint8 does not have"),
    ],
)
def test_inputs_that_do_not_fit(feeds, reason, tmp_path) -> None:
    path = save(single("MatMulInteger")[0], tmp_path)
    with pytest.raises(ValueError, match=reason):
        Emulator(path, plain(8)).run(feeds)


def test_codes_that_were_promised_are_checked(tmp_path) -> None:
    held = {"w": integers(-7, 7, 4, 3), "s": np.float32(0.5), "z": np.int8(0)}
    nodes = [node("DequantizeLinear", "w s z", "f"), node("MatMul", "x f", "y", "op")]
    path = save(model(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, held), tmp_path)
    emulator = Emulator(path, plain(6), ["x=uint4:0.25:1"])
    x = (integers(0, 15, 9, 4) - 1) * np.float32(0.25)
    done = emulator.run({"x": x})
    sums = np.rint(x / 0.25).astype(int) @ held["w"]
    wrapped = (sums + 32) % 64 - 32
    assert np.array_equal(done.outputs["y"], wrapped * np.float32(0.125))
    assert done.overflows == (sums != wrapped).sum() > 0
    for wrong in (0.1, 4.0, -0.5):
        with pytest.raises(ValueError, match=r"no codes in \[0, 15\]"):
            emulator.run({"x": np.full((1, 4), wrong)})


PRODUCTS = [  # shapes of a product's operands, and which of them are the weights
    *((a, b, "right") for a, b in (([5], [5, 3]), ([5], [5]), ([2, 5], [5]), ([5], [4, 5, 3]), ([2, 5], [4, 5, 3]))),
    *((a, b, "left") for a, b in (([3, 5], [5]), ([3, 5], [5, 2]), ([5], [5, 2]), ([5], [5]), ([4, 3, 5], [5]))),
    *((a, b, "left") for a, b in (([4, 3, 5], [5, 2]), ([3, 5], [4, 5, 2]), ([4, 3, 5], [4, 5, 2]))),
    ([4, 2, 5], [4, 5, 3], "right"),
]


@pytest.mark.parametrize("kind", ["MatMul", "MatMulInteger", "QLinearMatMul"])
@pytest.mark.parametrize(("a", "b", "side"), PRODUCTS)
def test_vectors_and_batches(a, b, side, kind, tmp_path) -> None:
    """Products of any shapes have that of numpy's, in the graph and on the integer layer."""
    rng, left = np.random.default_rng(3), side == "left"
    shapes = {"w": a if left else b, "x": b if left else a}
    w, x = rng.integers(-99, 99, shapes["w"]).astype(np.int8), rng.integers(0, 256, shapes["x"]).astype(np.uint8)
    each = (
        len(shapes["w"]) > 1
        and kind != "MatMulInteger"
        and (kind == "MatMul" or (len(shapes["w"]), left) == (2, False))
    )
    axis = -2 if left else -1
    scale = rng.choice([0.5, 1, 2], shapes["w"][axis]).astype(np.float32) if each else np.float32(0.5)
    constants = {"w": w, "s": scale, "one": np.float32(1), "zx": np.uint8(3), "zw": np.int8(0), "big": np.float32(999)}
    operands = ["w s zw", "x one zx"] if left else ["x one zx", "w s zw"]
    nodes = {
        "MatMul": [
            node("DequantizeLinear", "w s", "wf", axis=len(shapes["w"]) + axis if each else 0),
            node("DequantizeLinear", "x one zx", "xf"),
            node("MatMul", "wf xf" if left else "xf wf", "y"),
        ],
        "MatMulInteger": [node("MatMulInteger", "w x zw zx" if left else "x w zx zw", "y")],
        "QLinearMatMul": [node("QLinearMatMul", f"{' '.join(operands)} big zx", "y")],
    }
    types = {"MatMul": TensorProto.FLOAT, "MatMulInteger": TensorProto.INT32, "QLinearMatMul": TensorProto.UINT8}
    path = save(model(nodes[kind], {"x": (2, shapes["x"])}, {"y": (types[kind], None)}, constants), tmp_path)
    centred = x.astype(int) - 3
    real = w * (scale[:, None] if each and left else scale) if kind != "MatMulInteger" else w
    expected = real @ centred if left else centred @ real
    if kind == "QLinearMatMul":
        expected = np.clip(np.rint(expected / 999) + 3, 0, 255)
    for target in (None, plain(20, overflow="saturate", tile=3)):  # the second one unfolds the input
        found = Emulator(path, target).run({"x": x})
        assert not found.left
        assert found.outputs["y"].shape == expected.shape
        assert np.abs(found.outputs["y"] - expected).max() < 1e-3


def test_products_of_vectors_or_matrices_run_as_they_are(tmp_path) -> None:
    """Where nobody knows which, a scale of each row has no place."""
    nodes = [
        node("DequantizeLinear", "w s", "wf", axis=0),
        node("Reshape", "x shape", "r"),
        node("DequantizeLinear", "r one", "xf"),
        node("MatMul", "wf xf", "y", "product"),
    ]
    constants = {"w": np.ones((3, 4), np.int8), "s": np.float32([1, 2, 4]), "one": np.float32(1)}
    inputs = {"x": (2, [4]), "shape": (TensorProto.INT64, ["n"])}
    path = save(model(nodes, inputs, {"y": None}, constants), tmp_path)
    for shape in ([4], [4, 1]):
        feeds = {"x": np.arange(4, dtype=np.uint8), "shape": np.array(shape)}
        found = Emulator(path, TARGETS["int32"]).run(feeds)
        assert found.left == {"product": "whether its input is a vector or a matrix is not known"}
        assert found.outputs["y"].tolist() == (np.array([6, 12, 24]).reshape(3, *shape[1:])).tolist()


def test_ties_round_as_in_onnxruntime(tmp_path) -> None:
    """Sums halfway between two codes: the scales must be multiplied in the same order."""
    x, w = np.arange(256, dtype=np.uint8)[:, None], np.arange(-31, 32, dtype=np.int8)[None]
    op = node("QLinearMatMul", "x xs xz w ws wz ys yz", "y", "op")
    for scale in RNG.uniform(0.01, 1, 6).astype(np.float32):
        numbers = {"xs": scale, "ws": np.float32(0.5) * scale, "ys": scale * scale * np.float32(32)}
        zeros = {"xz": np.uint8(0), "wz": np.int8(0), "yz": np.uint8(128)}
        held = {"w": w} | numbers | zeros
        path = save(model([op], {"x": (U8, x.shape)}, {"y": (U8, None)}, held), tmp_path)
        assert np.array_equal(emulate_file(path, plain(32), {"x": x}).outputs["y"], original(path, {"x": x})["y"])


@pytest.mark.parametrize("bits", [12, 32])
def test_float_outputs_are_exact_sums_times_one_scale(bits, tmp_path) -> None:
    """No optimization of the rewritten graph multiplies weights by scales before they are added."""
    scales = RNG.uniform(0.001, 0.01, 5).astype(np.float32)
    held = {"w": integers(-60, 60, 5, 3, 3, 3), "ws": scales, "wz": np.zeros(5, np.int8)}
    held |= {"s": np.float32(0.013), "z": np.uint8(7), "b": RNG.normal(size=5).astype(np.float32)}
    nodes = [
        node("DequantizeLinear", "x s z", "f"),
        node("DequantizeLinear", "w ws wz", "g", axis=0),
        node("Conv", "f g b", "y", "op", pads=[1, 1, 1, 1]),
    ]
    made = model(nodes, {"x": (U8, [2, 3, 6, 6])}, {"y": None}, held)
    path = save(made, tmp_path)
    x = integers(0, 255, 2, 3, 6, 6, dtype=np.uint8)
    (product,) = read(path).products
    sums = exact_sums(made, product, x.astype(np.int64) - 7)
    if bits == 12:
        sums = (sums + 2048) % 4096 - 2048
    unit = (product.act_scale * product.rows.scale).astype(np.float32).reshape(-1, 1, 1)
    expected = sums.astype(np.float32) * unit + held["b"].reshape(-1, 1, 1)
    assert np.array_equal(emulate_file(path, plain(bits), {"x": x}).outputs["y"], expected)


def test_other_operators_run_as_they_are_defined(tmp_path) -> None:
    """Quantized additions and poolings are not fused into operators that round in other ways."""
    numbers = {"a": 0.0371, "b": 0.0113, "c": 0.0279}
    held = {name: np.float32(value) for name, value in numbers.items()} | {"z": np.uint8(121)}
    nodes = [
        node("DequantizeLinear", "x a z", "f"),
        node("DequantizeLinear", "v b z", "g"),
        node("Add", "f g", "h"),
        node("QuantizeLinear", "h c z", "i"),
        node("DequantizeLinear", "i c z", "j"),
        node("AveragePool", "j", "k", kernel_shape=[2, 2]),
        node("QuantizeLinear", "k c z", "y"),
    ]
    path = save(
        model(nodes, {n: (U8, [1, 9, 64, 64]) for n in "xv"}, {"y": (U8, None), "i": (U8, None)}, held), tmp_path
    )
    feeds = {name: integers(0, 255, 1, 9, 64, 64, dtype=np.uint8) for name in "xv"}
    found = emulate_file(path, plain(8), feeds).outputs
    for name, array in original(path, feeds).items():
        assert np.array_equal(found[name], array)


FLOAT_OPERATORS = [
    ("Gemm", "f g b", {"transA": 1, "alpha": 0.5, "beta": 2.0}, (12, 5), (12, 6)),
    ("Gemm", "f g b", {"transB": 1}, (5, 12), (6, 12)),
    ("MatMul", "g f", {}, (12, 5), (6, 12)),
    ("MatMul", "f g", {}, (12,), (12, 6)),
    ("MatMul", "f g", {}, (3, 5, 12), (12,)),
    ("Conv", "h g b", {"group": 4}, (2, 4, 7), (6 * 2, 1, 3)),
]


@pytest.mark.parametrize(("kind", "inputs", "attributes", "x_shape", "w_shape"), FLOAT_OPERATORS)
def test_operators_on_floats(kind, inputs, attributes, x_shape, w_shape, tmp_path) -> None:
    """Scales are powers of two, so that onnxruntime is exact as well; `h` has one for each channel."""
    outputs = 12 if kind == "Conv" else 6
    held = {"w": integers(-60, 60, *w_shape), "s": np.float32(0.25), "z": np.uint8(7), "t": np.float32(0.5)}
    held |= {"u": np.float32([1, 2, 0.5, 4]).reshape(-1, 1), "b": np.arange(outputs, dtype=np.float32)}
    nodes = [
        node("DequantizeLinear", "x s z", "f"),
        node("DequantizeLinear", "w t", "g"),
        *([node("Mul", "f u", "h")] if kind == "Conv" else []),
        node(kind, inputs, "y", "op", **attributes),
    ]
    path = save(model(nodes, {"x": (U8, x_shape)}, {"y": None}, held), tmp_path)
    feeds = {"x": integers(0, 255, *x_shape, dtype=np.uint8)}
    wide = Emulator(path, plain(32)).run(feeds)
    assert wide.left == {}
    assert np.array_equal(wide.outputs["y"], original(path, feeds)["y"])
    narrow = Emulator(path, plain(10)).run(feeds)
    assert narrow.overflows > 0
    agree(narrow, Unfolded(path, plain(10)).run(feeds))


def test_a_node_without_its_inputs_is_refused(tmp_path) -> None:
    path = save(model([node("DequantizeLinear", "", "y")], {"x": [2]}, {"y": [2]}), tmp_path)
    with pytest.raises(ValueError, match="onnxruntime cannot load the network"):
        emulate_file(path, None, {"x": np.zeros(2, np.float32)})
