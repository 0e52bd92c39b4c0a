"""How ranges pass through operations that move, select, scale or bound values, but do not sum them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from accaware.formats import IntFormat
from accaware.onnx.facts import (
    ONE,
    Call,
    Codes,
    Fact,
    Floats,
    Reals,
    affine,
    at_run_time,
    clipped,
    constant,
    floats_of,
    integers,
    interval,
    outward,
    rounded,
    union,
    unit,
    with_value,
)
from accaware.onnx.graph import Node, Shape
from accaware.onnx.tensors import ELEMENTS, SMALL, Array, Constant, UnreadableError

Handler = Callable[[Call], Sequence[Fact]]

_MOST_TERMS = 2**64  # elements of a tensor, far more than fit in memory
_STEPS = 256  # of rounding, more than it takes to sum up the sums of some elements


def kept(call: Call) -> list[Fact]:
    """The first output holds values of the input, at the same places along the channels."""
    return [call.fact(0)]


def dropout(call: Call) -> list[Fact]:
    """Nothing happens, except in training."""
    if call.has(2) and call.one(2, "training mode"):
        return [call.unknown()]
    return kept(call)


def selected(call: Call) -> list[Fact]:
    """The first output, or every part of a split, holds values of the input, anywhere."""
    return [_anywhere(call.fact(0))] * (len(call.node.outputs) if call.node.kind == "Split" else 1)


def _anywhere(fact: Fact) -> Fact:
    if isinstance(fact, Codes):
        if fact.per_axis:
            return Reals("its scale varies along a dimension that is rearranged", *interval(fact), fact.floats)
        return at_run_time(fact)
    if isinstance(fact, Constant):
        codes = integers(fact, "qdq")
        if codes is not None:
            return at_run_time(codes)
        return Reals(f"it is a part of constant '{fact.origin.name}'", *interval(fact), floats_of(fact))
    return fact


def pooled(call: Call) -> list[Fact]:
    """The largest of every window, at the same places along the channels; where a window can be empty, the smallest
    number of the type."""
    if _is_constant(call.fact(0)):
        return selected(call)
    fact = _of_windows(call)
    return [fact if call.node.kind == "GlobalMaxPool" or _windows_hold_data(call) else _with_extreme(fact, -1)]


def _of_windows(call: Call) -> Fact:
    """What is known of the values in any window of a pooling, which reaches along every dimension but the channels."""
    fact, shape = call.fact(0), call.known(call.node.inputs[0])
    if not isinstance(fact, Codes) or not fact.per_axis:
        return fact
    sides = len(call.node.ints("kernel_shape"))
    rank = sides + 2 if sides else 0 if shape is None else len(shape)
    channels = rank - 1 if call.node.kind == "MaxPoolNHWC" else 1
    return fact if fact.axis in (channels, channels - rank) else _anywhere(fact)


def _is_constant(fact: Fact) -> bool:
    return isinstance(fact, Constant) or (isinstance(fact, Codes) and fact.values is not None)


def _windows_lie_inside(node: Node) -> bool:
    """Whether a pooling neither pads nor rounds the number of windows up."""
    exact = node.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not node.get("ceil_mode", 0)
    return exact and not any(node.ints("pads"))


def _windows_hold_data(call: Call) -> bool:
    """Whether every window of a MaxPool meets the tensor, and does not lie in its padding alone."""
    node, kernel = call.node, call.node.ints("kernel_shape")
    if _windows_lie_inside(node):
        return True
    pads, ceil, ones = node.ints("pads"), node.get("ceil_mode", 0), (1,) * len(kernel)
    same = node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    strides, gaps = node.ints("strides") or ones, node.ints("dilations") or ones
    pads = pads or (0,) * 2 * len(kernel)
    sides = zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)

    def meets(k: int, s: int, d: int, before: int, after: int) -> bool:
        if d == 1:  # it reaches out of the padding, unless that is as long as the window; rounding up adds to it
            return max(before, after) < k - (s - 1 if ceil else 0)
        # Not all of its elements fit into the padding of both sides together.
        return d > 1 and not ceil and not same and -(-max(before, 0) // d) - (-max(after, 0) // d) < k

    return all(meets(k, s, d, *side) for k, s, d, side in zip(kernel, strides, gaps, sides, strict=True))


def _with_extreme(fact: Fact, sign: int) -> Fact:
    """What the largest (sign -1) or smallest (1) of values can be where there may be none: the type's own end."""
    if isinstance(fact, Codes) and fact.type is not None:
        return replace(fact, lo=fact.type.lo) if sign < 0 else replace(fact, hi=fact.type.hi)
    return with_value(fact, sign * math.inf)


def reduced(call: Call) -> list[Fact]:
    """ReduceMax or ReduceMin."""
    (fact,) = selected(call)
    shape = call.known(call.node.inputs[0])
    dims = None if shape is None else _reduced_dims(call, len(shape))
    # Of dimensions that are only known at run time, it may be any.
    sizes = [None] if shape is None else [shape[i] for i in (range(len(shape)) if dims is None else dims)]
    return [fact if all(sizes) else _with_extreme(fact, -1 if call.node.kind == "ReduceMax" else 1)]


def reduced_terms(call: Call, shape_of: Callable[[str], Shape | None]) -> int | None:
    """How many values a reduction takes together, where the shape of its input says it."""
    shape = shape_of(call.node.inputs[0])
    dims = None if shape is None else _reduced_dims(call, len(shape))
    if shape is None or dims is None:
        return None
    sizes = [shape[i] for i in dims]
    return None if None in sizes else int(np.prod(np.asarray(sizes, dtype=object)))


def _reduced_dims(call: Call, rank: int) -> set[int] | None:
    """The dimensions of a tensor of this rank that a reduction reduces; None where they are not constant."""
    axes: Sequence[int] = call.node.ints("axes")
    if call.has(1):
        array = constant(call.fact(1))
        if array is None:
            return None
        axes = array.reshape(-1).tolist()
    if not axes and not call.node.get("noop_with_empty_axes", 0):
        return set(range(rank))
    return {range(rank)[int(axis)] for axis in axes}


def cropped(call: Call) -> list[Fact]:
    """CenterCropPad, which pads with 0."""
    return [with_value(_anywhere(call.fact(0)), 0.0)]


def _moved(fact: Fact, move: Callable[[Constant], Constant], axis: Callable[[Codes, int], int]) -> Fact:
    """A transposed or reshaped tensor. axis: where a dimension goes, given the tensor's rank."""
    if isinstance(fact, Constant):
        return move(fact)
    if not isinstance(fact, Codes) or (fact.values is None and not fact.per_axis):
        return fact
    rank = len(fact.values.shape) if fact.values is not None else 0
    place = axis(fact, rank) if fact.per_axis else 0
    return replace(fact, axis=place, values=None if fact.values is None else move(fact.values))


def transpose(call: Call) -> list[Fact]:
    fact, order = call.fact(0), call.node.ints("perm")

    def full(rank: int) -> tuple[int, ...]:
        return order or tuple(reversed(range(rank)))

    def axis(codes: Codes, rank: int) -> int:
        perm = full(rank or len(order))
        return perm.index(codes.axis % len(perm))

    return [_moved(fact, lambda c: c.transposed(full(len(c.shape))), axis)]


def _reshaper(target: Callable[[Call, tuple[int, ...]], tuple[int, ...]]) -> Handler:
    """A handler that gives a constant the shape `target`, and a tensor of run time none."""

    def handler(call: Call) -> list[Fact]:
        fact = call.fact(0)
        values = fact.values if isinstance(fact, Codes) else fact
        if not isinstance(values, Constant):
            return selected(call)
        before = values.shape
        after = target(call, before)

        def axis(codes: Codes, rank: int) -> int:
            found = codes.axis % rank
            count, skipped = before[found], math.prod(before[:found])
            for place, size in enumerate(after):
                if size == count and math.prod(after[:place]) == skipped:
                    return place
            raise UnreadableError("its scale varies along a dimension that is reshaped")

        return [_moved(fact, lambda c: c.reshaped(after), axis)]

    return handler


def _reshape(call: Call, before: tuple[int, ...]) -> tuple[int, ...]:
    wanted = [int(d) for d in (call.array(1, "shape").reshape(-1) if call.has(1) else call.node.ints("shape"))]
    keep = not call.node.get("allowzero", 0)
    shape = [before[i] if d == 0 and keep and i < len(before) else d for i, d in enumerate(wanted)]
    known = math.prod(d for d in shape if d != -1)
    return tuple(math.prod(before) // max(1, known) if d == -1 else d for d in shape)


def _flatten(call: Call, before: tuple[int, ...]) -> tuple[int, ...]:
    axis = call.node.get("axis", 1)
    axis += len(before) if axis < 0 else 0
    return math.prod(before[:axis]), math.prod(before[axis:])


def _axes(call: Call, rank: int) -> set[int]:
    axes = call.array(1, "axes").reshape(-1).tolist() if call.has(1) else call.node.ints("axes")
    return {int(a) % max(1, rank) for a in axes}


def _squeeze(call: Call, before: tuple[int, ...]) -> tuple[int, ...]:
    axes = _axes(call, len(before)) or {i for i, size in enumerate(before) if size == 1}
    return tuple(size for i, size in enumerate(before) if i not in axes)


def _unsqueeze(call: Call, before: tuple[int, ...]) -> tuple[int, ...]:
    count = call.array(1, "axes").size if call.has(1) else len(call.node.ints("axes"))
    axes = _axes(call, len(before) + count)
    sizes = iter(before)
    return tuple(1 if i in axes else next(sizes, 1) for i in range(len(before) + count))


def relu(call: Call) -> list[Fact]:
    return [clipped(call.fact(0), 0.0, math.inf)]


def clip(call: Call) -> list[Fact]:
    lows = [call.one(1, "lower bound")] if call.has(1) else _roundings(call, "min", -math.inf)
    highs = [call.one(2, "upper bound")] if call.has(2) else _roundings(call, "max", math.inf)
    fact = integers(call.fact(0), "qdq") or call.fact(0)
    found = [clipped(fact, low, high) for low in lows for high in highs]
    return [found[0] if len(found) == 1 else union(found)]


def _roundings(call: Call, name: str, default: float) -> list[float]:
    """The values that an attribute, a float32, can have in the run: itself, or rounded to half floats."""
    number, floats = call.node.get(name, default), floats_of(call.fact(0))
    return [number] if floats and floats != np.float16 else sorted({number, float(np.float16(number))})


def extremum(call: Call) -> list[Fact]:
    """Max or Min with one constant number is a Clip."""
    for x, place in ((0, 1), (1, 0)):
        array = constant(call.fact(place)) if call.has(place) and len(call.facts) == 2 else None
        if array is not None and array.size == 1:
            bound = call.one(place, "bound")
            limits = (bound, math.inf) if call.node.kind == "Max" else (-math.inf, bound)
            return [clipped(_beside(call, x, array), *limits)]
    return [union([_anywhere(call.fact(i)) for i in range(len(call.facts))])]


def concat(call: Call) -> list[Fact]:
    return [union([integers(f) or f for f in map(call.fact, range(len(call.facts)))])]


def where(call: Call) -> list[Fact]:
    return [union([_anywhere(integers(f) or f) for f in (call.fact(1), call.fact(2))])]


def pad(call: Call) -> list[Fact]:
    if call.node.get("mode", "constant") != "constant":
        return selected(call)
    fact = call.fact(0)
    if _is_constant(fact) or (isinstance(fact, Codes) and fact.per_axis):  # places shift, and with them channels
        fact = _anywhere(fact)
    for value in [call.one(2, "padding")] if call.has(2) else _roundings(call, "value", 0.0):
        fact = with_value(fact, value)
    return [fact]


def cast(call: Call) -> list[Fact]:
    element = ELEMENTS.get(call.node.get("to", 0))
    fact = call.fact(0)
    if element is None:
        raise UnreadableError("it is cast to a type that is not read")
    if element.codes is None:
        return [_as_floats(integers(fact) or fact, element.dtype)]
    codes = integers(fact)
    if codes is None:
        lo, hi = interval(fact)
        inside = element.codes.lo <= lo and hi <= element.codes.hi
        ends = (math.floor(lo), math.ceil(hi)) if inside else (element.codes.lo, element.codes.hi)
        return [Codes(*ends, ONE, type=element.codes)]
    if element.codes.lo <= codes.lo and codes.hi <= element.codes.hi:
        return [replace(codes, type=element.codes)]
    return [Codes(element.codes.lo, element.codes.hi, ONE, type=element.codes)]


def _as_floats(fact: Fact, floats: Floats) -> Fact:
    if isinstance(fact, Codes):
        if fact.values is not None:  # which stands for its integers, rounded already
            floats = floats_of(fact, Reals("", floats=floats)) or floats
        return rounded(replace(fact, type=None), floats)
    if isinstance(fact, Reals):
        lo, hi = outward(fact.lo, fact.hi, floats)
        return replace(fact, lo=lo, hi=hi, floats=floats)
    if fact.dtype.itemsize <= floats.itemsize:
        return fact
    return fact.computed(None, lambda block, _: block.astype(floats), floats)


def scaled(call: Call) -> list[Fact]:
    """Add, Sub, Mul or Div with a constant."""
    kind = call.node.kind
    # Of two constants, the one that holds codes may be weights.
    place = 1 if constant_or_none(call, 1) is not None and not isinstance(call.fact(1), Codes) else 0
    place = place if constant_or_none(call, place) is not None else 1 - place
    c, x = constant_or_none(call, place), call.fact(1 - place)
    if c is None or isinstance(x, Constant) or (kind == "Div" and place == 0):
        return [_anything(call)]
    x = _beside(call, 1 - place, c)
    x = integers(x) or x
    integer = isinstance(x, Codes) and x.type is not None
    if integer != (c.dtype.kind != "f"):  # large integers, of which only an interval in floats is known
        return [_anything(call)]
    one, nought = np.ones((), c.dtype), np.zeros((), c.dtype)
    if kind == "Div":
        if integer or not np.all(c):
            return [_anything(call)]
        return [affine(x, 1 / c.astype(np.float64), nought, c.dtype)]
    floats = c.dtype
    if not integer:
        c = c.astype(np.float64)
    if kind == "Mul":
        return [affine(x, c, nought, floats)]
    if kind == "Sub":
        return [affine(x, one, -c.astype(np.float64), floats)] if place else [affine(x, -np.ones(()), c, floats)]
    return [affine(x, one, c, floats)]


def _beside(call: Call, index: int, other: Array) -> Fact:
    """An input that is broadcast with a constant, which can make it larger and move dimensions that it counts."""
    fact = call.fact(index)
    if not isinstance(fact, Codes):
        return fact
    if fact.values is not None:
        shape = fact.values.shape
        return fact if np.broadcast_shapes(shape, other.shape) == shape else _anywhere(fact)
    if not fact.per_axis or fact.axis < 0:
        return fact
    known = call.known(call.node.inputs[index])
    rank = fact.axis + 1 if known is None else len(known)  # at least so many
    return fact if other.ndim <= rank else _anywhere(fact)


def constant_or_none(call: Call, index: int) -> Array | None:
    """The values of a small constant input; None for anything else."""
    fact = call.fact(index)
    if isinstance(fact, Codes) and (fact.values is None or fact.values.size > SMALL):
        return None
    return None if isinstance(fact, Constant) and fact.size > SMALL else constant(fact)


def _anything(call: Call) -> Fact:
    """An output of the type of the inputs."""
    found = [integers(fact) for fact in call.facts if fact is not None]
    types = [codes.type for codes in found if codes is not None and codes.type is not None]
    return Codes(types[0].lo, types[0].hi, ONE, type=types[0]) if types else call.unknown()


def addition(call: Call) -> list[Fact]:
    """Add, Sub or Sum: of two tensors of codes with one scale it is the codes' own, else an interval."""
    if call.node.kind != "Sum" and any(constant_or_none(call, i) is not None for i in range(len(call.facts))):
        return scaled(call)
    facts = [call.fact(i) for i in range(len(call.facts))]
    floats = floats_of(*facts)
    spans = [interval(f) for f in facts]
    if call.node.kind == "Sub":
        if any(isinstance(f, Codes) and f.type is not None for f in facts):
            return [_anything(call)]
        (lo, hi), (low, high) = spans
        lo, hi = outward(lo - high, hi - low, floats)
        return [replace(call.unknown(), lo=lo, hi=hi, floats=floats)]
    # Of three and more, the sums of some can be larger than that of all.
    sizes = [sum(abs(span[end]) for span in spans) if len(facts) > 2 else 0.0 for end in (0, 1)]
    codes = [f for f in facts if isinstance(f, Codes) and not f.per_axis and f.values is None]
    if len(codes) == len(facts) and all(
        c.type is None and c.scale is not None and c.scale == codes[0].scale for c in codes
    ):
        zeros = [c.zero for c in codes if not isinstance(c.zero, IntFormat)]
        if len(zeros) == len(codes):
            total, error = IntFormat(sum(c.lo for c in codes), sum(c.hi for c in codes)), sum(c.error for c in codes)
            added = replace(codes[0], lo=total.lo, hi=total.hi, zero=np.sum(zeros, axis=0), error=error)
            assert added.scale is not None
            return [rounded(added, floats, len(facts) - 1, max(sizes) / float(added.scale))]
    if any(isinstance(f, Codes) and f.type is not None for f in facts):
        return [_anything(call)]
    lo, hi = sum(lo for lo, _ in spans), sum(hi for _, hi in spans)
    lo, hi = outward(lo, hi, floats, max(1, len(facts) - 1), (sizes[0], sizes[1]))
    return [replace(call.unknown(), lo=lo, hi=hi, floats=floats)]


def batch_norm(call: Call) -> list[Fact]:
    if call.node.get("training_mode", 0):
        return [call.unknown()]
    scale, bias, mean, var = (call.array(i, "statistics").astype(np.float64) for i in range(1, 5))
    epsilon = call.node.get("epsilon", float(np.float32(1e-5)))  # attributes are float32, and their defaults
    factor = scale / np.sqrt(var + epsilon)
    offset = bias - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(offset).all()):
        return [call.unknown()]
    fact = call.fact(0)
    if isinstance(fact, Constant):
        return [call.unknown()]
    # Along the channels, dimension 1, which nothing here counts from the last: only an interval is kept.
    ends = [np.nan_to_num(factor * end, nan=0, posinf=math.inf, neginf=-math.inf) + offset for end in interval(fact)]
    beside = 2 * (np.abs(mean * factor) + np.abs(bias))
    floats = floats_of(fact, *call.facts[1:5])
    lo, hi = outward(np.minimum(*ends), np.maximum(*ends), floats, 8, (beside, beside))
    reason = fact.reason if isinstance(fact, Reals) else "its codes are scaled by a batch-norm"
    return [Reals(reason, lo, hi, floats)]


def average(call: Call) -> list[Fact]:
    """Average pooling: n times finer codes where every output averages n of them, else an interval."""
    fact = _of_windows(call)
    lo, hi = (end(0.0, x) for end, x in zip((min, max), interval(fact), strict=True))
    n, floats = terms_of(call, call.known), floats_of(fact)
    # Rounded to nearest, a + b is at most 2 b away from a: one after the other, values sum up to at most twice the sum.
    size = 2 * max(-lo, hi) * (n or _MOST_TERMS)
    fits = floats is not None and size <= float(np.finfo(floats).max)
    few = n is not None and 2 * n * unit(floats) < 0.5
    if (
        isinstance(fact, Codes)
        and fact.scale is not None
        and not isinstance(fact.zero, IntFormat)
        and n
        and few
        and _windows_are_whole(call)
        and fact.type is None
        and fact.values is None
        and fits
    ):
        least, most, error = fact.lo * n, fact.hi * n, fact.error * n
        finer = replace(fact, lo=least, hi=most, scale=fact.scale / n, zero=fact.zero * n, error=error)
        return [rounded(finer, floats, n + 2)]
    reason = fact.reason if isinstance(fact, Reals) else f"it is the output of {call.node.kind} '{call.node.name}'"
    if n and few:
        lo, hi = outward(lo, hi, floats if fits else None, 2 * n)
    else:
        lo, hi = outward(2 * lo, 2 * hi, floats if fits else None, _STEPS)
    return [Reals(reason, lo, hi, floats)]


def _windows_are_whole(call: Call) -> bool:
    """Whether every window of an average holds as many values as its kernel, or a divisor of that."""
    node, kernel = call.node, call.node.ints("kernel_shape")
    if not _windows_lie_inside(node):
        return False
    ones, shape = (1,) * len(kernel), call.known(node.inputs[0])
    sizes = shape[2:] if shape is not None and len(shape) == len(kernel) + 2 else (None,) * len(kernel)
    windows = zip(kernel, node.ints("strides") or ones, node.ints("dilations") or ones, sizes, strict=True)
    # onnxruntime divides toward zero to count them: by a stride above 1, one is left that is larger than the tensor.
    shared = 1 if node.get("count_include_pad", 0) else 2  # of a kernel of 2, it holds 1 or 2
    return all(s == 1 or k <= shared or (size is not None and size > (k - 1) * d) for k, s, d, size in windows)


def terms_of(call: Call, shape_of: Callable[[str], Shape | None]) -> int | None:
    """How many values a pooling averages, where its kernel or the shape of its input says it."""
    if call.node.kind == "AveragePool":
        return math.prod(call.node.ints("kernel_shape")) or None
    shape = shape_of(call.node.inputs[0])
    sizes = [] if shape is None else list(shape[2:])
    return math.prod(s for s in sizes if s) if sizes and all(sizes) else None


def bounded(lo: float, hi: float) -> Handler:
    """A function whose values lie in [lo, hi], up to rounding: a float tanh exceeds 1."""

    def handler(call: Call) -> list[Fact]:
        floats = floats_of(call.fact(0))
        low, high = outward(lo, hi, floats, 4)
        return [replace(call.unknown(), lo=low, hi=high, floats=floats)]

    return handler


def absolute(call: Call) -> list[Fact]:
    """Abs; of the smallest integer of a signed type it is that integer."""
    codes = integers(call.fact(0))
    if codes is None or codes.type is None:
        floats = floats_of(call.fact(0))
        return [replace(call.unknown(), lo=0.0 if floats else -math.inf, floats=floats)]
    if codes.type.lo < 0 and codes.lo == codes.type.lo:
        return [Codes(codes.type.lo, codes.type.hi, ONE, type=codes.type)]
    lo = max(codes.lo, -codes.hi, 0)
    return [Codes(lo, max(-codes.lo, codes.hi), ONE, type=codes.type)]


def resized(call: Call) -> list[Fact]:
    mode = call.node.get("mode", "nearest")
    if call.node.get("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return [call.unknown()]
    if mode == "nearest":
        return selected(call)
    if mode == "linear":
        lo, hi = interval(call.fact(0))
        floats = floats_of(call.fact(0))
        # At most eight values of three dimensions, each times a weight that is computed.
        lo, hi = outward(min(0.0, lo), max(0.0, hi), floats, 32)
        return [replace(call.unknown(), lo=lo, hi=hi, floats=floats)]
    return [call.unknown()]


def constant_node(call: Call) -> list[Fact]:
    attributes = call.node.attributes
    name = call.node.outputs[0]
    if isinstance(attributes.get("value"), Constant):
        value: Constant = attributes["value"]
        return [replace(value, origin=replace(value.origin, name=name))]
    for key, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if attributes.get(key) is not None:
            return [Constant.of(name, np.asarray(attributes[key], dtype))]
    raise UnreadableError("its value is of a type that is not read")


def constant_of_shape(call: Call) -> list[Fact]:
    shape = tuple(int(d) for d in call.array(0, "shape").reshape(-1))
    value = call.node.attributes.get("value")
    fill = value.small.reshape(-1) if isinstance(value, Constant) else np.zeros(1, np.float32)
    if fill.size != 1 or min(shape, default=0) < 0 or len(shape) > 32:
        raise UnreadableError("its shape or value is impossible")
    if math.prod(shape) > SMALL:
        return [Reals("it is a large constant", float(fill[0]), float(fill[0]))]
    return [Constant.of(call.node.outputs[0], np.broadcast_to(fill[0], shape))]


def shape(call: Call) -> list[Fact]:
    fact = call.fact(0)
    values = fact.values if isinstance(fact, Codes) else fact
    sizes: Any = values.shape if isinstance(values, Constant) else call.known(call.node.inputs[0])
    start, end = call.node.get("start", 0), call.node.attributes.get("end")
    if sizes is None or None in sizes[start:end]:
        return [Codes(0, 2**63 - 1, ONE, type=IntFormat(-(2**63), 2**63 - 1))]
    return [Constant.of(call.node.outputs[0], np.asarray(sizes[start:end], np.int64))]


def _gather(call: Call, x: Array, index: Array) -> Array:
    if x.size * index.size > _FOLD**2 // 64:
        raise UnreadableError("it gathers a large constant")
    return np.take(x, index.astype(np.int64), axis=call.node.get("axis", 0))


def _slice(call: Call, x: Array, *limits: Array) -> Array:
    if not limits:
        starts, ends, axes = (call.node.ints(name) for name in ("starts", "ends", "axes"))
    else:
        starts, ends, axes = (tuple(limits[i].tolist()) if i < len(limits) else () for i in range(3))
    steps = limits[3].tolist() if len(limits) > 3 else [1] * len(starts)
    parts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        parts[axis] = slice(start, None if step < 0 and end < -x.shape[axis] else end, step)
    return x[tuple(parts)]


def _cast(call: Call, x: Array) -> Array:
    element = ELEMENTS[call.node.get("to", 0)]
    if element.codes and element.dtype != np.bool_:
        whole = np.trunc(x.astype(np.float64))
        if not ((whole >= element.codes.lo) & (whole < element.codes.hi + 1)).all():
            raise UnreadableError("it casts constants to integers that the type does not have")
    return x.astype(element.dtype)


def _divide(_: Call, x: Array, y: Array) -> Array:
    if x.dtype.kind != "f":
        return np.asarray(np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)), x.dtype)
    return np.asarray(x / y)


_FOLD = 4096  # elements of the constants of a node that is computed

#: Operations on small constants, which exporters leave in the graph.
FOLDED: dict[str, Callable[..., Array]] = {
    "Add": lambda _, x, y: x + y,
    "Sub": lambda _, x, y: x - y,
    "Mul": lambda _, x, y: x * y,
    "Div": _divide,
    "Neg": lambda _, x: -x,
    "Abs": lambda _, x: np.abs(x),
    "Sqrt": lambda _, x: np.sqrt(x),
    "Reciprocal": lambda _, x: 1 / x,
    "Exp": lambda _, x: np.exp(x),
    "Floor": lambda _, x: np.floor(x),
    "Ceil": lambda _, x: np.ceil(x),
    "Round": lambda _, x: np.asarray(np.round(x)),
    "Concat": lambda call, *xs: np.concatenate(xs, axis=call.node.get("axis", 0)),
    "Gather": _gather,
    "Slice": _slice,
    "Cast": _cast,
}


def folded(call: Call) -> list[Fact] | None:
    """The output of an operation on small constants; None where it is something else."""
    fold = FOLDED.get(call.node.key)
    facts = [fact for fact in call.facts if fact is not None]
    constants = [f for f in facts if isinstance(f, Constant)]
    if fold is None or len(constants) < len(facts) or sum(f.size for f in constants) > _FOLD:
        return None
    if call.node.key == "Cast" and any(f.codes is not None for f in constants):
        return None  # integers that become floats may be weights
    arrays = [array for array in map(constant, facts) if array is not None]
    if math.prod(np.broadcast_shapes(*(a.shape for a in arrays)) if fold in _BROADCAST else ()) > 16 * _FOLD:
        return None
    return [Constant.of(call.node.outputs[0], np.asarray(fold(call, *arrays)))]


_BROADCAST = [FOLDED[kind] for kind in ("Add", "Sub", "Mul", "Div")]

RANGES: dict[str, Handler] = {
    **dict.fromkeys(("Identity", "qonnx.DebugMarker"), kept),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool", "qonnx.MaxPoolNHWC"), pooled),
    **dict.fromkeys(
        ("Slice", "Gather", "GatherElements", "GatherND", "Split", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"),
        selected,
    ),
    **dict.fromkeys(("ReverseSequence", "Compress", "TopK"), selected),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), reduced),
    "CenterCropPad": cropped,
    "Dropout": dropout,
    "Transpose": transpose,
    "Reshape": _reshaper(_reshape),
    "Flatten": _reshaper(_flatten),
    "Squeeze": _reshaper(_squeeze),
    "Unsqueeze": _reshaper(_unsqueeze),
    "Relu": relu,
    "Clip": clip,
    "Max": extremum,
    "Min": extremum,
    "Concat": concat,
    "Where": where,
    "Pad": pad,
    "Cast": cast,
    "Add": addition,
    "Sub": addition,
    "Sum": addition,
    "Mul": scaled,
    "Div": scaled,
    "BatchNormalization": batch_norm,
    "AveragePool": average,
    "GlobalAveragePool": average,
    "Resize": resized,
    "Upsample": resized,
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "Softmax"), bounded(0, 1)),
    **dict.fromkeys(("Tanh", "Softsign", "Erf", "Sin", "Cos"), bounded(-1, 1)),
    "Abs": absolute,
    **dict.fromkeys(("Sqrt", "Exp", "Softplus"), bounded(0, math.inf)),
    "Constant": constant_node,
    "ConstantOfShape": constant_of_shape,
    "Shape": shape,
}
