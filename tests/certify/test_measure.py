"""`accaware emulate`: data in, counts and accuracy out, and one line for whatever is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto

from accaware.certify.emulation import Emulator, emulate_file
from accaware.certify.measure import random_feeds, top1
from accaware.certify.targets import TARGETS
from accaware.cli import run
from onnx_helpers import model, node, save

U8, I32 = TensorProto.UINT8, TensorProto.INT32
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (20, 8)).astype(np.uint8)
W = RNG.integers(-9, 10, (8, 5)).astype(np.int8)
SUMS = X.astype(int) @ W
WRAPPED = (SUMS + 2048) % 4096 - 2048
LABELS = SUMS.argmax(axis=1)


@pytest.fixture
def file(tmp_path):
    op = node("MatMulInteger", "x w", "y", "op")
    return save(model([op], {"x": (U8, ["n", 8])}, {"y": (I32, ["n", 5])}, {"w": W}), tmp_path)


def npz(folder, name="data.npz", **arrays):
    np.savez(folder / name, **arrays)
    return str(folder / name)


def test_counts_and_accuracy(file, tmp_path, capsys) -> None:
    out, outputs = tmp_path / "out.json", tmp_path / "out.npz"
    data = npz(tmp_path, images=X, labels=LABELS)
    options = ["--data", data, "--acc-bits", "12", "--json", str(out), "--outputs", str(outputs), "--batch-size", "7"]
    assert run(["emulate", str(file), *options]) == 0
    found = json.loads(out.read_text())
    overflows = int((SUMS != WRAPPED).sum())
    assert overflows > 0
    assert found["operations"] == [
        {"name": "op", "kind": "MatMulInteger", "bits": 12, "sums": 100, "overflows": overflows}
    ]
    assert found["overflows"] == overflows
    assert found["exact_top1"] == 100
    assert found["top1"] == 100 * (WRAPPED.argmax(axis=1) == LABELS).mean() < 100
    assert found["equal"] == (SUMS == WRAPPED).all(axis=1).sum()
    assert (found["rows"], found["target"], found["left"]) == (20, "int12", {})
    with np.load(outputs) as arrays:
        assert np.array_equal(arrays["y"], WRAPPED)
    text = capsys.readouterr().out
    assert f"int12: {overflows} overflows; {found['equal']} of 20 rows have the outputs of exact sums" in text
    assert f"top-1 {found['top1']:.2f}, with exact sums 100.00" in text


def test_limit_and_patterns(file, tmp_path) -> None:
    out = tmp_path / "out.json"
    data = npz(tmp_path, x=X)
    options = ["--data", data, "--limit", "6", "--acc-bits", "o*=12", "--json", str(out)]
    assert run(["emulate", str(file), *options]) == 0
    found = json.loads(out.read_text())
    assert found["operations"][0]["sums"] == 30
    assert found["operations"][0]["bits"] == 12
    assert found["overflows"] == (SUMS != WRAPPED)[:6].sum()
    assert found["top1"] is None


def test_saturation(file, tmp_path) -> None:
    out = tmp_path / "out.json"
    options = ["--data", npz(tmp_path, images=X), "--acc-bits", "12", "--overflow", "saturate", "--json", str(out)]
    assert run(["emulate", str(file), *options]) == 0
    steps = 0
    for row in X.astype(int):
        total = np.zeros(5, int)
        for code, weights in zip(row, W.astype(int), strict=True):
            exact = total + code * weights
            total = exact.clip(-2048, 2047)
            steps += (exact != total).sum()
    assert json.loads(out.read_text())["overflows"] == steps > 0


def test_without_data_inputs_are_random_codes(file, capsys) -> None:
    assert run(["emulate", str(file), "--limit", "4"]) == 0
    text = capsys.readouterr().out
    assert "4 of 4 rows have the outputs of exact sums" in text
    assert "drawn at random" in text
    emulator = Emulator(file, None)
    feeds = random_feeds(emulator, 4)
    assert feeds["x"].shape == (4, 8)
    assert feeds["x"].dtype == np.uint8
    assert feeds["x"].max() > 200
    assert np.array_equal(emulator.run(feeds).outputs["y"], feeds["x"].astype(int) @ W)


def test_operations_without_integers_are_named(tmp_path, capsys) -> None:
    nodes = [node("MatMul", "x w", "y", "op")]
    path = save(model(nodes, {"x": [2, 8]}, {"y": [2, 5]}, {"w": W.astype(np.float32)}), tmp_path)
    assert run(["emulate", str(path), "--acc-bits", "4"]) == 0
    assert "warning: op runs as it is: its weights 'w' are floats" in capsys.readouterr().out


def test_files_of_fixed_batches(tmp_path) -> None:
    op = node("MatMulInteger", "x w", "y", "op")
    path = save(model([op], {"x": (U8, [5, 8])}, {"y": (I32, [5, 5])}, {"w": W}), tmp_path)
    done = emulate_file(path, TARGETS["int32"], {"x": X}, batch_size=3)
    assert np.array_equal(done.outputs["y"], SUMS)
    with pytest.raises(ValueError, match="batches of 5, which do not divide 19 rows"):
        emulate_file(path, TARGETS["int32"], {"x": X[:19]})


def test_top1() -> None:
    outputs = np.array([[0, 2, 1], [3, 0, 0], [0, 0, 1], [1, 0, 0]])
    assert top1(outputs, np.array([1, 0, 0, 0])) == 75
    with pytest.raises(ValueError, match=r"3 labels do not fit an output of shape \[4, 3\]"):
        top1(outputs, np.zeros(3, int))


WRONG = [
    ({"images": X[:, :7]}, r"input 'x' has shape [?, 8], not [20, 7]"),
    ({"images": X.astype(float)}, "input 'x' holds uint8, not float64"),
    ({"pictures": X}, "it has no `images`; it has pictures"),
    ({"images": X, "labels": LABELS[:3]}, "`labels` must be one integer for each image"),
    ({"images": X, "labels": LABELS + 0.5}, "`labels` must be one integer for each image"),
    ({"images": X[:0]}, "there are no rows"),
    ({"images": np.array([None])}, "not an .npz of arrays"),
]


@pytest.mark.parametrize(("arrays", "reason"), WRONG, ids=[reason[:24] for _, reason in WRONG])
def test_wrong_data(arrays, reason, file, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    assert run(["emulate", str(file), "--data", npz(tmp_path, **arrays), "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith("accaware: ")
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"PK\3\4broken", "not an .npz"), (b"text", "not an .npz"), (None, "No such file")]
)
def test_broken_data(content, reason, file, tmp_path, capsys) -> None:
    data = tmp_path / "data.npz"
    if content is not None:
        data.write_bytes(content)
    assert run(["emulate", str(file), "--data", str(data)]) == 2
    assert reason in capsys.readouterr().err


def test_one_array_is_no_data(file, tmp_path, capsys) -> None:
    np.save(tmp_path / "data.npy", X)
    assert run(["emulate", str(file), "--data", str(tmp_path / "data.npy")]) == 2
    assert "not an .npz with `images`" in capsys.readouterr().err


def test_wrong_files_and_options(file, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(file.read_bytes()[:-30])
    unknown = save(model([node("Nothing", "x", "y")], {"x": [2]}, {"y": [2]}), tmp_path, "unknown.onnx")
    for arguments in (
        [str(broken)],
        [str(tmp_path / "absent.onnx")],
        [str(tmp_path)],
        [str(unknown)],
        [str(file), "--target", "nothing"],
        [str(file), "--acc-bits", "conv*=12"],
        [str(file), "--input", "z=uint8"],
        [str(file), "--limit", "0"],
    ):
        assert run(["emulate", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("accaware: ")
        assert error.count("\n") == 1, error
