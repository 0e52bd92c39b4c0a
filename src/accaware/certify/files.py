"""Certificates of ONNX files: every accumulating operation, proven, refuted, or listed with the reason why neither."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from accaware.bounds import bits_needed
from accaware.certify.carried import Carried, carried
from accaware.certify.certificate import SCHEMA, TOOL, Certificate, Operation, outside, prove
from accaware.certify.targets import OTHER_WIDTHS, TARGETS, Target
from accaware.integer.layer import IntegerLayer
from accaware.onnx.read import Network, Other, Product, Unproven, parse_input, read

__all__ = ["certify_file", "file_layers", "targets_of"]


def certify_file(
    path: str | Path,
    target: Target = TARGETS["file"],
    inputs: Sequence[str] = (),
    acc_bits: Mapping[str, int] | None = None,
) -> Certificate:
    """Prove that no operation of an ONNX file can overflow its register, or show an input that does.

    inputs: codes of graph inputs that the file does not give, each `NAME=uint8[:scale[:zero]]`. acc_bits: widths other
    than the target's, by pattern of operation names; the last pattern that matches wins. Operations that cannot be read
    are "unproven", with the reason; additions and pooling are "outside", with the width they need where it is known.

    Raises `OSError`, or `ValueError` for a file that is no ONNX model, for inputs it does not have and for a pattern
    that matches nothing.
    """
    network = read(path, dict(map(parse_input, inputs)))
    targets = targets_of(network, target, acc_bits or {})
    shared = next((t for t in targets.values() if isinstance(t, Carried)), next(iter(targets.values()), target))
    others = [f"{pattern}={bits}" for pattern, bits in (acc_bits or {}).items()]
    return Certificate(
        SCHEMA,
        TOOL,
        network.sha256,
        tuple(_operations(network, targets)),
        target=shared.name + (OTHER_WIDTHS + ", ".join(others) if others else ""),
        assumes=shared.assumes,
        bias=shared.bias,
        inputs=tuple(inputs),
    )


def file_layers(
    path: str | Path,
    target: Target = TARGETS["file"],
    inputs: Sequence[str] = (),
    acc_bits: Mapping[str, int] | None = None,
) -> Iterator[IntegerLayer]:
    """The integer layers that `certify_file` judges, one after the other."""
    network = read(path, dict(map(parse_input, inputs)))
    targets = targets_of(network, target, acc_bits or {})
    return (targets[product.name].layer(product) for product in network.products)


def targets_of(network: Network, target: Target, acc_bits: Mapping[str, int]) -> dict[str, Target]:
    """The target of every product by its name; "file" stands for what the file carries (of other operations too), and
    "int32" where it does not.

    Raises `ValueError` for a pattern that matches none, or one whose register the file says, and for metadata that are
    damaged or about other operations.
    """
    names = [product.name for product in network.products]
    targets = dict.fromkeys(names, target)
    if target is TARGETS["file"]:
        own = carried(network.metadata)
        if gone := sorted(set(own) - {operation.name for operation in network.operations}):
            raise ValueError(
                f"the file carries a register for {gone[0]!r}, an operation that it does not have; say which "
                "register, with --acc-bits or --target"
            )
        targets = {**dict.fromkeys(names, TARGETS["int32"]), **own}
    for pattern, bits in acc_bits.items():
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"acc_bits: no operation matches {pattern!r}; they are {', '.join(names) or 'none'}")
        if given := [name for name in matched if isinstance(targets[name], Carried)]:
            raise ValueError(
                f"acc_bits: the file itself says what register {given[0]!r} has; to judge it by another, give a target "
                f"or a width for all operations besides {pattern!r}"
            )
        targets.update({name: targets[name].with_bits(bits) for name in matched})
    return targets


def _operations(network: Network, targets: Mapping[str, Target]) -> Iterator[Operation]:
    for operation in network.operations:
        if isinstance(operation, Product):
            try:
                yield prove(targets[operation.name].layer(operation))
            except ValueError as error:
                yield Operation(operation.name, operation.kind, "unproven", reason=str(error))
        elif isinstance(operation, Unproven):
            mine = targets.get(operation.name)
            if isinstance(mine, Carried) and not mine.inside:
                yield outside(operation.name, operation.kind, None, operation.reason)
            else:
                yield Operation(operation.name, operation.kind, "unproven", reason=operation.reason)
        else:
            yield _sum(operation)


def _sum(operation: Other) -> Operation:
    bits, note = None, f"adds {operation.sums}"
    if operation.terms is not None and operation.codes is not None:
        codes = operation.codes.with_zero()
        bits = bits_needed(operation.terms * codes.lo, operation.terms * codes.hi)
        note = f"adds {operation.terms} {operation.sums}, each in [{operation.codes.lo}, {operation.codes.hi}]"
    return outside(operation.name, operation.kind, bits, note)
