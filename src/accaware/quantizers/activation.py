"""The activation quantizer: a learned scale for the tensor or for each token, codes signed or not as data tell."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from accaware.formats import IntFormat
from accaware.quantizers.grid import fake_quantize

__all__ = ["ActivationQuantizer", "token_step"]

_SAMPLE = 1 << 16  # values kept of each calibration batch
_GRID = 100  # candidate scales
_TINY = 1e-10


class ActivationQuantizer(nn.Module):
    """x -> scale * clamp(round(x / scale), lo, hi), any shape, with a learned scalar scale (LSQ, Esser et al. 2020).

    `per_token`: each vector x [..., K] has a scale of its own, max|x| over the largest code, times the learned scalar.

    Passes x through until `calibrate` has set the range of codes; while `observing` it passes x through and collects a
    sample of it. `signed`: None lets calibration decide. `code_range` is a buffer [lo, hi] of the state dict.
    """

    code_range: Tensor

    def __init__(self, bits: int, signed: bool | None = None, per_token: bool = False) -> None:
        super().__init__()
        self.bits, self.signed, self.per_token = bits, signed, per_token
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("code_range", torch.zeros(2, dtype=torch.int64))
        self.codes: IntFormat | None = None
        self.observing = False
        self._seen: list[Tensor] = []
        self._negative, self._finite = False, True

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x.detach())
            return x
        if self.codes is None:
            return x
        values = max(1, math.prod(x.shape[1:]))  # of one image; a batch may hold none
        return fake_quantize(x, self.step(x), self.codes, (values * self.codes.magnitude) ** -0.5)

    def step(self, x: Tensor) -> Tensor:
        """The scale of x, positive even where training went astray: a scalar, or [..., 1] for tokens x [..., K]."""
        if not self.per_token:
            return self.positive_scale
        assert self.codes is not None
        return token_step(x, self.positive_scale, self.codes)

    @property
    def positive_scale(self) -> Tensor:
        """The learned scalar, positive even where training went astray."""
        return self.scale.clamp(min=_TINY)

    def _full(self, x: Tensor) -> Tensor:
        """The scale at which the largest value (of each token, if they have their own) has the largest code."""
        assert self.codes is not None
        if self.per_token:
            return token_step(x, 1.0, self.codes)
        return x.abs().max() / max(self.codes.hi, -self.codes.lo, 1)

    def fixed_step(self) -> Tensor | None:
        """The scale of every x, a positive scalar; None where each token has its own."""
        return None if self.per_token else self.positive_scale.detach()

    def observe(self) -> None:
        """From now on collect a sample of what passes, and forget what an earlier collection left."""
        self.observing, self._seen, self._negative, self._finite = True, [], False, True

    def _observe(self, x: Tensor) -> None:
        values = x.reshape(-1, x.shape[-1]).float() if self.per_token else x.reshape(-1).float()
        self._negative |= bool((values < 0).any())
        self._finite &= bool(values.isfinite().all())
        # Odd, so that it meets every row and column of an image, whose lengths mostly are even.
        step = max(1, -(-values.numel() // _SAMPLE)) | 1
        offset = len(self._seen) % step
        self._seen.append(values[offset::step].clone())

    def calibrate(self, where: str = "") -> None:
        """Set codes and scale from what was observed: the scale of smallest squared error.

        where: the name of a layer that reads the tensor, for messages. Raises `ValueError` if nothing was observed, or
        values that are not finite.
        """
        at = f"{where}: " if where else ""
        if not self._seen:
            raise ValueError(f"{at}no data reached this activation quantizer during calibration")
        if not self._finite:
            raise ValueError(f"{at}the calibration data that reach it must be finite; some are NaN or infinite")
        values, negative = torch.cat(self._seen), self._negative
        self._seen, self._negative = [], False
        signed = negative if self.signed is None else self.signed
        self.set_codes(IntFormat.signed(self.bits) if signed else IntFormat.unsigned(self.bits))
        assert self.codes is not None
        full = self._full(values)
        full = torch.where(full > 0, full, 1.0)
        best = (float("inf"), 1.0)
        for share in torch.logspace(-2.5, 0, _GRID, base=10).tolist():
            error = float((fake_quantize(values, share * full, self.codes) - values).square().mean())
            best = min(best, (error, share))
        with torch.no_grad():
            self.scale.fill_(best[1] if self.per_token else best[1] * float(full))

    def set_codes(self, codes: IntFormat) -> None:
        """Fix the range of codes."""
        self.codes = codes
        self.code_range.copy_(torch.tensor([codes.lo, codes.hi]))

    def to_codes(self, x: Tensor) -> Tensor:
        """The integer codes of x, as float64."""
        assert self.codes is not None
        return (x.float() / self.step(x)).round().clamp(self.codes.lo, self.codes.hi).double()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "code_range")
        if stored is not None:
            lo, hi = (int(v) for v in stored)
            if lo == hi == 0:  # not calibrated
                self.codes = None
            else:
                codes = IntFormat(lo, hi)
                if codes.span + 1 != 2**self.bits:
                    raise ValueError(
                        f"{prefix.rstrip('.')}: the checkpoint's activation codes are [{lo}, {hi}], "
                        f"not of act_bits={self.bits}"
                    )
                self.set_codes(codes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes={self.codes}" + ", per_token=True" * self.per_token


def token_step(x: Tensor, scale: Tensor | float, codes: IntFormat) -> Tensor:
    """Steps [..., 1] of tokens x [..., K]: `scale` times those at which the largest values have the largest code."""
    full = x.detach().float().abs().amax(-1, keepdim=True) / max(codes.hi, 1)
    return (scale * full).clamp(min=_TINY)
