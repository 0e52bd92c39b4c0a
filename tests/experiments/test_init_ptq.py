"""Training that starts from post-training quantization."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accaware as aa
from accaware.cli import run
from accaware.experiments.grid import parse, points
from accaware.experiments.job import load_run
from accaware.experiments.runs import RunFolder
from accaware.experiments.training import KeepLast
from accaware.ptq.model import reconstruct
from cli_helpers import fails


def integers(folder: str) -> np.ndarray:
    return np.concatenate([layer.rows.ravel() for layer in aa.integer_layers(load_run(Path(folder)))])


@pytest.mark.parametrize("method", ["projected", "baseline"])
def test_training_starts_from_the_integers_of_ptq(options: list[str], ptq_options: list[str], method: str) -> None:
    """A learning rate that moves nothing ends where it starts."""
    words = ["--acc-bits", "9", "--method", method]
    assert run(["ptq", *ptq_options, *words, "--out", "ptq"]) == 0
    words += ["--lr", "1e-12"]
    assert run(["train", *options, *words, "--init", "ptq", "--out", "trained"]) == 0
    assert run(["train", *options, *words, "--out", "search"]) == 0
    assert np.array_equal(integers("trained"), integers("ptq"))
    assert not np.array_equal(integers("search"), integers("ptq"))


def test_a_resumed_run_is_not_initialised_again(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)
        reconstruct(*args, **options)

    def killed(self: KeepLast, *args: Any) -> None:
        keep(self, *args)
        if RunFolder(Path("killed")).last_checkpoint():
            raise RuntimeError("killed")

    monkeypatch.setattr(aa, "reconstruct", counted)
    words = ["train", *options, "--acc-bits", "9", "--init", "ptq"]
    assert run([*words, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        keep = KeepLast.on_train_batch_end
        patch.setattr(KeepLast, "on_train_batch_end", killed)
        assert run([*words, "--out", "killed"]) == 70
    shutil.copytree("killed", "earlier")
    for file in Path("earlier/checkpoints").iterdir():
        file.unlink()
    assert len(calls) == 2
    assert run(["train", "--resume", "--out", "killed"]) == 0
    assert len(calls) == 2
    assert run(["train", "--resume", "--out", "earlier"]) == 0
    assert len(calls) == 3
    whole = RunFolder(Path("whole")).model_state()
    for name in ("killed", "earlier"):
        state = RunFolder(Path(name)).model_state()
        assert all(torch.equal(state[key], whole[key]) for key in whole)


def test_where_it_cannot_start_is_said_in_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *options, "--init", "ptq", "--out", "no"]
    assert "init 'ptq' needs method projected or baseline, not 'a2q+'" in fails([*words, "--method", "a2q+"], capsys)
    assert "projected or baseline, not 'a2q'" in fails([*words, "--depthwise-method", "a2q"], capsys)
    assert "init 'ptq' corrects biases itself" in fails([*words, "--bias-correct"], capsys)
    assert "init 'ptq' quantizes; quantize cannot be false" in fails([*words, "--no-quantize"], capsys)
    assert "init 'ptq' needs the weights of a trained model" in fails([*words, "--model", "resnet20"], capsys)
    assert "ptq itself takes algorithm 'budgeted'" in fails(["ptq", "--init", "ptq", "--out", "no"], capsys)
    assert not Path("no").exists()


def test_a_sweep_compares_it_with_others() -> None:
    found = points(parse(["init=search,ptq", "seed=0,1"]), {})
    assert [(point.init, point.seed) for point in found.values()] == [
        ("search", 0),
        ("search", 1),
        ("ptq", 0),
        ("ptq", 1),
    ]
    with pytest.raises(ValueError, match=r"point method=a2q,init=ptq: init 'ptq' needs method projected or baseline"):
        points(parse(["method=projected,a2q", "init=ptq"]), {})
