"""A trained network as an ONNX file that carries its request and its certificate, proven again before it is written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from accaware.certify.carried import KEY, metadata
from accaware.certify.certificate import Certificate
from accaware.certify.files import certify_file, file_layers
from accaware.certify.model import certify
from accaware.exporter.capture import PRODUCTS, capture
from accaware.exporter.dialects import DIALECTS, write_dialect
from accaware.files import write_whole
from accaware.integer.layer import IntegerLayer
from accaware.integer.network import IntegerOp, integer_network
from accaware.layers import LAYERS

__all__ = ["export"]


def export(model: nn.Module, path: str | Path, dialect: str = "qdq", sample: Any = None) -> Certificate:
    """Write a prepared and calibrated model as an ONNX file; returns the certificate of that file.

    dialect: "qdq", "qcdq", "qonnx" or "qoperator". sample: an input of the model (the tuple of its arguments, or the
    mapping of its keyword arguments), for the shapes; the first dimension (of a mapping's tensors the first two) may
    have any size. The file's metadata say of every operation which accumulator it was made for and what it starts from
    (`accaware.certify.carried`), and that layers kept in floats, products of two activations (attention) and
    rotations of inputs are outside the request; `certify_file` judges it by these. Products with other weights of
    floats, which no layer holds, are unproven there.

    Raises `OSError`, or `ValueError`, one line that names the layer where one is the reason, for what the dialect or
    PyTorch's exporter cannot write. Then nothing is written.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, not {dialect!r}")
    if sample is None:
        raise ValueError("export needs a sample, an input of the model, for its shapes")
    words, path = DIALECTS[dialect], Path(path)
    certificate = certify(model)
    network = integer_network(model, sample)
    layers = {m.layer.name: m.layer for m in network.modules() if isinstance(m, IntegerOp)}
    graph = capture(network, sample, words.opset)
    written = write_dialect(graph, words)
    carried = {name: layers[layer] for name, layer in written.items()}
    outside = [name for name in _floats(network, graph) if name not in written]
    onnx.helper.set_model_props(graph, {KEY: metadata(carried, certificate, outside)})
    contents = graph.SerializeToString()
    again = _read_back(contents, carried)
    write_whole(path, contents)
    return again


def _floats(network: nn.Module, graph: onnx.ModelProto) -> Iterator[str]:
    """The products that nobody asked to prove."""
    modules = dict(network.named_modules())
    rotations = {f"{name}.rotation" for name in modules}
    weights = {tensor.name for tensor in graph.graph.initializer} - rotations
    for node in graph.graph.node:
        kept = type(modules.get(node.name.partition("#")[0])) in LAYERS
        if node.op_type in PRODUCTS and node.name and (kept or weights.isdisjoint(node.input)):
            yield node.name


def _read_back(contents: bytes, layers: Mapping[str, IntegerLayer]) -> Certificate:
    """The certificate of the file, in which the readers find the integers that were to be written."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        file.write_bytes(contents)
        found = {layer.name: layer for layer in file_layers(file)}
        for name, layer in layers.items():
            assert np.array_equal(found[name].rows, layer.rows), f"the weights of {name} were written wrong"
            assert layer.codes.lo <= found[name].codes.lo <= found[name].codes.hi <= layer.codes.hi, name
        return certify_file(file)
