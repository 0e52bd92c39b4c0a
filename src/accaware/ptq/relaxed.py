"""Where the descent starts: the best real weights within the budget, rounded tap by tap with feedback.

The real weights v = s x that minimise the output error under the budget share it over the whole row, by its
convex problem: sum x+ <= B+ and sum x- <= B- in each tile (inputs of one sign), or ||x||_1 <= B, |x| <= qmax. They are
found by alternating between the least squares and the budget (ADMM), and rounded as GPTQ does, by what the exact budget
has left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accaware.projections import project_integers
from accaware.ptq.descent import Problem
from accaware.ptq.gptq import gptq
from accaware.ptq.rounding import BLOCK, Exact

__all__ = ["Relaxation", "first_scale", "start", "sweep"]

_SCALES, _STRIDE = 5, 0.5  # how many are tried; log2 between the first, upwards, and the second
_STEPS = (12, 6)  # of the alternation, from a cold start, and from the solution at another scale
_NEWTON = (8, 2)  # steps from zero, and from the threshold of the last step
_PULL, _BEYOND = 1.5, 1.8  # towards the budget, relative to the taps' powers; and how far beyond it steps go (1: not)


class Relaxation:
    """The convex problem of real weights, in float32; in the metric of the taps' powers, which needs fewer steps.

    Its rows are [G, R/G, tiles, T]: the taps of each tile side by side, short ones padded with zeros.
    """

    def __init__(self, problem: Problem) -> None:
        b, order = problem.budget, problem.tiles.argsort(stable=True)
        sizes = torch.bincount(problem.tiles)
        self.used = torch.arange(int(sizes.max()), device=order.device) < sizes.unsqueeze(1)
        self.index = torch.zeros_like(self.used, dtype=torch.int64)
        self.index[self.used] = order
        self.qmax, self.caps = problem.qmax, (b.positive, b.negative)
        if b.l1 is None and None not in self.caps:
            self.nearest = b
        else:  # two coupled limits: their sum, which is all but the whole of it where codes are symmetric
            both = b.l1 if b.l1 is not None else ((b.hi or 0) + (b.lo or 0)) // (b.up + b.down)
            self.nearest = replace(b, hi=None, lo=None, l1=both)
        taps, used = self.index.flatten(), self.used.flatten().float()
        self.gram = problem.gram.float()[:, taps][:, :, taps] * used * used.unsqueeze(1)
        self.cross = self.split(problem.cross)
        power = self.gram.diagonal(dim1=1, dim2=2) + (1 - used)
        pulled = self.gram + _PULL * torch.diag_embed(power)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(pulled))
        self.power = power.view(-1, 1, *self.used.shape)
        self.per_power = 1 / self.power

    def split(self, rows: Tensor) -> Tensor:
        """[R, K], of any type, to rows of this problem."""
        tiles = torch.where(self.used, rows[:, self.index], 0).float()
        return tiles.view(len(self.gram), -1, *self.used.shape)

    def merge(self, rows: Tensor) -> Tensor:
        """And back, in float64."""
        merged = torch.empty(rows.shape[:2].numel(), int(self.used.sum()), dtype=torch.float64, device=rows.device)
        merged[:, self.index[self.used]] = rows.flatten(0, 1)[:, self.used].double()
        return merged

    def times(self, rows: Tensor) -> Tensor:
        """H v for every row."""
        return torch.matmul(rows.flatten(2), self.gram).view_as(rows)

    def solve(self, v: Tensor, duals: Tensor, scale: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The rows of the smallest output error within the budget, and their duals, from those of another scale.

        Boyd et al. 2011 (section 3.1.1, over-relaxed as in 3.4.3). scale: [R, 1].
        """
        step = scale.float().view(len(v), -1, 1, 1)
        roots = [torch.zeros_like(v[..., :1])] * 2
        v = self.shrink(v, step, roots, _NEWTON[0])
        for _ in range(steps):
            wanted = self.cross + _PULL * self.power * (v - duals)
            free = torch.matmul(wanted.flatten(2), self.inverse).view_as(v)
            ahead = torch.lerp(v, free, _BEYOND) + duals
            v = self.shrink(ahead, step, roots, _NEWTON[1])
            duals = ahead - v
        return v, duals

    def shrink(self, v: Tensor, step: Tensor, roots: list[Tensor], newton: int) -> Tensor:
        """Rows within the budget at this scale, near v: the nearest of those without a largest |x|, cut off there.

        roots: where a few steps of Newton's method start, and end.
        """
        if self.nearest.l1 is not None:
            sizes, caps = [v.abs()], [self.nearest.l1]
        else:
            sizes, caps = [v.clamp(min=0), (-v).clamp_(min=0)], [cap or 0 for cap in self.caps]
        for side, cap in enumerate(caps):
            for _ in range(newton):  # at most one beyond the root; then it rises to it and stays there
                left = torch.addcmul(sizes[side], roots[side], self.per_power, value=-1).clamp_(min=0)
                excess = left.sum(-1, keepdim=True) - step * cap
                slope = left.sign_().mul_(self.per_power).sum(-1, keepdim=True).clamp_(min=1e-30)
                roots[side] = (roots[side] + excess / slope).clamp_(min=0)
            left = torch.addcmul(sizes[side], roots[side], self.per_power, value=-1)
            sizes[side] = torch.minimum(left.clamp_(min=0), step * self.qmax)
        return sizes[0].copysign(v) if len(sizes) == 1 else sizes[0] - sizes[1]


def start(weight: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Integers within the budget [R, K], and scales [R, 1], of small output error. weight: the float ones, [R, K].

    Each row goes to the scales that help, and turns around with half the stride at one that does not.
    """
    relaxation = Relaxation(problem)
    v = relaxation.split(problem.unbounded())
    duals = torch.zeros_like(v)
    centre = first_scale(weight, relaxation)
    stride, best = torch.full_like(centre, _STRIDE), torch.full_like(centre, float("inf"))
    q, scale = torch.zeros_like(weight), centre
    for turn in range(_SCALES):
        step = centre * 2.0**stride if turn else centre
        v, duals = relaxation.solve(v, duals, step, _STEPS[turn > 0])
        codes = gptq(relaxation.merge(v), step, problem, Exact)
        fit = problem.best_scale(codes, step)
        error = -fit * (codes * problem.cross).sum(-1, keepdim=True)  # what it is at the best scale
        better = error < best
        q, scale, best = torch.where(better, codes, q), torch.where(better, fit, scale), torch.minimum(error, best)
        centre, stride = torch.where(better, step, centre), torch.where(better, stride, -stride / 2)
    return q, scale


def first_scale(weight: Tensor, relaxation: Relaxation) -> Tensor:
    """That at which the projection of the weights has the smallest output error, of a coarse grid; [R, 1], float64."""
    r, rows = relaxation, relaxation.split(weight)
    power = r.power.expand_as(rows).flatten(0, 1)
    base = rows.abs().amax((2, 3), keepdim=True).clamp(min=1e-10) / r.qmax
    scale, most = base, torch.zeros_like(base)
    for ratio in (2.0 ** torch.arange(-1.5, max(1, r.qmax).bit_length(), 0.25)).tolist():
        step = base * ratio
        codes = project_integers((rows / step).flatten(0, 1), r.nearest, r.qmax, power).view_as(rows)
        along = (codes * r.cross).sum((2, 3), keepdim=True).clamp_(min=0)
        gain = along.square() / (codes * r.times(codes)).sum((2, 3), keepdim=True)  # at the best scale of these codes
        scale, most = torch.where(gain > most, step, scale), torch.fmax(gain, most)
    return scale.double().view(-1, 1)


def sweep(q: Tensor, scale: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Once over all taps: each becomes the best integer that the budget allows beside the others. Then the best scale.

    q: [R, K] integers within the budget; scale: [R, 1] > 0. Returns both anew.
    """
    room, gram = Exact(q, scale, problem), problem.gram
    steps, q = problem.grouped(scale).squeeze(-1), problem.by_tap(q)
    slope = gram @ (steps.unsqueeze(1) * q) - problem.grouped(problem.cross).mT
    tiles = problem.tiles.expand(len(gram), -1)
    for t in range(q.shape[1]):
        room.spend(q[:, t], tiles[:, t])
    for begin in range(0, q.shape[1], BLOCK):
        end = min(begin + BLOCK, q.shape[1])
        before = q[:, begin:end].clone()
        for t in range(begin, end):
            old = q[:, t].clone()
            room.spend(old, tiles[:, t], -1)
            _, q[:, t] = room(steps * old - slope[:, t] / gram[:, t, t].unsqueeze(-1), tiles[:, t])
            change = (steps * (q[:, t] - old)).unsqueeze(1)
            slope[:, t:end].addcmul_(gram[:, t, t:end].unsqueeze(2), change)
        slope[:, end:] += gram[:, end:, begin:end] @ (steps.unsqueeze(1) * (q[:, begin:end] - before))
    q = problem.by_row(q)
    return q, problem.best_scale(q, scale)
