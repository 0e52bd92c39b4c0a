"""The examples: a network without PyTorch, and a layer in C."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import accaware as aa
from accaware.integer.network import integer_network
from exporter.helpers import operands, prepared
from onnx_helpers import run

EXAMPLES = Path(__file__).parents[2] / "examples"
ALONE = """
import runpy, sys
for name in ("torch", "onnx", "accaware"):
    sys.modules[name] = None  # importing it fails
path, *sys.argv = sys.argv[1:]
runpy.run_path(path, run_name="__main__")
"""


def alone(*words, script=EXAMPLES / "run_onnxruntime.py"):
    """What a Python without PyTorch, onnx and this library prints."""
    command = [sys.executable, "-c", ALONE, str(script), script.name, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_file_runs_without_pytorch(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    model, x = prepared("residual", rows=150, acc_bits=12)
    path = tmp_path / "net.onnx"
    aa.export(model, path, "qdq", sample=x[:2])
    out, _ = operands(integer_network(model, x), x)
    labels = np.where(np.arange(len(x)) < 120, out.argmax(1), -1)  # 80 % are right
    np.savez(tmp_path / "data.npz", images=x.numpy(), labels=labels)
    assert alone(path, tmp_path / "data.npz") == "top-1 80.00 % of 150 images\n"
    row = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
    printed = np.array(alone(path).replace("[", "").replace("]", "").split(), float)
    assert np.allclose(printed, run(onnx.load(path), {"input": row}, ["output"])["output"], atol=1e-5)


def test_an_encoder_runs_without_pytorch(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    helpers = pytest.importorskip("transformer_helpers")
    model, batch = helpers.tiny("bert"), helpers.padded([5, 9, 3])
    aa.prepare_(model, aa.Spec(8, 8, 20), batch, keep={"pooler.dense": "float"})
    aa.calibrate(model, [batch], init="none")
    aa.export(model, tmp_path / "net.onnx", sample=batch)
    (tmp_path / "pairs.tsv").write_text("2.5\ta cat\tthe dog\n1.0\ta tree sees\ta house near\n\tbig\tsmall cat\n")
    tokenizer = helpers.folder("bert", tmp_path / "model") / "tokenizer.json"
    words = (tmp_path / "net.onnx", tokenizer, tmp_path / "pairs.tsv")
    *lines, last = alone(*words, script=EXAMPLES / "encode_onnxruntime.py").splitlines()
    with torch.no_grad():
        a, b = (integer_network(model, batch)(input_ids=torch.tensor([ids]))[0][0].mean(0) for ids in ([4, 6], [5, 7]))
    cosine, *sentences = lines[0].split("\t")
    assert float(cosine) == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-3)
    assert (sentences, len(lines)) == (["a cat", "the dog"], 3)
    assert last in ("Spearman 100.00 % of 2 pairs", "Spearman -100.00 % of 2 pairs")


def in_c(header, codes, folder):
    """Sums and outputs, [positions, channels] each, of codes [positions, taps]."""
    (folder / "layer.h").write_text(header)
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run(["gcc", *flags, f"-I{folder}", EXAMPLES / "layer.c", "-o", folder / "layer"], check=True)
    text = "\n".join(" ".join(map(str, row)) for row in codes.tolist())
    done = subprocess.run([folder / "layer"], input=text, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return np.array(lines[0::2], np.int64), np.array(lines[1::2], np.float32)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to compile examples/layer.c")
@pytest.mark.parametrize(
    ("name", "bits"), [("conv1", 9), ("conv2", 9), ("linear", 8)]
)  # of codes with and without sign
def test_a_layer_in_c_is_the_integer_network(name, bits, tmp_path) -> None:
    header = runpy.run_path(str(EXAMPLES / "layer_header.py"))["header"]
    model, x = prepared("residual", acc_bits=bits, preload="free")
    op = integer_network(model, x).get_submodule(name)
    assert op.layer.preload.any()
    ends = torch.where(op.q > 0, op.hi, op.lo), torch.where(op.q > 0, op.lo, op.hi)  # where the register is full
    codes = torch.cat([*ends, torch.randint(op.lo, op.hi + 1, (8, *op.q.shape[1:]))]).float()
    wanted = op.sums(codes), op(codes * op.act_scale)
    sums, outputs = (y.flatten(2).mT.flatten(0, 1) if y.dim() == 4 else y for y in wanted)
    taps = torch.nn.functional.unfold(codes, 3, padding=1).mT.flatten(0, 1) if codes.dim() == 4 else codes
    found = in_c(header(op), taps.int(), tmp_path)
    assert np.array_equal(found[0], sums)
    assert np.array_equal(found[1], outputs)
    narrow, _ = in_c(header(op).replace(f"ACC_BITS {bits}", f"ACC_BITS {bits - 1}"), taps.int(), tmp_path)
    assert not np.array_equal(narrow, sums)


def test_layers_that_the_c_does_not_show_are_refused() -> None:
    header = runpy.run_path(str(EXAMPLES / "layer_header.py"))["header"]
    model, x = prepared("mobile")
    with pytest.raises(ValueError, match=r"^3: layer\.c shows one running sum"):
        header(integer_network(model, x).get_submodule("3"))
