"""The slow reference: one register, one product at a time, Python integers only. Tests compare everything else with it.

It shares no code with the fast emulation, and reads as what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accaware.integer.layer import IntegerLayer


def wrap(value: int, bits: int) -> int:
    """The low `bits` bits, read as two's complement."""
    low = value & ((1 << bits) - 1)
    return low - (1 << bits) if low >> (bits - 1) else low


def saturate(value: int, bits: int) -> int:
    """The nearest value that `bits` bits of two's complement hold."""
    return max(-(1 << bits - 1), min(value, (1 << bits - 1) - 1))


def run(layer: IntegerLayer, row: int, inputs: Sequence[int], zero_point: int = 0) -> int:
    """What the register of output `row` delivers for one input [K] of stored codes, start values subtracted."""
    register = layer.accumulator
    store: Callable[[int, int], int] = wrap if register.overflow == "wrap" else saturate
    weights = [int(q) for q in layer.rows[row]]
    surplus = int(layer.weight_zero[row])
    starts = [int(b) for b in layer.starts[row]]
    size = register.tile or len(weights)
    spill = wrap if layer.raw else store
    begin = int(layer.outer_start[row])
    outer = spill(begin, register.outer_bits)
    for tile, start in enumerate(starts):
        total = store(start, register.bits)
        for tap in range(tile * size, min((tile + 1) * size, len(weights))):
            code, weight = int(inputs[tap]), weights[tap]
            product = (weight + surplus) * code if layer.raw else weight * (code - zero_point)
            total = store(total + product, register.bits)
        if register.tile is None:
            return total - start - _excess(layer, weights, surplus, inputs, zero_point)
        outer = spill(outer + (total - start), register.outer_bits)
    return spill(outer - _excess(layer, weights, surplus, inputs, zero_point), register.outer_bits) - begin


def _excess(layer: IntegerLayer, weights: Sequence[int], surplus: int, inputs: Sequence[int], zero_point: int) -> int:
    """What the products of raw codes are more than those of centred ones."""
    if not layer.raw:
        return 0
    return sum((q + surplus) * int(x) - q * (int(x) - zero_point) for q, x in zip(weights, inputs, strict=True))
