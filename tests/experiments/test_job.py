"""Whole runs on tiny data: what the run folder holds, what a resumed run gives, what distributed processes share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import accaware as aa
from accaware.certify.certificate import Certificate
from accaware.certify.model import certify
from accaware.cli import run
from accaware.experiments.job import find_device, load_run
from accaware.experiments.runs import RunFolder
from cli_helpers import fails
from experiments.helpers import imagenet_folder

RESULT = {
    "metric": str,
    "top1": float,
    "float_top1": float,
    "split": str,
    "holds": bool,
    "method": str,
    "weight_bits": int,
    "act_bits": int,
    "acc_bits": int,
    "bits_needed": int,
    "sparsity": float,
    "zero_channels": int,
    "epochs": float,
    "steps": int,
    "seed": int,
    "seconds": float,
    "model": str,
    "classes": int,
    "data": str,
    "hardware": dict,
    "versions": dict,
}


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def log_without_seconds(folder: Path) -> list[list[str]]:
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.split(",")[:-1] for line in lines]


def same_weights(one: Path, two: Path) -> bool:
    a, b = RunFolder(one).model_state(), RunFolder(two).model_state()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "accaware", *words]


def environment() -> dict[str, str]:
    source = str(Path(aa.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def test_a_run_folder_holds_what_the_contract_says(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *options, "--acc-bits", "12", "--out", "a"]) == 0
    folder = Path("a")
    names = {"config.yaml", "result.json", "certificate.json", "model.safetensors", "checkpoints", "log.csv"}
    assert {p.name for p in folder.iterdir()} - {"tensorboard"} == names
    got = result(folder)
    assert {name: type(got[name]) for name in RESULT} == RESULT
    assert got.keys() == RESULT.keys() | {"commit"}
    assert (got["metric"], got["split"], got["acc_bits"], got["steps"], got["classes"]) == ("top1", "test", 12, 12, 3)
    assert got["holds"] is True
    certificate = Certificate.load(folder / "certificate.json")
    assert certificate.holds
    assert got["bits_needed"] == certificate.bits_needed <= 12
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["command"], config["acc_bits"], config["normalize"]) == ("train", ["12"], "imagenet")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000012.ckpt"]
    assert [row[0] for row in log_without_seconds(folder)] == ["step", "10", "12"]
    assert f"top-1 {got['top1']:.2f} % (test), proven to fit 12 bits" in capsys.readouterr().out


def test_the_model_of_a_run_comes_back(options: list[str]) -> None:
    assert run(["train", *options, "--out", "a", "--epochs", "0.5"]) == 0
    certificate, kept = certify(load_run(Path("a"))), Certificate.load("a/certificate.json")
    assert certificate.sha256 == kept.sha256
    inside = [(op.name, op.lo, op.hi) for op in certificate.inside]
    assert inside == [(op.name, op.lo, op.hi) for op in kept.inside]


def test_a_validation_run_says_so(options: list[str]) -> None:
    assert run(["train", *options, "--out", "a", "--epochs", "0.2", "--val-size", "20"]) == 0
    assert result(Path("a"))["split"] == "val"


def test_ptq_writes_the_same_files_without_training(ptq_options: list[str]) -> None:
    assert run(["ptq", *ptq_options, "--out", "a"]) == 0
    got = result(Path("a"))
    assert (got["holds"], got["epochs"], got["steps"]) == (True, 0, 0)
    assert RESULT.keys() <= got.keys()
    assert yaml.safe_load(Path("a/config.yaml").read_text())["command"] == "ptq"
    load_run(Path("a"))


def test_ptq_that_is_stopped_leaves_nothing(
    ptq_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training could go on in what it left, with its own defaults and without the integers of ptq."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("accaware.experiments.job.certify", stop)
        assert run(["ptq", *ptq_options, "--out", "a"]) == 130
    assert not Path("a").exists()
    assert run(["ptq", *ptq_options, "--out", "a"]) == 0
    Path("a/result.json").unlink()  # killed in its last moment, or by an earlier version
    message = fails(["train", "--resume", "--out", "a"], capsys)
    assert message == "accaware: run folder a is a run of ptq, which never stops halfway: repeat it\n"


def test_true_options_may_be_said_again(tmp_path: Path, cache: Path, tiny: str) -> None:
    """Also one that would be impossible beside the defaults of the others."""
    words = ["--data", "folder", "--data-dir", str(imagenet_folder(tmp_path / "data")), "--model", tiny]
    words += ["--image-size", "30", "--resize", "31", "--batch-size", "4", "--epochs", "0.4", "--device", "cpu"]
    assert run(["train", *words, "--out", "a"]) == 0
    assert run(["train", "--resume", "--out", "a", "--resize", "31"]) == 0


def test_a_model_that_cannot_take_the_images_is_named(
    tmp_path: Path, cache: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "folder", "--data-dir", str(imagenet_folder(tmp_path / "data")), "--model", tiny]
    message = fails(
        ["train", *words, "--image-size", "64", "--out", "a", "--device", "cpu", "--batch-size", "4"], capsys
    )
    assert "model 'tiny_nets:net' cannot take inputs [2, 3, 64, 64]: mat1 and mat2 shapes" in message
    assert not Path("a").exists()


def test_a_score_that_is_no_number_is_no_result(
    ptq_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter((50.0, float("nan")))
    monkeypatch.setattr("accaware.experiments.job.evaluate", lambda *_: next(scores))
    assert "top-1 of the quantized network is nan" in fails(["ptq", *ptq_options, "--out", "a"], capsys)
    assert not Path("a").exists()


def test_a_damaged_run_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *options, "--epochs", "0.2", "--out", "a"]) == 0
    weights, config = Path("a/model.safetensors"), Path("a/config.yaml")
    whole, said = weights.read_bytes(), config.read_text()
    config.write_text(said.replace("image_size: 32", "image_size: 64"))  # which nothing read, once
    assert run(["certify", "a"]) == 0
    weights.write_bytes(whole[:100])
    for words in (["certify", "a"], ["export", "a", "-o", "a.onnx"]):
        assert "a/model.safetensors is damaged: " in fails(words, capsys)
    weights.write_bytes(whole)
    config.write_text(
        said.replace("tiny_nets:net", "tiny_nets:narrow").replace("- 0=8", "- 1=8").replace("- 8=8\n", "")
    )
    assert "a/model.safetensors is of another network: " in fails(["certify", "a"], capsys)
    Path("a/result.json").write_text("{}")
    assert "a/result.json is damaged: it lacks 'classes'" in fails(["certify", "a"], capsys)


@pytest.mark.parametrize("method", ["a2q", "a2q+", "baseline"])
def test_every_method_trains(options: list[str], method: str) -> None:
    assert run(["train", *options, "--out", "a", "--epochs", "0.4", "--method", method]) == 0


def test_distillation_changes_the_weights_and_the_seed_repeats_them(options: list[str]) -> None:
    options += ["--epochs", "0.5"]
    assert run(["train", *options, "--out", "a"]) == 0
    assert run(["train", *options, "--out", "b"]) == 0
    assert run(["train", *options, "--out", "c", "--distill", "1"]) == 0
    assert run(["train", *options, "--out", "d", "--seed", "1"]) == 0
    assert same_weights(Path("a"), Path("b"))
    assert not same_weights(Path("a"), Path("c"))
    assert not same_weights(Path("a"), Path("d"))


def test_a_killed_run_goes_on_to_the_same_weights(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in the middle of the second epoch; Dropout and momentum make it notice any difference."""
    options += ["--epochs", "20"]
    killed = subprocess.Popen(
        command("train", *options, "--out", "killed"), env=environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(Path("killed/checkpoints").glob("step-*.ckpt")) and time.monotonic() < deadline:
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    last = RunFolder(Path("killed")).last_checkpoint()
    assert last is not None
    step = int(last.stem.removeprefix("step-"))
    assert 0 < step < 120
    assert not Path("killed/result.json").exists()
    assert run(["train", "--resume", "--out", "killed"]) == 0
    assert run(["train", *options, "--out", "whole"]) == 0
    assert same_weights(Path("killed"), Path("whole"))
    assert log_without_seconds(Path("killed")) == log_without_seconds(Path("whole"))
    capsys.readouterr()
    assert run(["train", "--resume", "--out", "killed"]) == 0
    assert capsys.readouterr().out == "killed is complete\n"


def test_a_run_killed_before_its_first_checkpoint_starts_again(options: list[str]) -> None:
    assert run(["train", *options, "--out", "whole"]) == 0
    assert run(["train", *options, "--out", "killed", "--epochs", "1"]) == 0
    for name in ("result.json", "checkpoints/step-00000006.ckpt"):
        Path("killed", name).unlink()
    config = Path("killed/config.yaml")
    config.write_text(config.read_text().replace("epochs: 1.0", "epochs: 2.0"))
    assert run(["train", "--resume", "--out", "killed"]) == 0
    assert same_weights(Path("killed"), Path("whole"))


def test_two_processes_train_one_model(options: list[str]) -> None:
    """The same one, whether we start them or torchrun does, as recipes/README.md says."""
    words = ["train", *options, "--devices", "2", "--epochs", "0.5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, line in (("ours", command(*words)), ("torchrun", [*torchrun, "-m", "accaware", *words])):
        line += ["--out", name]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 2
        assert result(Path(name))["holds"] is True
    assert same_weights(Path("ours"), Path("torchrun"))


def test_every_process_of_a_host_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert str(find_device("auto")) == str(find_device("cuda")) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(find_device("auto")) == str(find_device("cuda")) == "cuda:3"
    assert (str(find_device("cuda:1")), str(find_device("cpu"))) == ("cuda:1", "cpu")
