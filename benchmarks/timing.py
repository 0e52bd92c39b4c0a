"""Alternating measurements: what is compared runs in turn, in one process, so that drift of the machine cancels."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every candidate, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], baselines: list[str]) -> None:
    """Print the median time of every candidate and the median, over the rounds, of its ratio to each baseline."""
    table = Table(title=title, caption=f"{torch.get_num_threads()} threads, {_cpu()}, torch {torch.__version__}")
    table.add_column("")
    table.add_column("median ms", justify="right")
    for baseline in baselines:
        table.add_column(f"x {baseline}", justify="right")
    for name, times in seconds.items():
        ratios = [
            statistics.median(t / b for t, b in zip(times, seconds[baseline], strict=True)) for baseline in baselines
        ]
        table.add_row(name, f"{1000 * statistics.median(times):.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


def peak() -> int:
    """Bytes that this process has had in memory at most since `forget_peak`; Linux. (`ru_maxrss` is the parent's.)"""
    return _of_process("VmHWM")


def forget_peak() -> None:
    """The peak begins anew, without freed memory that the allocator has kept; Linux with glibc."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory_of(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that `run` has at most beyond what is there before it, on a CPU (Linux) or a GPU."""
    if device == "cpu":
        forget_peak()
        before = _of_process("VmRSS")
        run()
        return peak() - before
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _of_process(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
