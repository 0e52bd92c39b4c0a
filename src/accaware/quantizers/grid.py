"""Fake quantization on a grid of learned step size: the one differentiable function that the quantizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accaware.formats import IntFormat

__all__ = ["fake_quantize"]

# Codes that come from a tensor on the same grid are u = code * (1 +- 2^-22): they count as inside the range, so that
# quantizing twice changes neither the value nor the gradient.
_EDGE = 2.0**-10


class _FakeQuantize(torch.autograd.Function):
    """s * codes(x/s). Straight-through to x inside the range; to s see `fake_quantize`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, form: IntFormat, grad_scale: float, codes: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        u, free = x / scale, None
        if codes is None:
            q = u.clamp_(form.lo, form.hi).round_()
        else:
            q, near = codes(u), u.clamp(form.lo, form.hi).round_()
            free = (q == near).all(-1, keepdim=True).to(u.dtype)
        out = q.mul_(scale)
        # x and out are kept by what is before and after, mostly; x / scale would be one tensor more.
        ctx.save_for_backward(x, out, scale, free)
        ctx.form, ctx.grad_scale = form, grad_scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, out, scale, free = ctx.saved_tensors
        form, u = ctx.form, x / scale
        # A mask by comparison is ten times slower on a CPU than the backward pass of a hard tanh.
        inside = torch.ops.aten.hardtanh_backward(grad, u, form.lo - _EDGE, form.hi + _EDGE)
        drift = _products(inside, u if free is None else u * free, scale)
        return inside, (_products(grad, out, scale) / scale - drift) * ctx.grad_scale, None, None, None


def _products(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a * b, summed to the shape of `like`."""
    if like.numel() != 1:
        return (a * b).sum_to_size(like.shape)
    order = b.dim_order()  # in the order of memory flattening copies nothing, and a dot product makes no third tensor
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1)).reshape(like.shape)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    form: IntFormat,
    grad_scale: float = 1.0,
    codes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Round x to the grid scale * [form.lo, form.hi], differentiably.

    x: any shape; scale: positive, broadcasts to x. `codes` replaces the clamp and round by another map from x/scale to
    integers. The gradient passes to x inside the range. To the scale it is that of LSQ (Esser et al. 2020, equation 3),
    sum grad * (q - x/scale) inside and sum grad * q outside, times `grad_scale`; but in rows (of the last dimension)
    where `codes` differs from rounding, a budget holds the integers, and it is sum grad * q, the derivative at fixed
    integers: LSQ's form there shrinks the scale without end. Computes in float32, also under autocast.

    >>> fake_quantize(torch.tensor([0.3, 1.2, 9.0]), torch.tensor(0.5), IntFormat.unsigned(2))
    tensor([0.5000, 1.0000, 1.5000])
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return _FakeQuantize.apply(x, scale, form, grad_scale, codes)  # type: ignore[no-any-return, no-untyped-call]
