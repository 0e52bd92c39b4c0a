"""What the inputs of a file's operations are like on given data: E[x^2] of every channel, by way of onnxruntime."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from accaware.onnx.graph import Node, load, message
from accaware.onnx.tensors import Array

__all__ = ["mean_squares"]

_BATCH = 64
#: The input with the data and the one with its zero point, of operators whose first input is not both.
_CODES = {
    "QLinearConv": (0, 2),
    "QLinearMatMul": (0, 2),
    "QGemm": (0, 2),
    "ConvInteger": (0, 2),
    "MatMulInteger": (0, 2),
}
_CODES["MatMulIntegerToFloat"] = (0, 4)
_PRODUCTS = (*_CODES, "Conv", "ConvTranspose", "MatMul", "Gemm", "DynamicQuantizeMatMul")


def mean_squares(path: str | Path, data: str | Path) -> dict[str, NDArray[np.float64]]:
    """E[x^2] of the inputs of every operation that multiplies, by its name: float64 [C], by input channel.

    x: the value (the code less its zero point, for operators on codes), averaged over rows and positions of the arrays
    [N, ...] of `data` (.npz), one for each graph input by its name; that of the only one may be called `images`.
    Operations within subgraphs are left out, and those whose first input is constant. Raises `OSError`, or
    `ValueError`, one line, for data that does not fit the graph and for a file that onnxruntime cannot run.
    """
    arrays, graph = _arrays(data), load(path).graph
    if len(graph.inputs) == 1 and "images" in arrays:
        arrays[next(iter(graph.inputs))] = arrays.pop("images")
    nodes = [node for node in graph.nodes if node.kind in _PRODUCTS and node.inputs]
    model = message(path)
    tensors = dict.fromkeys(name for node in nodes for name in _inputs(node))
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted = [name for name in tensors if name and name not in constants and name not in arrays]
    session = _session(path, model, wanted)
    needed = [entry.name for entry in session.get_inputs()]
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(f"{data}: there is no array '{missing[0]}'; the graph has inputs {', '.join(needed)}")
    length = min((len(arrays[name]) for name in needed if arrays[name].ndim), default=0)
    if not length:
        raise ValueError(f"{data}: its arrays have no rows")
    total: dict[str, Any] = {}
    for start in range(0, length, _BATCH):
        feeds = {name: arrays[name][start : min(start + _BATCH, length)] for name in needed}
        try:
            found = dict(zip(wanted, session.run(wanted, feeds), strict=True)) if wanted else {}
        except Exception as error:  # onnxruntime raises types of its own
            raise ValueError(f"{data}: onnxruntime cannot run {path} on it: {_line(error)}") from error
        values = {**feeds, **found}
        for node in nodes:
            x, zero = (values.get(name) if name else None for name in _inputs(node))
            if x is not None:
                zero = _constant(model, _inputs(node)[1]) if zero is None else zero
                total[node.name] = total.get(node.name, 0) + _squares(node, x, zero)
    return {name: sums[:, 0] / sums[:, 1] for name, sums in total.items()}


def _arrays(data: str | Path) -> dict[str, Array]:
    try:
        with np.load(data, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{data}: no .npz file of arrays ({_line(error)})") from error


def _session(path: str | Path, model: ModelProto, wanted: list[str]) -> Any:
    model.graph.output.extend(
        ValueInfoProto(name=name) for name in wanted if name not in {o.name for o in model.graph.output}
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        content = model.SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own, protobuf others for large models
        raise ValueError(f"{path}: onnxruntime cannot run it: {_line(error)}") from error


def _inputs(node: Node) -> tuple[str, str]:
    x, zero = _CODES.get(node.kind, (0, None))
    return node.inputs[x], node.inputs[zero] if zero is not None and zero < len(node.inputs) else ""


def _constant(model: ModelProto, name: str) -> Array | int:
    found = [tensor for tensor in model.graph.initializer if name and tensor.name == name]
    return onnx.numpy_helper.to_array(found[0]) if found else 0


def _squares(node: Node, x: Array, zero: Array | int) -> Array:
    """Sum of squares and number of values of every channel, [C, 2]."""
    axis = 1 if "Conv" in node.kind else 0 if node.attributes.get("transA") else -1
    flat = np.moveaxis(x.astype(np.float64) - np.asarray(zero, np.float64), axis, 0).reshape(x.shape[axis], -1)
    return np.stack([(flat**2).sum(axis=1), np.full(len(flat), flat.shape[1])], axis=1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
