"""Random graphs: what the reader claims of every tensor holds for what onnxruntime computes.

    python tests/onnx_graphs.py [--graphs 20000] [--seed 1] [--first 0]

runs so many; the same seed and number are the same graph. What fails is printed with its number, after which the exit
code is 1. Graphs start from integers, at the ends of their type and between, and go through operators that move,
select, scale, bound, quantize or sum up. The tests run a few hundred.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import ChainMap
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, ValueInfoProto, helper

from accaware.formats import IntFormat
from accaware.onnx.facts import Codes, Fact, interval
from accaware.onnx.graph import load
from accaware.onnx.read import _Reading
from accaware.onnx.tensors import Constant
from onnx_helpers import model, node, session

OPSETS = [10, 11, 13, 17, 19, 21]
BYTES = ["int8", "uint8", "int8", "uint8", "int16", "uint16"]
NUMBERS = [0, 1, -1, 0.5, 2, -2, 6, 127, -128, 255, 0.1, -0.3, 1e-3, 100, 1e4]
SCALES = [2.0**-6, 2.0**-3, 0.5, 1, 4, 0.1, 0.3, 1 / 3, 0.007, 5e-4, 3.7, 1e4, 1e-8]
OFF, ALL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL


class Graph:
    """A graph that grows by a node at a time, and the values of its tensors in the first run."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.opset = rng, rng.choice(OPSETS)
        self.nodes: list[Any] = []
        self.inputs: dict[str, tuple[int, list[Any]]] = {}
        self.constants: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.count = 0

    def constant(self, array: Any, dtype: Any = None) -> str:
        self.count += 1
        self.constants[f"c{self.count}"] = np.asarray(array, dtype)
        return f"c{self.count}"

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        self.count += 1
        names = [f"t{self.count}", *(f"t{self.count}_{i}" for i in range(1, outputs))]
        self.nodes.append(node(kind, [*inputs], names, f"{kind}{self.count}", **attributes))
        return names[0]

    def like(self, x: str) -> str:
        """A tensor of the same type."""
        dtype = self.values[x].dtype
        return self.rng.choice([name for name, value in self.values.items() if value.dtype == dtype])

    def number(self, dtype: Any) -> Any:
        return np.asarray(self.rng.choice([*NUMBERS, self.rng.uniform(-5, 5)])).astype(dtype)

    def per_axis(self, shape: tuple[int, ...], draw: Any, dtype: Any) -> tuple[Any, dict[str, int]]:
        """A parameter of a quantizer: mostly one number, else one for every place along a dimension."""
        if not shape or self.opset < 13 or self.rng.random() < 0.75:
            return np.asarray(draw(), dtype), {}
        axis = self.rng.randrange(len(shape))
        return np.asarray([draw() for _ in range(shape[axis])], dtype), {"axis": axis}

    def made(self, wanted: list[str]) -> bytes:
        made = model(self.nodes, self.inputs, {}, self.constants, self.opset)
        made.graph.output.extend(ValueInfoProto(name=name) for name in wanted)
        return bytes(made.SerializeToString())


# The operators. Each adds one to a graph, behind tensor x of value v, or raises where it has none for that.


def quantize(g: Graph, x: str, v: Any) -> str:
    kind = g.rng.choice(BYTES[: 6 if g.opset >= 21 else 4])
    ends = np.iinfo(kind)
    draw = g.rng.choice([lambda: 0, lambda: ends.min, lambda: ends.max, lambda: g.rng.randint(ends.min, ends.max)])
    scale, where = g.per_axis(v.shape, lambda: g.rng.choice(SCALES), v.dtype)
    zero = np.asarray([draw() for _ in range(scale.size)], kind).reshape(scale.shape)
    return g.add("QuantizeLinear", x, g.constant(scale), g.constant(zero), **where)


def dequantize(g: Graph, x: str, v: Any) -> str:
    ends = np.iinfo(v.dtype) if v.dtype.itemsize < 4 else np.iinfo("int8")
    scale, where = g.per_axis(v.shape, lambda: g.rng.choice(SCALES), g.rng.choice(["float32", "float32", "float16"]))
    zero = [0 if v.dtype.itemsize > 2 else g.rng.choice([0, ends.min, g.rng.randint(0, ends.max)])] * scale.size
    return g.add("DequantizeLinear", x, g.constant(scale), g.constant(np.reshape(zero, scale.shape), v.dtype), **where)


def pool(g: Graph, x: str, v: Any) -> str:
    sides = v.ndim - 2
    several = lambda lo, hi, n=sides: [g.rng.randint(lo, hi) for _ in range(n)]  # noqa: E731
    options: dict[str, Any] = {"kernel_shape": several(1, 3)}
    if g.rng.random() < 0.6:
        options["strides"] = several(1, 3)
    if g.rng.random() < 0.5:
        options["pads"] = several(0, 2, 2 * sides)
    elif g.rng.random() < 0.3:
        options["auto_pad"] = g.rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
    if g.rng.random() < 0.3:
        options["dilations"] = several(1, 3)
    kind, options["ceil_mode"] = g.rng.choice(["MaxPool", "AveragePool"]), g.rng.randint(0, 1)
    if kind == "AveragePool":
        options["count_include_pad"] = g.rng.randint(0, 1)
    return g.add(kind, x, **options)


def whole(g: Graph, x: str, v: Any) -> str:
    return g.add(g.rng.choice(["GlobalMaxPool", "GlobalAveragePool"]), x)


def reduce(g: Graph, x: str, v: Any) -> str:
    kind = g.rng.choice(["ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum"])
    axes = [g.rng.randrange(v.ndim)]
    if g.opset >= (13 if kind == "ReduceSum" else 18):
        return g.add(kind, x, g.constant(axes, np.int64), keepdims=g.rng.randint(0, 1))
    return g.add(kind, x, axes=axes, keepdims=g.rng.randint(0, 1))


def move(g: Graph, x: str, v: Any) -> str:
    kind = g.rng.choice(["Transpose", "Reshape", "Flatten", "Identity", "Tile", "Expand", "Slice", "Gather", "Split"])
    axis = g.rng.randrange(v.ndim)
    if kind == "Transpose":
        return g.add(kind, x, perm=g.rng.sample(range(v.ndim), v.ndim))
    if kind == "Reshape":
        return g.add(kind, x, g.constant(g.rng.choice([[-1], [1, -1], v.shape[::-1], [-1, 1, 1]]), np.int64))
    if kind == "Tile":
        return g.add(kind, x, g.constant([g.rng.randint(1, 2) for _ in v.shape], np.int64))
    if kind == "Expand":
        return g.add(kind, x, g.constant([g.rng.randint(1, 2), *v.shape], np.int64))
    if kind == "Slice":
        bounds = ([g.rng.randint(-2, 1)], [g.rng.choice([2, 9, -1])], [axis], [g.rng.choice([1, 1, 2, -1])])
        return g.add(kind, x, *(g.constant(bound, np.int64) for bound in bounds))
    if kind == "Gather":
        return g.add(kind, x, g.constant([g.rng.randrange(v.shape[axis]) for _ in range(2)], np.int64), axis=axis)
    if kind == "Split":
        return g.add(kind, x, outputs=2, axis=axis, **({"num_outputs": 2} if g.opset >= 18 else {}))
    return g.add(kind, x, **({"axis": axis} if kind == "Flatten" else {}))


def pad(g: Graph, x: str, v: Any) -> str:
    pads, mode = [g.rng.randint(-1, 2) for _ in range(2 * v.ndim)], g.rng.choice(["constant", "constant", "edge"])
    if g.opset < 11:
        return g.add("Pad", x, pads=pads, mode=mode, value=float(g.number(np.float32)))
    return g.add("Pad", x, g.constant(pads, np.int64), g.constant(g.number(v.dtype)), mode=mode)


def crop(g: Graph, x: str, v: Any) -> str:
    return g.add("CenterCropPad", x, g.constant([max(1, s + g.rng.randint(-1, 2)) for s in v.shape], np.int64))


def join(g: Graph, x: str, v: Any) -> str:
    return g.add("Concat", x, g.like(x), axis=g.rng.randrange(v.ndim))


def either(g: Graph, x: str, v: Any) -> str:
    return g.add("Where", g.constant([g.rng.random() < 0.5 for _ in range(v.shape[-1])]), x, g.like(x))


def bound(g: Graph, x: str, v: Any) -> str:
    if g.opset < 11:
        low, high = sorted([float(g.number(np.float32)), float(g.number(np.float32))])
        return g.add("Clip", x, min=low, max=high)
    low, high = g.number(v.dtype), g.number(v.dtype)
    return g.add("Clip", x, g.constant(low), g.constant(high) if g.rng.random() < 0.7 else "")


def unary(g: Graph, x: str, v: Any) -> str:
    kinds = ["Relu", "Abs", "Neg", *(["Sigmoid", "Tanh", "Exp", "Softsign", "Round"] if v.dtype.kind == "f" else [])]
    return g.add(g.rng.choice(kinds), x)


def arithmetic(g: Graph, x: str, v: Any) -> str:
    kind = g.rng.choice(["Add", "Sub", "Mul", "Max", "Min", *(["Div"] if v.dtype.kind == "f" else [])])
    if g.rng.random() < 0.4 and kind != "Div":
        return g.add(kind, x, g.like(x))
    size = g.rng.choice([1, 1, v.shape[-1]])
    other = np.asarray([g.number(v.dtype) for _ in range(size)], v.dtype)
    other = np.where(other == 0, np.asarray(1, v.dtype), other) if kind == "Div" else other
    shape = (1,) * g.rng.choice([0, 0, v.ndim - 1, v.ndim, v.ndim + 1]) + ((size,) if size > 1 else ())
    other = other.reshape(shape)
    if g.rng.random() < 0.1:  # which makes the other operand larger
        other = np.repeat(other.reshape(1, *other.shape), 2, axis=0)
    operands = [x, g.constant(other)]
    return g.add(kind, *(operands if kind == "Div" else g.rng.sample(operands, 2)))


def total(g: Graph, x: str, v: Any) -> str:
    return g.add("Sum", x, *(g.like(x) for _ in range(g.rng.randint(1, 3))))


def cast(g: Graph, x: str, v: Any) -> str:
    kinds = ["FLOAT", "FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "UINT16"]
    return g.add("Cast", x, to=getattr(TensorProto, g.rng.choice(kinds[: 4 if v.dtype.kind == "f" else 9])))


def normalize(g: Graph, x: str, v: Any) -> str:
    ends = [(-3, 3), (-3, 3), (-3, 3), (1e-3, 4)]
    values = [g.constant([g.rng.uniform(*end) for _ in range(v.shape[1])], v.dtype) for end in ends]
    return g.add("BatchNormalization", x, *values)


def resize(g: Graph, x: str, v: Any) -> str:
    scales = g.constant([1, 1, *[g.rng.choice([2, 0.5, 1.5])] * (v.ndim - 2)], np.float32)
    return g.add("Resize", x, "", scales, mode=g.rng.choice(["nearest", "linear"]))


def weights(g: Graph, x: str, v: Any) -> str:
    """Of constant codes, in floats."""
    codes = np.asarray([g.rng.randint(-8, 8) for _ in range(v.shape[-1])], np.int8)
    return g.add("DequantizeLinear", g.constant(codes), g.constant(g.rng.choice(SCALES), np.float32))


FLOATS = [*[quantize] * 8, pool, whole, arithmetic, total, normalize, unary]
INTEGERS = [*[dequantize] * 8, pool, *[weights] * 2]
ANY = [reduce, *[move] * 5, pad, crop, join, either, bound, unary, *[arithmetic] * 2, cast, resize]


def grow(g: Graph, feeds: dict[str, Any]) -> bool:
    """Add a node that onnxruntime takes; False where the one drawn is none."""
    before = [*g.nodes], {**g.constants}
    x = g.rng.choice([*g.values][-4:])
    v = g.values[x]
    try:
        g.rng.choice([*ANY, *(FLOATS if v.dtype.kind == "f" else INTEGERS)])(g, x, v)
        outputs = [*g.nodes[-1].output]
        values = session(g.made(outputs), OFF).run(outputs, feeds)
    except Exception:  # of whatever kind: the graph goes on without it
        g.nodes, g.constants = before
        return False
    if any(value.dtype.kind not in "fiu" or value.size > 3000 for value in values):
        g.nodes, g.constants = before
        return False
    g.values.update(zip(outputs, values, strict=True))
    return True


def graph(rng: random.Random) -> tuple[Graph, list[dict[str, Any]]]:
    """A graph of two to eight nodes, and five inputs: twice any codes, and the ends of their type."""
    g = Graph(rng)
    feeds: list[dict[str, Any]] = [{} for _ in range(5)]
    for name in "xy"[: rng.randint(1, 2)]:
        dtype = np.dtype(rng.choice(["uint8", "int8"]))
        shape = rng.choice([[1, 4, 3, 3], [2, 3], [1, 2, 4, 4], [1, 3, 5], [4, 2, 2]])
        ends = np.iinfo(dtype)
        sizes = [None if rng.random() < 0.2 else size for size in shape]
        g.inputs[name] = (helper.np_dtype_to_tensor_dtype(dtype), sizes)
        drawn = np.random.default_rng(rng.getrandbits(32))
        codes = range(ends.min, ends.max + 1)
        for feed, among in zip(feeds, [codes, [ends.max], [ends.min], [ends.min, 0, ends.max], codes], strict=True):
            feed[name] = drawn.choice(np.asarray(among), shape).astype(dtype)
    g.values = dict(feeds[0])
    wanted = rng.randint(2, 8)
    for _ in range(40):
        wanted -= grow(g, feeds[0])
        if not wanted:
            break
    return g, feeds


class Watched(_Reading):
    """Remembers what is known of every tensor."""

    def __init__(self, held: Any) -> None:
        super().__init__({}, held)
        self.seen: dict[str, Fact] = {}

    def _node(self, call: Any, graph: Any) -> list[Fact]:
        facts = super()._node(call, graph)
        self.seen.update(zip(call.node.outputs, facts, strict=False))
        return facts


def claims(contents: bytes, folder: Path) -> dict[str, Fact]:
    (folder / "net.onnx").write_bytes(contents)
    held = load(folder / "net.onnx")
    reading = Watched(held)
    reading.graph(held.graph, ChainMap())
    return reading.seen


def broken(fact: Fact, value: Any) -> str:
    """What a claim says that a value is not; nothing where it holds."""
    real = value.astype(np.float64)
    if not real.size:
        return ""
    if isinstance(fact, Constant):
        return "" if np.array_equal(fact.small, value, equal_nan=True) else "it is another constant"
    lo, hi = interval(fact)
    if real.min() < lo or real.max() > hi:
        return f"values in [{real.min()}, {real.max()}], claimed [{lo}, {hi}]"
    if not isinstance(fact, Codes) or fact.scale is None or isinstance(fact.zero, IntFormat) or not fact.error < 0.5:
        return ""
    if fact.values is not None and fact.values.shape != real.shape:
        return f"a constant of shape {fact.values.shape}, not {real.shape}"
    place = [-1 if i == fact.axis % real.ndim else 1 for i in range(real.ndim)] if real.ndim else []
    scale, zero = (p.reshape(place) if p.ndim else p for p in (fact.scale, fact.zero))
    if fact.per_axis and max(scale.size, zero.size) != real.shape[fact.axis]:
        return f"scales along dimension {fact.axis} of {real.shape}"
    codes = real / scale + zero
    if fact.values is not None:  # which stands for its integers, whatever floats made of them
        off = np.abs(codes - fact.values.small).max()
        return f"constant codes off by {off}" if off > 0.01 * max(1, np.abs(codes).max()) else ""
    off = np.abs(codes - np.rint(codes)).max()
    if off > fact.error + 1e-9 * max(1, np.abs(codes).max()):
        return f"codes off by {off}, claimed {fact.error}"
    if np.rint(codes).min() < fact.lo or np.rint(codes).max() > fact.hi:
        return f"codes in [{codes.min()}, {codes.max()}], claimed [{fact.lo}, {fact.hi}]"
    return ""


def attempt(rng: random.Random, folder: Path) -> str:
    """What is wrong with the claims about one random graph, as it is and as onnxruntime optimizes it."""
    g, feeds = graph(rng)
    names = [name for made in g.nodes for name in made.output]
    known = claims(g.made(names), folder)
    unclear = set()  # runs with values that are no numbers, which ranges do not speak of
    for wanted, level in [(names, OFF), (names, ALL), *(([name], ALL) for name in names[-2:])]:
        try:
            running = session(g.made(wanted), level)
        except Exception:  # which says nothing about the ranges
            continue
        needed = {info.name for info in running.get_inputs()}
        for i, feed in enumerate(feeds):
            try:
                values = running.run(wanted, {name: array for name, array in feed.items() if name in needed})
            except Exception:
                continue
            if any(np.isnan(value).any() for value in values if value.dtype.kind == "f"):
                unclear.add(i)
            for name, value in zip(wanted, values, strict=True):
                why = "" if i in unclear else broken(known[name], value)
                if why:
                    steps = [f"{made.output[0]} = {made.op_type}({', '.join(made.input)})" for made in g.nodes]
                    return f"{name}: {why} (opset {g.opset}: {'; '.join(steps)})"
    return ""


def case(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {number}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.first, asked.first + asked.graphs):
            child = os.fork()  # some graphs end onnxruntime itself
            if not child:
                code = 1
                try:
                    wrong = attempt(case(asked.seed, number), Path(folder))
                    if wrong:
                        print(f"{number}: {wrong}", flush=True)
                    code = int(bool(wrong))
                except Exception:
                    print(f"{number}: {traceback.format_exc()}", flush=True)
                finally:
                    os._exit(code)
            failed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    print(f"{asked.graphs} graphs, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    sys.exit(main())
