"""Certificates of prepared PyTorch models."""

from __future__ import annotations

import hashlib

from torch import nn

from accaware.bounds import bits_needed
from accaware.certify.certificate import Certificate, Operation, outside
from accaware.formats import IntFormat
from accaware.integer.convert import integer_layers
from accaware.integer.layer import IntegerLayer
from accaware.layers import LAYERS, QuantIdentity, QuantLayer
from accaware.trace import Other, Trace

__all__ = ["certify"]


def certify(model: nn.Module) -> Certificate:
    """Prove, in integers, that no layer of the request can overflow its accumulator, or show an input that does.

    Covers every accumulating operation that the network runs: those outside the request (kept layers, pooling, sums,
    additions) are listed with the width they need, where it is known; products of two activations (attention), which
    stay in float, with the width that they would need in codes of as many bits as the layers' inputs have. Raises
    `ValueError` for a model that is not prepared or not calibrated.
    """
    layers = integer_layers(model)
    modules = dict(model.named_modules())
    others = [
        outside(name, type(module).__name__, None, "float layer")
        for name, module in modules.items()
        if type(module) in LAYERS
    ]
    others += [
        outside(f"{name}.rotation", "Hadamard", None, "in floats, before the layer")
        for name, module in modules.items()
        if isinstance(module, QuantLayer) and module.rotation is not None
    ]
    seen: Trace = getattr(model, "_accaware_trace", Trace())
    bits = max((layer.codes.span.bit_length() for layer in layers if layer.inside), default=0)
    others += [
        _other(op, modules) if op.signed is None or not bits else _of_activations(op, bits) for op in seen.others
    ]
    return Certificate.of(layers, others, sha256=fingerprint(layers))


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
    if op.kind in ("add", "iadd", "radd", "sub"):
        return outside(op.name, op.kind, None, "adds rescaled sums; its width is set by the rescaling that follows")
    if quantizer is None or quantizer.codes is None or op.terms is None:
        return outside(op.name, op.kind, None, "its input is not a quantized tensor")
    codes = quantizer.codes
    bits = bits_needed(op.terms * min(codes.lo, 0), op.terms * max(codes.hi, 0))
    return outside(op.name, op.kind, bits, f"sum of {op.terms} codes")
