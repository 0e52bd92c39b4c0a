"""The second checker: a certificate derived again by other means, one output at a time, in Python integers.

Deliberately simple and slow, and sharing nothing with the first but the readers and the table of targets: no bounds, no
integer layer, no vectorised sums. What agrees here was not made by one mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from accaware.bounds import Integers
from accaware.certify.carried import Carried, carried
from accaware.certify.certificate import Certificate, Operation
from accaware.certify.kernels import onnxruntime_feed
from accaware.certify.targets import OTHER_WIDTHS, TARGETS, Target
from accaware.formats import Accumulator, TapOrder
from accaware.onnx.read import Network, Product, Unproven, parse_input, read

__all__ = ["disagreements"]


def disagreements(claimed: Certificate, file: str | Path) -> list[str]:
    """What a certificate says that the ONNX file does not bear out, one line each; empty where it agrees.

    Raises `OSError` or `ValueError` where the file cannot be read.
    """
    network = read(file, dict(map(parse_input, claimed.inputs)))
    name = claimed.target.partition(OTHER_WIDTHS)[0]
    own = carried(network.metadata) if name == "file" else {}
    if network.sha256 != claimed.sha256:
        return [f"the certificate is about another file: sha256 {claimed.sha256}, not {network.sha256}"]
    shared = next(iter(own.values()), TARGETS.get(name))
    for field in ("assumes", "bias") if shared else ():
        said, known = getattr(claimed, field), getattr(shared, field)
        if said != known:
            return [f"{field} of target {name} is {known!r}, not {said!r}"]
    return list(_all(claimed, network, own, TARGETS["int32"] if name == "file" else shared))


def _all(claimed: Certificate, network: Network, own: Mapping[str, Carried], named: Target | None) -> Iterator[str]:
    said = {operation.name: operation for operation in claimed.operations}
    names = [operation.name for operation in network.operations]
    for name in sorted(said.keys() - set(names)):
        yield f"{name}: not in the file"
    for operation in network.operations:
        op = said.get(operation.name)
        if op is None:
            yield f"{operation.name}: not in the certificate"
        elif isinstance(operation, Product):
            mine = own.get(op.name)
            if op.verdict == "unproven":
                continue
            if mine and (op.target, op.raw, op.preload) != (mine.accumulator, mine.raw, _starts(mine, operation)):
                yield f"{op.name}: the file carries another register, or other start values"
            elif mine and mine.preload and operation.bias is not None and mine.accumulator.tile is None:
                yield f"{op.name}: it has a bias, which its start values leave out"
            elif op.verdict != "outside" or (mine and not mine.inside):
                if mine:
                    yield from _product(op, operation, mine.bias, mine.preload)
                else:
                    yield from _fed(op, operation, claimed, named)
            else:
                yield f"{op.name}: said to be outside, but its weights and codes are known"
        elif isinstance(operation, Unproven):
            kept = op.name in own and not own[op.name].inside
            if op.verdict != "unproven" and not (kept and op.verdict == "outside"):
                yield f"{op.name}: said to be {op.verdict}, but {operation.reason}"
        elif not isinstance(operation, Unproven) and op.verdict != "outside":
            yield f"{op.name}: said to be {op.verdict}, but it multiplies by no weights"


def _starts(mine: Carried, product: Product) -> tuple[int, ...]:
    """What the file says that the register starts from: its own start values, or the operator's bias."""
    if mine.preload or product.bias is None or mine.accumulator.tile is not None:
        return mine.preload
    bias = tuple(map(int, product.bias))
    return bias if any(bias) else ()


def _fed(op: Operation, product: Product, claimed: Certificate, named: Target | None) -> Iterator[str]:
    """One operation, with the codes that the runtime of the target feeds to it, in the register that its name means."""
    assert op.target is not None
    if named is not None:
        register, raw = named.accumulator, named.raw
        if named.only:
            feed = onnxruntime_feed(product)
            if op.raw != (feed is not None):
                yield f"{op.name}: its kernel adds {'stored codes in pairs' if feed else 'in int32'}"
                return
            register, raw = Accumulator(register.outer_bits), False
            if feed is not None:
                register, raw = replace(named.accumulator, order=feed.order), True
                product = replace(product, codes=feed.codes, zero_range=feed.zero_range)
        own_width = {"bits": op.target.bits} if OTHER_WIDTHS in claimed.target else {}
        if (asdict(op.target), op.raw) != (asdict(register) | own_width, raw):
            yield f"{op.name}: its register is not that of target {claimed.target}"
            return
    yield from _product(op, product, claimed.bias, ())


def _product(op: Operation, product: Product, bias_is: str, preload: tuple[int, ...]) -> Iterator[str]:
    """One operation: the ranges of every output, then the verdict."""
    register, codes = op.target, op.codes
    assert register is not None
    assert codes is not None
    if (codes.lo, codes.hi) != (product.codes.lo, product.codes.hi):
        yield f"{op.name}: input codes are [{product.codes.lo}, {product.codes.hi}], not [{codes.lo}, {codes.hi}]"
        return
    zeros = sorted({product.zero_range.lo, product.zero_range.hi})
    if sorted(set(op.zero_points)) != zeros:
        yield f"{op.name}: zero points are {zeros}, not {list(op.zero_points)}"
        return
    order: TapOrder = "hwc" if register.order == "hwc" else "chw"
    stored, less_zero = product.rows.raw(order), product.rows.centred(order)
    if (len(op.lo), op.fan_in) != tuple(stored.shape):
        yield f"{op.name}: {stored.shape[0]} rows of {stored.shape[1]}, not {len(op.lo)} of {op.fan_in}"
        return
    starts = [0] * len(stored) if product.bias is None or bias_is == "outside" else [int(b) for b in product.bias]
    tiled = register.tile is not None
    tiles = -(-op.fan_in // register.tile) if register.tile else 1
    if preload and len(preload) != len(stored) * tiles:
        yield f"{op.name}: {len(preload)} start values do not fit {len(stored)} rows"
        return
    inner_starts = [list(preload[row * tiles : (row + 1) * tiles]) for row in range(len(stored))]
    if not preload:
        inner_starts = [[0 if tiled else start] for start in starts]
    fits = True
    for row in range(len(stored)):
        centred = [int(q) for q in less_zero[row]]
        start, outer_start = inner_starts[row], starts[row] if tiled else 0
        if op.raw:
            ends = [min(codes.lo, *zeros, 0), max(codes.hi, *zeros, 0)]
            inner = _range([int(q) for q in stored[row]], [ends], register.tile, register.order == "any", start)
        else:
            ranges = [[min(codes.lo - z, 0), max(codes.hi - z, 0)] for z in zeros]
            inner = _range(centred, ranges, register.tile, register.order == "any", start)
        if inner != (op.lo[row], op.hi[row]):
            yield f"{op.name}: row {row} is in [{inner[0]}, {inner[1]}], not [{op.lo[row]}, {op.hi[row]}]"
        fits = fits and -(2 ** (register.bits - 1)) <= inner[0] and inner[1] < 2 ** (register.bits - 1)
        if tiled:
            ranges = [[min(codes.lo - z, 0), max(codes.hi - z, 0)] for z in zeros]
            outer = _range(centred, ranges, None, False, [outer_start])
            if outer != (op.outer_lo[row], op.outer_hi[row]):
                yield f"{op.name}: row {row} spills to [{outer[0]}, {outer[1]}], not as certified"
            fits = fits and -(2 ** (register.outer_bits - 1)) <= outer[0] and outer[1] < 2 ** (register.outer_bits - 1)
    if op.verdict != "outside" and fits != (op.verdict == "proven"):
        yield f"{op.name}: said to be {op.verdict}, but it {'fits' if fits else 'does not fit'}"
    if op.witness is not None and not _overflows(op, product, stored, less_zero, starts, inner_starts):
        yield f"{op.name}: its witness does not overflow"


def _overflows(
    op: Operation, product: Product, stored: Integers, less_zero: Integers, starts: list[int], begin: list[list[int]]
) -> bool:
    """Whether the witness is an input of the file and its sum, product by product, is one that does not fit."""
    found, register = op.witness, op.target
    assert found is not None
    assert register is not None
    raw = op.raw and found.register == "inner"
    row = [int(q) for q in (stored if raw else less_zero)[found.row]]
    codes = [int(x) - (0 if raw else found.zero_point) for x in found.inputs]
    products = [q * x for q, x in zip(row, codes, strict=True)]
    tiled = register.tile is not None
    if found.register == "outer":
        sums = [starts[found.row] + sum(products)]
    else:
        size = register.tile or len(row)
        if tiled and register.order == "any":
            products.sort(reverse=found.value > 0)
        first = begin[found.row]
        sums = [
            first[i // size if len(first) > 1 else 0] + sum(products[i : i + size])
            for i in range(0, len(products), size)
        ]
    bits = register.outer_bits if found.register == "outer" else register.bits
    possible = product.zero_range.lo <= found.zero_point <= product.zero_range.hi
    possible = possible and all(product.codes.lo <= x <= product.codes.hi for x in found.inputs)
    return possible and found.value in sums and not -(2 ** (bits - 1)) <= found.value < 2 ** (bits - 1)


def _range(
    weights: Sequence[int], ranges: Sequence[Sequence[int]], tile: int | None, any_taps: bool, starts: Sequence[int]
) -> tuple[int, int]:
    """The smallest and the largest sum of any tile, for inputs in one of `ranges`. starts: of every tile, or one."""
    lows, highs = [], []
    size = len(weights) if tile is None else tile
    for lo, hi in ranges:
        low = [min(q * lo, q * hi) for q in weights]
        high = [max(q * lo, q * hi) for q in weights]
        if any_taps:
            low, high = sorted(low), sorted(high, reverse=True)
        for first in range(0, 1 if any_taps else len(weights), size):
            begin = starts if any_taps or len(starts) == 1 else [starts[first // size]]
            lows.append(min(begin) + sum(low[first : first + size]))
            highs.append(max(begin) + sum(high[first : first + size]))
    return min(lows), max(highs)
