"""What several parts of the tests share: data, a model and options that are small enough to train in a second."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; pytest-xdist uses the cores

TINY = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 3),
    )

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))

def number():
    return 7
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache that no other test sees; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "accaware"


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like CIFAR-10's, with 96 training and 40 test images; never written to."""
    from experiments.helpers import random_images, write_parquet

    folder = tmp_path_factory.mktemp("cifar")
    train = random_images(96, 1)
    write_parquet(folder / "train-00000-of-00002.parquet", train.rows(slice(50)))
    write_parquet(folder / "train-00001-of-00002.parquet", train.rows(slice(50, None)))
    write_parquet(folder / "test-00000-of-00001.parquet", random_images(40, 2))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model factory, in a module of the current folder."""
    (tmp_path / "tiny_nets.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_nets", raising=False)
    return "tiny_nets:net"


@pytest.fixture
def ptq_options(cifar: Path, tiny: str, cache: Path) -> list[str]:
    """Options of `ptq` for tiny data and the tiny model."""
    words = "--calib 32 --keep 0=8 --keep 8=8 --device cpu"
    return ["--data-dir", str(cifar), "--model", tiny, *words.split()]


@pytest.fixture
def options(ptq_options: list[str]) -> list[str]:
    """Options of a run that takes a second: 12 steps of 16 images."""
    words = "--batch-size 16 --epochs 2 --checkpoint-every 4 --lr 0.005 --scale-lr 0.01"
    return [*ptq_options, *words.split()]


@pytest.fixture(scope="session")
def browser() -> str:
    """The program that shows pages; without it the test skips."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found or pytest.skip("needs Chromium to open the page")


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Finds a file of the shared data, or skips: ACCAWARE_SHARED, else the folder `shared` beside the repository."""

    def find(name: str) -> Path:
        beside = Path(__file__).parents[2] / "shared"
        path = Path(os.environ.get("ACCAWARE_SHARED", beside)) / name
        if not path.exists():
            pytest.skip(f"needs {name}, which is not part of the repository (set ACCAWARE_SHARED)")
        return path

    return find
