"""Where the descent starts: the best real weights within the budget, rounded tap by tap with feedback.

The real weights v = s x that minimise the output error under the budget share it over the whole row, by its
convex problem: sum x+ <= B+ and sum x- <= B- in each tile (inputs of one sign), or ||x||_1 <= B, |x| <= qmax. They are
found by accelerated projected gradients (FISTA), and rounded as GPTQ does, by what the exact budget has left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accaware.projections import project_integers
from accaware.ptq.descent import Problem, output_error
from accaware.ptq.gptq import gptq
from accaware.ptq.rounding import BLOCK, Exact

__all__ = ["start", "sweep"]

_FACTORS = (0.0, -0.25, -0.5, 0.25, 0.5)  # log2 of the scales that are tried, relative to the projection's
_STEPS = (40, 15)  # gradients from a cold start, and from the solution at another scale


class _Tiles:
    """Rows [R, K] to tiles [R, tiles, T], short ones padded with zeros, and back; and the budget as real numbers."""

    def __init__(self, problem: Problem) -> None:
        b, order = problem.budget, problem.tiles.argsort(stable=True)
        sizes = torch.bincount(problem.tiles)
        self.index = torch.full((len(sizes), int(sizes.max())), -1, device=order.device)
        self.index[torch.arange(self.index.shape[1], device=order.device) < sizes.unsqueeze(1)] = order
        self.used, self.qmax = self.index >= 0, problem.qmax
        self.caps = (b.positive, b.negative)
        if b.l1 is None and None not in self.caps:
            self.nearest = b
        else:  # two coupled limits: their sum, which is all but the whole of it where codes are symmetric
            both = b.l1 if b.l1 is not None else ((b.hi or 0) + (b.lo or 0)) // (b.up + b.down)
            self.nearest = replace(b, hi=None, lo=None, l1=both)

    def split(self, rows: Tensor) -> Tensor:
        return torch.where(self.used, rows[:, self.index.clamp(min=0)], 0)

    def merge(self, tiles: Tensor) -> Tensor:
        rows = tiles.new_empty(len(tiles), int(self.used.sum()))
        rows[:, self.index[self.used]] = tiles[:, self.used]
        return rows

    def shrink(self, v: Tensor, scale: Tensor) -> Tensor:
        """The nearest real weights within the budget at this scale, to a few steps of Newton's method. v: [R, K]."""
        x = self.split(v)
        if self.nearest.l1 is not None:
            parts = [(x.abs(), self.nearest.l1, x.sign())]
        else:
            parts = [(x.clamp(min=0), self.caps[0], 1.0), ((-x).clamp(min=0), self.caps[1], -1.0)]
        out, step = torch.zeros_like(x), scale.unsqueeze(-1)
        for size, cap, sign in parts:
            threshold = torch.zeros_like(size[..., :1])
            for _ in range(8):  # it rises to the root and stays there
                above = size > threshold
                excess = (size * above).sum(-1, keepdim=True) - step * cap
                threshold = (excess / above.sum(-1, keepdim=True).clamp(min=1)).clamp_(min=0)
            out += torch.minimum((size - threshold).clamp_(min=0), step * self.qmax) * sign
        return self.merge(out)


def start(weight: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Integers within the budget [R, K], and scales [R, 1], of small output error. weight: the float ones, [R, K]."""
    tiles, gram = _Tiles(problem), problem.gram
    target = torch.cholesky_solve(problem.grouped(problem.cross).mT, torch.linalg.cholesky(gram)).mT.flatten(0, 1)
    base = _first_scale(weight, problem, tiles)
    lipschitz = _largest_eigenvalue(gram).repeat_interleave(len(weight) // len(gram)).view(-1, 1)
    v, best = target, torch.full_like(base, float("inf"))
    q, scale = torch.zeros_like(weight), base
    for turn, factor in enumerate(_FACTORS):
        step = base * 2.0**factor
        v = _relax(v if turn else target, step, problem, tiles, lipschitz, _STEPS[turn > 0])
        codes = gptq(v, step, problem, Exact)
        fit = problem.best_scale(codes, step)
        error = output_error(codes, fit, problem).unsqueeze(-1)
        better = error < best
        q, scale, best = torch.where(better, codes, q), torch.where(better, fit, scale), torch.minimum(error, best)
    return q, scale


def _first_scale(weight: Tensor, problem: Problem, tiles: _Tiles) -> Tensor:
    """That at which the projection of the weights has the smallest output error, of a coarse grid; [R, 1]."""
    power = problem.gram.diagonal(dim1=1, dim2=2).repeat_interleave(len(weight) // len(problem.gram), 0)
    importance = tiles.split(power).clamp(min=1e-30)
    base = weight.abs().amax(-1, keepdim=True).clamp(min=1e-10) / problem.qmax
    scale, best = base, torch.full_like(base, float("inf"))
    for ratio in (2.0 ** torch.arange(-1.5, max(1, problem.qmax).bit_length(), 0.25)).tolist():
        step = base * ratio
        codes = tiles.merge(project_integers(tiles.split(weight / step), tiles.nearest, problem.qmax, importance))
        error = output_error(codes, problem.best_scale(codes, step), problem).unsqueeze(-1)
        scale, best = torch.where(error < best, step, scale), torch.minimum(error, best)
    return scale


def _relax(v: Tensor, scale: Tensor, problem: Problem, tiles: _Tiles, lipschitz: Tensor, steps: int) -> Tensor:
    """The real weights within the budget of the smallest output error, from v; Beck and Teboulle 2009 (FISTA)."""
    v = ahead = tiles.shrink(v, scale)
    momentum = 1.0
    for _ in range(steps):
        new = tiles.shrink(ahead - (problem.times(ahead) - problem.cross) / lipschitz, scale)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - v)
        v, momentum = new, following
    return v


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Of each matrix [G, K, K], or a little more; by the power method."""
    x = torch.ones_like(gram[:, :, :1])
    for _ in range(30):
        x = gram @ x
        x = x / x.norm(dim=1, keepdim=True)
    return 1.1 * (gram @ x).norm(dim=1).flatten()


def sweep(q: Tensor, scale: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Once over all taps: each becomes the best integer that the budget allows beside the others. Then the best scale.

    q: [R, K] integers within the budget; scale: [R, 1] > 0. Returns both anew.
    """
    room = Exact(q, scale, problem)
    q, steps, gram = problem.grouped(q).clone(), problem.grouped(scale), problem.gram
    slope = steps * q @ gram - problem.grouped(problem.cross)
    tiles = problem.tiles.expand(len(gram), -1)
    for t in range(q.shape[2]):
        room.spend(q[..., t], tiles[:, t])
    for begin in range(0, q.shape[2], BLOCK):
        end = min(begin + BLOCK, q.shape[2])
        before = q[..., begin:end].clone()
        for t in range(begin, end):
            old = q[..., t].clone()
            room.spend(old, tiles[:, t], -1)
            _, q[..., t] = room(steps[..., 0] * old - slope[..., t] / gram[:, t, t].unsqueeze(-1), tiles[:, t])
            change = (steps[..., 0] * (q[..., t] - old)).unsqueeze(-1)
            slope[..., t:end] += change * gram[:, t, t:end].unsqueeze(1)
        slope[..., end:] += steps * (q[..., begin:end] - before) @ gram[:, begin:end, end:]
    q = q.flatten(0, 1)
    return q, problem.best_scale(q, scale)
