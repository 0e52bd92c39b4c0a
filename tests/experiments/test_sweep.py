"""Sweeps on Ray: killed and gone on with, on two nodes, and with points that fail."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import accaware
from accaware.cli import run
from accaware.experiments.results import read_runs
from accaware.experiments.runs import RunFolder
from accaware.experiments.settings import Settings
from accaware.experiments.sweep import _found, _locked, _shares
from cli_helpers import fails

pytest.importorskip("ray", reason="a sweep needs Ray")
LIMIT = 100  # seconds
POINTS = 8  # more than two workers can end while their driver dies


def environment() -> dict[str, str]:
    source = str(Path(accaware.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def two_cores() -> None:
    """A run on one thread, as the run that it is compared with."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


@contextmanager
def sweeping(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "accaware", "sweep", *words, "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), preexec_fn=two_cores, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def sweep(*words: str) -> tuple[int, str, str]:
    with sweeping(*words) as process:
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def under_way(folder: Path) -> list[Path]:
    """Runs with a checkpoint that have no result."""
    found = (file.parents[1] for file in folder.glob("*/checkpoints/step-*.ckpt"))
    return sorted({path for path in found if not RunFolder(path).complete})


def complete(folder: Path) -> dict[Path, int]:
    """When the results were written."""
    return {file.parent: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}


def attempts(folder: Path) -> list[int]:
    """The processes that trained in this folder, as its console.txt says."""
    return [int(pid) for pid in re.findall(r"^process (\d+) on", (folder / "console.txt").read_text(), re.MULTILINE)]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def without_time(folder: Path) -> list[list[str]]:
    return [line.split(",")[:-1] for line in (folder / "log.csv").read_text().splitlines()]


def test_a_killed_sweep_goes_on_and_repeats_nothing(options: list[str]) -> None:
    """First the driver is killed, then, in the same sweep resumed, a worker."""
    options += ["--epochs", "12", "--acc-bits", "12"]
    words = [*options, "--grid", f"seed=0..{POINTS - 1}", "--out", "sweep"]
    folder = Path("sweep")
    with sweeping(*words) as driver:
        wait_for(lambda: complete(folder) and under_way(folder), driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    pids = [attempts(path)[-1] for path in under_way(folder)]
    deadline = time.monotonic() + LIMIT
    while any(map(alive, pids)):  # Ray ends the workers of a driver that is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before, halves = complete(folder), under_way(folder)
    assert 0 < len(before) < POINTS
    with sweeping(*words) as driver:
        fresh = lambda: [p for p in under_way(folder) if p not in halves and len(attempts(p)) == 1]  # noqa: E731
        wait_for(fresh, driver)
        (victim, *_) = fresh()
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, attempts(victim)[0]) == own, "work beside it would starve the sweep"
        os.kill(attempts(victim)[0], signal.SIGKILL)
        out, err = driver.communicate(timeout=LIMIT)
        assert (driver.returncode, err) == (0, ""), out
    assert f"{POINTS} points, {len(before)} complete: sweep" in out
    after = complete(folder)
    assert {path.name for path in after} == {f"seed={seed}" for seed in range(POINTS)}
    assert {path: after[path] for path in before} == before
    for seed in range(POINTS):
        assert run(["train", *options, "--seed", str(seed), "--out", f"whole/{seed}"]) == 0
        one, two = folder / f"seed={seed}", Path(f"whole/{seed}")
        assert without_time(one) == without_time(two)
        assert len(attempts(one)) == 1 + (one in halves) + (one == victim)
    assert [run.value for run in read_runs([folder])] == [run.value for run in read_runs([Path("whole")])]


@contextmanager
def ray_node(*words: str) -> Iterator[None]:
    """`ray start` in the foreground, so that it can be stopped without stopping anybody else's."""
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block", "--num-cpus=1"]
    limits = ["--object-store-memory=80000000", "--disable-usage-stats"]
    command = [*ray, *limits, *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment(), start_new_session=True, **quiet) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_two_nodes_run_one_sweep(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # nobody else gets into this cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        head = ("--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={temporary}")
        stack.enter_context(ray_node(*head))
        deadline = time.monotonic() + LIMIT
        while not listens(int(address.split(":")[1])):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stack.enter_context(ray_node(f"--address={address}"))
        code, out, err = sweep(*options, "--grid", "seed=0..3", "--out", "sweep", "--address", address)
        assert (code, err) == (0, ""), out
    assert len(read_runs([Path("sweep")])) == 4
    nodes = {re.findall(r"Ray node (\w+)", file.read_text())[-1] for file in Path("sweep").glob("*/console.txt")}
    assert len(nodes) == 2


def test_a_point_that_fails_is_tried_again_and_the_others_go_on(options: list[str]) -> None:
    """The process dies twice in one network and once in another; a third one can be put right by its user only."""
    with Path("tiny_nets.py").open("a") as file:
        file.write(
            "\nimport os\ndef dies(times, name):\n"
            "    open(name, 'a').write('x')\n    if len(open(name).read()) <= times: os._exit(1)\n    return net()\n"
            "def once(): return dies(1, 'once')\ndef always(): return dies(99, 'always')\n"
        )
    Path("recipe.yaml").write_text(yaml.safe_dump({"epochs": 0.4, "lr": 0.1, "seed": 3}))
    words = [word for word in options if word not in ("--epochs", "2")]
    grid = "model=tiny_nets:net,tiny_nets:once,tiny_nets:always,tiny_nets:number"
    code, out, err = sweep("recipe.yaml", *words, "--grid", grid, "--out", "sweep")
    assert code == 1, out
    first, second = sorted(err.splitlines())
    assert first.startswith("accaware: model=tiny_nets:always failed: WorkerCrashedError")
    assert second == (
        "accaware: model=tiny_nets:number failed: model 'tiny_nets:number' returned int, not a torch.nn.Module"
    )
    assert {path.name for path in complete(Path("sweep"))} == {"model=tiny_nets:net", "model=tiny_nets:once"}
    assert (Path("once").read_text(), Path("always").read_text()) == ("xx", "xx")
    config = yaml.safe_load(Path("sweep/model=tiny_nets:net/config.yaml").read_text())
    assert (config["lr"], config["seed"], config["epochs"]) == (0.005, 3, 0.4)  # options win over the recipe


# Without Ray


def test_a_complete_sweep_starts_nothing(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options += ["--epochs", "0.2"]
    assert run(["train", *options, "--seed", "1", "--out", "sweep/seed=1"]) == 0
    capsys.readouterr()
    words = ["sweep", *options, "--grid", "seed=1", "--out", "sweep"]
    assert run([*words, "--address", "127.0.0.1:1"]) == 0
    assert capsys.readouterr().out == "1 points, 1 complete: sweep\n"
    assert Path("sweep/index.parquet").exists()
    message = "run folder sweep/seed=1 was made with --lr 0.005, not 0.5"
    assert message in fails([*words, "--lr", "0.5"], capsys)
    assert "a run of a sweep is one process" in fails([*words, "--devices", "2"], capsys)
    assert "quantize must be true" in fails([*words[:1], *words[-4:], "--no-quantize"], capsys)


def test_a_grid_in_another_order_finds_its_runs(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options += ["--epochs", "0.2"]
    for bits, seed in (("12", "1"), ("13", "0")):
        out = f"sweep/acc_bits={bits},seed={seed}"
        assert run(["train", *options, "--acc-bits", bits, "--seed", seed, "--out", out]) == 0
    Path("sweep/damaged").mkdir()
    Path("sweep/damaged/config.yaml").write_text("a: [")
    capsys.readouterr()
    words = ["sweep", *options, "--out", "sweep", "--address", "127.0.0.1:1"]
    assert run([*words, "--grid", "seed=01", "--grid", "acc_bits=12"]) == 0
    assert capsys.readouterr().out == "1 points, 1 complete: sweep\n"
    folder, new = Path("sweep"), Settings(out="sweep/x")
    assert _found({"x": new}, folder) == {"x": new}
    Path("sweep/acc_bits=13,seed=0/result.json").unlink()  # half-done
    half = replace(RunFolder(folder / "acc_bits=13,seed=0").settings(), out="sweep/x")
    assert _found({"x": half}, folder)["x"].out == "sweep/acc_bits=13,seed=0"


def test_a_checkpoint_that_changed_makes_another_run(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_nets

    torch.save(tiny_nets.net().state_dict(), "w.pt")
    options += ["--epochs", "0.2"]
    assert run(["train", *options, "--checkpoint", "w.pt", "--seed", "1", "--out", "sweep/seed=1"]) == 0
    kept = RunFolder(Path("sweep/seed=1")).settings().checkpoint_sha256
    assert kept == hashlib.sha256(Path("w.pt").read_bytes()).hexdigest()
    assert "sha256" not in Path("sweep/seed=1/config.yaml").read_text().splitlines()[1]
    Path("w.pt").rename("moved.pt")
    resume = ["train", "--resume", "--out", "sweep/seed=1"]
    sweep = ["sweep", *options, "--grid", "seed=1", "--out", "sweep", "--address", "127.0.0.1:1", "--checkpoint"]
    assert run(resume) == run([*resume, "--checkpoint", "moved.pt"]) == run([*sweep, "moved.pt"]) == 0
    torch.save(tiny_nets.net().state_dict(), "moved.pt")
    now = hashlib.sha256(Path("moved.pt").read_bytes()).hexdigest()
    message = "run folder sweep/seed=1 was made with another --checkpoint than moved.pt: "
    message += f"sha256 {kept[:16]}..., not {now[:16]}..."
    assert message in fails([*sweep, "moved.pt"], capsys)
    assert message in fails([*resume, "--checkpoint", "moved.pt"], capsys)
    assert "checkpoint w.pt does not exist" in fails([*sweep, "w.pt"], capsys)
    result, config = Path("sweep/seed=1/result.json"), Path("sweep/seed=1/config.yaml")
    result.rename("result.json")
    Path("moved.pt").rename("w.pt")
    assert message.replace("moved.pt", "w.pt") in fails(resume, capsys)
    Path("result.json").rename(result)
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "sha256" not in line))  # a folder from before
    assert run([*sweep, "w.pt"]) == 0


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    """By a lock of the system, which ends with the process."""
    with _locked(tmp_path / "run"), pytest.raises(BlockingIOError), (tmp_path / "run" / "console.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "run" / "console.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("cores", "gpus", "device", "workers", "gpus_per_run", "expected"),
    [
        ([8], [], "auto", None, None, (8, 1, 0)),
        ([8], [], "auto", 3, None, (3, 2, 0)),
        ([2], [], "auto", 5, None, (5, 1, 0)),
        ([16], [2], "auto", None, None, (2, 8, 1)),
        ([16], [2], "auto", None, 0.25, (8, 2, 0.25)),
        ([16], [2], "cpu", None, None, (16, 1, 0)),
        ([16], [2], "auto", None, 0.0, (16, 1, 0)),
        ([4, 4, 8], [], "auto", 1, None, (1, 8, 0)),  # a run is on one node
    ],
)
def test_runs_share_cores_and_gpus(
    cores: list[int],
    gpus: list[int],
    device: str,
    workers: int | None,
    gpus_per_run: float | None,
    expected: tuple[int, int, float],
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in cores]
    nodes += [{"Alive": True, "Resources": {"GPU": count}} for count in gpus]
    nodes.append({"Alive": False, "Resources": {"CPU": 99}})
    cluster = SimpleNamespace(nodes=lambda: nodes)
    assert _shares(cluster, {"a": Settings(device=device)}, workers, gpus_per_run) == expected
    with pytest.raises(ValueError, match="--gpus-per-run 9 can never be met"):
        _shares(cluster, {}, workers, 9)
