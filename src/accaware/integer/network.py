"""The integer network: a prepared model whose layers are integers, as hardware and other runtimes run them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from accaware.formats import IntFormat
from accaware.integer.convert import integer_layer
from accaware.integer.layer import IntegerLayer
from accaware.layers import QuantIdentity, QuantLayer
from accaware.prepare import quant_layers
from accaware.quantizers import ActivationQuantizer
from accaware.quantizers.activation import token_step
from accaware.rotation import turned
from accaware.trace import batchnorm_after

__all__ = ["IntegerIdentity", "IntegerOp", "integer_network"]

_CONVOLUTIONS: dict[str, Any] = {
    "Conv1d": F.conv1d,
    "Conv2d": F.conv2d,
    "Conv3d": F.conv3d,
    "ConvTranspose1d": F.conv_transpose1d,
    "ConvTranspose2d": F.conv_transpose2d,
    "ConvTranspose3d": F.conv_transpose3d,
}


def integer_network(model: nn.Module, sample: Any = None) -> nn.Module:
    """The integer network of a prepared and calibrated model: a copy in evaluation mode, of `IntegerOp`s.

    sample: an input of the model (the tuple of its arguments, or the mapping of its keyword arguments). One run over it
    finds the batch-norms that alone read a layer's output; they become part of its rescale (never of its weights).
    Without it they stay as they are. Forward hooks are taken along; a batch-norm stays by itself where it or the layer
    has one.

    Raises `ValueError` for a model that is not prepared or not calibrated or is itself one layer, and for a layer whose
    sums need more than 32 bits.
    """
    layers = quant_layers(model)
    if not layers:
        raise ValueError("this model has no quantized layer; call prepare_ first")
    if isinstance(model, QuantLayer):
        raise ValueError("an integer network is of modules: put the layer into nn.Sequential before prepare_")
    norms = {} if sample is None else batchnorm_after(model, layers, sample)
    norms = {name: norm for name, norm in norms.items() if not _hooks(layers[name], model.get_submodule(norm))}
    integer: dict[nn.Module, nn.Module] = {model.get_submodule(name): nn.Identity() for name in norms.values()}
    integer |= {layer: IntegerOp(layer, _norm(model, norms.get(name))) for name, layer in layers.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantIdentity) and module.input_quant is not None:
            integer[module] = IntegerIdentity(name, module.input_quant)
    network = copy.deepcopy(model).eval()
    for name, module in model.named_modules(remove_duplicate=False):  # a module may have several names
        if module in integer:
            vars(integer[module]).update(_hooks(network.get_submodule(name)))
            network.set_submodule(name, integer[module])
    return network


def _hooks(*modules: nn.Module) -> dict[str, Any]:
    """The attributes that hold forward hooks of the modules, those that are not empty."""
    held = ((name, value) for module in modules for name, value in vars(module).items())
    return {name: value for name, value in held if name.startswith(("_forward_hooks", "_forward_pre_hooks")) and value}


def _norm(model: nn.Module, name: str | None) -> _BatchNorm | None:
    if name is None:
        return None
    norm = model.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    return norm


class _Codes(nn.Module):
    """The grid that a tensor of reals is rounded to: integers [lo, hi] in units of `act_scale`, float32 [].

    Where each token has a scale of its own the unit is 1.
    """

    act_scale: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        assert quantizer.codes is not None
        self.lo, self.hi = quantizer.codes.lo, quantizer.codes.hi
        step = quantizer.fixed_step()
        self.register_buffer("act_scale", torch.ones_like(quantizer.scale) if step is None else step.float().clone())

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of x, as float32."""
        return (x.float() / self.act_scale).round().clamp(self.lo, self.hi)

    def symbol(self, kind: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor) -> Tensor:
        """One node of this library's own domain, in a program of ONNX; `accaware.exporter` writes it in a dialect."""
        attributes = {"lo": self.lo, "hi": self.hi, **attributes}
        return torch.onnx.ops.symbolic(
            f"accaware::{kind}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
        )


class IntegerIdentity(_Codes):
    """A tensor that several operations read, on its grid: x -> act_scale * codes(x)."""

    def __init__(self, name: str, quantizer: ActivationQuantizer) -> None:
        super().__init__(quantizer)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y = self.codes(x) * self.act_scale
        return (
            self.symbol("Stream", (x, self.act_scale), {"name": self.name}, y) if torch.onnx.is_in_onnx_export() else y
        )


class IntegerOp(_Codes):
    """A layer in integers: x -> rescale * sums(codes(x)) + shift, float32 in and out.

    With a scale for each token x / step(x) takes the place of x, and the sums are multiplied by that step too. Inputs
    of a rotated layer are first rotated, in floats.

    q: int8, in the shape of the float layer's weight. sums: int32. rescale and shift: float32 [C], one for each output
    channel: both scales, bias and batch-norm, multiplied in float64. layer: the record that proofs read; a start value
    of the register is found there alone, since it is subtracted from the sums again.

    NaN stays NaN, as in the prepared model; integers have none.

    The sums are exact on every device. They are computed in float32 where none can pass 2^24 and the machine's
    convolution was seen to be exact (once for each shape), in float64 elsewhere. A program of `torch.export` computes
    in float32 within 2^24: exact where a convolution multiplies and adds (not Winograd's or Fourier's way, not TF32).
    """

    q: Tensor
    rescale: Tensor
    shift: Tensor
    rotation: Tensor | None
    token_scale: Tensor | None

    def __init__(self, layer: QuantLayer, norm: _BatchNorm | None = None) -> None:
        quantizer = layer.input_quant
        super().__init__(quantizer)
        self.register_buffer("rotation", layer.rotation)
        self.register_buffer("token_scale", quantizer.positive_scale.detach() if quantizer.per_token else None)
        self.layer = integer_layer(layer)
        self.kind, self.bits = self.layer.kind, layer.spec.weight_bits
        q, scale, _ = layer.deployed()
        gain, shift = _affine(layer, norm, len(scale))
        self.register_buffer("q", layer.rows.merge(q).to(torch.int8))
        self.register_buffer("rescale", (self.act_scale.double() * scale.reshape(-1) * gain).float())
        self.register_buffer("shift", shift.float())
        self._narrow = _fits(self.layer)
        self._exact: dict[torch.Size, bool] = {}
        self._geometry(layer)

    def _geometry(self, layer: Any) -> None:
        self.options: dict[str, Any] = {}
        self.edges: list[int] = []  # that are padded by other values than 0, as `F.pad` counts them
        self.attributes: dict[str, Any] = {}
        if self.kind == "Linear":
            return
        transposed = self.kind.startswith("ConvTranspose")
        self.options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
        self.edge_mode = layer.padding_mode
        if layer.padding_mode != "zeros":
            self.edges = list(layer._reversed_padding_repeated_twice)
            padding, pads = 0, [0] * len(self.edges)
        elif transposed:
            padding, pads = layer.padding, [*layer.padding, *layer.padding]
        else:
            ends = layer._reversed_padding_repeated_twice
            padding, pads = layer.padding, [*ends[0::2][::-1], *ends[1::2][::-1]]
        self.options["padding"] = padding
        self.attributes = {"strides": list(layer.stride), "dilations": list(layer.dilation), "pads": pads}
        self.attributes |= {"kernel_shape": list(layer.kernel_size), "group": layer.groups}
        if transposed:
            self.options["output_padding"] = layer.output_padding
            self.attributes["output_padding"] = list(layer.output_padding)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None:
            raise ValueError(f"{self.layer.name}: an integer network has no output_size; give the layer output_padding")
        if self.edges:
            x = F.pad(x, self.edges, mode=self.edge_mode)
        if self.rotation is not None:
            x = turned(x, self.rotation)
        if self.token_scale is None:
            return self._rescaled(x, self.shift)
        step = token_step(x, self.token_scale, IntFormat(self.lo, self.hi))
        return self._rescaled(x / step, torch.zeros_like(self.shift)) * step + self._along(self.shift)

    def _rescaled(self, x: Tensor, shift: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            total = self._sums(self.codes(x)).float()
            y = total * self._along(self.rescale) + self._along(shift)
        if not torch.onnx.is_in_onnx_export():
            return y
        inputs = (x, self.act_scale, self.q, self.rescale, shift)
        attributes = {"name": self.layer.name, "kind": self.kind, "bits": self.bits, **self.attributes}
        return self.symbol("Layer", inputs, attributes, y)

    def sums(self, codes: Tensor) -> Tensor:
        """Codes, held as floats, to the exact sums of their products with q, int32. Codes must be numbers, not NaN."""
        return self._sums(codes).int()

    def _sums(self, codes: Tensor) -> Tensor:
        """The sums as floats."""
        return self._operate(codes, torch.float32 if self._narrow and self._trusted(codes) else torch.float64).round()

    def _operate(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        codes, q = codes.to(dtype), self.q.to(dtype)
        return F.linear(codes, q) if self.kind == "Linear" else _CONVOLUTIONS[self.kind](codes, q, **self.options)

    def _trusted(self, codes: Tensor) -> bool:
        """Whether float32 gives the sums of inputs of this shape."""
        if torch.compiler.is_compiling():
            return True
        if codes.device.type != "cpu":
            return False
        if codes.shape not in self._exact:
            generator = torch.Generator().manual_seed(0)
            extremes = torch.randint(2, codes.shape, generator=generator) * (self.hi - self.lo) + self.lo
            ours, exact = (self._operate(extremes, dtype) for dtype in (torch.float32, torch.float64))
            self._exact[codes.shape] = torch.equal(ours.double(), exact)
        return self._exact[codes.shape]

    @property
    def weight(self) -> Tensor:
        """Raises `ValueError`: what reads the float weight of a layer has no integers."""
        raise ValueError(
            f"{self.layer.name}: its float weight is read outside of the layer, and integer networks have none; "
            "let the layer alone read it"
        )

    def _along(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (self.q.dim() - 2))

    def extra_repr(self) -> str:
        return f"{self.layer.name}: {self.kind}, {list(self.q.shape)}, codes [{self.lo}, {self.hi}]"


def _affine(layer: QuantLayer, norm: _BatchNorm | None, channels: int) -> tuple[Tensor, Tensor]:
    """Batch-norm after a bias as gain and shift, float64 [C] each."""
    zeros = torch.zeros(channels, dtype=torch.float64, device=layer.weight.device)
    bias = zeros if layer.bias is None else layer.bias.detach().double()
    if norm is None:
        return zeros + 1, bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach().double()
    shift = (bias - norm.running_mean.double()) * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach().double()


def _fits(layer: IntegerLayer) -> bool:
    """Whether float32 holds every sum. Raises `ValueError` where int32 does not."""
    reach = int(np.abs(layer.rows).sum(axis=1, dtype=object).max()) * layer.codes.magnitude
    if reach >= 2**31:
        raise ValueError(f"{layer.name}: sums reach {reach}; the integer network adds in 32 bits")
    return reach <= 2**24
