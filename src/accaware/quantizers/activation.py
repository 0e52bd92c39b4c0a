"""The activation quantizer: one learned scale per tensor, codes signed or unsigned as calibration finds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accaware.formats import IntFormat
from accaware.quantizers.grid import fake_quantize

__all__ = ["ActivationQuantizer"]

_SAMPLE = 1 << 16  # values kept of each calibration batch
_GRID = 100  # candidate scales
_TINY = 1e-10


class ActivationQuantizer(nn.Module):
    """x -> scale * clamp(round(x / scale), lo, hi), any shape, with a learned scalar scale (LSQ, Esser et al. 2020).

    Passes x through until `calibrate` has set the range of codes; while `observing` it passes x through and collects a
    sample of it. `signed`: None lets calibration decide. `code_range` is a buffer [lo, hi] of the state dict.
    """

    code_range: Tensor

    def __init__(self, bits: int, signed: bool | None = None) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("code_range", torch.zeros(2, dtype=torch.int64))
        self.codes: IntFormat | None = None
        self.observing = False
        self._seen: list[Tensor] = []
        self._negative = False

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x.detach())
            return x
        if self.codes is None:
            return x
        return fake_quantize(x, self.step(), self.codes, (x[0].numel() * self.codes.magnitude) ** -0.5)

    def step(self) -> Tensor:
        """The scale, a positive scalar even where training went astray."""
        return self.scale.clamp(min=_TINY)

    def observe(self) -> None:
        """From now on collect a sample of what passes, and forget what an earlier collection left."""
        self.observing, self._seen, self._negative = True, [], False

    def _observe(self, x: Tensor) -> None:
        values = x.reshape(-1).float()
        self._negative |= bool((values < 0).any())
        # Odd, so that it meets every row and column of an image, whose lengths mostly are even.
        step = max(1, -(-values.numel() // _SAMPLE)) | 1
        offset = len(self._seen) % step
        self._seen.append(values[offset::step].clone())

    def calibrate(self) -> None:
        """Set codes and scale from what was observed: the scale of smallest squared error.

        Raises `ValueError` if nothing was observed.
        """
        if not self._seen:
            raise ValueError("no data reached this activation quantizer during calibration")
        values, negative = torch.cat(self._seen), self._negative
        self._seen, self._negative = [], False
        signed = negative if self.signed is None else self.signed
        self.set_codes(IntFormat.signed(self.bits) if signed else IntFormat.unsigned(self.bits))
        assert self.codes is not None
        most = float(values.abs().max()) or 1.0
        largest = max(self.codes.hi, 1) if not signed else max(-self.codes.lo, 1)
        best = (float("inf"), 1.0)
        for share in torch.logspace(-2.5, 0, _GRID, base=10).tolist():
            scale = share * most / largest
            error = float((fake_quantize(values, values.new_tensor(scale), self.codes) - values).square().mean())
            best = min(best, (error, scale))
        with torch.no_grad():
            self.scale.fill_(best[1])

    def set_codes(self, codes: IntFormat) -> None:
        """Fix the range of codes."""
        self.codes = codes
        self.signed = codes.is_signed
        self.code_range.copy_(torch.tensor([codes.lo, codes.hi]))

    def to_codes(self, x: Tensor) -> Tensor:
        """The integer codes of x, as float64."""
        assert self.codes is not None
        return (x / self.step()).round().clamp(self.codes.lo, self.codes.hi).double()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "code_range")
        if stored is not None:
            lo, hi = (int(v) for v in stored)
            if hi > lo:
                codes = IntFormat(lo, hi)
                if codes.span + 1 != 2**self.bits:
                    raise ValueError(
                        f"{prefix.rstrip('.')}: the checkpoint's activation codes are [{lo}, {hi}], "
                        f"not of act_bits={self.bits}"
                    )
                self.set_codes(codes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes={self.codes}"
