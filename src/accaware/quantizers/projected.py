"""The projected quantizer: the closest integers that the accumulator can hold. The baseline is its unbounded case."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accaware.formats import Spec
from accaware.projections import project_integers
from accaware.quantizers.grid import fake_quantize
from accaware.quantizers.weight import WeightQuantizer

__all__ = ["BaselineQuantizer", "ProjectedQuantizer"]


class BaselineQuantizer(WeightQuantizer):
    """Nearest rounding with a learned scale (LSQ, Esser et al. 2020); knows no accumulator."""

    def __init__(self, spec: Spec, channels: int, parts: int) -> None:
        super().__init__(spec, channels, parts)
        self.scale = nn.Parameter(torch.ones(self.channels, 1, 1))

    def step(self) -> Tensor:
        return self.scale.clamp(min=1e-10)

    def set_step(self, scale: Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(scale)

    def forward(self, rows: Tensor) -> Tensor:
        grad_scale = (rows[0].numel() * self.form.hi) ** -0.5
        return fake_quantize(rows, self.step(), self.form, grad_scale, self._codes)

    def integers(self, rows: Tensor) -> Tensor:
        return self._codes(rows / self.step().to(rows.dtype))

    def _codes(self, u: Tensor) -> Tensor:
        return u.round().clamp_(self.form.lo, self.form.hi)


class ProjectedQuantizer(BaselineQuantizer):
    """Forward: w_q = s * projection(w / s) onto the exact budget (`accaware.projections.project_integers`).

    Backward: straight-through to w where |w / s| <= qmax, so that weights which the budget set to 0 can return; to s
    as `fake_quantize` says.
    """

    @torch.no_grad()
    def start(self, rows: Tensor) -> Tensor:
        assert self.budget is not None
        step = self.step()
        return project_integers(rows / step, self.budget.simple, self.form.hi) * step

    def _codes(self, u: Tensor) -> Tensor:
        assert self.budget is not None
        return project_integers(u, self.budget, self.form.hi).to(u.dtype)
