"""Many runs at once on Ray, on this machine or a cluster. The run folders are the truth: whatever is killed, the same
command goes on where they stop.

Every node must have this library installed and must see the same files under the same paths. A worker locks the folder
of its run while it trains, so that no other one, not even an orphan of a killed sweep, trains it at the same time.
"""

from __future__ import annotations

import logging
import os
import platform
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from accaware.experiments.checkpoints import fingerprint
from accaware.experiments.images import first_line
from accaware.experiments.results import read_runs, write_index
from accaware.experiments.runs import RunFolder, cores
from accaware.experiments.settings import Settings, check_same

CONSOLE, LOCK = "console.txt", "console.lock"
OBJECTS = 80 * 2**20  # bytes of Ray's object store: nothing large is passed


def sweep(
    points: Mapping[str, Settings],
    folder: Path,
    console: Console,
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_run: float | None = None,
    retries: int = 1,
) -> dict[str, str]:
    """Train every point that is not complete, in `folder`/NAME, or where a run of the same settings lies in `folder`
    under another name. Returns, by the point's name, why it failed.

    address: of a Ray cluster ("auto" finds it), None starts one on this machine. workers: runs at a time; by default
    one for each core, or for each share of a GPU. gpus_per_run: may be a fraction; by default 1 where there are any.
    A point that dies or raises is tried again `retries` times, from its last checkpoint; one that says `ValueError`
    would only say it again. Raises `ValueError`, before anything starts, where a folder holds a run of other settings,
    and where a run would be more than one process or of a float network.
    """
    if any(settings.devices * settings.num_nodes > 1 for settings in points.values()):
        raise ValueError("a run of a sweep is one process: --devices and --num-nodes must be 1")
    if not all(settings.quantize for settings in points.values()):
        raise ValueError("a sweep compares accumulators, and a float network has none: quantize must be true")
    hashes = {file: fingerprint(file) for file in {settings.checkpoint for settings in points.values()}}
    points = {
        name: replace(settings, out=str(folder / name), checkpoint_sha256=hashes[settings.checkpoint])
        for name, settings in points.items()
    }
    points = _found(points, folder)
    todo = {name: settings for name, settings in points.items() if not _complete(Path(settings.out), settings)}
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{len(points)} points, {len(points) - len(todo)} complete: {folder}", highlight=False, markup=False)
    failures: dict[str, str] = {}
    if todo:
        with _ray(address, workers) as ray, _bar(console, len(points), len(todo)) as bar:
            workers, threads, gpus = _shares(ray, todo, workers, gpus_per_run)
            for name, failure in _outcomes(ray, todo, workers, threads, gpus, retries):
                if failure:
                    failures[name] = failure
                else:
                    _say(bar.console, name, Path(todo[name].out))
                bar.advance(bar.task_ids[0])
    write_index(folder)
    return failures


def _found(points: Mapping[str, Settings], folder: Path) -> dict[str, Settings]:
    """The points, each in the folder that holds its run: a grid in another order, or with values in another spelling,
    calls the same points by other names.
    """
    new = {name for name, settings in points.items() if not (Path(settings.out) / "config.yaml").exists()}
    there: dict[str, Path] = {}
    for file in sorted(folder.glob("*/config.yaml")) if new else ():
        if file.parent.name not in points:
            with suppress(ValueError):  # a damaged one is nobody's
                there.setdefault(RunFolder(file.parent).settings().same_run(), file.parent)
    return {
        name: replace(settings, out=str(there.get(settings.same_run(), settings.out))) if name in new else settings
        for name, settings in points.items()
    }


def _complete(folder: Path, settings: Settings) -> bool:
    """Whether that run has its result. Raises `ValueError` where anything was computed there with other settings."""
    run = RunFolder(folder)
    if run.complete or run.last_checkpoint():
        check_same(run.settings(), asdict(settings), folder)
    return run.complete


# Ray -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str | None, workers: int | None) -> Iterator[Any]:
    """The module, connected; it says only what is wrong, and calls nobody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would starve a sweep beside other work
    import ray

    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:  # "local" starts a cluster even where the environment names another one
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECTS}
        options["num_cpus"] = max(cores(), workers or 1)
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address!r} (see docs/sweeps.md): {first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _shares(
    ray: Any, todo: Mapping[str, Settings], workers: int | None, gpus_per_run: float | None
) -> tuple[int, int, float]:
    """Runs at a time, threads of each, and GPUs of each."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    if gpus_per_run is None:
        gpus_per_run = float(gpus > 0 and any(settings.device != "cpu" for settings in todo.values()))
    if gpus_per_run > gpus:
        raise ValueError(f"--gpus-per-run {gpus_per_run:g} can never be met: there are {gpus:g}")
    workers = workers or int(gpus / gpus_per_run if gpus_per_run else cores) or 1
    widest = max(node.get("CPU", 0) for node in nodes)
    return workers, max(1, int(min(cores // workers, widest))), gpus_per_run


def _outcomes(
    ray: Any, todo: Mapping[str, Settings], workers: int, threads: int, gpus: float, retries: int
) -> Iterator[tuple[str, str | None]]:
    """Names of points as they end, and why they failed, if they did; never more than `workers` at a time."""
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries, retry_exceptions=True)(_train)
    waiting, running = iter(todo.items()), dict[Any, str]()
    while True:
        while len(running) < workers and (point := next(waiting, None)):
            name, settings = point
            if not gpus and settings.device == "auto":
                settings = replace(settings, device="cpu")  # Ray hides no GPU from a run that asks for none
            running[task.options(name=name).remote(os.getcwd(), settings, threads)] = name
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        try:
            failure = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            failure = f"{type(error.cause).__name__}: {error.cause}"
        except ray.exceptions.RayError as error:
            failure = f"{type(error).__name__}: {error}"
        yield running.pop(done), failure


def _train(cwd: str, settings: Settings, threads: int) -> str | None:
    """One point, on a worker, from where its folder stops. Returns what the user can put right."""
    import torch

    from accaware.experiments import job

    os.chdir(cwd)
    torch.set_num_threads(threads)
    run = RunFolder(Path(settings.out))
    with _locked(run.path) as file:
        print(f"process {os.getpid()} on {platform.node()}, {threads} threads, of {_node()}", file=file, flush=True)
        if not run.complete and run.last_checkpoint() is None:
            run.create(settings)
        try:
            job.resume(run.path, asdict(settings), Console(file=file, width=120))
        except ValueError as error:
            print(error, file=file)
            return str(error)
        except BaseException:
            traceback.print_exc(file=file)
            raise
    return None


def _node() -> str:
    import ray

    return f"Ray node {ray.get_runtime_context().get_node_id()}"


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """What the run says, a file that only one process has at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK), (folder / CONSOLE).open("a") as file:  # released with the process, however it ends
        yield file


# What the user sees --------------------------------------------------------------------------------------------------


@contextmanager
def _bar(console: Console, total: int, todo: int) -> Iterator[Progress]:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    bar = Progress(TextColumn("points"), *columns, console=console, disable=not console.is_terminal)
    bar.add_task("points", total=total, completed=total - todo)
    with bar:
        yield bar


def _say(console: Console, name: str, folder: Path) -> None:
    (run,) = read_runs([folder])
    console.print(f"{name}: {run.shown}, {run.result['seconds']:.0f} s", highlight=False, markup=False, soft_wrap=True)
