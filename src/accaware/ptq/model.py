"""Sequential post-training quantization: each layer's integers from the inputs that the quantized network gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from accaware.inputs import call, feeds
from accaware.layers import LAYERS, QuantLayer
from accaware.prepare import quant_layers
from accaware.ptq import ALGORITHMS
from accaware.ptq.axe import Axe
from accaware.ptq.descent import Problem, descend
from accaware.ptq.gpfq import gpfq
from accaware.ptq.gptq import gptq
from accaware.ptq.moments import Moments
from accaware.ptq.relaxed import start, sweep
from accaware.ptq.rounding import Nearest
from accaware.ptq.scales import at_best_scale
from accaware.quantizers.projected import BaselineQuantizer
from accaware.quantizers.weight import scale_ratios
from accaware.trace import batchnorm_after, evaluating

__all__ = ["budgeted", "reconstruct"]

_TAP_BY_TAP = {"gptq": gptq, "gpfq": gpfq}

_DAMPING = 0.01  # of the Gram matrix, relative to its mean diagonal, as in GPTQ
_ROUNDING = 1e-12  # of squares in float32, relative to those of means of inputs, or of the terms of outputs
_SWEEPS = 3
_REST = 0.49  # of a unit: the nearest integers stay those that were chosen
_ALL_PAIRS = 1 << 27  # pairs of moves in a layer, up to which the descent compares them all
_ONCE = "reconstruct iterates over the batches many times, which this iterator does not allow"


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    algorithm: str = "budgeted",
    *,
    fixed_scale: bool = False,
) -> None:
    """Choose the integers of a prepared model by the outputs that they give, in place and without labels or training.

    Layer by layer, in the order in which they run, the integers and scales minimise the squared distance between the
    layer's output in the quantized network and in the float one, under the exact budget (`accaware.ptq.descent`). Where
    a bias or a batch-norm follows, means do not count: it is given those (and batch-norm the variances) that bring the
    float network's. Layers outside the request and transposed convolutions stay as `calibrate` left them.

    model: prepared and calibrated, with methods "projected" or "baseline", before any `bias_correct`. reference: the
    float network that it was made from, with the same names of layers. batches: as for `calibrate`; iterated once for
    each layer (once for those that read one tensor), up to which both networks run: memory holds its moments. Before
    that the first batch shows the order.
    algorithm: how the integers are chosen: by our "budgeted", by its rivals "axe-gptq" and "axe-gpfq", or by plain
    "gptq" and "gpfq", which know no accumulator and need method "baseline". fixed_scale: these other algorithms keep
    the scales that `calibrate` chose, as published, instead of the best of about a hundred by the outputs. Raises
    `ValueError` for another algorithm, a fixed scale with "budgeted", a model that is not prepared or not calibrated,
    another method, one scale for all channels, layers that the reference lacks, a weight that two modules share, no
    data, and an iterator.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}")
    if fixed_scale and algorithm == "budgeted":
        raise ValueError("algorithm 'budgeted' finds its scales: fixed_scale is for the others")
    if isinstance(batches, Iterator):
        raise ValueError(_ONCE)
    layers = {name: layer for name, layer in quant_layers(model).items() if layer.inside}
    if not layers:
        raise ValueError("reconstruct needs a prepared model with layers inside the request")
    floats = dict(reference.named_modules())
    holders: Counter[Tensor] = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    for name, layer in layers.items():
        if holders[layer.weight] > 1:
            raise ValueError(f"{name}: another module holds the same weight, which reconstruct writes; give it a copy")
        _refuse_unfit(name, layer, floats.get(name), algorithm)
    with evaluating(model), evaluating(reference):
        first = next(feeds(batches, next(model.parameters()).device), None)
        if first is None:
            raise ValueError("reconstruct needs at least one batch")
        calls, groups = _calls(model, layers, first)
        bare = {name: layer for name, layer in layers.items() if layer.bias is None and calls[name] == 1}
        following = {
            name: (cast(_BatchNorm, model.get_submodule(norm)), floats.get(norm))
            for name, norm in batchnorm_after(model, bare, first).items()
        }
        for names in groups:
            group = [Moments(layers[name], floats[name], mixing=algorithm.endswith("gpfq")) for name in names]
            _collect(group, model, reference, batches, calls[names[0]])
            for name, moments in zip(names, group, strict=True):
                centred = name in following or moments.layer.bias is not None
                _choose(moments.layer, moments.finish(centred), algorithm, fixed_scale)
                _correct(moments, *following.get(name, (None, None)))


def _refuse_unfit(name: str, layer: QuantLayer, reference: nn.Module | None, algorithm: str) -> None:
    if type(reference) not in LAYERS:
        raise ValueError(f"{name}: the reference has no such float layer")
    if not isinstance(layer.weight_quant, BaselineQuantizer) or not layer.spec.per_channel:
        raise ValueError(
            f"{name}: reconstruct needs method projected or baseline with a scale for each channel, "
            f"not {layer.spec.method} with per_channel={layer.spec.per_channel}"
        )
    if layer.input_quant.codes is None:
        raise ValueError(f"{name}: not calibrated; call calibrate(model, batches) first")
    if algorithm in _TAP_BY_TAP and layer.spec.method != "baseline":
        raise ValueError(f"{name}: algorithm {algorithm!r} knows no accumulator: it needs method 'baseline'")
    if algorithm.startswith("axe") and (layer.spec.method, layer.spec.preload) != ("projected", "none"):
        raise ValueError(f"{name}: algorithm {algorithm!r} needs method projected and no free preload")
    layer.bind()


class _Reached(Exception):  # noqa: N818 -- no error
    """The layer has seen the batch: what comes after it need not run."""


def _run(network: nn.Module, inputs: Any) -> None:
    with suppress(_Reached):
        call(network, inputs)


def _calls(model: nn.Module, layers: dict[str, QuantLayer], first: Any) -> tuple[Counter[str], list[list[str]]]:
    """How often each layer runs; and the layers that have moments, in the order of first runs.

    Those that read one tensor in a row (query, key and value) are together. first: what the model is called with.
    """
    seen: Counter[str] = Counter()
    inputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}  # operations in place make another tensor of it

    def note(name: str, x: Tensor) -> None:
        seen.update([name])
        inputs[name], versions[name] = x, 0 if x.is_inference() else x._version

    hooks = [m.register_forward_pre_hook(lambda _, args, n=name: note(n, args[0])) for name, m in layers.items()]
    try:
        call(model, first)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    for name in seen:
        if getattr(layers[name], "transposed", False):
            continue
        other = groups[-1][-1] if groups else name
        same = inputs[other] is inputs[name] and versions[other] == versions[name]
        if groups and same and seen[other] == seen[name] == 1:
            groups[-1].append(name)
        else:
            groups.append([name])
    return seen, groups


def _collect(group: list[Moments], model: nn.Module, reference: nn.Module, batches: Iterable[Any], calls: int) -> None:
    """Run both networks up to the last call of the group's last layer, and of the float layer that it was made from."""
    inputs: list[list[tuple[Tensor, ...]]] = [[] for _ in group]
    originals: list[list[tuple[Tensor, ...]]] = [[] for _ in group]

    def note(found: list[list[tuple[Tensor, ...]]], index: int, *values: Tensor) -> None:
        if index == len(group) - 1 and len(found[index]) == calls - 1:
            found[index].append(values)
            raise _Reached
        found[index].append(tuple(value.clone() for value in values))  # what comes may change them in place

    hooks = []
    for i, moments in enumerate(group):
        hooks += [
            moments.layer.register_forward_pre_hook(lambda _, args, i=i: note(inputs, i, args[0])),
            moments.reference.register_forward_hook(lambda _, args, out, i=i: note(originals, i, args[0], out)),
        ]
    try:
        for feed in feeds(batches, next(model.parameters()).device):
            _run(model, feed)
            _run(reference, feed)
            for moments, seen, wanted in zip(group, inputs, originals, strict=True):
                layer = moments.layer
                while seen:
                    (x,), (original, y) = seen.pop(), wanted.pop()
                    moments.add(layer.input_quant(layer.rotated(x)), layer.rotated(original), y)
    finally:
        for hook in hooks:
            hook.remove()
    if not group[0].count:
        raise ValueError(_ONCE)


def _choose(layer: QuantLayer, moments: Moments, algorithm: str, fixed_scale: bool) -> None:
    """Give the layer the integers and scales of the smallest output error that the algorithm finds."""
    weight, cross = layer.rotated(cast(Tensor, moments.reference.weight).double()), moments.cross
    power = moments.gram.diagonal(dim1=1, dim2=2)
    # Taps that no input tells anything about stay near their float weights: also where inputs differ by rounding alone.
    least = _ROUNDING * moments.x.square().mean(-1) + 1e-14
    damping = torch.maximum(_DAMPING * power.mean(-1), least).view(-1, 1, 1)
    damped = damping * torch.eye(power.shape[1], dtype=power.dtype, device=power.device)
    mixed = moments.mixed + damped if moments.mixing else None
    cross = (cross + damping * weight.reshape(cross.shape)).flatten(0, 1)
    quantizer, rows = layer.weight_quant, layer.rows
    assert quantizer.budget is not None
    parts = torch.arange(rows.parts, device=weight.device).view(1, -1, 1)
    tiles = rows.merge(parts.expand_as(rows.split(weight)))[0].flatten()
    problem = Problem(moments.gram + damped, cross, tiles, quantizer.budget, quantizer.form.hi, mixed)
    taps = weight.reshape(cross.shape)
    if algorithm == "budgeted":
        q, scale = budgeted(taps, problem)
    else:
        kind = Axe if algorithm.startswith("axe") else Nearest
        solve = partial(_TAP_BY_TAP[algorithm.removeprefix("axe-")], kind=kind)
        if fixed_scale:
            scale = quantizer.step().double().squeeze(-1)
            q = solve(taps, scale, problem)
        else:
            q, scale = at_best_scale(solve, taps, problem, torch.tensor(scale_ratios(problem.qmax)))
    quantizer.set_step(scale.unsqueeze(-1))
    # The quantizer finds these integers, and training still has what rounding took away.
    rest = (weight.reshape(q.shape) / scale - q).clamp(-_REST, _REST)
    layer.weight.copy_(((q + rest) * scale).reshape(weight.shape))


def budgeted(weight: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Integers within the budget [R, K] and scales [R, 1], of small output error. weight: the float ones, [R, K]."""
    q, scale = start(weight, problem)
    for _ in range(_SWEEPS):
        q, scale = sweep(q, scale, problem)
    return descend(q, scale, problem) if len(q) * (2 * q.shape[1]) ** 2 <= _ALL_PAIRS else (q, scale)


def _correct(moments: Moments, norm: _BatchNorm | None, reference: nn.Module | None) -> None:
    """Bring back the float network's means by the bias, or means and variances by the batch-norm that follows.

    reference: the float network's norm, whose statistics are the start: what ran before on the model's does not count.
    """
    layer = moments.layer
    weight = layer.quantized_weight().double().reshape(moments.cross.shape)
    mean = (weight @ moments.x.unsqueeze(-1)).flatten()
    if layer.bias is not None:
        layer.bias.copy_(cast(Tensor, moments.reference.bias) - (mean - moments.y.flatten()))
    elif norm is not None:
        given = reference if isinstance(reference, _BatchNorm) and reference.running_mean is not None else norm
        centre, before = cast(Tensor, given.running_mean), cast(Tensor, given.running_var)
        inputs = (moments.gram.diagonal(dim1=1, dim2=2) + moments.x.square()).clamp(min=0).sqrt().unsqueeze(-1)
        least = _ROUNDING * (weight.abs() @ inputs).squeeze(-1).square()
        power = (weight * (weight @ moments.gram)).sum(-1)
        known = (power > least) & (moments.power > least)
        variance = before * torch.where(known, power / moments.power, 1).flatten()
        # Running statistics are not quite those of these images: what is between them is scaled as the outputs are.
        ratio = (variance + norm.eps) / (before + norm.eps)
        cast(Tensor, norm.running_mean).copy_(mean - (moments.y.flatten() - centre) * ratio.sqrt())
        cast(Tensor, norm.running_var).copy_(variance)
