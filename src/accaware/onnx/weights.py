"""Integer weights as rows: which taps one accumulator adds, as views of the tensor where that is possible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accaware.bounds import Integers
from accaware.formats import IntFormat, Order
from accaware.onnx.tensors import Array, Origin, UnreadableError

#: A weight tensor as parts [O, C, taps]: output channel, input channel of its group, position in the kernel. There is
#: one part for each phase of a strided transposed convolution, else one.
Parts = Callable[[Array], tuple[Array, ...]]


_MOST_PHASES = 4096
_LARGEST_KERNEL = 4096


@dataclass(frozen=True, eq=False)
class Layout:
    """How an operation reads its weights.

    parts: the tensor as parts. outputs: output channels. fan_in: taps of the longest part. phases: the number of parts.
    rows: for the dimensions along which a parameter may vary without varying within a row, the index of every output
    channel [O]. inputs: for every output channel its one input channel, where it has only one.
    """

    parts: Parts
    outputs: int
    fan_in: int
    phases: int = 1
    rows: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    inputs: NDArray[np.int64] | None = None

    def per_output(self, values: Array, axis: int, rank: int) -> Array:
        """A parameter [] or [n] along `axis` as [] or [O]. Raises `UnreadableError` where it varies within a row."""
        if not values.ndim:
            return values
        index = self.rows.get(axis % rank)
        if index is None:
            raise UnreadableError("taps of one output have different scales or zero-points")
        if index.max(initial=-1) >= len(values):
            raise UnreadableError(f"its {len(values)} scales or zero-points do not fit its weights")
        return values[index]


@dataclass(frozen=True, eq=False)
class Rows:
    """The weights of one operation: R rows, an output channel's phases one after the other, of K taps.

    codes: the integers that the weights' type (or the clip around them) has. zero_points: int64, one [] or [R].
    scale: float64 [R], or None where it is only known at run time. origin: the tensor that they come from.
    scale_index: which of the file's scales every row has, int64 [R]; None where all of them are one number.
    """

    layout: Layout
    weights: Array
    codes: IntFormat
    zero_points: NDArray[np.int64]
    scale: NDArray[np.float64] | None
    origin: Origin
    scale_index: NDArray[np.int64] | None = None

    @property
    def count(self) -> int:
        """R."""
        return self.layout.outputs * self.layout.phases

    @property
    def fan_in(self) -> int:
        """K: of a transposed convolution, of the phase with most taps."""
        return self.layout.fan_in

    def raw(self, order: Order = "chw") -> Integers:
        """The codes as the file has them, [R, K] of their own type; phases with fewer taps end with 0."""
        return _joined([_flat(p, order) for p in self.layout.parts(self.weights)])

    def centred(self, order: Order = "chw") -> Integers:
        """Codes less zero-points, [R, K]: of the codes' type where all zero-points are 0, else int32 or int64."""
        if not self.zero_points.any():
            return self.raw(order)
        wide = np.int32 if max(-self.codes.lo, self.codes.hi, int(np.abs(self.zero_points).max())) < 2**30 else np.int64
        zeros = np.broadcast_to(self.zero_points, (self.count,)).reshape(self.layout.outputs, self.layout.phases)
        parts = [_flat(p, order) for p in self.layout.parts(self.weights)]
        return _joined([np.subtract(p, zeros[:, i, None], dtype=wide) for i, p in enumerate(parts)])

    def restore(self, rows: Integers, order: Order = "chw") -> Integers:
        """The inverse of `raw`: new codes [R, K] in the shape of the tensor that `origin` names."""
        size = math.prod(self.origin.shape)
        places = self.origin.replay(np.arange(1, size + 1).reshape(self.origin.shape))
        index = _joined([_flat(p, order) for p in self.layout.parts(places)])
        if rows.shape != index.shape:
            raise ValueError(f"rows must have shape {list(index.shape)}, not {list(rows.shape)}")
        restored = np.empty(size, rows.dtype)
        restored[index[index > 0] - 1] = rows[index > 0]
        return restored.reshape(self.origin.shape)


def tap_values(rows: Rows, kind: str, channels: Array, order: Order = "chw") -> Array:
    """One number for each input channel, [C], as one for each tap, [R, K].

    kind: of the operation. Raises `ValueError` where C is not the number of channels that it reads.
    """
    shape = rows.weights.shape
    if "Conv" not in kind:
        taps, wanted = np.broadcast_to(channels, (rows.count, len(channels))), rows.fan_in
        fits = len(channels) == wanted
    elif "Transpose" in kind:
        fits = len(channels) == shape[0]
        tensor = np.broadcast_to(channels.reshape(-1, *[1] * (len(shape) - 1)), shape) if fits else channels
    else:
        groups, rest = divmod(len(channels), shape[1])
        fits = groups > 0 and not rest and shape[0] % groups == 0
        if fits:
            spread = np.repeat(channels.reshape(groups, shape[1]), shape[0] // groups, axis=0)
            tensor = np.broadcast_to(spread.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape)
    if not fits:
        raise ValueError(f"{len(channels)} input channels do not fit weights of shape {list(shape)}")
    return taps if "Conv" not in kind else replace(rows, weights=tensor).raw(order)


def _flat(part: Array, order: Order) -> Array:
    moved = part if order == "chw" else part.swapaxes(1, 2)
    return moved.reshape(len(part), math.prod(part.shape[1:]))


def _joined(parts: Sequence[Array]) -> Array:
    """Phases [O, K] side by side as rows [O * phases, K of the longest]; a view where there is one."""
    if len(parts) == 1:
        return parts[0]
    longest = max(p.shape[1] for p in parts)
    rows = np.zeros((len(parts[0]), len(parts), longest), parts[0].dtype)
    for i, part in enumerate(parts):
        rows[:, i, : part.shape[1]] = part
    return rows.reshape(-1, longest)


def matrix(shape: tuple[int, ...], inner: int) -> Layout:
    """A matrix product that sums over dimension `inner`, -1 or -2, of a constant operand; others are outputs."""
    if len(shape) == 1:
        return Layout(lambda w: (w.reshape(1, -1, 1),), 1, shape[0])
    rank = len(shape)
    outer = rank - 1 if inner == -2 else rank - 2
    count, batch = shape[outer], math.prod(shape[:-2])
    index = np.tile(np.arange(count), batch)

    def parts(w: Array) -> tuple[Array, ...]:
        rows = w.swapaxes(-1, -2) if inner == -2 else w
        return (rows.reshape(batch * count, shape[inner], 1),)

    return Layout(parts, batch * count, shape[inner], rows={outer: index})


def convolution(shape: tuple[int, ...], groups: int) -> Layout:
    """A convolution, weights [O, C / groups, *kernel]."""
    if len(shape) < 3 or groups < 1 or shape[0] % groups:
        raise UnreadableError(f"weights of shape {list(shape)} do not fit a convolution of {groups} groups")
    outputs, channels, taps = *shape[:2], math.prod(shape[2:])
    inputs = np.repeat(np.arange(groups), outputs // groups) if channels == 1 else None
    layout = Layout(lambda w: (w.reshape(outputs, channels, taps),), outputs, channels * taps, inputs=inputs)
    layout.rows[0] = np.arange(outputs)
    return layout


def transposed(shape: tuple[int, ...], groups: int, stride: Sequence[int], dilation: Sequence[int]) -> Layout:
    """A transposed convolution, weights [C, O / groups, *kernel].

    Along one dimension, output o sums the taps k with (o + padding - k * dilation) divisible by the stride, so the
    taps fall into phases by (k * dilation) mod stride, and each output sums the taps of one phase only.
    """
    kernel = shape[2:]
    stride, dilation = tuple(stride) or (1,) * len(kernel), tuple(dilation) or (1,) * len(kernel)
    fits = len(kernel) == len(stride) == len(dilation) and len(shape) > 2 and min(*stride, *dilation) > 0
    if not fits or groups < 1 or shape[0] % groups:
        raise UnreadableError(f"weights of shape {list(shape)} do not fit a transposed convolution of {groups} groups")
    if max(kernel) > _LARGEST_KERNEL:
        raise UnreadableError(f"a kernel of {max(kernel)} positions is more than {_LARGEST_KERNEL}")
    per_group, outputs = shape[0] // groups, groups * shape[1]
    chosen = []  # for every dimension, the positions of each residue
    for size, s, d in zip(kernel, stride, dilation, strict=True):
        residues: dict[int, list[int]] = {}
        for k in range(size):
            residues.setdefault(k * d % s, []).append(k)
        chosen.append([residues[r] for r in sorted(residues)])
    phases = math.prod(map(len, chosen))
    if phases > _MOST_PHASES:
        raise UnreadableError(f"it has {phases} phases, more than {_MOST_PHASES}")

    def parts(w: Array) -> tuple[Array, ...]:
        w = w.reshape(groups, per_group, shape[1], *kernel).swapaxes(1, 2).reshape(outputs, per_group, *kernel)
        every: tuple[Any, ...] = (slice(None), slice(None))
        return tuple(w[every + np.ix_(*t)].reshape(outputs, per_group, -1) for t in itertools.product(*chosen))

    index = {1: np.tile(np.arange(shape[1]), groups)}
    inputs = np.repeat(np.arange(groups), shape[1])
    if per_group == 1:
        index[0] = inputs
    longest = math.prod(max(map(len, positions)) for positions in chosen)
    return Layout(parts, outputs, per_group * longest, phases, index, inputs if per_group == 1 else None)
