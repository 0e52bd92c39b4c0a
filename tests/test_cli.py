"""The command line: every mistake is one line on stderr and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import accaware
from accaware import cli
from accaware.cli import run
from cli_helpers import fails


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "resnet99"], "unknown model 'resnet99'"),
        (["--checkpoint", "no.pt"], "checkpoint no.pt does not exist"),
        (["--checkpoint", "half.safetensors"], "checkpoint half.safetensors is damaged"),
        (["--checkpoint", "other.safetensors"], "other.safetensors: 0.weight has shape (1, 1), the model needs (4, 3"),
        (["--data-dir", "nowhere"], "data folder nowhere does not exist"),
        (["--data-dir", "empty"], "data folder empty holds no train-*.parquet"),
        (["--data-dir", "corrupt"], "train-0.parquet cannot be read"),
        (["--data", "mnist"], "unknown data 'mnist'"),
        (["--weight-bits", "9"], "weight_bits must lie in [2, 8], not 9"),
        (["--act-bits", "0"], "act_bits must lie in [1, 8], not 0"),
        (["--acc-bits", "40"], "acc_bits"),
        (["--acc-bits", "conv*=12"], "acc_bits: no layer matches 'conv*'"),
        (["--keep", "conv*=8"], "keep: no layer matches 'conv*'"),
        (["--method", "magic"], "method must be one of projected"),
        (["--batch-size", "97"], "batch_size must lie in [1, 96]"),
        (["--val-size", "96"], "val_size must lie in [0, 95]"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used: it must be auto, cpu, mps, cuda or cuda:NUMBER"),
        (["--device", "cpu:0"], "device 'cpu:0' cannot be used"),
        (["--precision", "transformer-engine"], "precision must be one of 32-true, "),
        (["--checkpoint", "numbered.pt"], "checkpoint numbered.pt holds no state dict of tensors"),
        (["--image-size", "64"], "image_size would change nothing: it needs data imagenet, folder or bsds300"),
        (
            ["--model", "resnet20", "--keep", "conv1=8", "--distill", "1"],
            "distill needs the weights of a trained model",
        ),
        (["--out", "other.safetensors/run"], "run folder other.safetensors/run cannot be made: "),
        (["--model", "tiny_nets:narrow"], "keep: no layer matches '0'"),
        (["--acc-bits", "12", "--acc-bits", "13"], "acc_bits is given twice without a layer pattern: 12, 13"),
        (["--epochs", "many"], "Invalid value for '--epochs'"),
        (["--bogus"], "No such option"),
        (["--resume"], "run folder run holds no run (no config.yaml)"),
    ],
)
def test_mistakes(
    options: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    torch.save({1: torch.zeros(1)}, "numbered.pt")
    save_file({"0.weight": torch.zeros(1, 1)}, "other.safetensors")
    Path("half.safetensors").write_bytes(Path("other.safetensors").read_bytes()[:-1])
    Path("empty").mkdir()
    Path("corrupt").mkdir()
    Path("corrupt/train-0.parquet").write_text("not parquet")
    before = {p.name for p in tmp_path.iterdir()}
    assert message in fails(["train", *options, "--out", "run", *change], capsys)
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}


def test_an_accumulator_that_no_weight_fits_names_the_layer(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(["train", *options, "--acc-bits", "3=2", "--out", "run"], capsys)
    assert message.startswith("accaware: 3: ")
    assert "acc_bits=2" in message
    assert not Path("run").exists()


def test_a_run_folder_in_use_is_not_touched(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/precious").write_text("data")
    for name in ("train", "ptq"):
        words = options if name == "train" else ["--model", "tiny_nets:net"]
        assert "run folder run exists" in fails([name, *words, "--out", "run"], capsys)
    assert [p.name for p in Path("run").iterdir()] == ["precious"]


def test_options_that_contradict_the_run_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *options, "--epochs", "0.2", "--out", "run"]) == 0
    message = fails(["train", "--resume", "--out", "run", "--lr", "0.5"], capsys)
    assert "run folder run was made with --lr 0.005, not 0.5" in message
    assert run(["train", "--resume", "--out", "run", "--epochs", "0.2", "--devices", "1"]) == 0


def test_a_damaged_training_checkpoint_is_named(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *options, "--epochs", "0.2", "--out", "run"]) == 0
    Path("run/result.json").unlink()
    checkpoint = next(Path("run/checkpoints").iterdir())
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    assert checkpoint.name in fails(["train", "--resume", "--out", "run"], capsys)


def test_ptq_of_an_untrained_built_in_model_is_refused(cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(["ptq", "--data-dir", str(cifar), "--model", "resnet20", "--out", "run"], capsys)
    assert "ptq needs the weights of a trained model: --checkpoint" in message


def test_a_full_disk_is_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accaware.experiments.runs, "write_whole", full)  # type: ignore[attr-defined]
    assert "No space left on device" in fails(["train", *options, "--epochs", "0.2", "--out", "run"], capsys)


def full(path: Path, content: bytes | str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_disk_that_fills_up_while_training_loses_nothing(options: list[str]) -> None:
    """A limit on the size of files stands for the disk: the checkpoint is the first file that is larger."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    assert run(["train", *options, "--epochs", "0.2", "--out", "warm"]) == 0  # fills the cache
    environment = {**os.environ, "PYTHONPATH": str(Path(accaware.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "accaware", "train", *options, "--out", "run"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if "font_manager" not in line]  # other libraries keep caches too
    assert len(ours) == 1
    assert ours[0].startswith("accaware: run/")
    assert not list(Path("run").rglob("*.ckpt*"))
    assert run(["train", "--resume", "--out", "run"]) == 0


def test_a_run_that_diverges_says_so(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *options, "--method", "baseline", "--lr", "1e30", "--epochs", "20", "--out", "wild"]
    assert re.search(r"training diverged: at step \d+ the loss is (nan|inf); try a smaller --lr", fails(words, capsys))
    assert not Path("wild/result.json").exists()


def test_mistakes_before_any_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'nope'" in fails(["nope"], capsys)
    assert "Missing option '--out'" in fails(["train"], capsys)
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "ptq" in shown
    assert run(["train", "--help"]) == 0
    assert "--acc-bits" in capsys.readouterr().out


def test_a_missing_library_says_how_to_install_it(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr("accaware.experiments.job.load", load)
    message = fails(["train", *options, "--out", "run"], capsys)
    assert "pyarrow is not installed; pip install 'accaware[all]'" in message


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    assert run(["train"]) == 130
    assert capsys.readouterr().err == "accaware: interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("a bug", name="accaware.no")])
def test_our_own_mistakes_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a code of their own: 1 is an answer."""

    def broken(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", broken)
    assert run(["train"]) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("a bug\n")


def test_a_traceback_may_be_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCAWARE_TRACEBACK", "1")
    assert run(["train", "--out", "run", "--lr", "-1"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("accaware: lr must be a positive number, not -1.0\n")


def test_help_imports_neither_torch_nor_lightning() -> None:
    heavy = "{'torch', 'lightning'} & set(sys.modules)"
    code = f"import sys; from accaware.cli import run; run(['train', '--help']); print({heavy})"
    environment = {**os.environ, "PYTHONPATH": str(Path(accaware.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")


def test_the_console_script_is_there() -> None:
    script = shutil.which("accaware", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("accaware is not installed here, only on the path")
    assert subprocess.run([script, "--help"], capture_output=True, check=True).stdout
