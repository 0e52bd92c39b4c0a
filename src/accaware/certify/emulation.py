"""What a network really computes on a narrow accumulator, and how often its sums overflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accaware.bounds import Integers, bits_needed, worst_case
from accaware.certify.carried import Carried
from accaware.certify.files import targets_of
from accaware.certify.targets import TARGETS, Target
from accaware.formats import Accumulator, IntFormat, TapOrder
from accaware.integer.emulate import emulate
from accaware.integer.layer import IntegerLayer
from accaware.onnx.read import Product, parse_input, read
from accaware.onnx.rewrite import Fold, Outside, rewrite
from accaware.onnx.session import Feeds, Runner
from accaware.onnx.unfold import sums

__all__ = ["Count", "Emulated", "Emulator", "emulate_file", "run_batches"]

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Count:
    """What happened in one operation: of so many sums, so many overflows, in a register of `bits` bits (None: exact).

    An overflow is, for wrap-around, a finished sum (of a tile, or of the outer register) that does not fit; for
    saturation, a step that was clipped.
    """

    name: str
    kind: str
    bits: int | None
    sums: int
    overflows: int

    def plus(self, other: Count) -> Count:
        """Those of two runs together."""
        return replace(self, sums=self.sums + other.sums, overflows=self.overflows + other.overflows)


@dataclass(frozen=True, eq=False)
class Emulated:
    """outputs: arrays by the name of the graph output. counts: of every operation, in the order of the file.

    left: operations whose integers are not known, which ran as they are, with the reason.
    """

    outputs: dict[str, NDArray[Any]]
    counts: tuple[Count, ...]
    left: dict[str, str]

    @property
    def overflows(self) -> int:
        """Of all operations together."""
        return sum(count.overflows for count in self.counts)


class Emulator:
    """An ONNX network on an accumulator, to run again and again.

    target: the register, None for exact sums. inputs: codes of graph inputs that the file does not give, each
    `NAME=uint8[:scale[:zero]]`. acc_bits: other widths, by pattern of operation names. threads: of onnxruntime, 0 for
    all cores.

    A running sum that wraps around does not depend on its order, so onnxruntime computes it. Everything else goes tile
    by tile through `accaware.integer.emulate`, each sum in the order of the target, "any" meaning channels first.
    Raises `OSError`, or `ValueError` for a file that cannot be read or rewritten and for wrong options.
    """

    def __init__(
        self,
        path: str | Path,
        target: Target | None,
        inputs: Sequence[str] = (),
        acc_bits: Mapping[str, int] | None = None,
        threads: int = 0,
    ) -> None:
        network = read(path, dict(map(parse_input, inputs)))
        self.sha256 = network.sha256
        targets = targets_of(network, target or _EXACT, acc_bits or {})
        self._codes, self._exact = network.inputs, target is None
        self._products: dict[str, Product] = {}
        self._layers: dict[str, IntegerLayer] = {}
        self.left = {op.name: op.reason for op in network.unproven}
        for product in network.products:
            try:
                self._layers[product.name] = targets[product.name].layer(product)
                self._products[product.name] = product
            except ValueError as error:
                self.left[product.name] = str(error)
        folds = {name: self._fold(targets[name]) for name in self._products}
        self._net = rewrite(path, self._products, folds)
        self.left |= self._net.left
        outside = {o.stand_in: self._outside(name, o) for name, o in self._net.outside.items()}
        self._runner = Runner(self._net.model, outside, threads)
        self._seen: dict[str, Count] = {}
        hidden = {*self._net.overflows.values(), *self._net.sums.values()}
        self.outputs = [name for name in self._runner.outputs if name not in hidden]

    @property
    def inputs(self) -> dict[str, tuple[np.dtype[Any], tuple[int | None, ...] | None]]:
        """Types and shapes of the graph inputs; None for what the file leaves open."""
        return self._runner.inputs

    def codes(self, name: str) -> tuple[int, int, float, float] | None:
        """Smallest and largest code, scale and zero point of a graph input; None where it holds no known codes."""
        codes, (dtype, _) = self._codes.get(name), self.inputs[name]
        if codes is None:
            return None if dtype.kind == "f" else (*_limits(dtype), 1.0, 0.0)
        if codes.scale is None or codes.per_axis or isinstance(codes.zero, IntFormat):
            return None
        return codes.lo, codes.hi, float(codes.scale), float(codes.zero)

    def _fold(self, target: Target) -> Fold:
        register, bias = target.accumulator, target.bias == "inside"
        one_fold = register.overflow == "wrap" and register.tile is None and not target.raw
        one_fold = one_fold and not (isinstance(target, Carried) and target.preload)
        return Fold(None if self._exact else register.bits, bias, outside=not (one_fold or self._exact))

    def run(self, feeds: Feeds) -> Emulated:
        """Run one batch. feeds: arrays by the name of the graph input. Raises `ValueError` where they do not fit."""
        self._seen = {}
        found = self._runner.run(self._checked(feeds))
        return Emulated({name: found[name] for name in self.outputs}, tuple(self._counts(found)), dict(self.left))

    def _counts(self, found: Feeds) -> Iterator[Count]:
        net = self._net
        for name, product in self._products.items():
            bits = None if self._exact else self._layers[name].accumulator.bits
            if name in net.sums:
                overflows = int(found[net.overflows[name]].sum(dtype=np.float64)) if name in net.overflows else 0
                yield Count(name, product.kind, bits, int(found[net.sums[name]]), overflows)
            elif name in net.outside:
                nothing = Count(name, product.kind, bits, 0, 0)  # of a node that no output needs, or of no rows
                yield replace(self._seen.get(name, nothing), bits=bits)

    def _outside(self, name: str, operation: Outside) -> Callable[..., NDArray[Any]]:
        """What computes the sums of an operation with the integer layer."""
        product, layer = self._products[name], self._layers[name]
        if self._exact:
            layer = _unlimited(layer)
        parts: dict[bytes, IntegerLayer] = {}
        higher = layer.zero_points[0] - product.zero_range.lo  # than the file's are the codes that the kernel gets

        def compute(codes: NDArray[Any], zero: NDArray[Any] | None = None) -> NDArray[Any]:
            point = higher + (product.zero_range.lo if zero is None else int(zero.reshape(())))

            def one(rows: Integers, inputs: Integers) -> NDArray[Any]:
                key = rows.tobytes()
                if key not in parts:
                    parts[key] = layer.part(rows)
                done = emulate(parts[key], inputs, point)
                seen = Count(name, product.kind, None, done.sums.size, int(done.overflows.sum()))
                self._seen[name] = self._seen[name].plus(seen) if name in self._seen else seen
                return done.sums.astype(np.float64)

            stored = np.rint(codes).astype(np.int64) + point
            order: TapOrder = "hwc" if layer.accumulator.order == "hwc" else "chw"
            return sums(product, operation.original, stored, point, order, one)

        return compute

    def _checked(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """The feeds in the types of the graph. Raises `ValueError` where they are not what was read."""
        if set(feeds) != set(self.inputs):
            raise ValueError(f"the network's inputs are {', '.join(self.inputs)}, not {', '.join(feeds) or 'none'}")
        arrays = {}
        for name, (dtype, shape) in self.inputs.items():
            array = np.asarray(feeds[name])
            if array.dtype.kind not in "fiub" or (dtype.kind in "iub" and array.dtype.kind == "f"):
                raise ValueError(f"input '{name}' holds {dtype}, not {array.dtype}")
            fits = shape is None or (len(shape) == array.ndim and all(map(_fits, shape, array.shape)))
            if not fits:
                raise ValueError(f"input '{name}' has shape {_text(shape)}, not {list(array.shape)}")
            arrays[name] = array.astype(dtype)
            if not np.array_equal(arrays[name], array) and dtype.kind in "iub":
                raise ValueError(f"input '{name}' holds values that {dtype} does not have")
            codes = self.codes(name)
            if codes is None:
                continue
            lo, hi, scale, zero = codes
            real = array / scale + zero
            code = np.rint(real)
            if not ((np.abs(real - code) < 1e-2) & (code >= lo) & (code <= hi)).all():
                raise ValueError(f"input '{name}' holds values that are no codes in [{lo}, {hi}]")
        return arrays

    def batches(self, feeds: Feeds, size: int) -> list[dict[str, NDArray[Any]]]:
        """The feeds in batches, `size` rows each unless the file fixes that. Raises `ValueError` where they do not fit.

        What has no first dimension, or not the same number of rows as the rest, is one batch.
        """
        fixed = {shape[0] for _, shape in self.inputs.values() if shape and shape[0] is not None}
        counts = {len(array) if np.ndim(array) else 0 for array in feeds.values()}
        if len(counts) != 1 or len(fixed) > 1 or counts == {0}:
            return [dict(feeds)]
        (count,), step = counts, min(fixed, default=size)
        if fixed and count % step:
            raise ValueError(f"the file takes batches of {step}, which do not divide {count} rows")
        return [{name: array[i : i + step] for name, array in feeds.items()} for i in range(0, count, step)]


_EXACT = TARGETS["int32"]


def _unlimited(layer: IntegerLayer) -> IntegerLayer:
    """The same sums in a register that holds them all."""
    lo, hi = zip(*(worst_case(layer.rows, codes.with_zero()) for codes in layer.centred), strict=True)
    bits = bits_needed(int(np.min(lo)), int(np.max(hi)))
    zero = np.zeros((), np.int64)
    return replace(layer, accumulator=Accumulator(max(2, bits)), preload=zero, outer_start=zero, raw=False)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = None if dtype.kind == "b" else np.iinfo(dtype)
    return (0, 1) if info is None else (int(info.min), int(info.max))


def _fits(wanted: int | None, size: int) -> bool:
    return wanted is None or wanted == size


def _text(shape: tuple[int | None, ...] | None) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape or ()) + "]"


def emulate_file(
    path: str | Path,
    target: Target | None,
    feeds: Feeds,
    inputs: Sequence[str] = (),
    acc_bits: Mapping[str, int] | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Emulated:
    """Run an ONNX file on an accumulator: see `Emulator` for the options and `Emulated` for the result.

    feeds: arrays by the name of the graph input, cut into batches along their first dimension. progress: called with
    the rows of every batch that is done. Raises `OSError` or `ValueError`.
    """
    return run_batches(Emulator(path, target, inputs, acc_bits), feeds, batch_size, progress)


def run_batches(emulator: Emulator, feeds: Feeds, batch_size: int = 64, progress: Progress | None = None) -> Emulated:
    """Run all rows of the feeds, batch by batch; the outputs are joined along their first dimension."""
    done: list[Emulated] = []
    for batch in emulator.batches(feeds, batch_size):
        done.append(emulator.run(batch))
        if progress is not None:
            progress(max((len(array) for array in batch.values() if np.ndim(array)), default=1))
    if len(done) == 1:
        return done[0]
    outputs = {n: np.concatenate([np.atleast_1d(d.outputs[n]) for d in done]) for n in emulator.outputs}
    counts = list(done[0].counts)
    for other in done[1:]:
        counts = [a.plus(b) for a, b in zip(counts, other.counts, strict=True)]
    return Emulated(outputs, tuple(counts), dict(emulator.left))
