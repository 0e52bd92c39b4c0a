"""From a float model to a prepared one, in place: quantizers in, ranges found, first integers chosen."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from accaware.formats import Spec
from accaware.inputs import call, feeds, operand
from accaware.layers import LAYERS, QuantIdentity, QuantLayer, codes_of, kept_spec, refuse_unfit
from accaware.quantizers import A2QQuantizer, ActivationQuantizer
from accaware.trace import Trace, evaluating, trace

__all__ = ["calibrate", "penalty", "prepare_", "quant_layers", "reestimate_batchnorm"]

Init = Literal["search", "ep", "none"]
T = TypeVar("T")


def prepare_(
    model: nn.Module,
    spec: Spec,
    sample: Any = None,
    keep: Mapping[str, int | str] | None = None,
    acc_bits: Mapping[str, int] | None = None,
    signed: Mapping[str, bool] | None = None,
) -> nn.Module:
    """Turn every `nn.Linear` and (transposed) convolution of `model` into its quantized form, in place.

    sample: an input of the model (or the tuple of its arguments, or the mapping of its keyword arguments). One run over
    it finds which layers read the same tensor, so that they share one activation quantizer, and which other operations
    accumulate. keep: layers that stay out of the request, by name pattern (`fnmatch`): bits (2-8; added up in 32 bits)
    or "float". acc_bits: accumulator widths by name pattern; the more specific pattern wins, then the later one.
    signed: whether the input codes of the layers that match are signed; calibration finds out for the others.

    Returns the model. Raises `ValueError`, and leaves the model as it is, for a pattern that matches nothing, a value
    that is not allowed, a model without such layers, one that is prepared already, and a layer whose weight is computed
    (pruned, normalized), empty or of 16 bits. Call `calibrate` next.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"spec must be a Spec, not {type(spec).__name__}")
    if quant_layers(model):
        raise ValueError("this model is prepared already")
    targets = {name: module for name, module in model.named_modules() if type(module) in LAYERS}
    streams = {name: module for name, module in model.named_modules() if isinstance(module, QuantIdentity)}
    if not targets:
        raise ValueError(f"{type(model).__name__} has no layer to quantize; known are {_known()}")
    kept = _match(keep or {}, [*targets, *streams], "keep")
    linear = any(isinstance(module, nn.Linear) and name not in kept for name, module in targets.items())
    if not linear and (spec.act_scale == "token" or spec.rotate):
        raise ValueError("act_scale 'token' and rotate are for nn.Linear, of which the request has none")
    widths = _match(acc_bits or {}, list(targets), "acc_bits")
    signs = _match(signed or {}, [*targets, *streams], "signed")
    _check_values(spec, keep or {}, acc_bits or {}, signed or {})
    _refuse_idle_widths(acc_bits or {}, targets, kept)
    specs = {
        name: _spec_of(module, spec, kept.get(name), widths.get(name))
        for name, module in {**streams, **targets}.items()
        if kept.get(name) != "float"
    }
    converted = {name: module for name, module in targets.items() if name in specs}
    for name, module in converted.items():
        refuse_unfit(name, module)
    _leave_fused_kernels(model)
    seen = Trace() if sample is None else trace(model, {**targets, **streams}, sample)
    quantizers = _quantizers(specs, seen.sources, signs)
    # What stays as it is, an embedding or a float layer, keeps the weight that it shared.
    left = set(model.modules()).difference(converted.values())
    shared = {id(p) for m in left for p in m.parameters(recurse=False)}
    for name, module in streams.items():
        module.input_quant = quantizers.get(name)
    for name, module in converted.items():
        weight = cast(Tensor, module.weight)
        module.__class__ = LAYERS[type(module)]
        if id(weight) in shared:
            module.weight = nn.Parameter(weight.detach().clone())
        assert isinstance(module, QuantLayer)
        module.quantize_(name, specs[name], quantizers[name].to(weight.device), name not in kept)
    model._accaware_trace = seen  # type: ignore[assignment]
    return model


def _check_values(
    spec: Spec, keep: Mapping[str, int | str], acc_bits: Mapping[str, int], signed: Mapping[str, bool]
) -> None:
    for pattern, value in keep.items():
        if value != "float" and (isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8):
            raise ValueError(f"keep {pattern!r} must be 2-8 bits or 'float', not {value!r}")
    for pattern, bits in acc_bits.items():
        try:
            replace(spec, acc_bits=bits)
        except (TypeError, ValueError) as error:
            raise type(error)(f"acc_bits {pattern!r}: {error}") from error
    for pattern, sign in signed.items():
        if not isinstance(sign, bool):
            raise ValueError(f"signed {pattern!r} must be True or False, not {sign!r}")


def _refuse_idle_widths(acc_bits: Mapping[str, int], names: Iterable[str], kept: Mapping[str, int | str]) -> None:
    """Raises `ValueError` for a width that no layer would have, since all that its pattern matches are kept."""
    for pattern, bits in acc_bits.items():
        matched = fnmatch.filter(names, pattern)
        if bits != 32 and all(name in kept for name in matched):  # 32 is what they have
            raise ValueError(
                f"acc_bits {pattern!r} must be 32, not {bits}: it matches only layers that are kept out of the request "
                f"({', '.join(matched)})"
            )


def _spec_of(module: nn.Module, spec: Spec, bits: int | str | None, width: int | None) -> Spec:
    """What is asked of one layer or stream. bits: those that it is kept at. width: of its own accumulator."""
    own = replace(spec, acc_bits=width or spec.acc_bits) if bits is None else kept_spec(spec, int(bits))
    return own if isinstance(module, nn.Linear) else replace(own, act_scale="tensor", rotate=False)


def _quantizers(
    specs: Mapping[str, Spec], sources: Mapping[str, str], signs: Mapping[str, bool]
) -> dict[str, ActivationQuantizer]:
    """The activation quantizer of every layer and stream, by name: one for all that read a tensor in the same format.

    Raises `ValueError` where they are given different signs.
    """
    readers: dict[tuple[Any, ...], list[str]] = {}
    for name, spec in specs.items():
        key = (sources.get(name, name), spec.act_bits, spec.act_scale, spec.rotate)
        readers.setdefault(key, []).append(name)
    found: dict[str, ActivationQuantizer] = {}
    for names in readers.values():
        given = {name: signs[name] for name in names if name in signs}
        if len(set(given.values())) > 1:
            told = ", ".join(f"{name}: {sign}" for name, sign in given.items())
            raise ValueError(f"signed must be the same for layers that read one tensor, not {told}")
        spec = specs[names[0]]
        sign = next(iter(given.values()), None)
        quantizer = ActivationQuantizer(spec.act_bits, sign, per_token=spec.act_scale == "token")
        found |= dict.fromkeys(names, quantizer)
    return found


def _leave_fused_kernels(model: nn.Module) -> None:
    """In evaluation mode torch's transformer encoders hand their layers' weights to one kernel, past the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # read by nothing but the choice of that kernel
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _known() -> str:
    return ", ".join(kind.__name__ for kind in LAYERS)


def _match(patterns: Mapping[str, T], names: list[str], option: str) -> dict[str, T]:
    """name -> value of the most specific pattern that matches it."""
    found: dict[str, T] = {}
    # Sorting is stable: among equally specific patterns the later one is applied last and wins.
    for pattern in sorted(patterns, key=lambda p: (not set(p) & set("*?["), len(p.strip("*?")))):
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(f"{option}: no layer matches {pattern!r}; the layers are {', '.join(names)}")
        found.update(dict.fromkeys(matched, patterns[pattern]))
    return found


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a prepared model, by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def _activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """By the name of the first layer or stream that has it."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    return {name.removesuffix("input_quant").removesuffix("."): m for name, m in found.items()}


def calibrate(model: nn.Module, batches: Iterable[Any], init: Init = "search") -> None:
    """Find activation ranges and signs from data, then the first weight scales of a prepared model.

    batches: model inputs, or tuples that start with one; a thousand images suffice. An input is a tensor, or a mapping
    of keyword arguments, of which padding (0 in `attention_mask` [B, L]) is left out. The float model runs over them
    once in evaluation mode. init: "search" chooses the weight scales (and EP-init's projection, for A2Q and A2Q+) of
    smallest error, each tap weighted by the power of its input; "ep" projects at the scale max|w| / qmax; "none" does
    not project.

    Raises `ValueError` without data, for data that are not finite, for a layer that no data reached or whose weight
    became computed, and for an accumulator too small for a layer. Raises `TypeError` for one batch in place of several.
    """
    if init not in ("search", "ep", "none"):
        raise ValueError(f"init must be search, ep or none, not {init!r}")
    layers = quant_layers(model)
    if not layers:
        raise ValueError("this model has no quantized layer; call prepare_ first")
    for layer in layers.values():
        layer.check()
    quantizers = _activation_quantizers(model)
    powers = {name: _Power() for name in layers}
    hooks = [layer.register_forward_pre_hook(powers[name]) for name, layer in layers.items()]
    for quantizer in quantizers.values():
        quantizer.observe()
    try:
        if _run(model, batches) == 0:
            raise ValueError("calibration needs at least one batch")
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer in quantizers.values():
            quantizer.observing = False
    for name in layers:
        if powers[name].count == 0:
            raise ValueError(f"{name}: no calibration data reached this layer")
    for name, quantizer in quantizers.items():
        quantizer.calibrate(name)
    for name, layer in layers.items():
        layer.bind()
        with torch.no_grad():
            rows = layer.rows.split(layer.weight)
            importance = layer.rows.split(_per_tap(layer, powers[name].mean()))
            start = layer.rows.merge(layer.weight_quant.initialise(rows, importance, init))
            layer.weight.copy_(start.clone())  # `start` may be a view of the weight, of other strides


class _Power:
    """A forward hook that averages x_i^2 for every input channel i of a layer."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        quantized = cast(QuantLayer, layer)
        x = quantized.rotated(operand(quantized.name, args).detach())
        x = x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.Linear) else x.movedim(1, -1).reshape(-1, x.shape[1])
        self.total = self.total + x.double().square().sum(0)
        self.count += len(x)

    def mean(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        power = self.total / self.count
        # An input channel that is always 0 must not make its weights free.
        return power.clamp(min=float(power.mean()) * 1e-3 + 1e-12)


def _per_tap(layer: QuantLayer, power: Tensor) -> Tensor:
    """Input power [in_channels] -> the shape of the weight."""
    weight = layer.weight
    power = power.to(weight.dtype)
    groups = getattr(layer, "groups", 1)
    trailing = (1,) * (weight.dim() - 2)
    if getattr(layer, "transposed", False):
        return power.reshape(-1, 1, *trailing).expand_as(weight)
    per_group = power.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return per_group.reshape(weight.shape[0], weight.shape[1], *trailing).expand_as(weight)


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Recompute the running statistics of every batch-norm from data, with the integers that will be deployed.

    batches: as for `calibrate`, but augmented as in training: batch-norm averaged over such images, and the statistics
    of plain ones shift every channel. Other layers stay in evaluation mode. Does nothing without batch-norm. Raises
    `ValueError` without data; whatever fails, the statistics are then those from before.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    try:
        if _run(model, batches, training=norms) == 0:
            raise ValueError("re-estimating batch-norm needs at least one batch")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in norm.named_buffers():
                value.copy_(buffers[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def penalty(model: nn.Module, strength: float = 1e-3) -> Tensor:
    """The regulariser to add to the loss, a scalar: strength * sum max(t - T, 0) over A2Q layers (A2Q+, section 2.3).

    0 for methods that need none. Raises `ValueError` for others before calibration.
    """
    terms = []
    for layer in quant_layers(model).values():
        if isinstance(layer.weight_quant, A2QQuantizer):
            codes_of(layer)
            layer.bind()  # what a state dict brought is not bound before the first run
            terms.append(layer.weight_quant.penalty())
    if not terms:
        return next(model.parameters()).new_zeros(())
    return strength * torch.stack(terms).sum()


def _run(model: nn.Module, batches: Iterable[Any], training: Iterable[nn.Module] = ()) -> int:
    """Run the model over the batches without gradients, in evaluation mode but for `training`; returns how many."""
    device = next(model.parameters()).device
    count = 0
    with evaluating(model), torch.no_grad():
        for module in training:
            module.train()
        for inputs in feeds(batches, device):
            call(model, inputs)
            count += 1
    return count
