"""Running networks: whole in onnxruntime, or in pieces around nodes that it cannot know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from accaware.onnx.build import reads
from accaware.onnx.rewrite import OUTSIDE
from accaware.onnx.tensors import ELEMENTS, Array

__all__ = ["Feeds", "Runner"]

Feeds = Mapping[str, Array]

#: Optimizations that would multiply integers by scales before they are added. Counting the sums stops those of today
#: already, since it reads what they would replace; this does not depend on it.
_DISABLED = ["ConvMulFusion", "ConvAddFusion", "ConvBNFusion", "MatMulScaleFusion", "MatMul_BatchNormalization_Fusion"]


class Runner:
    """A network that runs again and again.

    outside: what computes the nodes of domain `OUTSIDE`, by the name of their output. The operators of ONNX run as
    they are defined: no quantized operators are fused out of several others. threads: of onnxruntime, 0 for all cores.
    """

    def __init__(
        self, model: ModelProto, outside: Mapping[str, Callable[..., Array]] | None = None, threads: int = 0
    ) -> None:
        self.outputs = [info.name for info in model.graph.output]
        self.inputs = {info.name: _described(info) for info in model.graph.input}
        self._outside, self._threads = outside or {}, threads
        self._pieces = _linked(model, _cut(model.graph.node), self.outputs)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """All outputs. Raises `ValueError` for what onnxruntime refuses, and for operators that nobody can run."""
        values = dict(feeds)
        for piece in self._pieces:
            node = piece.nodes[0]
            if node.domain == OUTSIDE:
                values[node.output[0]] = self._outside[node.output[0]](*(values[name] for name in node.input))
            else:
                values.update(piece.run(values, self._threads))
        missing = [name for name in self.outputs if name not in values]
        if missing:
            raise ValueError(f"output '{missing[0]}' is computed by no node")
        return {name: values[name] for name in self.outputs}


def _described(info: ValueInfoProto) -> tuple[np.dtype[Any], tuple[int | None, ...] | None]:
    """The type and the shape of a graph input; None for what the file leaves open. Raises `ValueError`."""
    tensor = info.type.tensor_type
    if tensor.elem_type not in ELEMENTS:
        raise ValueError(f"input '{info.name}' is no tensor of numbers")
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape if tensor.HasField("shape") else None


def _linked(model: ModelProto, groups: Sequence[list[NodeProto]], outputs: Sequence[str]) -> list[_Piece]:
    """Groups of nodes as pieces, each of which gives what later ones, or the outputs, need of it."""
    pieces = [_Piece(model, nodes) for nodes in groups]
    wanted = set(outputs)
    for piece in reversed(pieces):
        piece.outputs = [name for name in piece.made if name in wanted]
        wanted.update(piece.inputs)
    return pieces


def _cut(nodes: Sequence[NodeProto]) -> list[list[NodeProto]]:
    """Nodes in their order, those of domain `OUTSIDE` alone."""
    pieces: list[list[NodeProto]] = []
    for node in _early(nodes):
        if not pieces or OUTSIDE in (node.domain, pieces[-1][0].domain):
            pieces.append([])
        pieces[-1].append(node)
    return pieces


def _early(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, where codes are dequantized as soon as they are there: numpy has no tensors of half bytes to keep."""
    made = {name: node for node in nodes for name in node.output}
    after: dict[int, list[NodeProto]] = {}
    for node in nodes:
        maker = made.get(node.input[0]) if node.op_type == "DequantizeLinear" and node.input else None
        if maker is not None and maker.op_type != node.op_type and not any(name in made for name in node.input[1:]):
            after.setdefault(id(maker), []).append(node)
    moved = {id(node) for group in after.values() for node in group}
    ordered: list[NodeProto] = []
    for node in nodes:
        if id(node) not in moved:
            ordered.append(node)
            ordered.extend(after.get(id(node), []))
    return ordered


class _Piece:
    """Some nodes of a model, which run together."""

    def __init__(self, model: ModelProto, nodes: list[NodeProto]) -> None:
        self.model, self.nodes = model, nodes
        self.made = [name for node in nodes for name in node.output if name]
        constants = {tensor.name for tensor in model.graph.initializer}
        read = dict.fromkeys(name for node in nodes for name in reads(node))
        self.inputs = [name for name in read if name not in constants and name not in self.made]
        self.constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
        self.outputs: list[str] = []
        self._session: Any = None
        self._steps: list[_Piece] = []  # one for each node, where there is a node that onnxruntime cannot run

    def run(self, values: Feeds, threads: int) -> dict[str, Array]:
        """What others need of the outputs of these nodes. The first values say what types the inputs have."""
        feeds = {name: values[name] for name in self.inputs if name in values}
        if self._session is None and not self._steps:
            self._session = _session(self._model(feeds), threads, alone=len(self.nodes) == 1)
            if self._session is None:
                self._steps = _linked(self.model, [[node] for node in self.nodes], self.outputs)
        if self._steps:
            return self._stepwise(feeds, threads)
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, feeds), strict=True))
        except Exception as error:  # onnxruntime's errors have no common class, nor have those of onnx's evaluator
            raise ValueError(f"the network does not run: {_line(error)}") from error

    def _stepwise(self, feeds: Feeds, threads: int) -> dict[str, Array]:
        values = dict(feeds)
        for step in self._steps:
            values.update(step.run(values, threads))
        return {name: values[name] for name in self.outputs}

    def _model(self, feeds: Feeds) -> ModelProto:
        known = {info.name: info for info in self.model.graph.input}
        types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
        inputs = [known.get(n) or helper.make_tensor_value_info(n, t, None) for n, t in types.items()]
        outputs = [helper.make_empty_tensor_value_info(name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "piece", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)


def _session(model: ModelProto, threads: int, alone: bool) -> Any:
    """What runs a model: onnxruntime, or, for a node `alone` that it has no kernel for, onnx's evaluator; else None."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED
        )
    except errors.NotImplemented as error:  # an operator without a kernel
        if not alone:
            return None
        missing: Exception = error
    except Exception as error:
        raise ValueError(f"onnxruntime cannot load the network: {_line(error)}") from error

    try:
        return ReferenceEvaluator(model)
    except Exception as error:
        raise ValueError(f"nothing runs this operator: {_line(missing)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
