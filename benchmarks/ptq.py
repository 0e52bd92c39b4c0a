"""What choosing the integers of one layer costs: GPTQ, AXE on GPTQ and on GPFQ, and `budgeted`, K outputs of K taps.

    python benchmarks/ptq.py [--sizes 256 512 1024 2048 4096] [--rounds 3] [--acc-bits 16]

4-bit weights and unsigned 4-bit inputs; random weights, correlated inputs. GPTQ and AXE run once, at the scale that
`budgeted`'s first search finds (as part of its time). Each size runs in a process of its own, all algorithms in turn.
Beside the times: the output error relative to the output, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from rich.console import Console
from timing import alternate, report
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


def layer(size: int, acc_bits: int) -> tuple[Tensor, Problem]:
    """Weights [K, K] and the problem of their layer, whose inputs are the float network's own."""
    torch.manual_seed(0)
    strong = torch.randn(size, size // 2, dtype=torch.float64) * torch.logspace(0, -1.5, size // 2, dtype=torch.float64)
    gram = (strong @ strong.mT * (4 / size)).unsqueeze(0) + 0.05 * torch.eye(size, dtype=torch.float64)
    weight = torch.randn(size, size, dtype=torch.float64)
    limits = budget(IntFormat.unsigned(4), Accumulator(acc_bits))
    tiles = torch.zeros(size, dtype=torch.int64)
    return weight, Problem(gram, weight @ gram[0], tiles, limits, 7, gram)


def measure(size: int, acc_bits: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Seconds and relative output errors of every algorithm, and the peak memory in MB."""
    weight, problem = layer(size, acc_bits)
    power = (weight * problem.cross).sum(-1)
    scale = first_scale(weight, Relaxation(problem))
    errors: dict[str, float] = {}

    def at_scale(name: str, solve: partial[Tensor]) -> None:
        problem.__dict__.pop("feedback", None)  # the factor that `Problem` keeps
        error = output_error(solve(weight, scale, problem), scale, problem)
        errors[name] = float((1 + error / power).mean())

    def ours() -> None:
        problem.__dict__.pop("feedback", None)
        errors["budgeted"] = float((1 + output_error(*budgeted(weight, problem), problem) / power).mean())

    rivals = {
        "gptq": partial(gptq, kind=Nearest),
        "axe-gptq": partial(gptq, kind=Axe),
        "axe-gpfq": partial(gpfq, kind=Axe),
    }
    candidates = {name: partial(at_scale, name, solve) for name, solve in rivals.items()}
    seconds = alternate({**candidates, "budgeted": ours}, rounds)
    return seconds, errors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--acc-bits", type=int, default=16)
    options = parser.parse_args()
    for size in options.sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds, errors, peak = process.submit(measure, size, options.acc_bits, options.rounds).result()
        report(f"{size} outputs of {size} taps, P = {options.acc_bits}; peak {peak} MB", seconds, ["gptq"])
        Console().print("relative output error:", *(f"{name} {error:.4g}" for name, error in errors.items()))


if __name__ == "__main__":
    main()
