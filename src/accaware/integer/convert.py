"""From a prepared PyTorch model to integer layers, and its accuracy on a register that really wraps around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

from accaware.formats import Spec
from accaware.integer.layer import IntegerLayer
from accaware.layers import QuantLayer, codes_of
from accaware.prepare import quant_layers

__all__ = ["integer_layer", "integer_layers", "wrapping"]


def integer_layers(model: nn.Module) -> list[IntegerLayer]:
    """The integers that will be deployed, layer by layer, in the model's order.

    Raises `ValueError` for a model that is not prepared or not calibrated.
    """
    layers = quant_layers(model)
    if not layers:
        raise ValueError("this model has no quantized layer; call prepare_ first")
    return [integer_layer(layer) for layer in layers.values()]


def integer_layer(layer: QuantLayer) -> IntegerLayer:
    """One layer's record; rows run over output channels and, within one, over the phases of a transposed one.

    Raises `ValueError` for a layer that is not calibrated, that `prepare_` would refuse by now, or whose shape changed.
    """
    layer.check()
    layer.bind()
    codes = codes_of(layer)
    q, scale, repaired = layer.deployed()
    rows = layer.rows
    taps = rows.join(q).flatten(0, 1).cpu().numpy()
    preload = layer.preload(q).reshape(len(taps), rows.tiles).cpu().numpy()
    accumulator, act_scale = layer.spec.accumulator, layer.input_quant.fixed_step()
    notes = {"a scale for each token": act_scale is None, "inputs are rotated": layer.rotation is not None}
    return IntegerLayer(
        name=layer.name,
        kind=type(layer).__name__.removeprefix("Quant"),
        rows=taps,
        codes=codes,
        accumulator=accumulator,
        preload=preload if accumulator.tile else preload[:, 0],
        scale=np.repeat(scale.reshape(-1).cpu().numpy(), rows.phases),
        act_scale=None if act_scale is None else float(act_scale),
        inside=layer.inside,
        method=layer.spec.method,
        repaired=int(repaired.sum()),
        note=", ".join(note for note, true in notes.items() if true),
    )


@contextmanager
def wrapping(model: nn.Module, bits: int | None = None) -> Iterator[None]:
    """Within the block, the sums of every layer of the request wrap around in its own accumulator, or in one of `bits`.

    Exact integer arithmetic in float64, for measuring what overflow does to accuracy; use it under `torch.no_grad()`.
    Sums wrap around whatever `overflow` was asked for: `accaware.integer.emulate` saturates too. Blocks may be nested;
    the inner one counts. Raises `ValueError` for `bits` that no request may have.
    """
    width = None if bits is None else Spec(acc_bits=bits).acc_bits
    before = {layer: layer.wrap_bits for layer in quant_layers(model).values() if layer.inside}
    for layer in before:
        layer.wrap_bits = width or layer.spec.acc_bits
    try:
        yield
    finally:
        for layer, own in before.items():
            layer.wrap_bits = own
