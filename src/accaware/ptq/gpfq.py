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
    order = problem.gram.diagonal(dim1=1, dim2=2).argsort(-1, descending=True)  # [G, K]
    gram, mixed = reordered(problem.gram, order), reordered(problem.mixed, order)
    rounding, tiles = kind(weight, scale, problem), problem.tiles[order]
    steps = problem.grouped(scale)
    place = order.unsqueeze(1).expand_as(problem.grouped(weight))
    w = problem.grouped(weight).gather(2, place)
    wanted = w @ mixed.tril().mT  # G_tt w_t + sum_{j<t} G_tj w_j
    q = torch.empty_like(w)
    for start in range(0, w.shape[2], BLOCK):
        end = min(start + BLOCK, w.shape[2])
        for t in range(start, end):
            _, q[..., t] = rounding(wanted[..., t] / gram[:, t, t].unsqueeze(-1), tiles[:, t])
            wanted[..., t + 1 : end] -= (steps[..., 0] * q[..., t]).unsqueeze(-1) * gram[:, t, t + 1 : end].unsqueeze(1)
        wanted[..., end:] -= (steps * q[..., start:end]) @ gram[:, start:end, end:]
    return torch.empty_like(q).scatter_(2, place, q).flatten(0, 1)
