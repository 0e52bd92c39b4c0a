"""Writing into a graph: nodes and constants under names that it does not use yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper, shape_inference

from accaware.onnx.tensors import ELEMENTS, Array


class Writer:
    """Replaces the nodes of a model's graph, in place: those that are not kept or added again are gone."""

    def __init__(self, model: ModelProto) -> None:
        self._model, self._graph = model, model.graph
        self._nodes = list(model.graph.node)
        self._names = set(_names(model.graph))
        self._producers = {tensor: node for node in self._nodes for tensor in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for tensor in dict.fromkeys(node.input):
                self._consumers.setdefault(tensor, []).append(node)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        known = _known(model)
        self._types: dict[str, int] = {name: tensor.data_type for name, tensor in self._constants.items()}
        self._types |= {name: kind.elem_type for name, kind in known.items()}
        self._ranks = {name: len(kind.shape.dim) for name, kind in known.items() if kind.HasField("shape")}
        del model.graph.node[:]

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        versions = [int(e.version) for e in self._model.opset_import if e.domain in ("", "ai.onnx")]
        return max([1, *versions])

    def originals(self) -> Sequence[NodeProto]:
        """The nodes that the graph had."""
        return self._nodes

    def producer(self, tensor: str) -> NodeProto | None:
        """The original node that computes a tensor; None for inputs and initializers."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> Sequence[NodeProto]:
        """The original nodes that read a tensor."""
        return self._consumers.get(tensor, [])

    def type(self, tensor: str) -> int:
        """The type of the elements of an original tensor, by ONNX's number; 0 where it is not known."""
        return self._types.get(tensor, 0)

    def rank(self, tensor: str) -> int | None:
        """The number of dimensions of an original tensor that is no initializer; None where it is not known."""
        return self._ranks.get(tensor)

    def size(self, tensor: str) -> int | None:
        """The number of elements of an initializer; None for other tensors."""
        found = self._constants.get(tensor)
        return None if found is None else int(np.prod(found.dims, dtype=object))

    def value(self, tensor: str) -> Array | None:
        """The values of an initializer or of a Constant node; None for other tensors, and for no numbers."""
        if tensor in self._constants:
            held = self._constants[tensor]
            return numpy_helper.to_array(held) if held.data_type in ELEMENTS else None
        node = self._producers.get(tensor)
        if node is None or node.op_type != "Constant":
            return None
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        value = next(iter(given.values()), None)
        if isinstance(value, TensorProto):
            return numpy_helper.to_array(value) if value.data_type in ELEMENTS else None
        return None if value is None else np.asarray(value)

    def keep(self, node: NodeProto) -> None:
        """Leave an original node as it is."""
        self._graph.node.append(node)

    def add(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """A node with one output, `out` or one of a new name, which it returns."""
        return self.several(kind, inputs, [out or self._new(kind)], domain, **attributes)[0]

    def several(
        self, kind: str, inputs: Iterable[str], outputs: Sequence[str] | int, domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        """A node with these outputs, or with so many of new names, which it returns."""
        named = [self._new(kind) for _ in range(outputs)] if isinstance(outputs, int) else outputs
        self._graph.node.append(helper.make_node(kind, [*inputs], [*named], domain=domain, **attributes))
        return named

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        """An initializer, under a new name."""
        name = self._new("constant")
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def finish(self, outputs: Iterable[str], domain: str | None = None) -> None:
        """Add outputs to the graph, import a domain, and drop what nothing needs any more."""
        graph = self._graph
        graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
        needed = {info.name for info in graph.output}
        kept = []
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                needed.update(reads(node))
                kept.append(node)
        initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
        names = {tensor.name for tensor in graph.initializer}
        inputs = [info for info in graph.input if info.name not in names]  # those have a value already
        for field, values in (("node", kept[::-1]), ("initializer", initializers), ("input", inputs)):
            copies = [type(value).FromString(value.SerializeToString()) for value in values]
            graph.ClearField(field)
            getattr(graph, field).extend(copies)
        graph.ClearField("value_info")
        if domain is not None:
            self._model.opset_import.append(helper.make_opsetid(domain, 1))

    def _new(self, hint: str) -> str:
        name = f"{hint}_{len(self._names)}"
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


def reads(node: NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those that its subgraphs take from around them among them."""
    yield from filter(None, node.input)
    for graph in bodies(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (info.name for info in graph.output)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of a node, in the order of its attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _names(graph: GraphProto) -> Iterator[str]:
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))
    for node in graph.node:
        yield from node.output
        for body in bodies(node):
            yield from _names(body)


def _known(model: ModelProto) -> dict[str, TypeProto.Tensor]:
    """The types of the tensors for which the file says them, or onnx can tell."""
    try:
        graph = shape_inference.infer_shapes(model).graph
    except Exception:  # not knowing is fine, and whatever the C++ code throws means that
        graph = model.graph
    return {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
