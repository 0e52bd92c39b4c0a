"""Integers under a budget that keep a layer's output: descent by single and pair moves, batched over rows.

For inputs X [n, K] and the outputs Y [n] that a row should give, the squared error of integers q at scale s is

    |s X q - Y|^2 / n = s^2 q.H q - 2 s q.c + |Y|^2 / n        H = X^T X / n, c = X^T Y / n.

A move changes one integer by one, or two integers by one each, so that a full budget can pass from tap to tap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from accaware.bounds import Budget

__all__ = ["Problem", "descend", "output_error", "reordered"]

_FIRST = 8  # changes of one integer that are paired with all others before all are
_PAIRS = 1 << 22  # pairs that are compared at once
_GAIN = 1e-9  # relative to the error of one unit: less is rounding
_INF = float("inf")


@dataclass(frozen=True, eq=False)
class Problem:
    """What R rows in G groups of consecutive ones, each with inputs of its own, should give, and their budget.

    gram: H [G, K, K], positive definite; cross: c [R, K]; both float64. tiles: [K] int64, the tile of each tap, from 0;
    `budget` holds for each tile of each row. qmax: the largest |q|. mixed: [G, K, K], where GPFQ needs it: the moments
    of the inputs (first) with those of the float network.
    """

    gram: Tensor
    cross: Tensor
    tiles: Tensor
    budget: Budget
    qmax: int
    mixed: Tensor | None = None

    @cached_property
    def order(self) -> Tensor:
        """Taps in the order of falling power, [G, K]."""
        return self.gram.diagonal(dim1=1, dim2=2).argsort(-1, descending=True)

    @cached_property
    def factor(self) -> Tensor:
        """The lower Cholesky factor of H in that order."""
        factor: Tensor = torch.linalg.cholesky(reordered(self.gram, self.order))
        return factor

    @cached_property
    def feedback(self) -> Tensor:
        """The upper Cholesky factor of H^-1 in that order."""
        upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(self.factor), upper=True)
        return upper

    def unbounded(self) -> Tensor:
        """The real weights of the smallest error, H^-1 c; [R, K]."""
        return self.by_row(torch.cholesky_solve(self.by_tap(self.cross, self.order), self.factor), self.order)

    def grouped(self, rows: Tensor) -> Tensor:
        """[R, K] -> [G, R/G, K]."""
        return rows.reshape(len(self.gram), -1, rows.shape[1])

    def by_tap(self, rows: Tensor, order: Tensor | None = None) -> Tensor:
        """[R, K] -> a copy [G, K, R/G], with the taps in this order: what visits taps finds all rows side by side."""
        taps = self.grouped(rows).mT
        if order is None:
            return taps.clone(memory_format=torch.contiguous_format)
        return taps.gather(1, order.unsqueeze(2).expand_as(taps))

    def by_row(self, taps: Tensor, order: Tensor | None = None) -> Tensor:
        """And back."""
        if order is not None:
            taps = torch.empty_like(taps).scatter_(1, order.unsqueeze(2).expand_as(taps), taps)
        return taps.mT.flatten(0, 1).contiguous()

    def repeated(self, times: int) -> Problem:
        """The same with each row so many times in a row."""
        problem = replace(self, cross=self.cross.repeat_interleave(times, 0))
        problem.__dict__.update(order=self.order, factor=self.factor, feedback=self.feedback)  # no row's own
        return problem

    def times(self, w: Tensor) -> Tensor:
        """H w for every row; w: [R, K]."""
        return torch.matmul(self.grouped(w), self.gram).flatten(0, 1)

    def best_scale(self, q: Tensor, otherwise: Tensor) -> Tensor:
        """s = q.c / q.H q, which minimises the error of q, rounded to float32; `otherwise` where that is not positive.

        q: [R, K]; otherwise, and what is returned: [R, 1], float64.
        """
        scale = ((q * self.cross).sum(-1, keepdim=True) / (q * self.times(q)).sum(-1, keepdim=True)).float().to(q)
        return torch.where(scale > 0, scale, otherwise)  # 0/0 is not


def reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each group's matrix [G, K, K] in the order [G, K]."""
    rows = matrix.gather(1, order.unsqueeze(2).expand_as(matrix))
    return rows.gather(2, order.unsqueeze(1).expand_as(rows))


def output_error(q: Tensor, scale: Tensor, problem: Problem) -> Tensor:
    """s^2 q.H q - 2 s q.c, that is the squared output error less that of q = 0, [R]. q: [R, K]; scale: [R, 1]."""
    w = scale * q
    return (w * (problem.times(w) - 2 * problem.cross)).sum(-1)


def descend(q: Tensor, scale: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Lower the output error until neither a move that the budget allows nor another scale lowers it further.

    q: [R, K] integers in float64 within the budget; scale: [R, 1] > 0, float64. Returns both, of the same shapes.
    """
    down = _Descent(q.clone(), scale.clone(), problem)
    rows = torch.arange(len(q), device=q.device)
    while len(rows):
        rest = rows
        while len(rest):
            down.refit(rest)
            rest = rest[down.greedy(rest)]
        rows = rows[down.exhaustive(rows)]
    return down.q, down.scale


class _Descent:
    """Rows on the way down. Changes of one integer are numbered: j < K raises tap j, j >= K lowers tap j - K."""

    def __init__(self, q: Tensor, scale: Tensor, problem: Problem) -> None:
        self.q, self.scale, self.problem = q, scale, problem
        self.group = torch.arange(len(q), device=q.device) // (len(q) // len(problem.gram))
        self.slope = torch.empty_like(q)  # H s q - c
        self.diagonal = problem.gram.diagonal(dim1=1, dim2=2)
        self.of_tile = torch.nn.functional.one_hot(problem.tiles).to(q.dtype)  # [K, tiles]
        b = problem.budget
        up, down, limits = (1, 1, (b.l1, b.l1)) if b.l1 is not None else (b.up, b.down, (b.hi, b.lo))
        self.limits = torch.tensor([float(x) for x in limits if x is not None], dtype=q.dtype, device=q.device)
        #: What a growing or shrinking positive, a growing or shrinking negative integer takes of both limits.
        uses = [[up, down], [-up, -down], [down, up], [-down, -up]]
        self.uses = torch.tensor(uses, dtype=q.dtype, device=q.device)

    def refit(self, rows: Tensor) -> None:
        """The best scale of these rows, and the slope anew."""
        self.scale[rows] = self.problem.best_scale(self.q, self.scale)[rows]
        self.slope[rows] = (self.problem.times(self.scale * self.q) - self.problem.cross)[rows]

    def greedy(self, rows: Tensor) -> Tensor:
        """Moves among the most promising ones, until there is none left; which rows moved."""
        moved, rest = torch.zeros(len(self.q), dtype=torch.bool, device=self.q.device), rows
        while len(rest):
            rest = rest[self.move(rest, None)]
            moved[rest] = True
        return moved[rows]

    def exhaustive(self, rows: Tensor) -> Tensor:
        """One round of all moves, the best of each block for every row; which rows moved."""
        changes = 2 * self.q.shape[1]
        size = max(1, _PAIRS // (len(rows) * changes))
        moved = torch.zeros(len(rows), dtype=torch.bool, device=self.q.device)
        for block in torch.split(torch.arange(changes, device=self.q.device), size):
            moved |= self.move(rows, block.expand(len(rows), -1))
        return moved

    def move(self, rows: Tensor, first: Tensor | None) -> Tensor:
        """Each row's best change, alone or after one of `first` [R, m] (None: the best few), if it gains; which moved.

        rows: indices [R].
        """
        problem, q, scale = self.problem, self.q[rows], self.scale[rows]
        fan_in, group, square = q.shape[1], self.group[rows], scale.square()
        unit, step = square * self.diagonal[group], 2 * scale * self.slope[rows]
        raised = (unit + step).masked_fill_(q >= problem.qmax, _INF)
        lowered = (unit - step).masked_fill_(q <= -problem.qmax, _INF)
        cost = torch.cat([raised, lowered], -1)  # [R, 2K], of each change
        kind = torch.cat([torch.where(q >= 0, 0, 3), torch.where(q > 0, 1, 2)], -1)
        tile = problem.tiles.repeat(2)
        one, two = (fits[:, tile] for fits in self.allowed(q))
        alone = torch.where(one.gather(-1, kind.unsqueeze(-1)).squeeze(-1), cost, _INF)
        if first is None:
            first = cost.topk(min(_FIRST, 2 * fan_in), largest=False).indices
        # after[r, k]: what each change costs where one of kind k comes first in its tile
        fits = two.gather(-1, kind[..., None, None].expand(-1, -1, 4, 1)).squeeze(-1).movedim(2, 1)
        after = torch.where(fits, cost.unsqueeze(1), _INF)
        index = torch.arange(len(rows), device=q.device)
        pair = after[index.unsqueeze(-1), kind.gather(-1, first)]  # [R, m, 2K]
        taps = first % fan_in
        if self.of_tile.shape[1] > 1:
            apart = torch.where(alone.gather(-1, first).isfinite().unsqueeze(-1), alone.unsqueeze(1), _INF)
            pair = torch.where(problem.tiles[taps].unsqueeze(-1) == tile, pair, apart)
        sign = torch.where(first < fan_in, 1.0, -1.0).to(q)
        bend = (2 * square * sign).unsqueeze(-1) * problem.gram[group.unsqueeze(-1), taps]
        pair[..., :fan_in] += bend
        pair[..., fan_in:] -= bend
        pair += cost.gather(-1, first).unsqueeze(-1)
        pair.scatter_(-1, torch.stack([taps, taps + fan_in], -1), _INF)
        (single, change), (double, chosen) = alone.min(-1), pair.flatten(1).min(-1)
        moved = torch.minimum(single, double) < -_GAIN * unit.amax(-1)
        paired = moved & (double < single)
        self.change(rows[moved], torch.where(paired, chosen % (2 * fan_in), change)[moved])
        self.change(rows[paired], first[index, chosen // (2 * fan_in)][paired])
        return moved

    def allowed(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Which kinds of changes (and pairs of them in one tile) keep the budget: bool [R, tiles, 4] ([..., 4, 4])."""
        p, n = q.clamp(min=0) @ self.of_tile, (-q).clamp(min=0) @ self.of_tile
        slack = self.limits - p.unsqueeze(-1) * self.uses[0] - n.unsqueeze(-1) * self.uses[2]
        pairs = self.uses.unsqueeze(1) + self.uses
        return (self.uses <= slack.unsqueeze(-2)).all(-1), (pairs <= slack[..., None, None, :]).all(-1)

    def change(self, rows: Tensor, changes: Tensor) -> None:
        """Make one change in each of these rows."""
        fan_in = self.q.shape[1]
        taps, sign = changes % fan_in, torch.where(changes < fan_in, 1.0, -1.0).to(self.q)
        self.q[rows, taps] += sign
        self.slope[rows] += (self.scale[rows, 0] * sign).unsqueeze(-1) * self.problem.gram[self.group[rows], taps]
