"""Layers that quantize their own input and weight. Each forward is the float layer's, on fake-quantized operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat, Method, Spec, TapOrder
from accaware.quantizers import ActivationQuantizer, weight_quantizer
from accaware.rotation import hadamard, turned
from accaware.rows import Rows, convolution_rows, residues_of_taps, transposed_rows

__all__ = [
    "LAYERS",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantIdentity",
    "QuantLayer",
    "QuantLinear",
]

#: The words that stand for 1, 2, ... in the request of a checkpoint; a new one comes last.
_WORDS: Mapping[str, tuple[str, ...]] = {"method": get_args(Method), "order": get_args(TapOrder)}


class QuantIdentity(nn.Module):
    """Marks a tensor that several operations read (a residual stream): quantized once, on one grid, for all of them.

    The identity until `prepare_` gives it a quantizer, which the layers that read its output share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_quant: ActivationQuantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.input_quant is None else cast(Tensor, self.input_quant(x))


class QuantLayer(nn.Module):
    """Mixin of the layers below: an `nn.Linear` or convolution whose operands are quantized.

    `input_quant` and `weight_quant` pass values through until `calibrate` or a loaded state dict has bound them.
    `inside`: whether the layer is part of the request (kept layers are not). Without gradients the forward uses the
    integers that will be deployed; they are cached until the weight or the quantizer changes.
    """

    weight: Tensor
    bias: Tensor | None
    request: Tensor
    rotation: Tensor | None
    spec: Spec
    inside: bool
    name: str

    def quantize_(self, name: str, spec: Spec, input_quant: ActivationQuantizer, inside: bool) -> None:
        """Give a layer that was just converted its quantizers; called by `prepare_`."""
        self.name, self.spec, self.inside = name, spec.of_depthwise() if self.depthwise else spec, inside
        self.rows, self._geometry = self.make_rows(), self.geometry()
        self.register_buffer("rotation", self.make_rotation(), persistent=False)
        if self.rotation is not None:  # a parameter of its own: others may share the float one
            self.weight = nn.Parameter(self.rotated(self.weight.detach()).to(self.weight.dtype))
        self.input_quant = input_quant
        self.weight_quant = weight_quantizer(self.spec, self.rows.channels, self.rows.parts)
        self.weight_quant.to(self.weight.device)
        values = torch.tensor(list(self._request().values()), dtype=torch.int32, device=self.weight.device)
        self.register_buffer("request", values)
        self.wrap_bits: int | None = None
        self._cache: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None

    def _request(self) -> dict[str, int]:
        """What a checkpoint must have been made for. Entries are only ever added, at the end: old ones are shorter.

        A word is its place in `_WORDS`, 0 where it decides nothing (the order of taps, but for tiles of several taps of
        a kernel) or a checkpoint does not know it.
        """
        spec, ordered = self.spec, self.rows.tiles > 1 and self.weight[0, 0].numel() > 1
        return {
            "weight_bits": spec.weight_bits,
            "act_bits": spec.act_bits,
            "acc_bits": spec.acc_bits,
            "outer_bits": spec.outer_bits,
            "tile": -1 if spec.tile is None else spec.tile,
            "preload": spec.preload == "free",
            "act_scale": spec.act_scale == "token",
            "rotate": spec.rotate,
            "method": 1 + _WORDS["method"].index(spec.method),
            "order": 1 + _WORDS["order"].index(spec.order) if ordered else 0,
        }

    @property
    def depthwise(self) -> bool:
        """One input channel for each output."""
        groups = getattr(self, "groups", 1)
        return groups > 1 and groups == getattr(self, "in_channels", 0)

    def make_rows(self) -> Rows:
        """Which taps one accumulator adds."""
        return convolution_rows(self.weight.shape, self.spec.order, self.spec.tile)

    def geometry(self) -> dict[str, Any]:
        """What decides, beside the request, which taps one accumulator adds."""
        return {"weight shape": tuple(self.weight.shape)}

    def check(self) -> None:
        """Raises `ValueError` where what is read of the layer now is not what its next run uses, or sums."""
        refuse_unfit(self.name, self)
        now = self.geometry()
        changed = [f"{what} {now[what]}, not {was}" for what, was in self._geometry.items() if now[what] != was]
        if changed:
            raise ValueError(f"{self.name}: changed since prepare_, which needs the final shape: {', '.join(changed)}")

    def make_rotation(self) -> Tensor | None:
        """What inputs and weights are multiplied by."""
        return None

    def rotated(self, x: Tensor) -> Tensor:
        """Inputs of the layer, or weights of the float one, as its integers see them."""
        return x if self.rotation is None else turned(x, self.rotation)

    def bind(self) -> None:
        """Tell the weight quantizer what its inputs are. Raises `ValueError` where no weight fits the accumulator."""
        codes = self.input_quant.codes
        if codes == self.weight_quant.codes:
            return
        if codes is None:  # a state dict from before calibration was loaded
            self.weight_quant.codes = None
            return
        # Plain rounding knows no accumulator: it is judged afterwards, not bounded.
        register = Accumulator(64) if self.spec.method == "baseline" else self.spec.accumulator
        limits = budget(codes, register, where=self.name)
        with torch.inference_mode(False):  # training may come next, and saves it for the backward pass
            valid = self.rows.valid(self.weight.device)
        self.weight_quant.bind(codes, limits, valid, self.name)
        self._cache = None

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight, in the shape of `weight`; differentiable while gradients are on.

        Raises `ValueError` for weights of 16 bits.
        """
        weight = self.weight
        _refuse_half(self.name, weight)
        if self.weight_quant.codes is None or self.input_quant.observing:
            return weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.rows.merge(self.weight_quant(self.rows.split(weight)))
        q, scale, _ = self.deployed()
        return self.rows.merge((q * scale).to(weight.dtype))

    def deployed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integers to deploy [C, parts, T] int64, scale [C, 1, 1] float64, and which parts were repaired [C, parts]."""
        # Compared by value: fused optimizers and `.data` change a tensor without changing its version.
        tensors = [t.detach() for t in (self.weight, *self.weight_quant.parameters())]
        if self._cache is None or not all(map(_same, tensors, self._cache[0])):
            with torch.no_grad():
                self._cache = ([t.clone() for t in tensors], self.weight_quant.deploy(self.rows.split(tensors[0])))
        return self._cache[1]

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.bind()
        x = self.rotated(x)
        if self.wrap_bits is not None and self.weight_quant.codes is not None:
            return self._wrapped(x, *args, **options)
        return self.operate(self.input_quant(x), self.quantized_weight(), self.bias, *args, **options)

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **options: Any) -> Tensor:
        """The float layer's own computation."""
        raise NotImplementedError

    def _wrapped(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The forward with a two's complement register of `wrap_bits` bits that really wraps around.

        Exact: float64 holds every sum below 2^53. A free preload changes nothing here, since it is subtracted again
        modulo 2^bits. With tiles each one wraps on its own, which this does not model: it is refused.
        """
        assert self.wrap_bits is not None
        if self.rows.tiles > 1:
            raise ValueError(f"{self.name}: wrap-around of tiles is not emulated here; use the integer layers")
        q, scale, _ = self.deployed()
        total = self.operate(self.input_quant.to_codes(x), self.rows.merge(q).double(), None, *args, **options)
        half = 2.0 ** (self.wrap_bits - 1)
        start = self._starts(q, total.shape).to(total)
        total = torch.remainder(total + start + half, 2 * half) - half - start
        out = total * self._along_channels(scale) * self.input_quant.step(x)
        out = out if self.bias is None else out + self._along_channels(self.bias)
        return out.to(self.weight.dtype)

    def _along_channels(self, values: Tensor) -> Tensor:
        """One value for each output channel, in a shape that broadcasts to the output."""
        return values.reshape(-1, *(1,) * (self.weight.dim() - 2))

    def _starts(self, q: Tensor, shape: torch.Size) -> Tensor:
        """The start value of every output, broadcasts to an output of `shape`; for layers without tiles."""
        return self._along_channels(self.preload(q))

    def preload(self, q: Tensor) -> Tensor:
        """The start value of each part, [C, parts] int64; zeros unless the preload is free."""
        codes = self.weight_quant.codes
        if self.spec.preload == "none" or codes is None:
            return q.new_zeros(q.shape[:2])
        p, n = q.clamp(min=0).sum(-1), (-q).clamp(min=0).sum(-1)
        form = codes.with_zero()
        lowest = self.spec.accumulator.lo - (form.lo * p - form.hi * n)
        highest = self.spec.accumulator.hi - (form.hi * p - form.lo * n)
        return torch.minimum(torch.maximum(lowest, torch.zeros_like(lowest)), highest)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "request")
        if stored is None and self.rotation is not None and prefix + "weight" in state_dict:
            raise ValueError(f"{self.name}: its weights are rotated; load float weights before prepare_")
        if stored is not None:
            self._compare(stored.tolist())
            state_dict[prefix + "request"] = self.request  # an earlier one is shorter
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._cache = None

    def _compare(self, stored: list[int]) -> None:
        """Raises `ValueError` where a checkpoint's request is another one."""
        request = self._request()
        if len(stored) > len(request):
            raise ValueError(
                f"{self.name}: the checkpoint is of a later version: "
                f"its request has {len(stored)} entries, this version knows {len(request)}"
            )
        stored = stored + [0] * (len(request) - len(stored))
        wrong = []
        for (name, ours), theirs in zip(request.items(), stored, strict=True):
            words = ("", *_WORDS.get(name, ()))
            if ours == theirs or (name in _WORDS and 0 in (ours, theirs)):
                continue
            named = [words[v] if 0 < v < len(words) else int(v) for v in (theirs, ours)]
            wrong.append(f"{name} {named[0]}, not {named[1]}")
        if wrong:
            raise ValueError(f"{self.name}: the checkpoint was made for {', '.join(wrong)}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


class QuantLinear(QuantLayer, nn.Linear):
    """x [..., in_features] -> [..., out_features]; weight [out_features, in_features]."""

    def make_rotation(self) -> Tensor | None:
        return hadamard(self.in_features).to(self.weight) if self.spec.rotate else None

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _QuantConv(QuantLayer):
    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self._conv_forward(x, weight, bias))


class QuantConv1d(_QuantConv, nn.Conv1d):
    """x [B, C, L] -> [B, out_channels, L']; weight [out_channels, in_channels/groups, k]."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """x [B, C, H, W] -> [B, out_channels, H', W']; weight [out_channels, in_channels/groups, kh, kw]."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """x [B, C, D, H, W] -> [B, out_channels, ...]; weight [out_channels, in_channels/groups, kd, kh, kw]."""


class _QuantConvTranspose(QuantLayer):
    convolve: Callable[..., Tensor]

    def make_rows(self) -> Rows:
        layer = cast(nn.ConvTranspose2d, self)
        spec = self.spec
        return transposed_rows(layer.weight.shape, layer.groups, layer.stride, layer.dilation, spec.order, spec.tile)

    def geometry(self) -> dict[str, Any]:
        return super().geometry() | {name: getattr(self, name) for name in ("stride", "dilation", "groups")}

    def _starts(self, q: Tensor, shape: torch.Size) -> Tensor:
        """Output o sums the phase of taps whose residue is (o + padding) mod stride; where there is none it sums 0."""
        layer = cast(Any, self)
        residues = residues_of_taps(layer.kernel_size, layer.stride, layer.dilation)
        starts = self.preload(q).reshape(-1, *map(len, residues))
        for dim, (known, stride, padding) in enumerate(zip(residues, layer.stride, layer.padding, strict=True)):
            phase = [(o + padding) % stride for o in range(shape[dim - len(residues)])]
            index = [known.index(r) if r in known else len(known) for r in phase]
            starts = torch.cat([starts, torch.zeros_like(starts.narrow(dim + 1, 0, 1))], dim + 1)
            starts = starts.index_select(dim + 1, torch.tensor(index, device=q.device))
        return starts

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        s = cast(Any, self)
        spatial = len(s.kernel_size)
        extra = s._output_padding(x, output_size, s.stride, s.padding, s.kernel_size, spatial, s.dilation)
        return self.convolve(x, weight, bias, s.stride, s.padding, extra, s.groups, s.dilation)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """x [B, C, L] -> [B, out_channels, L']; weight [in_channels, out_channels/groups, k]."""

    convolve = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """x [B, C, H, W] -> [B, out_channels, H', W']; weight [in_channels, out_channels/groups, kh, kw]."""

    convolve = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """x [B, C, D, H, W] -> [B, out_channels, ...]; weight [in_channels, out_channels/groups, kd, kh, kw]."""

    convolve = staticmethod(F.conv_transpose3d)


LAYERS: Mapping[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
}


def refuse_unfit(name: str, layer: nn.Module) -> None:
    """Raises `ValueError` where the weight or bias of a layer is no parameter of its own, or has no values or 16 bits.

    name: the layer's, for messages.
    """
    for part in ("weight", "bias"):
        if part not in layer._parameters:  # what is read between two runs is not what the next one uses
            raise ValueError(
                f"{name}: its {part} must be a parameter, not computed for each run (pruning, weight_norm, ...); "
                "make it one first: prune.remove, remove_weight_norm, remove_parametrizations"
            )
    weight = cast(Tensor, layer.weight)
    if not weight.numel():
        raise ValueError(f"{name}: a weight of shape {list(weight.shape)} has no values to quantize; keep it 'float'")
    _refuse_half(name, weight)


def _refuse_half(name: str, weight: Tensor) -> None:
    if weight.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: weights must be float32 or float64, not {str(weight.dtype).removeprefix('torch.')}, "
            "which cannot hold every integer times its scale; call float(), and train under torch.autocast for speed"
        )


def kept_spec(spec: Spec, bits: int) -> Spec:
    """The format of a layer that stays out of the request: plain quantization at `bits`, added up in 32 bits."""
    return replace(
        spec,
        weight_bits=bits,
        act_bits=bits,
        acc_bits=32,
        method="baseline",
        preload="none",
        tile=None,
        depthwise_method=None,
        act_scale="tensor",
        rotate=False,
    )


def codes_of(layer: QuantLayer) -> IntFormat:
    """The input codes of a calibrated layer. Raises `ValueError` before calibration."""
    if layer.input_quant.codes is None:
        raise ValueError(
            f"{layer.name}: not calibrated; call calibrate(model, batches) or load a calibrated checkpoint"
        )
    return layer.input_quant.codes
