"""AXE (arXiv 2409.17092): rounding tap by tap so that a budget holds, the step that AXE adds to GPTQ and to GPFQ.

Per row and tile, with input codes in [mu, nu], M = 2^(P-1) - 1, p the sum of the positive integers so far and n that of
the negative ones (n <= 0), a value v (in units of the scale) becomes

    soft:    sign(v) max(|v| - t, 0), t the threshold of the tile's centred weights on the l1 ball (2^P - 2)/(nu - mu)
    strict:  clamped to [min(l, 0), max(u, 0)], with
             u = min[(M - nu p - mu n)/nu, (-M - mu p - nu n)/mu] - 1/2
             l = max[(-M - mu p - nu n)/nu, (M - nu p - mu n)/mu] + 1/2, without what would be divided by 0

and is then rounded to nearest. The strict step keeps |every sum| <= M; the soft one leaves something for later taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accaware.projections import simplex_threshold
from accaware.ptq.descent import Problem
from accaware.ptq.rounding import Exact, least

__all__ = ["Axe"]


class Axe(Exact):
    """AXE's two steps. What they cut off is not made up for, as published."""

    def __init__(self, weight: Tensor, scale: Tensor, problem: Problem) -> None:
        super().__init__(weight, scale, problem)
        budget = problem.budget
        if budget.hi is None:
            raise ValueError("AXE knows no free preload: it needs preload 'none'")
        self.below.fill_(budget.hi)
        radius = 2 * budget.hi / (budget.up + budget.down)
        tiles = range(self.above.shape[-1])
        soft = [_threshold((weight / scale)[:, problem.tiles == tile], radius) for tile in tiles]
        self.soft = problem.grouped(torch.cat(soft, -1))

    def __call__(self, v: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Nearest`."""
        at = (self.groups, slice(None), tile)
        above, below, z = self.above[at], self.below[at], v / self.scale
        z = z.sign() * (z.abs() - self.soft[at]).clamp_(min=0)
        z = torch.minimum(z, (least(above, self.up, below, self.down) - 0.5).clamp_(min=0))
        z = torch.maximum(z, -(least(below, self.up, above, self.down) - 0.5).clamp_(min=0))
        q = z.round().clamp_(-self.qmax, self.qmax)
        self.spend(q, tile)
        return z * self.scale, q


def _threshold(u: Tensor, radius: float) -> Tensor:
    """What takes |u - mean u| onto the l1 ball: 0 inside. u: [R, T], returns [R, 1]."""
    size = (u - u.mean(-1, keepdim=True)).abs()
    return simplex_threshold(size, torch.full_like(size[:, :1], radius)).clamp_(min=0)
