"""GPFQ (arXiv 2201.11113), plain or with AXE's budget."""

from __future__ import annotations

import torch
from torch import Tensor

from accaware.ptq.descent import Problem, reordered
from accaware.ptq.rounding import BLOCK, Nearest

__all__ = ["gpfq"]


def gpfq(weight: Tensor, scale: Tensor, problem: Problem, kind: type[Nearest]) -> Tensor:
    """Round tap by tap, in the order of falling power; each makes up for the output error of those before.

    With H of the quantized network's inputs and G, `problem.mixed`, of these with the float network's, what is
    rounded is v_t = (G_tt w_t + sum_{j<t} (G_tj w_j - s H_tj q_j)) / H_tt.

    weight: [R, K]; scale: [R, 1] > 0; kind: how a tap is rounded. Returns integers [R, K].
    """
    assert problem.mixed is not None
    order = problem.order
    gram, mixed = reordered(problem.gram, order), reordered(problem.mixed, order)
    rounding, tiles = kind(weight, scale, problem), problem.tiles[order]
    steps = problem.grouped(scale).squeeze(-1)
    wanted = mixed.tril() @ problem.by_tap(weight, order)  # G_tt w_t + sum_{j<t} G_tj w_j
    q = torch.empty_like(wanted)
    for start in range(0, q.shape[1], BLOCK):
        end = min(start + BLOCK, q.shape[1])
        for t in range(start, end):
            _, q[:, t] = rounding(wanted[:, t] / gram[:, t, t].unsqueeze(-1), tiles[:, t])
            change = (steps * q[:, t]).unsqueeze(1)
            wanted[:, t + 1 : end].addcmul_(gram[:, t, t + 1 : end].unsqueeze(2), change, value=-1)
        wanted[:, end:] -= gram[:, end:, start:end] @ (steps.unsqueeze(1) * q[:, start:end])
    return problem.by_row(q, order)
