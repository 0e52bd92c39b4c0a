"""From an ONNX file to its accumulating operations: with their integers, or with the reason why those are not known."""

from __future__ import annotations

import re
import reprlib
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from onnx import defs

from accaware.formats import IntFormat
from accaware.onnx.facts import ONE, Call, Codes, Fact, Floats, Reals, floats_of, integers
from accaware.onnx.graph import Graph, Model, Shape, Value, load
from accaware.onnx.products import PRODUCTS, Product
from accaware.onnx.quantizers import QUANTIZERS
from accaware.onnx.ranges import RANGES, Handler, folded, reduced_terms, terms_of
from accaware.onnx.tensors import Array, Constant, UnreadableError
from accaware.onnx.weights import Rows

__all__ = ["Codes", "Network", "Other", "Product", "Rows", "Unproven", "parse_input", "read"]


@dataclass(frozen=True)
class Unproven:
    """An operation that adds products, or may, and whose integers are not known because of `reason`."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Other:
    """An operation that adds values rather than products with weights.

    sums: what it adds. terms: how many, and codes: the integers that every one of them is, where they are known.
    """

    name: str
    kind: str
    sums: str
    terms: int | None = None
    codes: IntFormat | None = None


@dataclass(frozen=True, eq=False)
class Network:
    """A file and its accumulating operations, in the order of its nodes; a subgraph's stand where its node does.

    sha256 and metadata: see `accaware.onnx.graph.Model`. inputs: the codes of graph inputs as they were assumed.
    """

    sha256: str
    opsets: Mapping[str, int]
    metadata: Mapping[str, str]
    inputs: Mapping[str, Codes]
    operations: tuple[Product | Unproven | Other, ...]

    @property
    def products(self) -> tuple[Product, ...]:
        """The operations whose integers are known."""
        return tuple(op for op in self.operations if isinstance(op, Product))

    @property
    def unproven(self) -> tuple[Unproven, ...]:
        """Those whose are not."""
        return tuple(op for op in self.operations if isinstance(op, Unproven))

    @property
    def others(self) -> tuple[Other, ...]:
        """Those that add no products with weights."""
        return tuple(op for op in self.operations if isinstance(op, Other))


def read(path: str | Path, inputs: Mapping[str, Codes] | None = None) -> Network:
    """Find every accumulating operation of an ONNX file, and the integers of those that are quantized.

    inputs: codes of graph inputs that the file does not give, by name (see `parse_input`). Every operation that may add
    up more than two numbers is in the result exactly once. Nodes of local functions are read where they are called,
    and an initializer that is listed as a graph input counts as its value, which the note of every product says. Ranges
    assume that no value is NaN.

    Raises `OSError` where the file cannot be opened, and `ValueError`, one line, for a file that is no ONNX model or
    damaged, and for a name in `inputs` that is no graph input or a range that does not fit its type.
    """
    model = load(path)
    reading = _Reading(dict(inputs or {}), model)
    with np.errstate(all="ignore"):  # hostile scales overflow; what comes out is checked
        reading.graph(model.graph, ChainMap())
    return Network(model.sha256, model.opsets, model.metadata, reading.assumed, tuple(reading.operations))


def parse_input(text: str) -> tuple[str, Codes]:
    """`NAME=uint8[:scale[:zero]]` as a name and the codes of a graph input; bits may be any number from 1 to 32.

    Raises `ValueError` for anything else.

    >>> name, codes = parse_input("x=uint4:0.5")
    >>> name, codes.lo, codes.hi, float(codes.scale)
    ('x', 0, 15, 0.5)
    """
    found = re.fullmatch(r"(.+)=(u?)int([0-9]{1,2})(?::([^:]+))?(?::([+-]?[0-9]{1,10}))?", text)
    bits = int(found[3]) if found else 0
    try:
        scale = float((found and found[4]) or 1)
    except ValueError:
        scale = 0.0
    if not found or not 1 <= bits <= 32 or not 0 < scale < np.inf:
        raise ValueError(f"an input is written NAME=uint8[:scale[:zero]], not {text!r}")
    codes = IntFormat.unsigned(bits) if found[2] else IntFormat.signed(bits)
    step, zero = (np.float64(v).reshape(()) for v in (scale, int(found[5] or 0)))
    return found[1], Codes(codes.lo, codes.hi, step, zero)


_MADE_WEIGHTS = 2**28  # bytes, and 16 times the file
_FOLDED_ELEMENTS = 2**22


class _Reading:
    """Walks through the nodes and collects what is known of every tensor, and the operations."""

    def __init__(self, inputs: dict[str, Codes], model: Model) -> None:
        self.given = inputs
        self.model = model
        self.presumed = _presumed(model.defaults)
        self.assumed: dict[str, Codes] = {}
        self.operations: list[Product | Unproven | Other] = []
        # A small file can describe much: a million views of one tensor, each quantized anew. These end that.
        self.weights: set[int] = set()
        self.weight_bytes = _MADE_WEIGHTS + 16 * model.bytes
        self.folded_elements = _FOLDED_ELEMENTS

    def graph(self, graph: Graph, outer: ChainMap[str, Fact]) -> None:
        facts: ChainMap[str, Fact] = ChainMap({}, *outer.maps)
        if graph.parent is None and (unknown := set(self.given) - set(graph.inputs)):
            raise ValueError(f"'{min(unknown)}' is no graph input; those are {', '.join(graph.inputs) or 'none'}")
        for name, value in graph.inputs.items():
            facts[name] = self._input(graph, name, value)
        for name, constant in graph.constants.items():
            facts[name] = _annotated(constant, graph.annotations.get(name))
        for node in graph.nodes:
            call = Call(node, [facts[name] if name else None for name in node.inputs], *_shapes(graph, self.model))
            for place, (name, fact) in enumerate(zip(node.outputs, self._node(call, graph), strict=False)):
                if isinstance(fact, Reals) and fact.floats is None:
                    fact = replace(fact, floats=_floats(call, place))
                facts[name] = fact
            for body in node.bodies.values():
                self.graph(body, facts)

    def _input(self, graph: Graph, name: str, value: Value) -> Fact:
        type_ = value.element.codes if value.element else None
        known: Codes | None = None
        if graph.parent is None:
            known = self.given.get(name) or _datatype(graph.annotations.get(name))
        if known is None:
            reason = f"'{name}' is a float input of the graph; say {name}=uint8:scale if it holds codes"
            if graph.parent is not None:
                reason = f"'{name}' is an input of subgraph '{graph.name}'"
            floats = value.element.dtype if value.element else None
            return Codes(type_.lo, type_.hi, ONE, type=type_) if type_ else Reals(reason, floats=floats)
        if type_ is not None:
            if not known.plain or not type_.lo <= known.lo <= known.hi <= type_.hi:
                raise ValueError(
                    f"input '{name}' holds integers in [{type_.lo}, {type_.hi}], not the codes given for it"
                )
            known = Codes(known.lo, known.hi, ONE, type=type_)
        self.assumed[name] = known
        return replace(known, floats=value.element.dtype) if value.element and type_ is None else known

    def _node(self, call: Call, graph: Graph) -> list[Fact]:
        """Note the operation, if the node is one; what is known of the node's outputs."""
        node = call.node
        outputs = [self._untyped(call, graph, name) for name in node.outputs]
        found: Sequence[Fact] = []
        key = node.key
        if key in PRODUCTS:
            try:
                if self.weight_bytes < 0:
                    raise UnreadableError("the file makes far more weights than it holds")
                product, fact = PRODUCTS[key](call)
                self._count(product)
                note = "; ".join(filter(None, (product.note, self.presumed)))
                self.operations.append(replace(product, note=note))
                found = [fact]
            except _REFUSALS as error:
                self.operations.append(Unproven(node.name, node.kind, _reason(error)))
            return [*found, *outputs[len(found) :]]
        operation = _other(call)
        if operation is not None:
            self.operations.append(operation)
        handler: Handler | None = QUANTIZERS.get(key) or RANGES.get(key)
        if handler is not None:
            try:
                found = (folded(call) if self.folded_elements > 0 else None) or handler(call)
                self.folded_elements -= sum(f.size for f in found if isinstance(f, Constant) and f.origin.computed)
            except _REFUSALS as error:
                found = [Reals(f"of {node.kind} '{node.name}': {_reason(error)}") for _ in node.outputs]
                found = [o if isinstance(o, Codes) else f for f, o in zip(found, outputs, strict=True)]
        found = found[: len(outputs)]
        return [*found, *outputs[len(found) :]]

    def _count(self, product: Product) -> None:
        """Note the memory of weights that are no view of the file."""
        array = product.rows.weights
        while isinstance(array.base, np.ndarray):
            array = array.base
        if array.base is None and id(array) not in self.weights:
            self.weights.add(id(array))
            self.weight_bytes -= array.nbytes

    def _untyped(self, call: Call, graph: Graph, name: str) -> Fact:
        """What the file alone says of an output: nothing, unless its type of elements is an integer."""
        value = graph.values.get(name)
        type_ = value.element.codes if value and value.element else None
        if type_ is not None:
            return Codes(type_.lo, type_.hi, ONE, type=type_)
        return replace(call.unknown(), floats=value.element.dtype) if value and value.element else call.unknown()


#: What reading a malformed node can raise. Not knowing is always a sound answer, so none of it ends the reading.
_REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError)


def _presumed(defaults: Sequence[str]) -> str:
    """What a reader of the certificate should know of inputs that have a value in the file."""
    if not defaults:
        return ""
    names = ", ".join(map(reprlib.repr, defaults[:3])) + (f" and {len(defaults) - 3} more" if defaults[3:] else "")
    return f"presumes that no run feeds another value to {names}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UnreadableError) else f"the node is malformed ({text})"


@cache
def _same_types(kind: str) -> tuple[tuple[int, ...], ...]:
    """For every output of an operator of ONNX, the inputs that ONNX gives the same type."""
    schema = defs.get_schema(kind)
    alike: dict[str, list[int]] = {}
    for i, formal in enumerate(schema.inputs):
        if formal.is_homogeneous:
            alike.setdefault(formal.type_str, []).append(i)
    return tuple(tuple(alike.get(o.type_str, ())) if o.is_homogeneous else () for o in schema.outputs)


def _floats(call: Call, place: int) -> Floats | None:
    """The type of an output's floats, where it is that of an input."""
    node = call.node
    if node.key != node.kind:  # QONNX computes everything in the one type of its inputs
        return floats_of(*call.facts) if node.key.startswith("qonnx.") else None
    outputs = _same_types(node.kind) if defs.has(node.kind) else ()
    inputs = outputs[min(place, len(outputs) - 1)] if outputs else ()
    return floats_of(*(call.facts[i] for i in inputs if i < len(call.facts)))


def _shapes(graph: Graph, model: Model) -> tuple[Callable[[str], Shape | None], Callable[[str], Shape | None]]:
    """What `Call` says of shapes: those in the file, and those that hold."""

    def shape(name: str) -> Shape | None:
        scope: Graph | None = graph
        while scope is not None:
            value = scope.inputs.get(name) or scope.values.get(name)
            if value is not None:
                return value.shape
            scope = scope.parent
        return None

    def known(name: str) -> Shape | None:
        scope = graph
        while scope.parent is not None and not scope.defines(name):
            scope = scope.parent
        if scope.parent is not None:
            return None
        return scope.inputs[name].shape if name in scope.inputs else model.shapes.get(name)

    return shape, known


def _datatype(name: str | None) -> Codes | None:
    """The codes of a `finn_datatype`; None for floats and for what is not known."""
    found = re.fullmatch(r"(U?)INT(\d{1,2})|FIXED<(\d{1,2}),(\d{1,2})>|(BIPOLAR|BINARY|TERNARY)", name or "")
    bits = int(found[2] or found[3] or 1) if found else 0
    if not found or not 1 <= bits <= 62:
        return None
    if found[5]:
        return Codes(0 if found[5] == "BINARY" else -1, 1, ONE, dialect="qonnx")
    codes = IntFormat.unsigned(bits) if found[1] else IntFormat.signed(bits)
    scale = np.ldexp(1.0, int(found[4] or 0) - bits) if found[3] else 1.0
    return Codes(codes.lo, codes.hi, np.float64(scale).reshape(()), dialect="qonnx")


def _annotated(constant: Constant, annotation: str | None) -> Fact:
    """A constant of floats whose annotation says that they are integers, as codes; others as they are."""
    codes = _datatype(annotation)
    if codes is None or constant.dtype.kind != "f":
        return constant
    assert codes.scale is not None
    scale, lo, hi = float(codes.scale), codes.lo, codes.hi

    def block(x: Array, _: slice) -> Array:
        whole: Array = np.rint(x / scale)
        if not ((whole * scale == x) & (whole >= lo) & (whole <= hi)).all():
            raise UnreadableError(f"'{constant.origin.name}' does not hold the {annotation} of its annotation")
        return whole

    values = constant.computed(codes.format, block)
    return Codes(lo, hi, codes.scale, values=values, dialect="qonnx", floats=constant.dtype)


# Operations that add values. Their sums are reported, with how many and which codes where that is known.

_FLOATS = [
    "Softmax",
    "LogSoftmax",
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "RMSNormalization",
    "LRN",
    "LpNormalization",
    "MeanVarianceNormalization",
    "LpPool",
    "GlobalLpPool",
    "CumSum",
    "Det",
    "Col2Im",
    "GridSample",
    "RoiAlign",
    "Resize",
    "Upsample",
    "ScatterElements",
    "ScatterND",
    "DFT",
    "STFT",
    "MelWeightMatrix",
    "AffineGrid",
    "NegativeLogLikelihoodLoss",
    "SoftmaxCrossEntropyLoss",
    "Scatter",
    "TensorScatter",
    "CumProd",
]
_REDUCTIONS = ["ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"]
_POOLS = ["AveragePool", "GlobalAveragePool", "qonnx.QuantAvgPool2d", "com.microsoft.QLinearAveragePool"]
_POOLS.append("com.microsoft.QLinearGlobalAveragePool")
_ADDITIONS = ["Add", "Sub", "Sum", "Mean", "com.microsoft.QLinearAdd"]
#: Operators of ONNX that multiply by weights in ways that no reader knows.
_UNREAD = [
    "Einsum",
    "LSTM",
    "GRU",
    "RNN",
    "Attention",
    "LinearAttention",
    "CausalConvWithState",
    "DeformConv",
    "TfIdfVectorizer",
]
#: Operators of other domains that add nothing.
_HARMLESS = ["com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu", "com.microsoft.BiasGelu"]


def _other(call: Call) -> Other | Unproven | None:
    """The operation that a node is, which multiplies by no weights that are known; None where it adds nothing."""
    node = call.node
    key = node.key
    if key in _ADDITIONS:
        return _addition(call)
    if key in _POOLS or key in _REDUCTIONS:
        return _pooling(call)
    if key in _FLOATS:
        adds = key not in ("Resize", "Upsample") or node.attributes.get("mode", "nearest") != "nearest"
        adds = adds and not (key.startswith("Scatter") and node.attributes.get("reduction", "none") == "none")
        return Other(node.name, node.kind, "floats within one tensor") if adds else None
    if key in _UNREAD:
        return Unproven(node.name, node.kind, "no reader knows the products of this operator")
    known = key in RANGES or key in QUANTIZERS or key in _HARMLESS
    if not known and (node.key != node.kind or not defs.has(node.kind)):
        return Unproven(node.name, node.kind, f"operator {key} is not known, and may add products")
    return None


def _codes(fact: Fact | None) -> IntFormat | None:
    """The codes of a tensor, less their zero-point where there is one."""
    codes = None if fact is None else integers(fact) or fact
    if not isinstance(codes, Codes) or isinstance(codes.zero, IntFormat) or not codes.error < 0.5:
        return None
    zeros = np.rint(codes.zero).astype(np.int64)
    return IntFormat(codes.lo - int(zeros.max()), codes.hi - int(zeros.min()))


def _addition(call: Call) -> Other | None:
    """Two tensors that are added; an addition of a constant is none."""
    node, quantized = call.node, call.node.kind == "QLinearAdd"
    places = [0, 3] if quantized else range(len(call.facts))
    facts = [call.facts[i] for i in places if i < len(call.facts)]
    if len(facts) == 2 and any(_fixed(fact) for fact in facts):
        return None
    codes = [_codes(fact) for fact in facts]
    known = [c for c in codes if c is not None]
    joint = None
    if known and len(known) == len(codes):
        joint = IntFormat(min(c.lo for c in known), max(c.hi for c in known))
    return Other(node.name, node.kind, "tensors, each with its own scale", len(facts), joint)


def _fixed(fact: Fact | None) -> bool:
    return isinstance(fact, Constant) or (isinstance(fact, Codes) and fact.values is not None)


def _pooling(call: Call) -> Other:
    node, terms = call.node, None
    try:
        if node.kind in ("AveragePool", "QuantAvgPool2d", "QLinearAveragePool") and node.attributes.get("kernel_shape"):
            terms = int(np.prod(node.ints("kernel_shape"), dtype=object))
        elif node.kind == "QuantAvgPool2d":
            terms = node.get("kernel", 0) ** 2 or None
        elif node.kind in _REDUCTIONS:
            terms = reduced_terms(call, call.shape)
        elif node.kind == "GlobalAveragePool":
            terms = terms_of(call, call.shape)
        fact = _codes(call.facts[0] if call.facts else None)
    except _REFUSALS:
        terms, fact = None, None
    plain = node.kind not in ("ReduceSumSquare", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceL1")
    return Other(node.name, node.kind, "values of one tensor", terms, fact if plain else None)
