"""Rounding one tap of every row at a time: to nearest, or to what the exact budget has left."""

from __future__ import annotations

import torch
from torch import Tensor

from accaware.ptq.descent import Problem

__all__ = ["BLOCK", "Exact", "Nearest", "least"]

BLOCK = 128  # taps that are rounded before the others hear of it


class Nearest:
    """R rows in G groups on their way through their taps, each rounded to the nearest integer."""

    def __init__(self, weight: Tensor, scale: Tensor, problem: Problem) -> None:
        """weight: [R, K]; scale: [R, 1] > 0."""
        self.scale, self.qmax = problem.grouped(scale).squeeze(-1), problem.qmax

    def __call__(self, v: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
        """What later taps shall make up to, and the integers. v: [G, R/G], a tap of each row; tile: that tap's, [G]."""
        return v, (v / self.scale).round().clamp_(-self.qmax, self.qmax)


class Exact(Nearest):
    """The nearest integer that the exact budget of the tile still allows; what it cuts off is made up for too."""

    def __init__(self, weight: Tensor, scale: Tensor, problem: Problem) -> None:
        super().__init__(weight, scale, problem)
        b = problem.budget
        self.up, self.down = (b.up, b.down) if b.l1 is None else (1, 1)
        hi, lo = (b.hi, b.lo) if b.l1 is None else (b.l1, b.l1)
        assert hi is not None
        assert lo is not None
        size = (*self.scale.shape, int(problem.tiles.max()) + 1)
        self.above, self.below = weight.new_full(size, float(hi)), weight.new_full(size, float(lo))
        self.groups = torch.arange(len(problem.gram), device=weight.device)

    def __call__(self, v: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Nearest`."""
        at = (self.groups, slice(None), tile)
        above, below = self.above[at], self.below[at]
        _, q = super().__call__(v, tile)
        q = torch.minimum(q, least(above, self.up, below, self.down).floor_())
        q = torch.maximum(q, -least(below, self.up, above, self.down).floor_())
        self.spend(q, tile)
        return v, q

    def spend(self, q: Tensor, tile: Tensor, sign: int = 1) -> None:
        """Take these integers of one tap off the budget, or (sign -1) give them back."""
        at = (self.groups, slice(None), tile)
        p, n = sign * q.clamp(min=0), sign * q.clamp(max=0)
        self.above[at] -= self.up * p - self.down * n
        self.below[at] -= self.down * p - self.up * n


def least(a: Tensor, x: int, b: Tensor, y: int) -> Tensor:
    """min(a / x, b / y), without what would be divided by 0."""
    if not (x and y):
        return a / x if x else b / y
    return torch.minimum(a / x, b / y)
