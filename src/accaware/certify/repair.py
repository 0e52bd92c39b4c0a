"""Repair: the closest weights with which a quantized ONNX file fits its registers, proven before it is written."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from accaware.bounds import Integers
from accaware.certify.certificate import Certificate
from accaware.certify.files import certify_file, targets_of
from accaware.certify.nearest import ImpossibleError, Nearest, Problem, nearest, with_rows
from accaware.certify.proof import prove
from accaware.certify.targets import Target
from accaware.integer.layer import IntegerLayer
from accaware.onnx.read import Network, Product, parse_input, read
from accaware.onnx.tensors import Array
from accaware.onnx.weights import tap_values
from accaware.onnx.write import File, Site

__all__ = ["Change", "ImpossibleError", "Repair", "repair_file"]

Power = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one operation's weights.

    rows and weights: how many there are; broken: rows that could overflow; rows_changed and weights_changed; scales:
    of how many rows the scale is another. error: ||s'q' - sq||^2 / ||sq||^2. bits_before and bits_after: of the
    accumulator that the worst row needs.
    """

    name: str
    kind: str
    rows: int
    broken: int
    rows_changed: int
    weights: int
    weights_changed: int
    scales: int
    error: float
    bits_before: int
    bits_after: int


@dataclass(frozen=True, slots=True)
class Repair:
    """A repaired file: what changed, operation by operation, and the certificate of what was written."""

    changes: tuple[Change, ...]
    certificate: Certificate

    def table(self) -> str:
        """One line for each operation that changed, then the whole; plain text."""
        lines = [_line(change) for change in self.changes if change.weights_changed]
        weights, changed = (sum(getattr(c, n) for c in self.changes) for n in ("weights", "weights_changed"))
        touched = sum(bool(c.weights_changed) for c in self.changes)
        share = changed / max(1, weights)
        whole = f"{touched} of {len(self.changes)} operations, {changed} of {weights} weights ({share:.2%}) changed"
        return "\n".join([*lines, whole]) + "\n"


def _line(change: Change) -> str:
    rescaled = f", {change.scales} with another scale" if change.scales else ""
    return (
        f"{change.name}: {change.rows_changed} of {change.rows} channels{rescaled}, {change.weights_changed} of "
        f"{change.weights} weights ({change.weights_changed / change.weights:.2%}), relative squared error "
        f"{change.error:.2e}; {change.bits_before} bits before, {change.bits_after} now"
    )


def repair_file(
    path: str | Path,
    out: str | Path,
    target: Target,
    inputs: Sequence[str] = (),
    acc_bits: Mapping[str, int] | None = None,
    power: Power | None = None,
    rescale: bool = True,
) -> Repair:
    """Write to `out` the ONNX file `path` with the closest weights that fit `target`, and prove that they do.

    inputs, acc_bits: as in `certify_file`. power: by operation, E[x^2] of its input's channels, float64 [C]: errors of
    weights count that much (none: all the same). rescale: whether scales may change; else fewer weights do, by more.
    The graph and its quantization format stay; weights, their scales (at the file's own granularity, and where nothing
    else reads them) and the integer biases in their units change. Nothing is written unless every operation of what is
    written is proven.

    Raises `ImpossibleError` where an operation is unproven, has no budget, or keeps its weights where they cannot be
    changed; `OSError` or `ValueError` for bad input.
    """
    path, out = Path(path), Path(out)
    network = read(path, dict(map(parse_input, inputs)))
    targets = targets_of(network, target, acc_bits or {})
    if network.unproven:
        found = ", ".join(f"{op.name} ({op.reason})" for op in network.unproven)
        raise ImpossibleError(f"{len(network.unproven)} operations are unproven: {found}")
    if not network.products:
        raise ImpossibleError(f"{path}: no operation multiplies by quantized weights")
    if not out.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(out.parent))
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file")
    file = File(path)
    plans = [_plan(file, users, targets, power or {}, rescale) for users in _by_tensor(network)]
    for plan in plans:
        plan.write(file)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        written = _written(file, plans, Path(folder), out.name, inputs)
        certificate = certify_file(Path(folder, out.name), target, inputs, acc_bits)
        failed = [op.name for op in certificate.inside if op.verdict != "proven"]
        if failed:
            raise ImpossibleError(f"no proof of the repaired {', '.join(failed)}")
        for name in written:
            with open(Path(folder, name), "rb") as done:
                os.fsync(done.fileno())
            os.replace(Path(folder, name), out.with_name(name))
    return Repair(tuple(change for plan in plans for change in plan.changes()), certificate)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A tensor of weights, the operations that multiply by it, and what is to become of them."""

    users: tuple[Product, ...]
    layers: tuple[IntegerLayer, ...]
    found: Nearest
    site: Site

    @property
    def order(self) -> Literal["chw", "hwc"]:
        return "hwc" if self.layers[0].accumulator.order == "hwc" else "chw"

    @property
    def bias(self) -> Integers | None:
        """The integer bias in units of the new scale, [R]."""
        old, ratio = self.users[0].bias, self.found.ratio
        return None if old is None else np.where(ratio == 1, old, np.rint(old / ratio).astype(np.int64))

    def write(self, file: File) -> None:
        """Change the tensors of the file."""
        self.put(file, self.found.rows != self.layers[0].rows, 0.0)
        ratio = self.found.ratio
        if (ratio == 1).all():
            return
        rows, bias = self.users[0].rows, self.bias
        for name in self.site.scales:
            old = file.array(name)
            factors = np.full(old.size, ratio[0])
            index = np.arange(rows.count) if self.site.after else rows.scale_index
            if old.size > 1 and index is not None:
                factors[:] = 1
                factors[index] = ratio
            file.put(name, old.astype(np.float64) * factors.reshape(old.shape))
        each = ratio[:: rows.layout.phases]
        if self.site.bias is not None and bias is not None:
            file.put(self.site.bias, bias[:: rows.layout.phases].reshape(file.array(self.site.bias).shape))
        if self.site.bias_scale is not None:
            old = file.array(self.site.bias_scale)
            parts = each if old.size > 1 else each[:1]
            file.put(self.site.bias_scale, old.astype(np.float64) * parts.reshape(old.shape))

    def put(self, file: File, changed: NDArray[np.bool_], nudge: float) -> None:
        """Write the weights that `changed` [R, K], those of other scales too if the tensor holds floats.

        nudge: of floats, towards which side of their code they lie, in units of the scale.
        """
        rows = self.users[0].rows
        zeros = np.broadcast_to(rows.zero_points, (rows.count,))
        if file.is_float(rows.origin.name):
            scale = np.ones(rows.count) if rows.scale is None else rows.scale
            values: Array = (self.found.rows + nudge) * (scale * self.found.ratio)[:, None]
            changed = changed | (self.found.ratio != 1)[:, None]
        else:
            values = self.found.rows + zeros[:, None]
        if changed.any():
            old = file.array(rows.origin.name)
            where = rows.restore(changed, self.order)
            file.put(rows.origin.name, np.where(where, rows.restore(values, self.order), old))

    def missed(self, network: Mapping[str, Product]) -> NDArray[np.bool_]:
        """Which weights [R, K] of a file are not what they should be. Raises `ImpossibleError` if something else is."""
        wrong = np.zeros(self.found.rows.shape, bool)
        for user in self.users:
            now = network.get(user.name)
            if now is None or now.codes != user.codes or now.zero_range != user.zero_range:
                raise ImpossibleError(f"{user.name}: it cannot be read any more with other weights")
            expected = user.bias if len(self.users) > 1 else self.bias
            if (now.bias is None) != (expected is None) or (now.bias is not None and (now.bias != expected).any()):
                raise ImpossibleError(f"{user.name}: its bias cannot be written in units of another scale")
            wrong |= now.rows.centred(self.order) != self.found.rows
        return wrong

    def changes(self) -> Iterator[Change]:
        """One record for each operation."""
        rows, ratio = self.found.rows, self.found.ratio
        for user, layer in zip(self.users, self.layers, strict=True):
            old = layer.rows.astype(np.float64)
            scale = np.ones(len(rows)) if user.rows.scale is None else user.rows.scale
            wrong = ((rows * ratio[:, None] - old) * scale[:, None]) ** 2
            changed = rows != layer.rows
            yield Change(
                name=user.name,
                kind=user.kind,
                rows=len(rows),
                broken=int(self.found.broken.sum()),
                rows_changed=int((changed.any(axis=1) | (ratio != 1)).sum()),
                weights=rows.size,
                weights_changed=int(changed.sum()),
                scales=int((ratio != 1).sum()),
                error=float(wrong.sum() / max(((old * scale[:, None]) ** 2).sum(), 1e-300)),
                bits_before=prove(layer).bits_needed or 0,
                bits_after=prove(with_rows(layer, self.found)).bits_needed or 0,
            )


def _by_tensor(network: Network) -> Iterable[tuple[Product, ...]]:
    groups: dict[str, list[Product]] = {}
    for product in network.products:
        groups.setdefault(product.rows.origin.name, []).append(product)
    return map(tuple, groups.values())


def _plan(file: File, users: tuple[Product, ...], targets: Mapping[str, Target], power: Power, rescale: bool) -> _Plan:
    first, name = users[0], users[0].rows.origin.name
    layers = []
    for user in users:
        try:
            layers.append(targets[user.name].layer(user))
        except ValueError as error:
            raise ImpossibleError(f"{user.name} is unproven: {error}") from error
    if all(prove(layer).verdict == "proven" for layer in layers):
        nothing = np.zeros(len(layers[0].rows), bool)
        return _Plan(users, tuple(layers), Nearest(layers[0].rows, nothing + 1.0, nothing), Site())
    if not file.holds(name):
        raise ImpossibleError(f"{first.name}: its weights '{name}' are no tensor of the file, or one of several")
    if other := file.other_use(name, users):
        raise ImpossibleError(f"{first.name}: its weights '{name}' are also what {other} uses")
    for user in users[1:]:
        if not _same_rows(first, user):
            raise ImpossibleError(f"{first.name} and {user.name} share the weights '{name}', in different rows")
    site = file.site(first) if rescale and len(users) == 1 else Site()
    groups = _groups(file, first, site)
    zeros = np.broadcast_to(first.rows.zero_points, (first.rows.count,))
    problem = Problem(
        layers,
        first.rows.codes.lo - zeros,
        first.rows.codes.hi - zeros,
        np.ones(len(zeros)) if first.rows.scale is None else np.abs(first.rows.scale),
        groups,
        _importance(users, layers[0], power),
    )
    return _Plan(users, tuple(layers), nearest(problem), site)


def _same_rows(a: Product, b: Product) -> bool:
    """Whether two operations read a tensor in the same way."""
    if (a.rows.count, a.rows.fan_in, a.rows.codes) != (b.rows.count, b.rows.fan_in, b.rows.codes):
        return False
    if a.rows.origin.shape != b.rows.origin.shape or (a.rows.zero_points != b.rows.zero_points).any():
        return False
    size = math.prod(a.rows.origin.shape)
    places = np.arange(size).reshape(a.rows.origin.shape)
    first, second = (replace(p.rows, weights=p.rows.origin.replay(places)).raw() for p in (a, b))
    return bool((first == second).all())


def _groups(file: File, product: Product, site: Site) -> Integers | None:
    """Which of the file's scales every row has, [R]; None where they must stay."""
    rows = product.rows
    if not site.scales or rows.scale is None:
        return None
    sizes = {file.array(name).size for name in site.scales}
    outputs = rows.layout.outputs
    if site.after:  # the operator itself knows no scale
        return np.zeros(rows.count, np.int64) if sizes == {1} else np.arange(rows.count)
    one = sizes == {1} or rows.scale_index is None
    if not one and (len(sizes) > 1 or rows.scale_index is None or int(rows.scale_index.max()) >= min(sizes)):
        return None
    if site.bias is not None and file.array(site.bias).size != outputs:
        return None
    if site.bias_scale is not None and file.array(site.bias_scale).size not in ((1, outputs) if one else (outputs,)):
        return None
    return np.zeros(rows.count, np.int64) if one else rows.scale_index


def _importance(users: Sequence[Product], layer: IntegerLayer, power: Power) -> NDArray[np.float64] | None:
    """E[x^2] of every tap, [R, K], and 1% of its mean, so that no weight is free; None where nothing is known."""
    known = [(user, power[user.name]) for user in users if user.name in power]
    if not known:
        return None
    total = np.zeros(layer.rows.shape)
    for user, square in known:
        total += tap_values(user.rows, user.kind, square, "hwc" if layer.accumulator.order == "hwc" else "chw")
    return total + max(0.01 * float(total.mean()), 1e-30)


def _written(file: File, plans: Sequence[_Plan], folder: Path, name: str, inputs: Sequence[str]) -> list[str]:
    """Save the file and read it again, until the codes of all weights are those that were asked for."""
    for nudge in (0.25, -0.25, 0.0):
        files = file.save(folder, name)
        network = {product.name: product for product in read(folder / name, dict(map(parse_input, inputs))).products}
        missed = [(plan, wrong) for plan in plans if (wrong := plan.missed(network)).any()]
        if not missed:
            return files
        for plan, wrong in missed:  # a quantizer that rounds down or up needs floats beside the middle of their code
            plan.put(file, wrong, nudge)
    names = ", ".join(plan.users[0].name for plan, _ in missed)
    raise ImpossibleError(f"{names}: no values of the file's weights are quantized to the closest safe integers")
