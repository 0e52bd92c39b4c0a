"""Unfolded inputs: for every sum of an operation, the codes that it multiplies, in the order of its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from accaware.bounds import Integers
from accaware.formats import TapOrder
from accaware.onnx.products import Product
from accaware.onnx.session import Runner
from accaware.onnx.tensors import Array

__all__ = ["Sums", "sums"]

#: Sums [B, r] of the rows with these indices [r], for inputs [B, K].
Sums = Callable[[Integers, Integers], Array]


def sums(product: Product, node: NodeProto, x: Integers, fill: int, order: TapOrder, compute: Sums) -> Array:
    """What `compute` makes of every sum, float64 in the shape of the operator's output.

    node: the operation in the file. x: its input, integers. fill: what a padded tap reads.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if "Conv" in node.op_type:
        return _convolution(product, node.op_type, attributes, x, fill, order, compute)
    if attributes.get("transB" if product.left else "transA"):
        x = x.T
    return _matrix(product, x, compute)


def _matrix(product: Product, x: Integers, compute: Sums) -> Array:
    """x [..., K], or [..., K, M] where the weights come first. Weights of a batch have one matrix for each."""
    shape = product.rows.origin.replay(np.broadcast_to(np.int8(0), product.rows.origin.shape)).shape
    batch = shape[:-2]
    x = x.swapaxes(-1, -2) if product.left and x.ndim > 1 else x
    vector, x = x.ndim == 1, np.atleast_2d(x)
    count = product.rows.count // int(np.prod(batch))
    if not batch:
        out = compute(np.arange(count), x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], count)
    else:
        x = np.broadcast_to(x, (*np.broadcast_shapes(x.shape[:-2], batch), *x.shape[-2:]))
        out = np.empty((*x.shape[:-1], count))
        which = np.broadcast_to(np.arange(int(np.prod(batch))).reshape(batch), x.shape[:-2])
        for place in np.ndindex(*x.shape[:-2]):
            out[place] = compute(which[place] * count + np.arange(count), x[place])
    if vector:
        out = out[..., 0, :]
    elif product.left and len(shape) > 1:
        out = out.swapaxes(-1, -2)
    return out[..., 0] if len(shape) == 1 else out


def _convolution(
    product: Product, kind: str, attributes: dict[str, Any], x: Integers, fill: int, order: TapOrder, compute: Sums
) -> Array:
    """x [N, C, *space], by groups and, for a strided transposed convolution, by phases."""
    rows = product.rows
    layout, shape = rows.layout, rows.origin.replay(np.broadcast_to(np.int8(0), rows.origin.shape)).shape
    maps = _maps(kind, attributes, shape[2:], x.shape[2:])  # [taps, *out]
    space, maps = maps.shape[1:], maps.reshape(len(maps), -1)
    taps = [part[0, 0] for part in layout.parts(np.broadcast_to(np.arange(len(maps)).reshape(shape[2:]), shape))]
    phase = np.zeros(maps.shape[1], int)  # of every output; those that meet no data may have any
    for i, part in enumerate(taps):
        phase[(maps[part] > 0).any(axis=0)] = i
    groups = int(attributes.get("group", 1))
    flat = x.reshape(len(x), groups, -1, int(np.prod(x.shape[2:])))
    flat = np.concatenate([np.full((*flat.shape[:3], 1), fill, flat.dtype), flat], axis=3)
    out = np.empty((len(x), layout.outputs, maps.shape[1]))
    for i, part in enumerate(taps):
        places = np.flatnonzero(phase == i)
        if not len(places):
            continue
        for g, channels in enumerate(np.split(np.arange(layout.outputs), groups)):
            met = flat[:, g][:, :, maps[np.ix_(part, places)]]  # [N, C / groups, taps, places]
            met = met.transpose((0, 3, 1, 2) if order == "chw" else (0, 3, 2, 1)).reshape(len(x) * len(places), -1)
            met = np.pad(met, [(0, 0), (0, rows.fan_in - met.shape[1])], constant_values=fill)
            found = compute(channels * layout.phases + i, met).reshape(len(x), len(places), -1)
            out[:, channels[:, None], places] = found.transpose(0, 2, 1)
    return out.reshape(len(x), layout.outputs, *space)


def _maps(kind: str, attributes: dict[str, Any], kernel: tuple[int, ...], space: tuple[int, ...]) -> Integers:
    """For every tap of a kernel, the place that every output reads there, counted from 1; 0 for padding.

    The operator itself says so: it gets the numbers of the places, and weights that choose one tap for each channel.
    """
    count = int(np.prod(kernel))
    chosen = np.eye(count, dtype=np.float32).reshape(count, *kernel)
    transposed = kind == "ConvTranspose"
    weights = chosen[None] if transposed else chosen[:, None]
    given = {k: v for k, v in attributes.items() if k not in ("group", "channels_last")}
    node = helper.make_node("ConvTranspose" if transposed else "Conv", ["x", "w"], ["y"], **given)
    places = np.arange(1, int(np.prod(space)) + 1, dtype=np.float32).reshape(1, 1, *space)
    graph = helper.make_graph(
        [node],
        "taps",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, places.shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    found = Runner(model, threads=1).run({"x": places})["y"]
    numbers: Integers = found[0].astype(np.int64)
    return numbers
