"""Networks leave as files that other people's tools run: equal to the bit, and proven for what they were made for."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import accaware as aa
from accaware.certify.carried import KEY
from accaware.certify.certificate import Certificate
from accaware.certify.files import certify_file, file_layers
from accaware.certify.second import disagreements
from accaware.cli import run as command
from accaware.exporter.capture import capture
from accaware.integer.network import integer_network
from accaware.onnx.read import read
from exporter.helpers import NETWORKS, file_operands, operands, prepared
from onnx_helpers import run

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

DIALECTS = ["qdq", "qcdq", "qonnx", "qoperator"]
REQUESTS = {
    "W4A4": {"acc_bits": 11, "preload": "free"},
    "W8A8": {"weight_bits": 8, "act_bits": 8, "acc_bits": 17, "method": "a2q+"},
}


def exported(name, dialect, folder, **request):
    """The model, its file and an input."""
    model, x = prepared(name, **request)
    path = folder / "net.onnx"
    aa.export(model, path, dialect, sample=x[:2])
    return model, path, x


@pytest.fixture
def captured_once(monkeypatch):
    """PyTorch's exporter, which takes most of the time, runs once for all dialects of one version of ONNX."""
    seen = {}

    def capture_once(network, sample, opset):
        if opset not in seen:
            seen[opset] = capture(network, sample, opset).SerializeToString()
        return onnx.ModelProto.FromString(seen[opset])

    monkeypatch.setattr("accaware.exporter.write.capture", capture_once)


def fast(made, feeds, wanted):
    """As users run it: every optimization of onnxruntime."""
    made = onnx.ModelProto.FromString(made.SerializeToString())
    del made.graph.output[:]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def by_qonnx(made, feeds, wanted):
    """As qonnx's own executor runs it, after its own shape inference."""
    from qonnx.core import onnx_exec
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes

    model = ModelWrapper(made)
    ((name, array),) = feeds.items()
    model.set_tensor_shape(name, list(array.shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx.IR_VERSION", 10)  # of the models of one node that it runs, which onnxruntime must know
        context = onnx_exec.execute_onnx(model.transform(InferShapes()), feeds, return_full_exec_context=True)
    return {name: context[name] for name in wanted}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_dialect_computes_the_same_and_is_proven_the_same(name, request_, captured_once, tmp_path) -> None:
    model, x = prepared(name, **REQUESTS[request_])
    out, codes = operands(integer_network(model, x), x)
    for dialect in DIALECTS:
        if (name, dialect) == ("transposed", "qoperator"):
            continue  # which qoperator does not have
        path = tmp_path / f"{dialect}.onnx"
        aa.export(model, path, dialect, sample=x[:2])
        proven_the_same(model, path)
        for runner in (by_qonnx,) if dialect == "qonnx" else (run, fast):
            there, seen = file_operands(path, codes, x, runner)
            assert seen.keys() == codes.keys()
            for layer in codes:
                assert np.array_equal(seen[layer], codes[layer]), (dialect, layer)
            if name == "residual":  # the mean over an image is a sum in some order
                assert np.allclose(there, out, rtol=1e-5, atol=1e-5)
            else:
                assert np.array_equal(there, out)
        onnx.checker.check_model(onnx.load(path), full_check=dialect != "qonnx")


def proven_the_same(model, path) -> None:
    """The file has the model's integers, and its own metadata are proven as the model's request was."""
    before, again = aa.certify(model), certify_file(path)
    assert again.target == "file"
    assert again.holds == before.holds
    assert again.bits_needed == before.bits_needed
    ours = {op.name: op for op in before.operations if op.lo}
    theirs = {op.name: op for op in again.operations if op.lo}
    assert ours.keys() == theirs.keys()
    for layer, op in ours.items():
        for field in ("lo", "hi", "preload", "codes", "verdict"):
            assert getattr(op, field) == getattr(theirs[layer], field), (layer, field)
        assert op.target.bits == theirs[layer].target.bits
    rows = {layer.name: layer.rows for layer in aa.integer_layers(model)}
    for layer in file_layers(path):
        assert np.array_equal(layer.rows, rows[layer.name])
    assert disagreements(Certificate.from_json(again.to_json()), path) == []


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_every_width_is_read_back(bits, captured_once, tmp_path) -> None:
    model, x = prepared("mobile", act_bits=bits, weight_bits=max(2, bits), keep={"0": 8}, acc_bits=20)
    for dialect in DIALECTS:
        aa.export(model, tmp_path / "net.onnx", dialect, sample=x[:2])
        first, *rest = read(tmp_path / "net.onnx").products
        assert (first.codes.lo, first.codes.hi) == (-128, 127)
        for product in rest:
            assert (product.codes.lo, product.codes.hi) == (0, 2**bits - 1)


def test_layers_kept_in_floats_are_outside_the_request_of_the_file(tmp_path) -> None:
    """Of which the exporter folds a batch-norm into one and transposes the weights of another, which runs twice."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, bias=False), nn.BatchNorm1d(4)
            self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.norm(self.b(torch.relu(self.a(x))))
            return self.d(torch.relu(self.c(torch.relu(self.c(x)))))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 12)
    aa.prepare_(model, aa.Spec(acc_bits=12), x, keep={"b": "float", "c": "float"})
    aa.calibrate(model, [x])
    aa.export(model, tmp_path / "net.onnx", sample=x)
    certificate = certify_file(tmp_path / "net.onnx")
    assert [(op.name, op.verdict) for op in certificate.operations] == [
        *(("a", "proven"), ("b", "outside"), ("c", "outside"), ("c#2", "outside"), ("d", "proven"))
    ]
    assert disagreements(certificate, tmp_path / "net.onnx") == []
    assert {op.name for op in aa.certify(model).operations if op.verdict == "outside"} == {"b", "c"}


def tampered(path, change):
    """The file with other metadata."""
    model = onnx.load(path)
    (entry,) = model.metadata_props
    data = json.loads(entry.value)
    change(data["operations"])
    entry.value = json.dumps(data)
    onnx.save(model, path)


def test_start_values_are_part_of_the_proof(tmp_path) -> None:
    model, path, _ = exported("mobile", "qdq", tmp_path, acc_bits=10, preload="free")
    certificate = certify_file(path)
    assert certificate.holds
    assert any(op.preload for op in certificate.inside)
    assert not aa.certify(model).operations[0].bits_needed > 10
    claimed = Certificate.from_json(certificate.to_json())
    layer = next(op.name for op in certificate.inside if op.preload)
    tampered(path, lambda ops: ops[layer].update(preload=[]))
    assert not certify_file(path).holds
    other = certify_file(path)
    assert disagreements(other, path) == []  # refuted, and rightly so
    forged = replace(claimed, sha256=other.sha256)
    assert any("start values" in line for line in disagreements(forged, path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ops: ops["0"].update(preload=[0.5]), "preload of operation '0' must be integers"),
        (lambda ops: ops["0"].update(register={"bits": 99}), "acc_bits must lie in"),
        (lambda ops: ops["0"].update(register={"size": 9}), "damaged"),
        (lambda ops: ops["0"].pop("inside"), "must have register, preload, inside"),
        (lambda ops: ops.update({"0": 3}), "must have register, preload, inside"),
    ],
)
def test_damaged_metadata_is_one_line(change, message, tmp_path) -> None:
    _, path, _ = exported("linear", "qdq", tmp_path)
    tampered(path, change)
    with pytest.raises(ValueError, match=message):
        certify_file(path)


def test_too_many_start_values_are_unproven(tmp_path) -> None:
    _, path, _ = exported("linear", "qdq", tmp_path)
    tampered(path, lambda ops: ops["0"].update(preload=[1] * 9))
    (op, *_) = certify_file(path).operations
    assert "9 start values" in op.reason


def test_tiles_travel(tmp_path) -> None:
    model, path, _ = exported("mobile", "qdq", tmp_path, acc_bits=10, tile=5, outer_bits=20, preload="free")
    certificate = certify_file(path)
    assert certificate.holds
    ours = {
        op.name: (op.lo, op.hi, op.outer_lo, op.outer_hi, op.preload) for op in aa.certify(model).operations if op.lo
    }
    assert {op.name: (op.lo, op.hi, op.outer_lo, op.outer_hi, op.preload) for op in certificate.operations} == ours
    assert disagreements(certificate, path) == []


def test_kept_layers_stay_outside(tmp_path) -> None:
    _, path, _ = exported("mobile", "qonnx", tmp_path, acc_bits=10, keep={"0": 8})
    certificate = certify_file(path)
    assert certificate.operations[0].verdict == "outside"
    assert certificate.bits_needed <= 10
    assert disagreements(certificate, path) == []


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


def test_a_layer_that_runs_twice_is_two_operations(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "twice", (Twice, (6,)))
    model, path, x = exported("twice", "qdq", tmp_path)
    certificate = certify_file(path)
    assert [op.name for op in certificate.operations] == ["layer", "layer#2"]
    assert certificate.holds
    out, _ = operands(integer_network(model, x), x)
    assert np.array_equal(file_operands(path, {"layer"}, x, fast)[0], out)


class NamedAsTorchDoes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.node_relu, self.relu = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.relu(torch.relu(self.node_relu(x)))


def test_names_that_the_exporter_gives_are_free_for_layers(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "named", (NamedAsTorchDoes, (6,)))
    model, path, x = exported("named", "qdq", tmp_path)
    assert [op.name for op in certify_file(path).operations] == ["node_relu", "relu"]
    out, _ = operands(integer_network(model, x), x)
    assert np.array_equal(file_operands(path, {"relu"}, x, fast)[0], out)


def test_files_say_nothing_of_the_machine(tmp_path) -> None:
    _, path, _ = exported("residual", "qdq", tmp_path)
    contents = path.read_bytes()
    assert not re.search(rb'\.py"|site-packages|stack_trace', contents)
    assert [entry.key for entry in onnx.load(path).metadata_props] == [KEY]


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return torch.linalg.eigvals(self.layer(x)[:, :, None] @ x[:, None]).real


@pytest.mark.parametrize(
    ("network", "dialect", "options", "message"),
    [
        ("transposed", "qoperator", {}, "^0: qoperator has no transposed convolution; qdq, qcdq and qonnx have$"),
        ("linear", "qonnx", {"act_bits": 1}, "^0: codes of one signed bit .* qdq and qcdq have them$"),
        ("linear", "onnx", {}, "^dialect must be one of qdq, qcdq, qonnx, qoperator, not 'onnx'$"),
        ("sorted", "qdq", {}, "^PyTorch cannot write Sorted as ONNX: .*linalg_eig"),
    ],
)
def test_what_cannot_be_written_is_one_line(network, dialect, options, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "sorted", (Sorted, (6,)))
    model, x = prepared(network, **options)
    with pytest.raises(ValueError, match=message) as caught:
        aa.export(model, tmp_path / "net.onnx", dialect, sample=x[:2])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_exported_by_command(ptq_options, tmp_path, capsys) -> None:
    assert command(["ptq", *ptq_options, "--acc-bits", "12", "--out", "run"]) == 0
    assert command(["export", "run", "--dialect", "qonnx", "-o", "net.onnx"]) == 0
    assert "holds" in capsys.readouterr().out
    assert command(["certify", "net.onnx", "--json", "cert.json"]) == 0
    assert command(["check", "cert.json", "net.onnx"]) == 0
    assert command(["emulate", "run", "--limit", "2"]) == 0
    assert "file: 0 overflows; 2 of 2 rows" in capsys.readouterr().out
    assert command(["export", "run", "--dialect", "tflite", "-o", "other.onnx"]) == 2
    assert "dialect must be one of" in capsys.readouterr().err
    assert not (tmp_path / "other.onnx").exists()
