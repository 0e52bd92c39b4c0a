"""Which gradient should the scale of a projected weight get? Three candidates against the slope that is really there.

    python benchmarks/scale_gradient.py

For rows w of Gaussian weights, codes q(s) = projection of w/s onto the budget, and the loss L(s) = ||s q(s) - w||^2,
the true slope is a central difference of L, averaged over rows (a single q(s) is a step function of s). The candidates
contract dL/d(s q) = 2 (s q - w) with

    fixed     q                              the integers held fixed: the exact derivative wherever there is one
    lsq       q - u inside, q outside        straight-through rounding (Esser et al. 2020), as if nothing were bound
    smoothed  q - (u - sgn mean_A |u|) on A  the active set A moves on the face of the budget

at scales below and above the best one. A candidate is useful where its sign is the true one: it must push a scale
that is too small up and one that is too large down.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from accaware.bounds import Budget
from accaware.projections import project_integers

QMAX, ROWS, FAN_IN = 7, 400, 144


def loss(w: Tensor, s: float, budget: Budget) -> Tensor:
    """L(s) of every row."""
    return (s * project_integers(w / s, budget, QMAX) - w).square().sum(-1)


def candidates(w: Tensor, s: float, budget: Budget) -> dict[str, Tensor]:
    """The slope of every row, by name."""
    u = w / s
    q = project_integers(u, budget, QMAX)
    grad = 2 * (s * q - w)
    inside = u.abs() <= QMAX
    active = (q != 0) & (q.abs() < QMAX)
    mean = (u.abs() * active).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp(min=1)
    return {
        "fixed": (grad * q).sum(-1),
        "lsq": (grad * (q - u * inside)).sum(-1),
        "smoothed": (grad * (q - (u - u.sign() * mean) * active)).sum(-1),
    }


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    w = torch.randn(ROWS, FAN_IN, dtype=torch.float64)
    table = Table(
        "budget ||q||_1", "s / best s", "true slope", "fixed", "lsq", "smoothed", title="dL/ds, mean over rows"
    )
    grid = [0.05 * 1.04**k for k in range(100)]
    for limit in (1000, 136, 68, 34):
        budget = Budget(1, 0, l1=limit)
        best = min(grid, key=lambda s, b=budget: float(loss(w, s, b).mean()))
        for ratio in (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0):
            s = best * ratio
            step = 0.02 * s
            true = float(((loss(w, s + step, budget) - loss(w, s - step, budget)) / (2 * step)).mean())
            slopes = {name: float(value.mean()) for name, value in candidates(w, s, budget).items()}
            table.add_row(str(limit), f"{ratio:.2f}", f"{true:.1f}", *(f"{v:.1f}" for v in slopes.values()))
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
