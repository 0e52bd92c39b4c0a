"""What the optimal integer projection of a 4096 x 4096 matrix costs, next to one pass of rounding over it.

    python benchmarks/projection.py [--rounds 7] [--device cpu]

The pass is `u.round().clamp(-7, 7).sum(1)`. The matrix is Gaussian; budgets are those of 4-bit inputs: two-sided
(unsigned), l1 (free preload) and coupled (signed). Each set runs in a process of its own, in turn with the pass: once a
process has freed much memory, the pass, which mostly waits for pages, finds it at hand and is several times faster.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from timing import alternate, report

from accaware.bounds import Budget, budget
from accaware.formats import Accumulator, IntFormat
from accaware.projections import project_integers

SIZE, QMAX = 4096, 7
PASS = "one pass"
U4, S4 = IntFormat.unsigned(4), IntFormat.signed(4)
SETS = {
    "two-sided, does not bind": budget(U4, Accumulator(32)),
    **{f"two-sided, P = {bits}": budget(U4, Accumulator(bits)) for bits in (16, 14)},
    **{f"free preload, P = {bits}": budget(U4, Accumulator(bits, preload="free")) for bits in (16, 14)},
    **{f"coupled, P = {bits}": budget(S4, Accumulator(bits)) for bits in (16, 14)},
}


def measure(name: str, limits: Budget, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of the pass and of the projection onto one set."""
    torch.manual_seed(0)
    u = torch.randn(SIZE, SIZE, device=device) * 3

    def finished(q: torch.Tensor) -> float:  # reading one number waits for the device
        return float(q.reshape(-1)[-1])

    candidates = {
        PASS: lambda: finished(u.round().clamp(-QMAX, QMAX).sum(1)),
        name: lambda: finished(project_integers(u, limits, QMAX)),
    }
    return alternate(candidates, rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for name, limits in SETS.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds = process.submit(measure, name, limits, options.rounds, options.device).result()
        report(f"{name}: {SIZE} x {SIZE} float32", seconds, [PASS])


if __name__ == "__main__":
    main()
