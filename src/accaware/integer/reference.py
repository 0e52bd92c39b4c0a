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


def run(layer: IntegerLayer, row: int, inputs: Sequence[int]) -> int:
    """What the register of output `row` delivers for one input [K], preload subtracted."""
    register = layer.accumulator
    store: Callable[[int, int], int] = wrap if register.overflow == "wrap" else saturate
    weights = [int(q) for q in layer.rows[row]]
    starts = [int(b) for b in layer.preload.reshape(len(layer.rows), -1)[row]]
    size = register.tile or len(weights)
    outer = 0
    for tile, start in enumerate(starts):
        total = store(start, register.bits)
        for tap in range(tile * size, min((tile + 1) * size, len(weights))):
            total = store(total + weights[tap] * int(inputs[tap]), register.bits)
        if register.tile is None:
            return total - start
        outer = store(outer + (total - start), register.outer_bits)
    return outer
