"""Weights from files, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accaware.experiments.checkpoints import load_weights


class Net(nn.Sequential):
    def __init__(self, width: int = 3) -> None:
        super().__init__(nn.Linear(2, width), nn.BatchNorm1d(width))


def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand_like(t) if t.is_floating_point() else t + 3 for name, t in Net().state_dict().items()}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}


@pytest.mark.parametrize(("name", "wrap"), [("w.safetensors", dict), ("w.pt", dict), ("w.th", nested)])
def test_weights_arrive(tmp_path: Path, name: str, wrap: Any) -> None:
    model = Net()
    load_weights(model, write(tmp_path / name, wrap(state())))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state()[key])


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    tensors = state()
    del tensors["1.num_batches_tracked"]
    load_weights(Net(), write(tmp_path / "w.pt", tensors))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 5, 100, -8])
def test_truncated_files_are_named(tmp_path: Path, name: str, keep: int) -> None:
    path = write(tmp_path / name, state())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"checkpoint .*{name} is damaged or no state dict"):
        load_weights(Net(), path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .*w.pt does not exist"):
        load_weights(Net(), tmp_path / "w.pt")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "w.pt", Net())
    with pytest.raises(ValueError, match="damaged or no state dict"):
        load_weights(Net(), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": 5}, {1: torch.zeros(1)}])
def test_other_contents_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        load_weights(Net(), write(tmp_path / "w.pt", content))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", state())
    with pytest.raises(ValueError, match=r"0.weight has shape \(3, 2\), the model needs \(4, 2\)"):
        load_weights(Net(4), path)
    with pytest.raises(ValueError, match=r"holds 1\.bias, which the model does not have"):
        load_weights(nn.Sequential(nn.Linear(2, 3)), path)
    with pytest.raises(ValueError, match=r"lacks 2\.weight"):
        load_weights(nn.Sequential(*Net(), nn.Linear(3, 1)), path)


@pytest.mark.parametrize(("name", "value"), [("0.weight", "nan"), ("0.weight", "-inf"), ("1.running_var", "nan")])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, name: str, value: str) -> None:
    tensors = state()
    tensors[name].view(-1)[0] = float(value)
    with pytest.raises(ValueError, match=rf"checkpoint .*w\.pt: {name} holds numbers that are not finite"):
        load_weights(Net(), write(tmp_path / "w.pt", tensors))


def test_a_buffer_may_be_infinite(tmp_path: Path) -> None:
    tensors = state()
    tensors["1.running_mean"][0] = float("-inf")
    load_weights(Net(), write(tmp_path / "w.pt", tensors))


def test_nothing_is_loaded_where_something_does_not_fit(tmp_path: Path) -> None:
    model = nn.Sequential(*Net(), nn.Linear(3, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="lacks"):
        load_weights(model, write(tmp_path / "w.pt", state()))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
