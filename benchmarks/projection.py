"""What the optimal integer projection of a 4096 x 4096 matrix costs, next to one pass of rounding over it.

    python benchmarks/projection.py [--rounds 7] [--device cpu]

The pass is `u.round().clamp(-7, 7).sum(1)`. The matrix is Gaussian, at the scale that the search would choose; budgets
are those of 4-bit inputs: two-sided (unsigned), l1 (free preload) and coupled (signed).
"""

from __future__ import annotations

import argparse

import torch
from timing import alternate, report

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import project_integers

SIZE, QMAX = 4096, 7


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    u = torch.randn(SIZE, SIZE, device=options.device) * 3

    def finished(q: torch.Tensor) -> float:  # reading one number waits for the device
        return float(q[-1, -1])

    candidates = {"one pass": lambda: finished(u.round().clamp(-QMAX, QMAX).sum(1, keepdim=True))}
    for bits in (16, 14):
        sets = {
            "two-sided": budget(IntFormat.unsigned(4), Accumulator(bits)),
            "free preload": budget(IntFormat.unsigned(4), Accumulator(bits, preload="free")),
            "coupled": budget(IntFormat.signed(4), Accumulator(bits)),
        }
        for name, limits in sets.items():
            candidates[f"{name}, P = {bits}"] = lambda b=limits: finished(project_integers(u, b, QMAX))
    candidates["two-sided, does not bind"] = lambda: finished(
        project_integers(u, budget(IntFormat.unsigned(4), Accumulator(32)), QMAX)
    )
    report("project_integers, 4096 x 4096 float32", alternate(candidates, options.rounds), ["one pass"])


if __name__ == "__main__":
    main()
