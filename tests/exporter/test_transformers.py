"""Transformers leave as files: any number of rows and tokens, rotated and with a scale for each token too."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

import accaware as aa
from accaware.certify.files import certify_file, file_layers
from accaware.certify.second import disagreements
from accaware.cli import run as command
from transformer_helpers import folder, padded, tiny

pytest.importorskip("onnxscript")

KEEP = {"bert": {"pooler.dense": "float"}, "llama": {"lm_head": "float"}}
CASES = [
    ("bert", "qdq", {}),
    ("bert", "qoperator", {"act_scale": "token", "rotate": True}),
    ("llama", "qcdq", {"act_scale": "token"}),
    ("llama", "qonnx", {"rotate": True}),
]


def prepared(kind, **request):
    model, batches = tiny(kind), [padded([5, 9, 9, 3], seed) for seed in range(3)]
    model.config.use_cache = False
    aa.prepare_(model, aa.Spec(8, 8, 16, tile=8, **request), batches[0], keep=KEEP[kind])
    aa.calibrate(model, batches, init="none")
    sample = batches[0] if kind == "llama" else {"token_type_ids": None, **batches[0]}  # what is no tensor is no input
    return model, sample


@pytest.mark.parametrize(("kind", "dialect", "request_"), CASES)
def test_files_compute_what_the_integer_network_does_and_are_proven(kind, dialect, request_, tmp_path):
    model, sample = prepared(kind, **request_)
    path = tmp_path / "net.onnx"
    certificate = aa.export(model, path, dialect, sample)
    assert certificate.holds
    assert disagreements(certificate, path) == []
    integers = {layer.name: layer for layer in aa.integer_layers(model)}
    written = {layer.name: layer for layer in file_layers(path) if layer.inside}
    assert {op.name for op in certificate.inside} == set(written) == set(integers)
    assert all(np.array_equal(written[name].rows, layer.rows) for name, layer in integers.items())
    attention = [op for op in certificate.operations if op.name not in integers and op.kind == "MatMul"]
    assert len(attention) >= 2, "products of activations, which nobody asked to prove"
    if dialect == "qonnx":  # which onnxruntime does not run
        return
    other = padded([7, 11], 5)  # other numbers of rows and tokens than those of the sample
    with torch.no_grad():
        wanted = aa.integer_network(model, sample)(**other)[0].numpy()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    feeds = {name: tensor.numpy() for name, tensor in other.items()}
    (found,) = session.run(["output"], feeds)
    # Floats between the layers (norms, softmax, rotations) are added in other orders, which may round a code otherwise.
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
    emulated = aa.emulate_file(path, aa.Target("16 bits", aa.Accumulator(16, tile=8)), feeds)
    assert emulated.overflows == 0
    assert np.linalg.norm(emulated.outputs["output"] - found) < 1e-3 * np.linalg.norm(found)


def test_from_a_folder_to_a_proven_file(tmp_path, capsys):
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("a cat sees the dog\n" * 60)
    words = ["ptq", "--data", "text", "--data-dir", str(tmp_path), "--model", f"hf:{folder('gpt2', tmp_path / 'gpt2')}"]
    words += ["--max-length", "16", "--calib", "8", "--tile", "8", "--act-bits", "8", "--init", "none"]
    assert command([*words, "--act-scale", "token", "--out", str(tmp_path / "run")]) == 0
    assert command(["export", str(tmp_path / "run"), "-o", str(tmp_path / "net.onnx")]) == 0
    assert "written in qdq" in capsys.readouterr().out
    assert certify_file(tmp_path / "net.onnx").holds


class Functional(torch.nn.Module):
    """A product with weights of floats that no layer holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), torch.nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) @ self.w


def test_weights_of_floats_that_no_layer_holds_stay_unproven(tmp_path):
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(4, 6)
    aa.prepare_(model, aa.Spec(8, 8, 20), x)
    aa.calibrate(model, [x], init="none")
    certificate = aa.export(model, tmp_path / "net.onnx", sample=x)
    assert not certificate.holds
    assert [op.verdict for op in certificate.operations if op.name not in ("a", "b")] == ["unproven"]
