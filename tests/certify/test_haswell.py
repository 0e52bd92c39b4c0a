"""The real thing: onnxruntime's AVX2 kernels saturate where certificates say so, and no more after repair."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import quantization as q

from accaware.certify.emulation import emulate_file
from accaware.certify.files import certify_file, file_layers
from accaware.certify.proof import witnesses
from accaware.certify.repair import repair_file
from accaware.certify.targets import TARGETS
from onnx_helpers import model, node, save
from onnx_networks import quantized, signed_qdq

WHERE = TARGETS["onnxruntime-avx2"]
QEMU = shutil.which("qemu-x86_64")
CPU = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"  # without what the emulator warns that it lacks
SCRIPT = Path(__file__).with_name("run_model.py")


def on_haswell(path, folder, **feeds):
    """The outputs of a model on a processor with AVX2 and without VNNI."""
    np.savez(folder / "in.npz", **feeds)
    words = [QEMU, "-cpu", CPU, sys.executable, str(SCRIPT), *map(str, (path, folder / "in.npz", folder / "out.npz"))]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")}
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = kept | one | {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=240
    )
    with np.load(folder / "out.npz") as found:
        return dict(found)


def matmul(folder, weights):
    """MatMulInteger of u8 codes [B, K] and s8 weights [K, O]."""
    made = model(
        [node("MatMulInteger", "x w", "y", "op")], {"x": (2, ["b", len(weights)])}, {"y": (6, None)}, {"w": weights}
    )
    return save(made, folder)


def conv(folder, weights, scale):
    """QLinearConv of u8 codes [1, C, 4] and s8 weights [O, C, 1]; the output is sum * scale."""
    constants = {"one": np.float32(1), "z": np.uint8(0), "w": weights, "zw": np.int8(0), "sy": np.float32(1 / scale)}
    constants["zy"] = np.uint8(128)
    nodes = [node("QLinearConv", "x one z w one zw sy zy", "y", "op", kernel_shape=[1])]
    shape = [1, weights.shape[1], 4]
    return save(model(nodes, {"x": (2, shape)}, {"y": (2, None)}, constants), folder)


@pytest.fixture(scope="module")
def haswell(tmp_path_factory):
    if QEMU is None or platform.machine() != "x86_64":
        pytest.skip("needs qemu-x86_64 (Debian: qemu-user) on an x86-64 machine")
    folder = tmp_path_factory.mktemp("canary")
    path = matmul(folder, np.full((64, 1), 127, np.int8))
    found = on_haswell(path, folder, x=np.full((1, 64), 255, np.uint8))["y"].item()
    if found != 1048544:
        pytest.skip(f"this emulator does not run the saturating kernel: {found}, and not 1048544")


def test_witnesses_make_matrix_products_wrong_and_repair_makes_them_right(haswell, tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.integers(-128, 128, (9, 24), dtype=np.int8)
    weights[:, ::3] //= 2  # rows that are safe
    path = matmul(tmp_path, weights)
    (layer,) = file_layers(path, WHERE)
    found = list(witnesses(layer))
    refuted = sorted(w.row for w in found)
    assert 8 <= len(refuted) <= 16
    inputs = np.array([w.inputs for w in found], np.uint8)
    heavy = rng.choice([0, 255, 254], (400, 9), p=[0.3, 0.5, 0.2]).astype(np.uint8)
    batch = np.concatenate([inputs, heavy])
    exact = batch.astype(np.int64) @ weights
    real = on_haswell(path, tmp_path, x=batch)["y"]
    assert all(real[i, w.row] != exact[i, w.row] for i, w in enumerate(found))
    assert sorted(set(np.argwhere(real != exact)[:, 1])) == refuted  # no other row is ever wrong

    fixed = tmp_path / "repaired.onnx"
    repair_file(path, fixed, WHERE)
    assert certify_file(fixed, WHERE).holds
    (repaired,) = file_layers(fixed, WHERE)
    batch = np.concatenate([batch, rng.integers(0, 256, (100, 9), dtype=np.uint8)])
    assert (on_haswell(fixed, tmp_path, x=batch)["y"] == batch.astype(np.int64) @ repaired.rows.T).all()
    assert (repaired.rows != weights.T).any(axis=1).nonzero()[0].tolist() == refuted


def test_convolutions_pair_channels(haswell, tmp_path):
    weights = np.array([[127, 127, 0, 0], [127, 0, 127, 0], [-128, -1, 0, 0], [64, 64, -64, -64]], np.int8)[..., None]
    path = conv(tmp_path, weights, scale=1 / 600)
    (op,) = certify_file(path, WHERE).operations
    (layer,) = file_layers(path, WHERE)
    assert sorted(w.row for w in witnesses(layer)) == [0, 2]
    assert op.verdict == "refuted"
    batch = np.full((1, 4, 4), 255, np.uint8)
    batch[:, 2:, :2] = 0
    exact = np.einsum("oc,bcl->bol", weights[..., 0].astype(int), batch.astype(int))
    real = on_haswell(path, tmp_path, x=batch)["y"].astype(int)
    expected = np.clip(np.rint(exact / 600) + 128, 0, 255)
    wrong = (np.abs(real - expected) > 1).any(axis=(0, 2))
    assert wrong.tolist() == [True, False, False, False]  # row 2 is off by one unit of the sum

    fixed = tmp_path / "repaired.onnx"
    repair_file(path, fixed, WHERE)
    (repaired,) = file_layers(fixed, WHERE)
    sums = np.einsum("oc,bcl->bol", repaired.rows.astype(int), batch.astype(int)) * repaired.scale[:, None]
    real = on_haswell(fixed, tmp_path, x=batch)["y"].astype(int)
    assert np.abs(real - np.clip(sums / 600 + 128, 0, 255)).max() <= 0.51


def test_weights_on_the_left_saturate_where_they_are_unsigned(haswell, tmp_path):
    """All operators at once; rows with and without a pair that is too large, for codes of either sign."""
    rows = {"u": np.uint8([[255] * 8, [128, 0] * 4, [0] * 8]), "s": np.int8([[127] * 8, [-128] * 8, [64, -64] * 4])}
    feeds = {"xs": np.tile(np.int8([127, -128]), (8, 1)), "xu": np.full((8, 2), 255, np.uint8)}
    constants = {"one": np.float32(1), "big": np.float32(5000), "us": np.int8(0), "uu": np.uint8(0)}
    nodes = []
    for x, w in ("su", "uu", "us", "ss"):
        constants[f"w{w}"] = rows[w]
        a, b, zero = f"w{w}", f"x{x}", f"u{w} u{x}"
        y = [f"y{x}{w}{i}" for i in range(5)]
        nodes += [
            node("MatMulInteger", f"{a} {b} {zero}", y[0]),
            node("DequantizeLinear", f"{a} one u{w}", f"{y[0]}w"),
            node("DequantizeLinear", f"{b} one u{x}", f"{y[0]}x"),
            node("MatMul", f"{y[0]}w {y[0]}x", y[1]),
        ]
        if (w, x) != ("s", "u"):  # onnxruntime has no kernel for these
            nodes.append(node("MatMulIntegerToFloat", f"{a} {b} one one {zero}", y[2], domain="com.microsoft"))
        if w == "u":
            nodes.append(node("QLinearMatMul", f"{a} one u{w} {b} one u{x} big u{w}", y[3]))
            nodes.append(node("QGemm", f"{a} one u{w} {b} one u{x}", y[4], domain="com.microsoft"))
    types = {"MatMulInteger": 6, "MatMul": 1, "MatMulIntegerToFloat": 1, "QLinearMatMul": 2, "QGemm": 1}
    made = model(
        nodes,
        {"xs": (3, [8, 2]), "xu": (2, [8, 2])},
        {n.output[0]: (types[n.op_type], None) for n in nodes if n.op_type in types},
        constants,
        extra=[("com.microsoft", 1)],
    )
    path = save(made, tmp_path)
    real = on_haswell(path, tmp_path, **feeds)
    for op in certify_file(path, WHERE).operations:
        y = op.name
        exact = rows[y[2]].astype(int) @ feeds[f"x{y[1]}"].astype(int)
        expected = np.clip(np.rint(exact / 5000), 0, 255) if y[3] == "3" else exact
        wrong = (real[y] != expected).any(axis=1)
        assert op.verdict == ("refuted" if y[1:3] == "su" else "proven"), y
        assert wrong.tolist() == ([True, False, False] if y[1:3] == "su" else [False] * 3), y


@pytest.mark.parametrize("file", ["qoperator", "qdq", "signed"])
def test_the_emulator_says_what_the_kernels_do(haswell, file, tmp_path):
    """Networks of several layers to the bit, where floats do not round in another order."""
    if file == "signed":
        made, feeds = signed_qdq(relu=True)
        path = save(made, tmp_path)
    else:
        form = q.QuantFormat.QOperator if file == "qoperator" else q.QuantFormat.QDQ
        types = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8}
        _, path, feeds = quantized("residual", tmp_path, quant_format=form, per_channel=True, **types)
        feeds["x"] *= 4
    done = emulate_file(path, WHERE, feeds)
    exact = emulate_file(path, None, feeds).outputs["y"]
    real = on_haswell(path, tmp_path, **feeds)["y"]
    assert done.overflows > 0
    assert not np.array_equal(real, exact)
    if file == "qdq":  # onnxruntime adds codes where the file adds floats
        step = np.diff(np.unique(real)).min()
        assert np.abs(real - done.outputs["y"]).max() < 1.01 * step
    else:
        assert np.array_equal(real, done.outputs["y"])
