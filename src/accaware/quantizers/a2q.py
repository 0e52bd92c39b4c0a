"""A2Q (Colbert et al., ICCV 2023, arXiv 2308.13504) and A2Q+ (ICML 2024, arXiv 2401.10432)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from accaware.bounds import Budget, a2q_budget, a2q_plus_budget
from accaware.formats import IntFormat, Spec
from accaware.projections import project_l1
from accaware.quantizers.weight import WeightQuantizer

__all__ = ["A2QQuantizer"]

_TINY = 1e-10
_FAR = 60.0  # powers of two


class A2QQuantizer(WeightQuantizer):
    """q = clip(trunc(g/s * v/||v||_1)), s = 2^d, g = 2^min(t, T), T = d + log2(budget); d and t are learned.

    v is the weight; A2Q+ centres it first (`centred`). d: [C, 1, 1] or [1, 1, 1]; t: [C, parts, 1]. Truncation keeps
    ||q||_1 <= budget: (2^(P-1) - 1) 2^(signed - N) for A2Q (equation 15 there), (2^P - 2)/(2^N - 1) for A2Q+ (its
    proposition 3.1). `penalty` is sum max(t - T, 0), which keeps t from drifting where it has no gradient.
    """

    def __init__(self, spec: Spec, channels: int, parts: int, centred: bool) -> None:
        super().__init__(spec, channels, parts)
        self.centred = centred
        self.d = nn.Parameter(torch.zeros(self.channels, 1, 1))
        self.t = nn.Parameter(torch.zeros(channels, parts, 1))

    def bind(self, codes: IntFormat, budget: Budget, valid: Tensor | None, where: str = "") -> None:
        bound = a2q_plus_budget if self.centred else a2q_budget
        bound(codes, self.spec.acc_bits, where)
        super().bind(codes, budget, valid, where)

    @property
    def l1_budget(self) -> float:
        """The paper's bound on ||q||_1."""
        assert self.codes is not None
        bound = a2q_plus_budget if self.centred else a2q_budget
        return float(bound(self.codes, self.spec.acc_bits))

    def step(self) -> Tensor:
        return torch.exp2(self.d)

    def set_step(self, scale: Tensor) -> None:
        with torch.no_grad():
            self.d.copy_(scale.log2())

    def forward(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            u = self._normalised(rows.float())
            q = (u + (u.trunc() - u).detach()).clamp(self.form.lo, self.form.hi)
            return q * self.step()

    def integers(self, rows: Tensor) -> Tensor:
        return self._normalised(rows).trunc().clamp(self.form.lo, self.form.hi)

    def _normalised(self, v: Tensor) -> Tensor:
        """g/s * v/||v||_1, [C, parts, T]."""
        mean = self._mean(v)
        centred = self._taps(v - mean)
        # A norm far beyond the budget, which has no gradient, must not overflow: 0 * inf is no number.
        t = torch.minimum(self.t, self.d.detach() + _FAR)
        norm = torch.exp2(t.to(v.dtype)) / torch.exp2(self.d.to(v.dtype))
        # The sum of magnitudes that Brevitas takes, so that equal parameters give equal integers at exact ties too.
        length = torch.linalg.vector_norm(centred, 1, dim=-1, keepdim=True)
        divisor = (length / norm.clamp(max=self.l1_budget)).clamp(min=_TINY)
        return self._taps(v / divisor - mean / divisor)

    def _mean(self, v: Tensor) -> Tensor:
        if not self.centred:
            return v.new_zeros(())
        # A tile may hold no tap at all: the last one of a short phase.
        count = v.shape[-1] if self.valid is None else self.valid.sum(-1, keepdim=True).clamp(min=1)
        return v.sum(-1, keepdim=True) / count

    def _taps(self, v: Tensor) -> Tensor:
        return v if self.valid is None else v * self.valid

    def penalty(self) -> Tensor:
        return (self.t - self.d - math.log2(self.l1_budget)).clamp(min=0).sum()

    def initialise(self, rows: Tensor, importance: Tensor | None, init: str) -> Tensor:
        super().initialise(rows, importance, init)
        if init != "none":
            rows = self._projected(rows)
        self._set_norm(rows)
        return rows

    @torch.no_grad()
    def start(self, rows: Tensor) -> Tensor:
        rows = self._projected(rows)
        self._set_norm(rows)
        return self.integers(rows) * self.step()

    def _projected(self, rows: Tensor) -> Tensor:
        """EP-init: the closest weights within the norm (A2Q+, section 4); centring comes after, as in the paper."""
        return project_l1(rows, self.step().detach() * self.l1_budget)

    def _set_norm(self, rows: Tensor) -> None:
        with torch.no_grad():
            self.t.copy_(self._taps(rows - self._mean(rows)).abs().sum(-1, keepdim=True).clamp(min=_TINY).log2())
