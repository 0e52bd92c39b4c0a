"""Loading: what is refused, external data, and tensors that stay in the file."""

from __future__ import annotations

import hashlib
import time
import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from accaware.onnx import wire
from accaware.onnx.graph import load
from accaware.onnx.read import read
from onnx_fuzz import W, small
from onnx_helpers import node, only, read_model, run, save, tensor


def refused(made, folder, match):
    path = save(made, folder) if not isinstance(made, bytes) else folder / "net.onnx"
    if isinstance(made, bytes):
        path.write_bytes(made)
    with pytest.raises(ValueError, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_damaged_files(tmp_path) -> None:
    good = small().SerializeToString()
    refused(b"", tmp_path, "empty")
    refused(b"not a model", tmp_path, "not an ONNX model")
    refused(good[:-20], tmp_path, "not an ONNX model")
    refused(onnx.ModelProto(ir_version=8).SerializeToString(), tmp_path, "no graph")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.onnx")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


def changed(change):
    made = small()
    change(made.graph, {t.name: t for t in made.graph.initializer})
    return made


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g, t: t["w"].dims.append(10**9), "24 bytes of data"),
        (lambda g, t: t["w"].dims.append(-1), "impossible"),
        (lambda g, t: t["w"].dims.extend([2**40] * 3), "impossible"),
        (lambda g, t: t["w"].ClearField("raw_data"), "0 values of data"),
        (lambda g, t: g.initializer.append(t["w"]), "two initializers 'w'"),
        (lambda g, t: g.initializer.remove(t["w"]), "reads 'w', which nothing"),
        (lambda g, t: g.node.append(g.node[0]), "'q' is computed twice"),
        (lambda g, t: g.node[3].output.append("s"), "'s' is computed twice"),
        (lambda g, t: g.node.reverse(), "which nothing before it"),
        (lambda g, t: g.node[0].input.__setitem__(0, "y"), "reads 'y', which nothing before it"),
        (lambda g, t: g.output.append(helper.make_tensor_value_info("o", 1, None)), "'o' is computed by no node"),
        (lambda g, t: g.input.append(g.input[0]), "two graph inputs"),
    ],
)
def test_impossible_graphs(change, match, tmp_path) -> None:
    refused(changed(change), tmp_path, match)


def test_attributes_that_runtimes_refuse(tmp_path) -> None:
    made = small()
    made.graph.node[3].attribute.extend(helper.make_attribute("transA", i) for i in (0, 1))
    refused(made, tmp_path, "two attributes 'transA'")
    body = helper.make_graph([], "body", [], [])
    made = small(nodes=[*small().graph.node, node("If", "c", "", then_branch=body)], c=np.array(True))
    made.graph.node[-1].attribute[0].ClearField("type")
    refused(made, tmp_path, "has no type")


def called(domain, name, opset=17):
    """A model with a local function, which adds, and a call of it in the place of its product."""
    made = small()
    opsets = [helper.make_opsetid("", opset)]
    made.functions.append(helper.make_function(domain, name, ["a", "b"], ["c"], [node("Add", "a a", "c")], opsets))
    del made.graph.node[3]
    made.graph.node.extend([node(name, "d f", "y", domain=domain), node("Gemm", "d f", "y2")])
    if domain:
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def test_functions_that_hide_an_operator_are_refused(tmp_path) -> None:
    """onnxruntime runs its own MatMul, whatever the function of that name does."""
    made = called("", "MatMul")
    values = run(made, {"x": np.full((2, 6), 9, np.float32)}, ["d", "f", "y"])
    assert (values["y"] == values["d"] @ values["f"]).all()
    for domain, name in (("", "MatMul"), ("ai.onnx", "Relu"), ("com.microsoft", "Gelu"), ("qonnx", "DebugMarker")):
        refused(called(domain, name), tmp_path, f"'{name}' is in domain '{domain}'")
    assert [op.kind for op in read_model(called("local", "MatMul"), tmp_path).operations] == ["Add", "Gemm"]


def test_functions_that_nothing_calls_hide_nothing(tmp_path) -> None:
    made = called("com.microsoft", "Gelu")
    (call,) = [n for n in made.graph.node if n.op_type == "Gelu"]
    call.op_type, call.domain = "MatMul", ""
    assert [op.kind for op in read_model(made, tmp_path).operations] == ["MatMul", "Gemm"]


def test_functions_that_stay_calls_are_refused(tmp_path) -> None:
    """onnx leaves those of other versions where they are; here the call would read as Gelu, which adds nothing."""
    refused(called("com", "microsoft.Gelu", opset=16), tmp_path, "of another version")


def test_names_that_are_no_text(tmp_path) -> None:
    refused(small().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel"), tmp_path, "no text")


def external(folder, location, data=None, **entries):
    made = small()
    (weights,) = [t for t in made.graph.initializer if t.name == "w"]
    data = weights.raw_data if data is None else data
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weights.external_data.add(key=key, value=str(value))
    if location and not location.startswith(("/", "..")):
        (folder / location).parent.mkdir(exist_ok=True, parents=True)
        (folder / location).write_bytes(data)
    return made


def test_external_data(tmp_path) -> None:
    plain = only(read_model(small(), tmp_path))
    made = external(tmp_path, "net.data", b"12345" + W.tobytes(), offset=5, length=24)
    network = read_model(made, tmp_path)
    assert (only(network).rows.raw() == plain.rows.raw()).all()
    path = tmp_path / "net.onnx"
    wanted = hashlib.sha256(path.read_bytes())
    wanted.update(b"net.data\0" + hashlib.sha256((tmp_path / "net.data").read_bytes()).digest())
    assert network.sha256 == wanted.hexdigest()
    assert read_model(small(), tmp_path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    below = read_model(external(tmp_path, "sub/net.data"), tmp_path)
    assert (only(below).rows.raw() == plain.rows.raw()).all()


def test_external_data_that_is_refused(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(24))
    (folder / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret")):
        refused(external(folder, location), folder, "no file in")
    for location in ("", ".", "absent/../../secret", "link", "absent"):
        refused(_placed(location), folder, "no file in")
    refused(_placed("a\0b"), folder, "null")
    refused(external(folder, "short", b"123"), folder, "outside its data file")
    refused(external(folder, "far", offset=10), folder, "outside its data file")
    refused(external(folder, "back", offset=-1), folder, "outside its data file")
    refused(external(folder, "length", length=23), folder, "23 bytes of data")
    refused(external(folder, "word", offset="x"), folder, "no number")


def _placed(location):
    made = small()
    (weights,) = [t for t in made.graph.initializer if t.name == "w"]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    return made


BOMBS = {
    "constant of shape": [node("ConstantOfShape", "big", "c"), node("Add", "d c", "y")],
    "expanded": [node("Expand", "s big", "c"), node("Add", "d c", "y")],
    "range": [node("Range", "zero far one", "c"), node("Add", "d c", "y")],
    "product of vectors": [node("Mul", "col row", "c"), node("Mul", "c c", "c2"), node("Add", "d c2", "y")],
    "weights": [node("ConstantOfShape", "big", "c"), node("MatMul", "d c", "y")],
    "slice": [node("Slice", "big zero far", "c"), node("Add", "d c", "y")],
    "kernel": [
        node("Unsqueeze", "long ax", "l"),
        node("Cast", "l", "k", to=1),
        node("ConvTranspose", "d k", "y", strides=[99999]),
    ],
    "strides": [node("ConvTranspose", "d f", "y", strides=[2**40], dilations=[2**40])],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_no_memory(bomb, tmp_path) -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w s", "f"),
        *BOMBS[bomb],
    ]
    constants = {
        "big": np.array([10**6, 10**6]),
        "zero": np.array([0]),
        "far": np.array([10**15]),
        "one": np.array([1]),
        "long": np.ones(10**6, np.int8),
        "ax": np.array([0, 1]),
        "col": np.ones((4000, 1), np.float32),
        "row": np.ones((1, 4000), np.float32),
    }
    path = save(small(nodes=nodes, **constants), tmp_path)
    tracemalloc.start()
    read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_weights_that_are_made_again_and_again(tmp_path, monkeypatch) -> None:
    """Every node makes new integers of the same floats."""
    monkeypatch.setattr("accaware.onnx.read._MADE_WEIGHTS", 0)
    nodes = [*small().graph.node[:2]]
    for i in range(200):
        nodes += [node("QuantizeLinear", "w s", f"q{i}"), node("DequantizeLinear", f"q{i} s", f"f{i}")]
        nodes.append(node("MatMul", f"d f{i}", f"y{i}", "one name"))
    nodes.append(node("Identity", "y0", "y"))
    path = save(small(np.ones((64, 64), np.float32), nodes), tmp_path)
    network = read(path)
    made = sum(op.rows.weights.nbytes for op in network.products)
    assert 0 < made < 17 * path.stat().st_size
    assert len(network.unproven) + len(network.products) == 200
    assert "far more weights" in network.unproven[-1].reason
    assert network.operations[-1].name == "one name#200"


def test_many_of_everything_take_no_time(tmp_path) -> None:
    empty = helper.make_graph([], "e", [], [])
    nodes = [*small().graph.node[:3], *(node("If", "c", "", "same", then_branch=empty) for _ in range(2000))]
    nodes += [node("Concat", "k k", f"k{i}", axis=0) for i in range(2000)]
    made = small(nodes=[*nodes, node("MatMul", "d f", "y")], c=np.array(True), k=np.ones(2000))
    path = save(made, tmp_path)
    start = time.process_time()
    tracemalloc.start()
    assert len(read(path).products) == 1
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    assert time.process_time() - start < 10


def test_nested_subgraphs(tmp_path) -> None:
    inner = helper.make_graph([node("MatMul", "d f", "y0")], "g", [], [helper.make_tensor_value_info("y0", 1, None)])
    for i in range(1, 20):
        deeper = node("If", "c", f"y{i}", then_branch=inner, else_branch=helper.make_graph([], "e", [], []))
        inner = helper.make_graph([deeper], "g", [], [helper.make_tensor_value_info(f"y{i}", 1, None)])
    made = small(c=np.array(True))
    made.graph.node[3].CopyFrom(node("If", "c", "y", then_branch=inner))
    assert len(read_model(made, tmp_path).products) == 1
    deep = bytes(8)
    for number in [6, 5, 1] * 2000:  # a graph of a node of an attribute of a graph ...
        deep = bytes([number << 3 | 2]) + wire._varint(len(deep)) + deep
    refused(bytes([7 << 3 | 2]) + wire._varint(len(deep)) + deep, tmp_path, "not an ONNX model")


def test_large_tensors_stay_in_the_file(tmp_path) -> None:
    weights = np.random.default_rng(0).integers(-128, 128, (2048, 1024), np.int8)
    constant = node("Constant", "", "k", value=tensor("k", weights[:1024]))
    constant.ClearField("input")
    nodes = [*small().graph.node, constant, node("DequantizeLinear", "k s", "g"), node("MatMul", "y g", "u")]
    path = save(small(weights, nodes), tmp_path)
    tracemalloc.start()
    network = read(path)
    rows = network.products[0].rows.raw()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weights.size / 8
    assert (rows == weights.T).all()
    assert np.shares_memory(rows, network.products[0].rows.weights)
    assert "known codes" in network.unproven[0].reason  # its weights, in a node, are read too
    assert (load(path).graph.nodes[4].attributes["value"].array == weights[:1024]).all()


def test_a_cut_model_is_the_same_model() -> None:
    weights = np.arange(40000, dtype=np.float32).reshape(200, 200)
    nested = helper.make_graph(
        [node("Identity", "v", "y")], "g", [], [helper.make_tensor_value_info("y", 1, None)], [tensor("v", weights + 1)]
    )
    made = small(weights)
    made.graph.node.append(node("If", "c", "u", then_branch=nested))
    data = made.SerializeToString()
    stripped = wire.cut(memoryview(data))
    assert len(stripped.message) < 4096
    parsed = onnx.ModelProto.FromString(stripped.message)
    large = [parsed.graph.initializer[2], parsed.graph.node[-1].attribute[0].g.initializer[0]]
    for tensor_, values in zip(large, (weights, weights + 1), strict=True):
        tensor_.raw_data = bytes(stripped.data(tensor_.raw_data))
        assert tensor_.raw_data == values.tobytes()
    assert parsed == made


def test_no_file_can_forge_a_view(tmp_path) -> None:
    token = bytes(16) + (0).to_bytes(8, "little") + (24).to_bytes(8, "little")
    weights = np.frombuffer(token, np.int8).reshape(8, 4)
    assert (only(read_model(small(weights), tmp_path)).rows.raw() == weights.T).all()
