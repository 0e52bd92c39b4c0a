"""GPTQ (OPTQ, arXiv 2210.17323), plain or with AXE's budget."""

from __future__ import annotations

import torch
from torch import Tensor

from accaware.ptq.descent import Problem
from accaware.ptq.rounding import BLOCK, Nearest

__all__ = ["gptq"]


def gptq(weight: Tensor, scale: Tensor, problem: Problem, kind: type[Nearest]) -> Tensor:
    """Round tap by tap, in the order of falling power; the taps to come make up for each error as well as they can.

    With U the upper Cholesky factor of H^-1 and z = w_t (what AXE's steps leave of it): q_t = round(z / s),
    e = (z - s q_t) / U_tt, w_{t:} -= e U_{t,t:}. It keeps X w for the inputs that the Gram matrix is of.

    weight: [R, K]; scale: [R, 1] > 0; kind: how a tap is rounded. Returns integers [R, K].
    """
    order, upper = problem.order, problem.feedback
    rounding, tiles = kind(weight, scale, problem), problem.tiles[order]
    steps = problem.grouped(scale).squeeze(-1)
    w = problem.by_tap(weight, order)
    q = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for t in range(start, end):
            z, q[:, t] = rounding(w[:, t], tiles[:, t])
            errors[:, t - start] = (z - steps * q[:, t]) / upper[:, t, t].unsqueeze(-1)
            w[:, t:end].addcmul_(upper[:, t, t:end].unsqueeze(2), errors[:, t - start].unsqueeze(1), value=-1)
        w[:, end:] -= upper[:, start:end, end:].mT @ errors
    return problem.by_row(q, order)
