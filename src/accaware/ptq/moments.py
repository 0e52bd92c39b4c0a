"""What a layer's inputs and outputs tell about its weights: their first and second moments."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accaware.layers import QuantLayer

__all__ = ["Moments"]


class Moments:
    """Moments of a layer's inputs, and of the outputs of the float layer `reference` that it was made from.

    For G groups of R outputs that sum K taps: gram [G, K, K], cross (outputs by taps) [G, R, K], the taps' x [G, K],
    the outputs' y [G, R] and their power [G, R]; batches are summed in float64, products within one in their own dtype.
    The layer's bias is no part of the outputs. If `mixing`, also mixed [G, K, K], of the inputs with those of the float
    layer, whose means are `originals` [G, K]. While they are collected, these are sums over `count` positions, and
    inputs count from `shift` [G, K], outputs from `base` [G, R], the means of the first batch: of values that are all
    but constant, float32 would keep the constant alone. After `finish` they are means.
    """

    def __init__(self, layer: QuantLayer, reference: nn.Module, mixing: bool = False) -> None:
        self.layer, self.reference, self.mixing, self.count = layer, reference, mixing, 0
        zero = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        self.gram = self.cross = self.x = self.y = self.power = self.mixed = self.originals = zero
        self.shift = self.base = zero

    def add(self, x: Tensor, original: Tensor, y: Tensor) -> None:
        """x: quantized inputs of the layer; original, y: inputs and outputs of the float layer, for the same images."""
        taps = _taps(self.layer, x)
        bias = cast(Tensor | None, self.reference.bias)
        y = y if bias is None else y - self.layer._along_channels(bias)
        y = y if self.layer.weight.dim() == 2 else y.movedim(-self.layer.weight.dim() + 1, -1)
        y = y.reshape(taps.shape[1], len(taps), -1).transpose(0, 1)
        if not self.count:
            self.shift, self.base = taps.mean(1), y.mean(1)
        taps, y = taps - self.shift.unsqueeze(1), y - self.base.unsqueeze(1)
        self.gram = self.gram + (taps.mT @ taps).double()
        self.cross = self.cross + (y.mT @ taps).double()
        self.x = self.x + taps.sum(1).double()
        self.y = self.y + y.sum(1).double()
        self.power = self.power + y.square().sum(1).double()
        self.count += taps.shape[1]
        if self.mixing:
            others = _taps(self.layer, original) - self.shift.unsqueeze(1)
            self.mixed = self.mixed + (taps.mT @ others).double()
            self.originals = self.originals + others.sum(1).double()

    def finish(self, centred: bool) -> Moments:
        """Sums to means; `centred`: second moments about the means."""
        for name in ("gram", "cross", "x", "y", "power", "mixed", "originals"):
            setattr(self, name, getattr(self, name) / self.count)
        self.gram = self.gram - _outer(self.x, self.x)
        self.cross = self.cross - _outer(self.y, self.x)
        self.power = self.power - self.y.square()
        if self.mixing:
            self.mixed = self.mixed - _outer(self.x, self.originals)
        self.x, self.originals, self.y = self.x + self.shift, self.originals + self.shift, self.y + self.base
        if not centred:
            self.power = self.power + self.y.square()
            self.gram = self.gram + _outer(self.x, self.x)
            self.cross = self.cross + _outer(self.y, self.x)
            if self.mixing:
                self.mixed = self.mixed + _outer(self.x, self.originals)
        return self


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(2) * b.unsqueeze(1)


def _taps(layer: QuantLayer, x: Tensor) -> Tensor:
    """What the outputs of each group sum, [G, positions, K]; taps in the order of the weight."""
    if layer.weight.dim() == 2:
        return x.reshape(1, -1, x.shape[-1])
    conv = cast(Any, layer)
    dims = len(conv.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    x = x.reshape(len(x), conv.groups, -1, *x.shape[2:]).movedim(2, 2 + dims)  # [B, G, *positions, channels, *kernel]
    return x.movedim(1, 0).reshape(conv.groups, -1, layer.weight[0].numel())
