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

from collections.abc import Callable

import torch
from torch import Tensor

from accaware.projections import simplex_threshold
from accaware.ptq.descent import Problem, output_error

__all__ = ["BLOCK", "Rounding", "at_best_scale", "reordered"]

BLOCK = 128  # taps that are rounded before the others hear of it
_ELEMENTS = 1 << 24  # weights of candidates that are solved at once


class Rounding:
    """The state of R rows in G groups on their way through their taps. `bounded`: with AXE, else to nearest alone."""

    def __init__(self, weight: Tensor, scale: Tensor, problem: Problem, bounded: bool) -> None:
        """weight: [R, K]; scale: [R, 1]."""
        budget = problem.budget
        self.scale, self.qmax, self.bounded = problem.grouped(scale).squeeze(-1), problem.qmax, bounded
        if not bounded:
            return
        if budget.hi is None:
            raise ValueError("AXE knows no free preload: it needs preload 'none'")
        self.up, self.down, self.limit = budget.up, budget.down, budget.hi
        radius = 2 * budget.hi / (budget.up + budget.down)
        count = int(problem.tiles.max()) + 1
        soft = [_threshold((weight / scale)[:, problem.tiles == tile], radius) for tile in range(count)]
        self.soft = problem.grouped(torch.cat(soft, -1))
        self.p, self.n = torch.zeros_like(self.soft), torch.zeros_like(self.soft)
        self.groups = torch.arange(len(problem.gram), device=weight.device)

    def __call__(self, v: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
        """What is rounded (without AXE: v) and the integers. v: [G, R/G], a tap of each row; tile: that tap's, [G]."""
        z = v / self.scale
        if not self.bounded:
            return v, z.round().clamp_(-self.qmax, self.qmax)
        at = (self.groups, slice(None), tile)
        p, n = self.p[at], self.n[at]
        z = z.sign() * (z.abs() - self.soft[at]).clamp_(min=0)
        above = self.limit - self.up * p + self.down * n
        below = self.limit - self.down * p + self.up * n
        z = torch.minimum(z, (_least(above, self.up, below, self.down) - 0.5).clamp_(min=0))
        z = torch.maximum(z, -(_least(below, self.up, above, self.down) - 0.5).clamp_(min=0))
        q = z.round().clamp_(-self.qmax, self.qmax)
        self.p[at], self.n[at] = p + q.clamp(min=0), n + q.clamp(max=0)
        return z * self.scale, q


def reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each group's matrix [G, K, K] in the order [G, K]."""
    rows = matrix.gather(1, order.unsqueeze(2).expand_as(matrix))
    return rows.gather(2, order.unsqueeze(1).expand_as(matrix))


def _threshold(u: Tensor, radius: float) -> Tensor:
    """What takes |u - mean u| onto the l1 ball: 0 inside. u: [R, T], returns [R, 1]."""
    size = (u - u.mean(-1, keepdim=True)).abs()
    return simplex_threshold(size, torch.full_like(size[:, :1], radius)).clamp_(min=0)


def _least(a: Tensor, x: int, b: Tensor, y: int) -> Tensor:
    """min(a / x, b / y), without what would be divided by 0."""
    if not (x and y):
        return a / x if x else b / y
    return torch.minimum(a / x, b / y)


def at_best_scale(
    solve: Callable[[Tensor, Tensor, Problem], Tensor], weight: Tensor, problem: Problem, ratios: Tensor
) -> tuple[Tensor, Tensor]:
    """The integers that `solve` finds at the scale, of max|w| / qmax times `ratios`, of the smallest output error.

    solve: from weights [R, K], scales [R, 1] and the problem to integers [R, K]. Returns integers and scales.
    """
    base = weight.abs().amax(-1, keepdim=True).clamp(min=1e-10) / problem.qmax
    found = []
    for part in ratios.to(weight).split(max(1, _ELEMENTS // weight.numel())):
        many = problem.repeated(len(part))
        scale = (base * part).reshape(-1, 1)
        q = solve(weight.repeat_interleave(len(part), 0), scale, many)
        error = output_error(q, scale, many).reshape(-1, len(part))
        best = (torch.arange(len(error), device=error.device) * len(part)) + error.argmin(-1)
        found.append((q[best], scale[best], error.amin(-1)))
    q, scale, error = (torch.stack(values) for values in zip(*found, strict=True))
    best = error.argmin(0)
    rows = torch.arange(len(best), device=best.device)
    return q[best, rows], scale[best, rows]
