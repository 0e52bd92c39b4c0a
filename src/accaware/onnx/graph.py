"""The graph of an ONNX file: checked, local functions inlined, every constant in its place but not yet read."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    inliner,
    load_model,
    shape_inference,
)

from accaware.onnx.tensors import (
    ELEMENTS,
    Array,
    Constant,
    Element,
    Origin,
    UnreadableError,
    listed,
    packed_bytes,
    shape_of,
    unpack,
)
from accaware.onnx.wire import Cut, cut

T = TypeVar("T")
Shape = tuple[int | None, ...]

_MOST_NODES = 2**20
_BUILT_IN = ("ai.onnx", "com.microsoft", "com.ms.", "org.pytorch.aten")  # how domains of operators begin
QONNX = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general", "finn", "qonnx")


@dataclass(frozen=True, eq=False)
class Value:
    """What the file says of a tensor: its type of elements (None: not read) and its dimensions (None: unknown)."""

    element: Element | None
    shape: Shape | None


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. name: unique in the file. key: its kind, after its domain where that is not ONNX's own.

    Absent inputs and outputs are "". bodies: its subgraphs, by attribute.
    """

    name: str
    kind: str
    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    bodies: Mapping[str, Graph]

    def get(self, name: str, default: T) -> T:
        """An attribute, of the type of `default`. Raises `UnreadableError` for another type."""
        value = self.attributes.get(name, default)
        if type(value) is not type(default):
            raise UnreadableError(f"attribute '{name}' is not of type {type(default).__name__}")
        return value

    def ints(self, name: str) -> tuple[int, ...]:
        """A list of integers, () where there is none. Raises `UnreadableError` for another type."""
        value: tuple[int, ...] = self.get(name, ())
        if any(type(v) is not int for v in value):
            raise UnreadableError(f"attribute '{name}' is not a list of integers")
        return value


@dataclass(eq=False)
class Graph:
    """A graph or subgraph: nodes in an order in which they can run, and what is known of its tensors.

    inputs: without those that have an initializer, which counts as their value. annotations: the `finn_datatype`
    of tensors. producers and consumers: by the name of the tensor, within this graph. parent: the graph around it.
    """

    name: str
    parent: Graph | None = None
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    producers: dict[str, Node] = field(default_factory=dict)
    consumers: dict[str, list[Node]] = field(default_factory=dict)

    def defines(self, name: str) -> bool:
        """Whether a tensor is defined here, and not in a graph around."""
        return name in self.inputs or name in self.constants or name in self.producers

    def sees(self, name: str) -> bool:
        """Whether a node may read this tensor: defined before it, here or in a graph around."""
        return self.defines(name) or (self.parent is not None and self.parent.sees(name))

    def walk(self) -> Iterable[Node]:
        """Every node, each before those of its subgraphs."""
        for node in self.nodes:
            yield node
            for body in node.bodies.values():
                yield from body.walk()


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded file. bytes: its size, with its external data. opsets: version by domain. metadata: its properties.

    sha256: of the file, or, with external data, of the file followed, for every data file in the order of their names,
    by that name, a zero byte and its own SHA-256. defaults: inputs that have an initializer, of which a run may feed
    another value (in the first versions of the format it may not). message: the file without its large tensors, local
    functions inlined.
    """

    path: Path
    bytes: int
    sha256: str
    opsets: Mapping[str, int]
    metadata: Mapping[str, str]
    graph: Graph
    message: ModelProto
    defaults: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The dimensions, of tensors of the outermost graph, that follow from those of its inputs and constants.

        What the file says of other tensors does not count, as nobody checks it.
        """
        try:
            values = shape_inference.infer_shapes(_unclaimed(self.message)).graph.value_info
        except Exception:  # whatever the C++ code throws at a broken model
            return {}
        return {v.name: shape for v in values if (shape := _value(v).shape) is not None}


def load(path: str | Path) -> Model:
    """Read and check an ONNX file; large tensors stay in it until they are asked for.

    Raises `OSError` where the file cannot be opened, and `ValueError`, one line with the path, for a file that is no
    ONNX model: damaged, with tensors that are missing, computed twice or from each other, or with data that is
    missing, too short or outside the file's folder.
    """
    path = Path(path)
    try:
        buffer = _mapped(path)
        stripped = cut(buffer)
        model = ModelProto.FromString(stripped.message)
        digest = hashlib.sha256(buffer)
        reader = _Reader(path.parent, stripped)
        whole = inlined(model)
        graph = reader.graph(whole.graph, None)
        opsets = {_text(entry.domain): entry.version for entry in model.opset_import}
        metadata = {_text(entry.key): _text(entry.value) for entry in model.metadata_props}
        for name, data in sorted(reader.files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    except (ValueError, DecodeError, RecursionError, UnicodeError) as error:
        reason = "not an ONNX model" if isinstance(error, DecodeError) else error
        raise ValueError(f"{path}: {' '.join(str(reason).split())[:500]}") from error
    defaults = tuple(i.name for i in model.graph.input if i.name in graph.constants) if model.ir_version > 3 else ()
    size = len(buffer) + sum(map(len, reader.files.values()))
    return Model(path, size, digest.hexdigest(), opsets, metadata, graph, whole, defaults)


#: Operators whose outputs have the shape that onnx infers, whatever the runtime: of windows see `_unclaimed`.
_SHAPED = (
    "Abs Add And AveragePool BatchNormalization Cast Ceil Clip Concat Constant Conv DequantizeLinear Div Dropout Elu "
    "Equal Erf Exp Flatten Floor Gelu Gemm GlobalAveragePool GlobalMaxPool Greater HardSigmoid HardSwish Identity "
    "LayerNormalization LeakyRelu Less Log MatMul Max MaxPool Min Mish Mul Neg Not Or Pad Pow QuantizeLinear "
    "Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Round Selu Sigmoid Sign Softmax Softplus Sqrt "
    "Squeeze Sub Sum Tanh Transpose Unsqueeze Where"
)
_BROADCASTS = frozenset(("Quant", "IntQuant", "BipolarQuant", "Trunc"))  # of QONNX: over all of their inputs


def _unclaimed(model: ModelProto) -> ModelProto:
    """What tensors' shapes follow from: a model without what it says of the tensors that its nodes compute.

    Left out are nodes whose shapes runtimes and onnx may see differently: of other operators, and with windows that
    are rounded up (runtimes drop those in the padding) or padded by a rule (where dilated, onnx errs).
    """
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    made = ModelProto(ir_version=max(4, model.ir_version))
    made.opset_import.add(domain="", version=version)
    graph, shaped = made.graph, set(_SHAPED.split())
    graph.name = "shapes"
    graph.initializer.extend(model.graph.initializer)
    constants = {tensor.name for tensor in graph.initializer}
    for info in model.graph.input:
        if info.name not in constants:
            graph.input.append(info)
            for size in graph.input[-1].type.tensor_type.shape.dim:
                if size.dim_value <= 0:  # which runtimes take for any
                    size.Clear()
    for node in model.graph.node:
        if node.domain in QONNX and node.op_type in _BROADCASTS and version >= 8:
            graph.node.add(op_type="Sum", input=[name for name in node.input if name], output=node.output)
        elif node.domain in ("", "ai.onnx") and node.op_type in shaped:
            given = {attribute.name: attribute for attribute in node.attribute}
            ruled = "auto_pad" in given and given["auto_pad"].s not in (b"", b"NOTSET", b"VALID")
            if not ruled and not ("ceil_mode" in given and given["ceil_mode"].i):
                graph.node.append(node)
                graph.node[-1].domain = ""
    return made


def message(path: str | Path) -> ModelProto:
    """A file that `load` has read, whole and as it is, with its external data. Raises `OSError` or `ValueError`."""
    try:
        return load_model(path)
    except OSError:
        raise
    except Exception as error:  # onnx and protobuf have errors of their own
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error


def _mapped(path: Path) -> memoryview:
    """A view of a file, whose pages are read when they are needed."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def inlined(model: ModelProto) -> ModelProto:
    """The model with the bodies of its local functions in place of their calls.

    Raises `ValueError` for a function that has the name of an operator, which runtimes may prefer, and for a call that
    cannot be replaced.
    """
    if not model.HasField("graph"):
        raise ValueError("the file has no graph")
    functions = {(f.domain, f.name): f for f in model.functions}
    if not functions:
        return model
    counts: dict[tuple[str, str], int] = {}
    if _expanded(model.graph.node, functions, counts, 0) > _MOST_NODES:
        raise ValueError(f"its local functions expand to more than {_MOST_NODES} nodes")
    for domain, name in counts:
        if not domain or domain in QONNX or domain.startswith(_BUILT_IN):
            raise ValueError(f"its local function '{name}' is in domain '{domain}', which is one of operators")
    try:
        made = inliner.inline_local_functions(model)
    except Exception as error:  # whatever the C++ code throws at a broken model
        raise ValueError(f"its local functions cannot be inlined: {error}") from error
    # Without a word, a function of another version of the operators stays a call.
    if left := next((n for n in _every(made.graph.node) if (n.domain, n.op_type) in functions), None):
        raise ValueError(f"its local function '{left.op_type}' cannot be inlined: its operators are of another version")
    return made


def _every(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    """These nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _every(body.node)


def unique_name(node: NodeProto, taken: dict[str, int]) -> str:
    """The node's name, or that of its output, made different from those `taken`, which it joins.

    taken: names, and how often each was asked for, so that a thousand nodes of one name take a thousand steps.
    """
    name = base = node.name or next(filter(None, node.output), node.op_type)
    while name in taken:
        taken[base] += 1
        name = f"{base}#{taken[base]}"
    taken[name] = 1
    return name


def _expanded(
    nodes: Iterable[NodeProto],
    functions: Mapping[tuple[str, str], FunctionProto],
    counts: dict[tuple[str, str], int],
    depth: int,
) -> int:
    """How many nodes these are once every function is inlined. counts: of the functions met so far."""
    if depth > 50:
        raise ValueError("its local functions call each other without end")
    total = 0
    for node in nodes:
        total += 1
        key = (node.domain, node.op_type)
        if key in functions:
            if key not in counts:
                counts[key] = _expanded(functions[key].node, functions, counts, depth + 1)
            total += counts[key]
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                total += _expanded(body.node, functions, counts, depth + 1)
    return total


class _Reader:
    """Turns messages into graphs. files: the contents of the external data files, by their names in the model."""

    def __init__(self, folder: Path, stripped: Cut) -> None:
        self.folder = folder
        self.cut = stripped
        self.files: dict[str, memoryview] = {}
        self.names: dict[str, int] = {}  # and how often each was asked for

    def graph(self, message: GraphProto, parent: Graph | None) -> Graph:
        graph = Graph(_text(message.name), parent)
        for tensor in message.initializer:
            _new(graph.constants, _text(tensor.name), self.constant(tensor), "initializer")
        for sparse in message.sparse_initializer:
            _new(graph.constants, _text(sparse.values.name), _sparse(sparse.values.name), "initializer")
        for info in message.input:
            if info.name not in graph.constants:
                _new(graph.inputs, _text(info.name), _value(info), "graph input")
        graph.values = {_text(info.name): _value(info) for info in message.value_info}
        for annotation in message.quantization_annotation:
            for entry in annotation.quant_parameter_tensor_names:
                if entry.key == "finn_datatype":
                    graph.annotations[_text(annotation.tensor_name)] = _text(entry.value)
        for node in message.node:
            self._add(graph, node)
        for info in message.output:
            if not graph.sees(_text(info.name)):
                raise ValueError(f"graph output '{info.name}' is computed by no node")
        return graph

    def _add(self, graph: Graph, message: NodeProto) -> None:
        for text in (message.name, message.op_type, message.domain, *message.input, *message.output):
            _text(text)
        name = unique_name(message, self.names)
        for tensor in filter(None, message.input):
            if not graph.sees(tensor):
                raise ValueError(f"node '{name}' reads '{tensor}', which nothing before it computes")
        attributes: dict[str, Any] = {}
        bodies: dict[str, Graph] = {}
        names: set[str] = set()
        for attribute in message.attribute:
            if _text(attribute.name) in names:
                raise ValueError(f"node '{name}' has two attributes '{attribute.name}'")
            names.add(attribute.name)
            if attribute.type == AttributeProto.UNDEFINED:
                raise ValueError(f"attribute '{attribute.name}' of node '{name}' has no type")
            if attribute.type == AttributeProto.GRAPH:
                bodies[attribute.name] = self.graph(attribute.g, graph)
            elif attribute.type == AttributeProto.GRAPHS:
                bodies |= {f"{attribute.name}[{i}]": self.graph(g, graph) for i, g in enumerate(attribute.graphs)}
            else:
                attributes[attribute.name] = self._attribute(attribute)
        domain = (
            "" if message.domain in ("", "ai.onnx") else "qonnx." if message.domain in QONNX else f"{message.domain}."
        )
        node = Node(
            name=name,
            kind=message.op_type,
            key=domain + message.op_type,
            inputs=tuple(message.input),
            outputs=tuple(message.output),
            attributes=attributes,
            bodies=bodies,
        )
        graph.nodes.append(node)
        for tensor in filter(None, node.outputs):
            if tensor in graph.inputs or tensor in graph.constants or tensor in graph.producers:
                raise ValueError(f"tensor '{tensor}' is computed twice")
            graph.producers[tensor] = node
        for tensor in dict.fromkeys(filter(None, node.inputs)):
            graph.consumers.setdefault(tensor, []).append(node)

    def _attribute(self, attribute: AttributeProto) -> Any:
        kinds = AttributeProto
        if attribute.type == kinds.TENSOR:
            return self.constant(attribute.t)
        if attribute.type == kinds.STRING:
            return attribute.s.decode(errors="replace")
        if attribute.type in (kinds.INT, kinds.FLOAT):
            return attribute.i if attribute.type == kinds.INT else attribute.f
        if attribute.type in (kinds.INTS, kinds.FLOATS):
            return tuple(attribute.ints if attribute.type == kinds.INTS else attribute.floats)
        return None  # of a kind that no reader asks for

    def constant(self, tensor: TensorProto) -> Constant:
        """A tensor message as a constant: its sizes are checked, its values not yet read."""
        shape = shape_of(tensor)
        element = ELEMENTS.get(tensor.data_type)
        origin = Origin(tensor.name, shape)
        if element is None or tensor.HasField("segment"):
            return Constant(origin, shape, np.dtype(object), None, partial(_refuse, tensor.name))
        load: partial[Array]
        if tensor.data_location == TensorProto.EXTERNAL:
            load = partial(unpack, element, shape, self._external(tensor, packed_bytes(element, shape)))
        elif tensor.HasField("raw_data"):
            data = self.cut.data(tensor.raw_data)
            _same_size(tensor.name, len(data), packed_bytes(element, shape), "bytes")
            load = partial(unpack, element, shape, data)
        else:
            values = getattr(tensor, element.field)
            count = int(np.prod(shape, dtype=object)) if element.bits >= 8 else packed_bytes(element, shape)
            _same_size(tensor.name, len(values), count, "values")
            load = partial(listed, element, shape, values)
        return Constant(origin, shape, element.dtype, element.codes, load)

    def _external(self, tensor: TensorProto, size: int) -> memoryview:
        entries = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
        name = entries.get("location", "")
        data = self._file(tensor.name, name)
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or size)
        except ValueError:
            raise ValueError(f"tensor '{tensor.name}' has an offset or length that is no number") from None
        _same_size(tensor.name, length, size, "bytes")
        if not 0 <= offset <= len(data) - size:
            raise ValueError(f"tensor '{tensor.name}' lies outside its data file '{name}' of {len(data)} bytes")
        return data[offset : offset + size]

    def _file(self, tensor: str, name: str) -> memoryview:
        """The contents of a data file, which must lie within the model's folder."""
        if name not in self.files:
            try:
                place = (self.folder / name).resolve()
                inside = bool(name) and place.is_relative_to(self.folder.resolve()) and place.is_file()
                self.files[name] = _mapped(place) if inside and place.stat().st_size else memoryview(b"")
            except OSError as error:
                raise ValueError(f"data file '{name}' of tensor '{tensor}' cannot be read: {error.strerror}") from error
            if not inside:
                raise ValueError(f"tensor '{tensor}' has its data in '{name}', which is no file in the model's folder")
        return self.files[name]


def _new(table: dict[str, T], name: str, value: T, what: str) -> None:
    if name in table:
        raise ValueError(f"there are two {what}s '{name}'")
    table[name] = value


def _text(value: str | bytes) -> str:
    """A string of a message, which protobuf leaves as bytes where it is none."""
    if isinstance(value, bytes):
        raise ValueError(f"the file has a name that is no text: {value[:40]!r}")
    return value


def _same_size(name: str, found: int, wanted: int, unit: str) -> None:
    if found != wanted:
        raise ValueError(f"tensor '{name}' has {found} {unit} of data where its dimensions want {wanted}")


def _refuse(name: str) -> Array:
    raise UnreadableError(f"the elements of '{name}' are of a type that is not read")


def _sparse(name: str) -> Constant:
    return Constant(Origin(name, ()), (), np.dtype(object), None, partial(_refuse, name))


def _value(info: ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim)
    return Value(ELEMENTS.get(tensor.elem_type), shape if tensor.HasField("shape") else None)
