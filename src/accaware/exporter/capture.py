"""From an integer network to a graph of ONNX in which every quantized operation is one node, not yet in any dialect.

PyTorch's own exporter writes everything else. A layer is `accaware.Layer` and a shared tensor `accaware.Stream`, whose
inputs and attributes `accaware.integer.network` states; `accaware.exporter.dialects` replaces them.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from accaware.layers import LAYERS

__all__ = ["PRODUCTS", "capture"]

#: What multiplies in a captured graph, beside the layers themselves.
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def capture(network: nn.Module, sample: Any, opset: int) -> ModelProto:
    """The graph of `network` for inputs like `sample`, with any number of rows, in version `opset` of ONNX.

    Inputs are called "input", "input_1" and so on, those of a mapping by its names, and of such (text) the second
    dimension has any size too, where the network allows it. The first output is "output"; the product of a float layer
    is called as the layer is ("NAME#2" and so on where that runs again). Raises `ValueError`, one line, for what
    PyTorch's exporter cannot write.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    shapes: Any
    if isinstance(sample, Mapping):
        kwargs = dict(sample)
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        shapes = {name: _free(value, 2) for name, value in kwargs.items()}
    else:
        args = sample if isinstance(sample, tuple) else (sample,)
        names, shapes = ["input", *(f"input_{i}" for i in range(1, len(args)))], tuple(_free(a, 1) for a in args)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=["output"],
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise ValueError(f"exporting needs {error.name}: pip install 'accaware[export]'") from error
    except Exception as error:  # whatever it met in the user's model
        raise ValueError(f"PyTorch cannot write {type(network).__name__} as ONNX: {_cause(error)}") from error
    assert program is not None
    model: ModelProto = ModelProto.FromString(program.model_proto.SerializeToString())
    _name_products(model, {name for name, module in network.named_modules() if type(module) in LAYERS})
    _clean(model)
    return model


def _free(value: Any, dimensions: int) -> dict[int, Any] | None:
    """That the first dimensions of a tensor may have any size."""
    return (
        dict.fromkeys(range(min(dimensions, value.dim())), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None
    )


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first: the exporter wraps it in advice about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_products(model: ModelProto, layers: set[str]) -> None:
    seen = Counter[str]()
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            scopes = [p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"] or ["[]"]
            # a convolution that a batch-norm was folded into has the scope of the latter
            for name in layers & {*ast.literal_eval(scopes[0]), node.input[1].removesuffix(".weight")}:
                seen[name] += 1
                node.name = name if seen[name] == 1 else f"{name}#{seen[name]}"


def _clean(model: ModelProto) -> None:
    """Without what the exporter noted of this machine: stack traces and the names of its own passes."""
    for message in (model, model.graph, *model.graph.node, *model.graph.initializer):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    model.producer_name, model.producer_version = "accaware", ""
