"""What choosing the integers of one layer costs: GPTQ, AXE on GPTQ and on GPFQ, and `budgeted`, K outputs of K taps.

    python benchmarks/ptq.py [--sizes 256 512 1024 2048 4096] [--rounds 3] [--acc-bits 16] [--searched 1024]

4-bit weights and unsigned 4-bit inputs; random weights, correlated inputs. GPTQ and AXE run once, at the scale that
`budgeted`'s first search finds (as part of its time), and up to the size `--searched` also as `accaware ptq` runs GPTQ,
at the best of about a hundred scales for each output. Above some 320 taps `budgeted` ends without the search of pairs.
Each size runs in a process of its own, all algorithms in turn. Beside the times: the output error relative to the
output, and the peak memory of the process while the algorithm ran.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from rich.console import Console
from timing import alternate, forget_peak, peak, report
from torch import Tensor

from accaware.bounds import budget
from accaware.formats import Accumulator, IntFormat
from accaware.ptq.axe import Axe
from accaware.ptq.descent import Problem, output_error
from accaware.ptq.gpfq import gpfq
from accaware.ptq.gptq import gptq
from accaware.ptq.model import budgeted
from accaware.ptq.relaxed import Relaxation, first_scale
from accaware.ptq.rounding import Nearest
from accaware.ptq.scales import at_best_scale
from accaware.quantizers.weight import scale_ratios


def layer(size: int, acc_bits: int) -> tuple[Tensor, Problem]:
    """Weights [K, K] and the problem of their layer, whose inputs are the float network's own."""
    torch.manual_seed(0)
    strong = torch.randn(size, size // 2, dtype=torch.float64) * torch.logspace(0, -1.5, size // 2, dtype=torch.float64)
    gram = (strong @ strong.mT * (4 / size)).unsqueeze(0) + 0.05 * torch.eye(size, dtype=torch.float64)
    weight = torch.randn(size, size, dtype=torch.float64)
    limits = budget(IntFormat.unsigned(4), Accumulator(acc_bits))
    tiles = torch.zeros(size, dtype=torch.int64)
    return weight, Problem(gram, weight @ gram[0], tiles, limits, 7, gram)


def measure(
    size: int, acc_bits: int, rounds: int, searched: bool
) -> tuple[dict[str, list[float]], dict[str, tuple[float, int]]]:
    """Seconds of every algorithm, its relative output error and its peak memory in MB."""
    weight, problem = layer(size, acc_bits)
    power = (weight * problem.cross).sum(-1)
    scale = first_scale(weight, Relaxation(problem))
    found: dict[str, tuple[float, int]] = {}

    def run(name: str, solve: Callable[[Problem], tuple[Tensor, Tensor]]) -> None:
        forget_peak()
        fresh = replace(problem)  # without the factors that a `Problem` keeps
        error = (1 + output_error(*solve(fresh), fresh) / power).mean()
        found[name] = float(error), peak() >> 20

    def once(solve: Callable[..., Tensor], kind: type[Nearest], problem: Problem) -> tuple[Tensor, Tensor]:
        return solve(weight, scale, problem, kind), scale

    candidates: dict[str, Callable[[Problem], tuple[Tensor, Tensor]]] = {
        "gptq": partial(once, gptq, Nearest),
        "axe-gptq": partial(once, gptq, Axe),
        "axe-gpfq": partial(once, gpfq, Axe),
        "budgeted": partial(budgeted, weight),
    }
    if searched:
        ratios = torch.tensor(scale_ratios(problem.qmax))
        candidates["gptq, searched"] = partial(at_best_scale, partial(gptq, kind=Nearest), weight, ratios=ratios)
    return alternate({name: partial(run, name, solve) for name, solve in candidates.items()}, rounds), found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--acc-bits", type=int, default=16)
    parser.add_argument("--searched", type=int, default=1024)
    options = parser.parse_args()
    for size in options.sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            job = process.submit(measure, size, options.acc_bits, options.rounds, size <= options.searched)
            seconds, found = job.result()
        report(f"{size} outputs of {size} taps, P = {options.acc_bits}", seconds, ["gptq"])
        for name, (error, memory) in found.items():
            Console().print(f"{name}: relative output error {error:.4g}, peak {memory} MB", highlight=False)


if __name__ == "__main__":
    main()
