"""Writing into an ONNX file: which tensors hold an operation's weights, scale and bias, and other values for them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, TensorProto, numpy_helper

from accaware.onnx.graph import Node, load, message
from accaware.onnx.read import Product
from accaware.onnx.tensors import ELEMENTS, Array, Element

__all__ = ["File", "Site"]

_LARGEST = 2**31 - 2**24  # bytes of a file without external data: protobuf's limit, with room for the graph
_DATA = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")

#: Inputs that may hold weights, each with the input that holds their scale (None: a node before has it).
_OPERANDS: dict[str, dict[int, int | None]] = {
    "QLinearConv": {3: 4},
    "com.microsoft.QLinearConv": {3: 4},
    "QLinearMatMul": {3: 4, 0: 1},
    "com.microsoft.QGemm": {3: 4, 0: 1},
    "com.microsoft.DynamicQuantizeMatMul": {1: 2},
    "com.microsoft.MatMulIntegerToFloat": {1: 3, 0: 2},
}
_FLOAT_OPERANDS: dict[int, int | None] = {1: None, 0: None}
_BIAS = {"QLinearConv": 8, "com.microsoft.QLinearConv": 8, "com.microsoft.QGemm": 6}
_FLOAT_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}

_INTEGER = ("MatMulInteger", "ConvInteger")
_DEQUANTIZE = ("DequantizeLinear", "com.microsoft.DequantizeLinear")
_QUANTIZE = ("QuantizeLinear", "com.microsoft.QuantizeLinear", "qonnx.Quant", "qonnx.IntQuant", "qonnx.BipolarQuant")
_QUANTIZERS = (*_DEQUANTIZE, *_QUANTIZE)
_MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_PASSES = (*_QUANTIZERS, *_MOVES, "Clip", "Min", "Max", "Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class Site:
    """The tensors that change with the scale of an operation's weights.

    scales: all to be multiplied by the same; none where the file has no scale of these weights alone. bias: integers
    in units of the products, and bias_scale: the tensor of that unit, where there are such. after: whether the scales
    are what the sums are multiplied by later, one number or one for each output.
    """

    scales: tuple[str, ...] = ()
    bias: str | None = None
    bias_scale: str | None = None
    after: bool = False


class File:
    """An ONNX file whose tensors can be given other values; all else stays as it is.

    Raises `OSError` or `ValueError` as `accaware.onnx.read.read` does.
    """

    def __init__(self, path: str | Path) -> None:
        graph = load(path).graph
        self.model = message(path)
        self._tensors: dict[str, TensorProto | None] = {}
        self._outputs: set[str] = set()  # of subgraphs too: they leave those by the node around them
        self._collect(self.model.graph)
        self._nodes: dict[str, Node] = {}
        self._producers: dict[str, Node] = {}
        self._readers: dict[str, list[Node]] = {}
        for node in graph.walk():
            self._nodes[node.name] = node
            self._producers.update(dict.fromkeys(node.outputs, node))
            for name in dict.fromkeys(node.inputs):
                self._readers.setdefault(name, []).append(node)

    def _collect(self, graph: GraphProto) -> None:
        """Every tensor by its name; None for two of one name, which cannot be told apart. All outputs of graphs."""
        self._outputs.update(info.name for info in graph.output)
        found = [(tensor.name, tensor) for tensor in graph.initializer]
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    found.append((node.output[0], attribute.t))
                for body in (attribute.g, *attribute.graphs):
                    self._collect(body)
        for name, tensor in found:
            self._tensors[name] = None if name in self._tensors else tensor

    def holds(self, name: str) -> bool:
        """Whether a tensor of this name has values of its own in the file, which can be replaced."""
        tensor = self._tensors.get(name)
        return tensor is not None and tensor.data_type in ELEMENTS

    def array(self, name: str) -> Array:
        """The values of a tensor that the file `holds`."""
        return numpy_helper.to_array(self._tensor(name))

    def is_float(self, name: str) -> bool:
        """Whether its elements are floats."""
        return ELEMENTS[self._tensor(name).data_type].codes is None

    def put(self, name: str, values: Array) -> None:
        """Other values of the same shape; floats are rounded to the tensor's type."""
        tensor = self._tensor(name)
        assert tuple(tensor.dims) == values.shape, (name, values.shape)
        for field in _DATA:
            tensor.ClearField(field)
        tensor.raw_data = _packed(ELEMENTS[tensor.data_type], values)

    def _tensor(self, name: str) -> TensorProto:
        tensor = self._tensors[name]
        assert tensor is not None, name
        return tensor

    def other_use(self, name: str, products: Collection[Product]) -> str | None:
        """What else a tensor's values reach than the weights of these operations; None where nothing does."""
        weights = {product.name: _operand(self._nodes[product.name], product) for product in products}
        waiting, seen = [name], {name}
        while waiting:
            tensor = waiting.pop()
            if tensor in self._outputs:
                return f"graph output '{tensor}'"
            for node in self._readers.get(tensor, []):
                places = [i for i, read in enumerate(node.inputs) if read == tensor]
                if node.key == "Shape" or places == [weights.get(node.name)]:
                    continue
                if node.key not in _PASSES:
                    return f"{node.kind} '{node.name}'"
                waiting += [n for n in node.outputs if n not in seen]
                seen.update(node.outputs)
        return None

    def site(self, product: Product) -> Site:
        """What changes with the scale of an operation's weights."""
        node = self._nodes[product.name]
        if node.key in _INTEGER:
            later = self._later(node, product)
            return Site((later,), after=True) if later else Site()
        scales = self._scales(node, product.rows.origin.name)
        if not scales:
            return Site()
        index = _BIAS.get(node.key, _FLOAT_BIAS.get(node.key))
        name = node.inputs[index] if index is not None and index < len(node.inputs) else ""
        before = self._producers.get(name)
        if name and node.key in _BIAS:
            return Site(scales, name) if product.bias is not None and self._alone(name, [node]) else Site()
        if before is not None and before.key in _DEQUANTIZE:
            bias, unit, *zero = before.inputs
            alone = all(self._alone(n, [before]) for n in (bias, unit)) and self._alone_computed(name, node)
            plain = not zero or not zero[0] or (self.holds(zero[0]) and not self.array(zero[0]).any())
            return Site(scales, bias, unit) if product.bias is not None and alone and plain else Site()
        return Site(scales) if product.bias is None else Site()

    def _alone_computed(self, name: str, node: Node) -> bool:
        return name not in self._outputs and self._readers.get(name, []) == [node]

    def _alone(self, name: str, nodes: Collection[Node]) -> bool:
        """Whether the file holds a tensor that these nodes alone read, each of them once."""
        readers = self._readers.get(name, [])
        mine = all(any(r is n for n in nodes) and r.inputs.count(name) == 1 for r in readers)
        return self.holds(name) and mine and name not in self._outputs

    def _scales(self, node: Node, weights: str) -> tuple[str, ...]:
        """The scales on the way from the tensor `weights` to a node, if nothing else has them; else none."""
        for operand, own in _OPERANDS.get(node.key, _FLOAT_OPERANDS).items():
            scales = [] if own is None else [node.inputs[own]]
            chain, name = [node], node.inputs[operand]
            while name != weights and (before := self._producers.get(name)) is not None:
                if before.key in _QUANTIZERS:
                    scales.append(before.inputs[1])
                elif before.key not in _MOVES and not (before.key == "Clip" and scales):
                    break  # what it does to the values depends on their scale
                chain.append(before)
                name = before.inputs[0]
            if name == weights:
                scales = list(dict.fromkeys(scales))
                return tuple(scales) if all(self._alone(s, chain) for s in scales) else ()
        return ()

    def _later(self, node: Node, product: Product) -> str | None:
        """The weights' scale behind an integer operator: its sums are cast to floats and multiplied by it and another.

        Nothing else may read what is in between, or the scale, which is a number or has one for each output.
        """
        rank, outputs = len(product.rows.weights.shape), product.rows.layout.outputs
        channels = (outputs, *[1] * (rank - 2)) if node.key == "ConvInteger" else (outputs,)
        # Weights on the left have their rows along a dimension that a vector lacks, those of a batch along two.
        each = node.key == "ConvInteger" or (rank == 2 and not product.left)
        cast = self._only(node.outputs[0], "Cast")
        scaled = cast and self._only(cast.outputs[0], "Mul")
        if cast is None or scaled is None:
            return None
        other = next(name for name in (*scaled.inputs, "") if name != cast.outputs[0])
        before = self._producers.get(other)
        factor = before if before is not None and self._only(other, "Mul") is scaled else scaled
        for name in factor.inputs if factor.key == "Mul" else ():
            if self._alone(name, [factor]) and self.is_float(name) and (self.array(name) > 0).all():
                size, shape = self.array(name).size, self.array(name).shape
                if size == 1 or (each and size == outputs and shape[-len(channels) :] == channels):
                    return name
        return None

    def _only(self, name: str, key: str) -> Node | None:
        """The one node that reads a tensor, once, if it is of this kind."""
        readers = self._readers.get(name, [])
        alone = len(readers) == 1 and name not in self._outputs and readers[0].inputs.count(name) == 1
        return readers[0] if alone and readers[0].key == key else None

    def save(self, folder: Path, name: str) -> list[str]:
        """Write the model into `folder` as `name`, and return the files: one, or two where it is too large for one.

        The second one holds the tensors, and comes first. Its name tells its contents apart from others, so that
        moving both to another folder replaces nothing that an older model there needs. Raises `OSError`.
        """
        tensors = [t for t in self._tensors.values() if t is not None]
        if sum(len(t.raw_data) for t in tensors) < _LARGEST and self.model.ByteSize() < _LARGEST:
            (folder / name).write_bytes(self.model.SerializeToString())
            return [name]
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.raw_data)
        data = f"{name}.{digest.hexdigest()[:12]}.data"
        onnx.save_model(
            self.model, folder / name, save_as_external_data=True, all_tensors_to_one_file=True, location=data
        )
        return [data, name]


def _operand(node: Node, product: Product) -> int:
    """The input of a node that holds the weights of its product."""
    candidates = _OPERANDS.get(node.key, _FLOAT_OPERANDS)
    return min(candidates) if product.left else max(candidates)


def _packed(element: Element, values: Array) -> bytes:
    """The bytes of a tensor in the file, as `accaware.onnx.tensors.unpack` reads them."""
    if element.bits >= 8:
        return bytes(values.astype(element.dtype.newbyteorder("<")).tobytes())
    per_byte = 8 // element.bits
    flat = np.zeros(-(-values.size // per_byte) * per_byte, np.uint8)
    flat[: values.size] = values.reshape(-1).astype(np.int64) & (2**element.bits - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * element.bits
    return bytes(np.bitwise_or.reduce(flat.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8).tobytes())
