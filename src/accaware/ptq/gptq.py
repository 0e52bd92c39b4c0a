"""GPTQ (OPTQ, arXiv 2210.17323), plain or with AXE's budget."""

from __future__ import annotations

import torch
from torch import Tensor

from accaware.ptq.axe import BLOCK, Rounding, reordered
from accaware.ptq.descent import Problem

__all__ = ["gptq"]


def gptq(weight: Tensor, scale: Tensor, problem: Problem, bounded: bool = True) -> Tensor:
    """Round tap by tap, in the order of falling power; the taps to come make up for each error as well as they can.

    With U the upper Cholesky factor of H^-1 and z what rounding tap t sees (after AXE's two steps, if `bounded`):
    q_t = round(z), e = (z - q_t) / U_tt, w_{t:} -= e U_{t,t:}. It keeps X w for the inputs that the Gram matrix is of.

    weight: [R, K]; scale: [R, 1] > 0. Returns integers [R, K]; without `bounded` they know no budget.
    """
    order = problem.gram.diagonal(dim1=1, dim2=2).argsort(-1, descending=True)  # [G, K]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(reordered(problem.gram, order)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rounding, tiles = Rounding(weight, scale, problem, bounded), problem.tiles[order]
    steps = problem.grouped(scale)
    place = order.unsqueeze(1).expand_as(problem.grouped(weight))
    w = problem.grouped(weight).gather(2, place)
    q = torch.empty_like(w)
    for start in range(0, w.shape[2], BLOCK):
        end = min(start + BLOCK, w.shape[2])
        errors = torch.empty_like(w[..., start:end])
        for t in range(start, end):
            z, q[..., t] = rounding(w[..., t], tiles[:, t])
            errors[..., t - start] = (z - steps[..., 0] * q[..., t]) / upper[:, t, t].unsqueeze(-1)
            w[..., t:end] -= errors[..., t - start].unsqueeze(-1) * upper[:, t, t:end].unsqueeze(1)
        w[..., end:] -= errors @ upper[:, start:end, end:]
    return torch.empty_like(q).scatter_(2, place, q).flatten(0, 1)
