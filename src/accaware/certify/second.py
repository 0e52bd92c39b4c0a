"""The second checker: a certificate derived again by other means, one output at a time, in Python integers.

Deliberately simple and slow, and sharing nothing with the first but the readers and the table of targets: no bounds, no
integer layer, no vectorised sums. What agrees here was not made by one mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

from accaware.bounds import Integers
from accaware.certify.carried import Carried, carried
from accaware.certify.certificate import Certificate, Operation
from accaware.certify.kernels import onnxruntime_feed
from accaware.certify.targets import OTHER_WIDTHS, TARGETS, Target
from accaware.formats import Accumulator, TapOrder
from accaware.onnx.read import Network, Other, Product, Unproven, parse_input, read

__all__ = ["disagreements", "own_word"]


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


def own_word(claimed: Certificate) -> str | None:
    """What `disagreements` takes from a certificate of an ONNX file as it is said there, one line; None for nothing.

    That is the register of a target that is in no table, unless it is the plain one that a name such as int14 says.
    """
    name = claimed.target.partition(OTHER_WIDTHS)[0]
    if name in TARGETS:
        return None
    plain, bits = TARGETS["int32"], re.fullmatch("int([0-9]{1,2})", name)
    if bits and (claimed.assumes, claimed.bias) == (plain.assumes, plain.bias):
        register = asdict(plain.accumulator) | {"bits": int(bits[1])}
        judged = [(op.raw, asdict(op.target), register | _width(claimed, op)) for op in claimed.operations if op.target]
        if not any(raw or said != known for raw, said, known in judged):
            return None
    return f"target {name!r} is in no table: its registers, with biases {claimed.bias}, are the certificate's own word"


def _all(claimed: Certificate, network: Network, own: Mapping[str, Carried], named: Target | None) -> Iterator[str]:
    said: dict[str, Operation] = {}
    for claim in claimed.operations:
        if claim.name in said:
            yield f"{claim.name}: it is in the certificate twice"
        said[claim.name] = claim
    names = [operation.name for operation in network.operations]
    for name in sorted(said.keys() - set(names)):
        yield f"{name}: not in the file"
    for operation in network.operations:
        op = said.get(operation.name)
        if op is None:
            yield f"{operation.name}: not in the certificate"
        elif isinstance(operation, Product):
            yield from _multiplies(op, operation, claimed, own.get(op.name), named)
        elif isinstance(operation, Unproven):
            kept = op.name in own and not own[op.name].inside
            if op.verdict == "unproven":
                yield from _same(op, Operation(op.name, operation.kind, "unproven", reason=operation.reason))
            elif kept and op.verdict == "outside":
                yield from _same(op, Operation(op.name, operation.kind, "outside", note=operation.reason))
            else:
                yield f"{op.name}: said to be {op.verdict}, but {operation.reason}"
        elif op.verdict != "outside":
            yield f"{op.name}: said to be {op.verdict}, but it multiplies by no weights"
        else:
            yield from _same(op, _adds(operation))


def _same(op: Operation, mine: Operation) -> Iterator[str]:
    """Which fields of an operation are not what they should be."""
    for field in fields(Operation):
        said, known = getattr(op, field.name), getattr(mine, field.name)
        if said != known:
            yield f"{op.name}: {field.name} is {known!r}, not {said!r}"


def _adds(operation: Other) -> Operation:
    """An operation without weights: how many bits its sum needs, where that is known."""
    terms, codes = operation.terms, operation.codes
    if terms is None or codes is None:
        return Operation(operation.name, operation.kind, "outside", note=f"adds {operation.sums}")
    ends = -terms * min(codes.lo, 0) - 1, terms * max(codes.hi, 0)
    bits = 1 + max((end.bit_length() for end in ends if end >= 0), default=0)
    note = f"adds {terms} {operation.sums}, each in [{codes.lo}, {codes.hi}]"
    return Operation(operation.name, operation.kind, "outside", bits, note=note)


def _multiplies(
    op: Operation, product: Product, claimed: Certificate, mine: Carried | None, named: Target | None
) -> Iterator[str]:
    """An operation with weights, in the register that the file carries for it, or in that of the target."""
    if op.verdict == "unproven" and op.target is None:
        yield from _same(op, Operation(op.name, product.kind, "unproven", reason=op.reason))
    elif (op.verdict == "outside") != (mine is not None and not mine.inside):
        yield f"{op.name}: said to be {op.verdict}, but its weights and codes are known"
    elif op.target is None:
        yield f"{op.name}: said to be {op.verdict}, without the numbers"
    elif mine is None:
        yield from _fed(op, product, claimed, named)
    elif (op.target, op.raw, op.preload) != (mine.accumulator, mine.raw, _starts(mine, product)):
        yield f"{op.name}: the file carries another register, or other start values"
    elif mine.preload and product.bias is not None and mine.accumulator.tile is None:
        yield f"{op.name}: it has a bias, which its start values leave out"
    else:
        yield from _product(op, product, mine.bias, mine.preload)


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
        register, raw = asdict(named.accumulator) | _width(claimed, op), named.raw
        if named.only:
            feed = onnxruntime_feed(product)
            if op.raw != (feed is not None):
                yield f"{op.name}: its kernel adds {'stored codes in pairs' if feed else 'in int32'}"
                return
            if feed is None:
                register, raw = asdict(Accumulator(named.accumulator.outer_bits)), False
            else:
                register["order"] = feed.order
                product = replace(product, codes=feed.codes, zero_range=feed.zero_range)
        if (asdict(op.target), op.raw) != (register, raw):
            yield f"{op.name}: its register is not that of target {claimed.target}"
            return
    yield from _product(op, product, claimed.bias, ())


def _width(claimed: Certificate, op: Operation) -> dict[str, int]:
    """The width behind the target's name that is an operation's: of the last pattern that matches; {} for none."""
    others = re.findall("(.+?)=([0-9]{1,2})(?:, |$)", claimed.target.partition(OTHER_WIDTHS)[2], re.DOTALL)
    found = [int(bits) for pattern, bits in others if fnmatchcase(op.name, pattern)]
    return {"bits": found[-1]} if found else {}


def _product(op: Operation, product: Product, bias_is: str, preload: tuple[int, ...]) -> Iterator[str]:
    """One operation: the ranges of every output, then the verdict."""
    register, codes = op.target, op.codes
    assert register is not None
    assert codes is not None
    if (codes.lo, codes.hi) != (product.codes.lo, product.codes.hi):
        yield f"{op.name}: input codes are [{product.codes.lo}, {product.codes.hi}], not [{codes.lo}, {codes.hi}]"
        return
    zeros = sorted({product.zero_range.lo, product.zero_range.hi})
    if list(op.zero_points) != zeros:
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
    begin = tuple(start for starts in inner_starts for start in starts)
    fits, zero_weights, zero_rows = True, 0, 0
    for row in range(len(stored)):
        centred = [int(q) for q in less_zero[row]]
        zero_weights, zero_rows = zero_weights + centred.count(0), zero_rows + (not any(centred))
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
    mine = replace(op, kind=product.kind, method=product.dialect, note=product.note, repaired=0)
    mine = replace(mine, preload=begin if any(begin) else (), outer_lo=op.outer_lo if tiled else ())
    mine = replace(mine, sparsity=zero_weights / less_zero.size, zero_channels=zero_rows)
    yield from _same(op, replace(mine, outer_hi=op.outer_hi if tiled else ()))
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
