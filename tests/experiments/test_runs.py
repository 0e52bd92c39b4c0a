"""The run folder and what a result says about its origin."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
import torch

import accaware
from accaware.experiments.runs import RunFolder, commit, hardware, versions
from accaware.experiments.settings import Settings


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.require_new()
    run.path.mkdir()
    run.require_new()
    (run.path / "notes").touch()
    with pytest.raises(ValueError, match=r"run folder .*run exists and is not empty; --out takes another one$"):
        run.require_new()
    for command, hint in (("ptq", "and is not empty; --out takes another one"), ("train", "train --resume continues")):
        run.create(Settings(command=command))
        with pytest.raises(ValueError, match=f"run folder .*run exists.*{hint}"):
            run.require_new()
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(run.path / "notes").require_new()


def test_a_folder_that_cannot_be_made_is_found_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run cannot be made: .*file is no folder that can be written to"):
        RunFolder(tmp_path / "file" / "deep" / "run").require_new()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"run folder run cannot be made: {tmp_path} is no folder that"):
        RunFolder(Path("run")).require_new()


def test_the_configuration_is_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("accaware.experiments.runs.write_whole", full)
    with pytest.raises(OSError, match="full"):
        RunFolder(tmp_path / "run").create(Settings())
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"metric": "top1"}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json is damaged: "):
        RunFolder(tmp_path).result()


def test_a_result_is_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).write_result({"top1": float("nan")})


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    run, settings = RunFolder(tmp_path / "run"), Settings(acc_bits=("12", "a=13"), lr=1e-5, out="run")
    run.create(settings)
    assert run.settings() == settings
    lines = (run.path / "config.yaml").read_text().splitlines()
    assert lines[1] == f"#   {settings.command_line()}"


@pytest.mark.parametrize("text", ["a: [", "[1, 2]", "unknown: 1", "lr: -1", ""])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        RunFolder(tmp_path).settings()


def test_the_last_checkpoint_is_the_one_with_most_steps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.last_checkpoint() is None
    run.create(Settings())
    for step in (900, 1000, 80):
        (run.checkpoints / f"step-{step:08d}.ckpt").touch()
    last = run.last_checkpoint()
    assert last is not None
    assert last.name == "step-00001000.ckpt"


def test_shared_tensors_are_written_under_every_name(tmp_path: Path) -> None:
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"a": shared, "b": shared})
    RunFolder(tmp_path).write_model(model, {})
    state = RunFolder(tmp_path).model_state()
    assert set(state) == set(model.state_dict())
    assert torch.equal(state["b.weight"], shared.weight)


def test_hardware_and_versions_say_something() -> None:
    found = hardware(torch.device("cpu"))
    assert found["cores"] >= 1
    assert found["cpu"]
    assert found["gpu"] is None
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert versions()["accaware"] == accaware.__version__


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_tracked_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "__init__.py"
    code.write_text("")
    monkeypatch.setattr(accaware, "__file__", str(code))
    assert commit() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody else's repository")
    assert commit() is None
    git(tmp_path, "add", "__init__.py")
    git(tmp_path, "commit", "-q", "-m", "ours")
    git(tmp_path, "tag", "v1")
    assert commit() == git(tmp_path, "rev-parse", "HEAD")
    code.write_text("changed = 1")
    assert commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
