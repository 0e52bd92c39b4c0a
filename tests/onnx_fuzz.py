"""Truncated, mutated and adversarial ONNX files and certificates: one line says no, or the verdict is sound.

    python tests/onnx_fuzz.py [--files 20000] [--seed 1] [--first 0]

runs so many; the same seed and number are the same file. What fails is printed with its number, after which the exit
code is 1. Memory is limited to 4 GiB above the start and a file to a minute, so bombs show. The tests run a few
thousand.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from accaware.certify.certificate import Certificate
from accaware.certify.emulation import Emulator
from accaware.certify.files import certify_file
from accaware.certify.measure import random_feeds
from accaware.certify.repair import ImpossibleError, repair_file
from accaware.certify.report import html
from accaware.certify.second import disagreements
from accaware.certify.targets import TARGETS
from accaware.formats import Accumulator
from accaware.onnx.moments import mean_squares
from onnx_helpers import model, node

W = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
REGISTERS = [
    TARGETS["int32"],
    TARGETS["onnxruntime-avx2"],
    TARGETS["avx2-u8s8-any"],
    TARGETS["neon-s8s8-int16"],
    TARGETS["fp16-exact"],
    *(
        replace(TARGETS["int32"], name="narrow", accumulator=register)
        for register in (
            Accumulator(8),
            Accumulator(11),
            Accumulator(9, "saturate"),
            Accumulator(9, tile=3, outer_bits=10, order="hwc"),
        )
    ),
]


def small(weights=W, nodes=None, **constants):
    """Two floats times weights, QDQ; other nodes may take the place of these."""
    nodes = nodes or [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w s", "f"),
        node("MatMul", "d f", "y"),
    ]
    grid = {"s": np.float32(0.5), "z": np.uint8(3), "w": weights, **constants}
    return model(nodes, {"x": [2, len(weights) if isinstance(weights, np.ndarray) else 6]}, {"y": None}, grid)


def sources() -> list[bytes]:
    """Files of every dialect, small and good."""
    rng = np.random.default_rng(0)
    qonnx, qdq = "qonnx.custom_op.general", [*small().graph.node]
    conv = [
        node("Quant", "x s zero bits", "d", domain=qonnx),
        node("Quant", "w4 wc zero bits", "f", domain=qonnx),
        node("Conv", "d f", "c", pads=[1, 1, 1, 1], group=2),
        node("BatchNormalization", "c v v v v", "n"),
        node("Relu", "n", "r"),
        node("Trunc", "r s zero bits two", "t", domain=qonnx),
        node("Transpose", "t", "u", perm=[0, 2, 3, 1]),
        node("BipolarQuant", "w s", "b", domain=qonnx),
        node("MatMul", "u b", "y"),
    ]
    qoperator = [
        node("QuantizeLinear", "x s z", "q"),
        node("QLinearConv", "q s z w8 wc1 z8 s z bias", "c", strides=[2, 2]),
        node("DequantizeLinear", "c s z", "c8"),
        node("DequantizeLinear", "w8 wc1", "f8", axis=0),
        node("ConvTranspose", "c8 f8", "e", strides=[2, 2], dilations=[1, 2]),
        node("QLinearMatMul", "c s z w s z0 s z", "y"),
    ]
    clipped = [*qdq[:2], node("Clip", "w lo hi", "wq"), node("DequantizeLinear", "wq s", "f"), *qdq[3:]]
    constants = {
        "zero": np.float32(0),
        "bits": np.float32(4),
        "two": np.float32(2),
        "wc": np.ones((4, 1, 1, 1), np.float32),
        "wc1": np.array([1, 2, 3, 4], np.float32),
        "v": np.ones(4, np.float32),
        "w4": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "w8": rng.integers(-8, 8, (4, 3, 3, 3), np.int8),
        "z8": np.zeros(4, np.int8),
        "z0": np.int8(0),
        "bias": np.arange(4, dtype=np.int32),
        "lo": np.int8(-7),
        "hi": np.int8(7),
    }
    made = [
        small(),
        small(nodes=clipped, **constants),
        small(nodes=conv, **constants),
        small(nodes=qoperator, **constants),
        small(W.astype(np.float32), conv, **constants),
    ]
    return [m.SerializeToString() for m in made] + runnable()


def runnable() -> list[bytes]:
    """Files that run as they are, so that emulation gets as far as their sums."""
    rng = np.random.default_rng(1)
    u8, i32, f32 = TensorProto.UINT8, TensorProto.INT32, TensorProto.FLOAT
    held = {
        "s": np.float32(0.5),
        "z": np.uint8(3),
        "w": rng.integers(-128, 128, (6, 4), np.int8),
        "k": rng.integers(-128, 128, (4, 2, 3), np.int8),
        "ks": np.float32([0.5, 0.25, 1, 2]),
        "kz": np.zeros(4, np.int8),
        "b": np.arange(4, dtype=np.int32),
        "ys": np.float32(40),
    }
    body = helper.make_graph(
        [node("DequantizeLinear", "w s", "f"), node("MatMul", "d f", "t", "inner")],
        "body",
        [],
        [helper.make_tensor_value_info("t", f32, None)],
    )
    chain = [
        node("QuantizeLinear", "x s z", "q"),
        node("QLinearConv", "q s z k ks kz ys z b", "c", "conv", pads=[1, 1], group=1),
        node("DequantizeLinear", "c ys z", "d"),
        node("MaxPool", "d", "p", kernel_shape=[2]),
        node("Relu", "p", "r"),
        node("DequantizeLinear", "k ks", "g", axis=0),
        node("ConvTranspose", "r g", "y", "up", strides=[2]),
    ]
    dynamic = [
        node("DynamicQuantizeLinear", "x", "q qs qz"),
        node("MatMulInteger", "q w qz", "i", "op"),
        node("Cast", "i", "c", to=f32),
        node("Mul", "c qs", "y"),
    ]
    nested = [*small().graph.node[:2], node("If", "yes", "y", then_branch=body, else_branch=body)]
    gemm = [
        node("QuantizeLinear", "x s z", "q"),
        node("QGemm", "q s z w s kz0 b ys z", "g", "gemm", "com.microsoft"),
        node("DequantizeLinear", "g ys z", "y"),
    ]
    integers = [node("MatMulInteger", "x w z", "y", "op")]
    microsoft = [("com.microsoft", 1)]
    made = [
        model(chain, {"x": [1, 2, 5]}, {"y": None}, held),
        model(dynamic, {"x": ["n", 6]}, {"y": None}, held),
        model(nested, {"x": [2, 6]}, {"y": None}, held | {"yes": np.array(True)}),
        model(gemm, {"x": [2, 6]}, {"y": None}, held | {"kz0": np.int8(0)}, extra=microsoft),
        model(integers, {"x": (u8, [2, 6])}, {"y": (i32, None)}, held),
    ]
    return [m.SerializeToString() for m in made]


GOOD = sources()
WILD = [0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), float("-inf"), 0.1]
VALUES = range(6, 9)  # changes of `damaged_graph` that leave a graph
SIZES = [0, -1, 1, 2, 3, 10**12, 2**31, 2**62]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut short, or with other bytes in it."""
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    broken = bytearray(data)
    for _ in range(rng.choice([1, 2, 8])):
        place = rng.randrange(len(broken))
        if rng.random() < 0.6:
            broken[place] = rng.randrange(256)
        else:
            broken[place : place + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
    return bytes(broken)


def damaged_graph(data: bytes, rng: random.Random, changes: range = range(12)) -> bytes:
    """A message that can be parsed, but two things in it are others: what, `changes` can limit."""
    made = onnx.ModelProto.FromString(data)
    graph = made.graph
    op, constant = rng.choice(graph.node), rng.choice(graph.initializer)
    names = [t.name for t in graph.initializer] + [o for n in graph.node for o in n.output] + ["", "absent", "x"]
    for change in rng.sample(changes, 2):
        if change == 0 and op.input:
            op.input[rng.randrange(len(op.input))] = rng.choice(names)
        elif change == 1:
            op.op_type = rng.choice(graph.node).op_type
        elif change == 2:
            del op.input[rng.randrange(len(op.input) + 1) :]
        elif change == 3 and constant.dims:
            constant.dims[rng.randrange(len(constant.dims))] = rng.choice(SIZES)
        elif change == 4:
            constant.data_type = rng.randrange(29)
        elif change == 5:
            for attribute in op.attribute:
                attribute.i = rng.choice([-1, 0, 5, 2**62, -(2**63)])
                attribute.f = rng.choice(WILD)
                attribute.ints[:] = [rng.choice([-1, 0, 5, 2**40]) for _ in attribute.ints]
        elif change == 6:
            constant.raw_data = rng.randbytes(len(constant.raw_data))
        elif change == 7 and constant.data_type == TensorProto.FLOAT:
            constant.raw_data = np.float32([rng.choice(WILD) for _ in range(len(constant.raw_data) // 4)]).tobytes()
        elif change == 8:
            constant.raw_data = bytes([rng.choice([0, 127, 128, 255])]) * len(constant.raw_data)
        elif change == 9:
            constant.data_location = TensorProto.EXTERNAL
            where = rng.choice(["net.onnx", "/dev/zero", "../net.onnx", ".", "absent"])
            for key, value in (("location", where), ("offset", rng.choice(SIZES)), ("length", rng.choice(SIZES))):
                constant.external_data.add(key=key, value=str(value))
        elif change == 10:
            dims = graph.input[0].type.tensor_type.shape.dim
            dims[rng.randrange(len(dims))].dim_value = rng.choice(SIZES)
        elif change == 11:
            graph.node.remove(op)
            break
    return made.SerializeToString()


def damaged(rng: random.Random) -> bytes:
    """One of the good files, damaged; a few stay as they are."""
    data, kind = rng.choice(GOOD), rng.random()
    if kind < 0.05:
        return data
    if kind < 0.3:
        return damaged_bytes(data, rng)
    return damaged_graph(data, rng, VALUES if kind < 0.6 else range(12))


def damaged_json(text: str, rng: random.Random) -> str:
    """A certificate with other characters in it, or with another value somewhere."""
    if rng.random() < 0.3:
        return damaged_bytes(text.encode(), rng).decode(errors="replace")
    data = json.loads(text)
    where = data
    while isinstance(where, dict | list) and where:
        key = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
        if not isinstance(where[key], dict | list) or not where[key] or rng.random() < 0.1:
            break
        where = where[key]
    else:
        return text
    old = where[key]
    values = [None, True, -1, 0, 7, 2**70, 1.5, float("nan"), "", "x" * 99, [], {}, [0], "proven", "wrap", "any"]
    where[key] = old + rng.choice([-1, 1]) if type(old) is int and rng.random() < 0.5 else rng.choice(values)
    return json.dumps(data)


def one_line(error: Exception) -> None:
    """The words are what a command line may print."""
    assert 0 < len(str(error)) < 3000
    assert "\n" not in str(error)


def attempt(rng: random.Random, folder: Path) -> set[str]:
    """Run one file through everything, in an empty folder; what came of it. Fails where that is not sound."""
    path, out, target, seen = folder / "net.onnx", folder / "out.onnx", rng.choice(REGISTERS), set()
    path.write_bytes(damaged(rng))
    certificate = None
    try:
        certificate = certify_file(path, target)
        seen.add("holds" if certificate.holds else "certified")
    except ValueError as error:
        one_line(error)
        seen.add("refused")
    if certificate is not None:
        html(certificate)
        judge(certificate, path, rng, seen)
    step = rng.randrange(3)
    if step == 0 or certificate is None:
        emulated(path, target, certificate, seen)
    if step == 1 or certificate is None:
        try:
            power = squares(path, folder / "in.npz") if rng.random() < 0.2 else None
            assert repair_file(path, out, target, power=power, rescale=rng.random() < 0.5).certificate.holds
            assert certify_file(out, target).holds
            out.unlink()
            seen.add("repaired")
        except (ValueError, ImpossibleError) as error:
            one_line(error)
            seen.add("not repaired")
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    return seen


def judge(certificate: Certificate, path: Path, rng: random.Random, seen: set[str]) -> None:
    """The second checker agrees, and damage to the certificate changes no verdict that it agrees with."""
    text = certificate.to_json()
    assert Certificate.from_json(text) == certificate
    assert disagreements(certificate, path) == []
    try:
        other = Certificate.from_json(damaged_json(text, rng))
        found = disagreements(other, path)
    except ValueError as error:
        one_line(error)
        seen.add("certificate refused")
        return
    seen.add("certificate disagrees" if found else "certificate agrees")
    for op, said in zip(certificate.operations, other.operations, strict=False):
        if not found and (op.target, op.raw, op.name) == (said.target, said.raw, said.name):
            same = certificate.bias == other.bias and certificate.target == other.target
            assert (op.verdict, op.lo, op.hi) == (said.verdict, said.lo, said.hi) or not same


def emulated(path: Path, target, certificate: Certificate | None, seen: set[str]) -> None:
    """What is proven never overflows."""
    try:
        emulator = Emulator(path, target, threads=1)
        done = emulator.run(random_feeds(emulator, 2))
    except ValueError as error:
        one_line(error)
        seen.add("not run")
        return
    seen.add("run, overflows" if done.overflows else "run")
    assert certificate is not None
    proven = {op.name for op in certificate.operations if op.verdict == "proven"}
    assert [count for count in done.counts if count.name in proven and count.overflows] == []


def squares(path: Path, data: Path):
    """What importance the weights have, on two rows of data."""
    np.savez(data, x=np.linspace(-9, 9, 12, dtype=np.float32).reshape(2, 6))
    try:
        return mean_squares(path, data)
    finally:
        data.unlink()


def case(seed: int, number: int) -> random.Random:
    """What decides everything about one file."""
    return random.Random(f"{seed}/{number}")


def _alarm(*_: object) -> None:
    raise TimeoutError("a file takes more than a minute")


def main() -> int:
    """Run the files and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="Number of the first file.")
    options = parser.parse_args()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _alarm)
    warnings.simplefilter("error")  # as in the tests
    outcomes: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.first, options.first + options.files):
            folder = Path(name) / str(number)
            folder.mkdir()
            signal.alarm(60)
            try:
                outcomes.update(attempt(case(options.seed, number), folder))
            except Exception:
                wrong += 1
                print(f"file {number}:", traceback.format_exc(), flush=True)
            signal.alarm(0)
            for entry in folder.iterdir():
                entry.unlink()
            folder.rmdir()
            if number % 1000 == 999:
                print(number + 1, "files", file=sys.stderr, flush=True)
    print(f"{options.files} files, {wrong} wrong;", ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
