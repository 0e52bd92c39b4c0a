"""Certify a file of 100 million int8 weights: seconds, and peak memory above the start as a multiple of the weights.

    python benchmarks/certify.py [--side 5000] [--layers 4]

Each target runs in a process of its own. Memory is the peak resident set, of which the mapped file is a part.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from timing import peak

from accaware.certify.files import certify_file
from accaware.certify.targets import TARGETS


def make(path: Path, side: int, layers: int) -> None:
    """A file of MatMulInteger nodes with random weights [side, side]."""
    weights = [np.random.default_rng(i).integers(-127, 128, (side, side), dtype=np.int8) for i in range(layers)]
    nodes = [helper.make_node("MatMulInteger", ["x", f"w{i}"], [f"y{i}"], name=f"layer{i}") for i in range(layers)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, side])]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.INT32, [1, side]) for i in range(layers)]
    tensors = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", inputs, outputs, tensors)), path)


def measure(path: Path, target: str) -> tuple[float, int]:
    """Seconds, and bytes above the start."""
    before = peak()
    start = time.perf_counter()
    certify_file(path, TARGETS[target])
    return time.perf_counter() - start, peak() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    count = options.layers * options.side**2
    table = Table(
        "target", "seconds", "peak memory / weights", title=f"certify, {count / 1e6:.0f} million int8 weights"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        make(path, options.side, options.layers)
        for target in ("int32", "avx2-u8s8", "avx2-u8s8-any"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                seconds, memory = process.submit(measure, path, target).result()
            table.add_row(target, f"{seconds:.1f}", f"{memory / count:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
