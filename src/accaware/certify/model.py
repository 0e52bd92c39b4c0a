"""Certificates of prepared PyTorch models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from torch import nn

from accaware.bounds import bits_needed
from accaware.certify.certificate import Certificate, Operation, outside
from accaware.formats import IntFormat
from accaware.integer.convert import integer_layers
from accaware.integer.layer import IntegerLayer
from accaware.layers import LAYERS, QuantIdentity, QuantLayer
from accaware.prepare import quant_layers
from accaware.trace import ADDS, PRODUCTS, Other, Trace

__all__ = ["certify"]

#: Modules that multiply: those that `prepare_` converts, what derives from them, and those that it does not know.
_MULTIPLY = (*LAYERS, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def certify(model: nn.Module) -> Certificate:
    """Prove, in integers, that no layer of the request can overflow its accumulator, or show an input that does.

    What else accumulates (kept layers, pooling, sums, additions, recurrent and other layers that stay in floats) is
    outside the request and listed with the width it needs, where that is known; products of two activations
    (attention), which stay in float, with the width that they would need in codes of as many bits as the layers' inputs
    have. All modules that multiply are found; operations between modules only as functions of torch that are known to
    accumulate, in the run that `prepare_` made over its `sample` - without one none are listed.

    Parts of `model` that were prepared one by one have their place in it before the names of their operations. Raises
    `ValueError` for a model that is not prepared or not calibrated.
    """
    model = _unwrapped(model)
    modules, names, seen = dict(model.named_modules()), dict[str, str](), list[Other]()
    for part, module in modules.items():
        if "_accaware_trace" in vars(module):
            if part:
                names |= {_within(part, n): _within(part, layer.name) for n, layer in quant_layers(module).items()}
            seen += [_placed(op, part) for op in cast(Trace, module._accaware_trace).others]
    layers = [
        replace(layer, name=names[name]) if name in names else layer
        for name, layer in zip(quant_layers(model), integer_layers(model), strict=True)
    ]
    others = [outside(name, type(module).__name__, None, "float layer") for name, module in _floats(modules, seen)]
    others += [
        outside(f"{name}.rotation", "Hadamard", None, "in floats, before the layer")
        for name, module in modules.items()
        if isinstance(module, QuantLayer) and module.rotation is not None
    ]
    bits = max((layer.codes.span.bit_length() for layer in layers if layer.inside), default=0)
    others += [_other(op, modules) if op.signed is None or not bits else _of_activations(op, bits) for op in seen]
    return Certificate.of(layers, others, sha256=fingerprint(layers))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The prepared model in what holds it alone (`nn.DataParallel` and the like), which is no part of its names."""
    inner = model
    while "_accaware_trace" not in vars(inner) and len(children := list(inner.children())) == 1:
        (inner,) = children
    return inner if "_accaware_trace" in vars(inner) else model


def _within(part: str, name: str) -> str:
    return ".".join(filter(None, (part, name)))


def _placed(op: Other, part: str) -> Other:
    return replace(op, name=_within(part, op.name), source=op.source and _within(part, op.source))


def _floats(modules: dict[str, nn.Module], seen: list[Other]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that multiply in floats, but for those whose products `seen` lists."""
    products = [op.name for op in seen if op.kind in PRODUCTS]
    for name, module in modules.items():
        if not isinstance(module, _MULTIPLY) or isinstance(module, QuantLayer):
            continue
        within = isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)  # which multiplies for it
        if not within and not any(product.startswith(f"{name}.") for product in products):
            yield name, module


def fingerprint(layers: list[IntegerLayer]) -> str:
    """SHA-256 over what is proven: names, weights, code ranges, start values and registers."""
    digest = hashlib.sha256()
    for layer in layers:
        head = (layer.name, layer.codes, layer.accumulator, layer.rows.shape, layer.inside)
        digest.update(repr(head).encode())
        digest.update(layer.rows.astype("<i8").tobytes())
        digest.update(layer.preload.astype("<i8").tobytes())
    return digest.hexdigest()


def _of_activations(op: Other, bits: int) -> Operation:
    a, b = (IntFormat.signed(bits) if signed else IntFormat.unsigned(bits) for signed in op.signed or ())
    corners = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    assert op.terms is not None
    needed = bits_needed(op.terms * min(0, *corners), op.terms * max(0, *corners))
    return outside(op.name, op.kind, needed, f"float; in {bits}-bit codes, a sum of {op.terms} products of activations")


def _other(op: Other, modules: dict[str, nn.Module]) -> Operation:
    source = modules.get(op.source) if op.source else None
    quantizer = source.input_quant if isinstance(source, QuantIdentity) else None
    if op.kind in ADDS:
        return outside(op.name, op.kind, None, "adds rescaled sums; its width is set by the rescaling that follows")
    if quantizer is None or quantizer.codes is None or op.terms is None:
        return outside(op.name, op.kind, None, "its input is not a quantized tensor")
    codes = quantizer.codes
    bits = bits_needed(op.terms * min(codes.lo, 0), op.terms * max(codes.hi, 0))
    return outside(op.name, op.kind, bits, f"sum of {op.terms} codes")
