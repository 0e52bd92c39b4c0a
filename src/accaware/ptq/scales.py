"""The scale at which an algorithm that is given one ends best: for GPTQ, GPFQ and AXE on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accaware.ptq.descent import Problem, output_error

__all__ = ["at_best_scale"]

_ELEMENTS = 1 << 20  # weights of candidates that are solved at once: more do not stay in the caches


def at_best_scale(
    solve: Callable[[Tensor, Tensor, Problem], Tensor], weight: Tensor, problem: Problem, ratios: Tensor
) -> tuple[Tensor, Tensor]:
    """The integers that `solve` finds at the scale, of max|w| / qmax times `ratios`, of the smallest output error.

    solve: from weights [R, K], scales [R, 1] and the problem to integers [R, K]. Returns integers and scales.
    """
    base = weight.abs().amax(-1, keepdim=True).clamp(min=1e-10) / problem.qmax
    q, scale, least_error = torch.zeros_like(weight), base, torch.full_like(base, float("inf"))
    for part in torch.split(ratios.to(weight), max(1, _ELEMENTS // weight.numel())):
        many = problem.repeated(len(part))
        steps = (base * part).reshape(-1, 1)
        codes = solve(weight.repeat_interleave(len(part), 0), steps, many)
        error, which = output_error(codes, steps, many).reshape(-1, len(part)).min(-1, keepdim=True)
        best = torch.arange(len(error), device=error.device) * len(part) + which.squeeze(-1)
        better = error < least_error
        q, scale = torch.where(better, codes[best], q), torch.where(better, steps[best], scale)
        least_error = torch.minimum(error, least_error)
    return q, scale
