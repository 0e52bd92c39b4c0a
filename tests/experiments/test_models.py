"""The built-in models, and models by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accaware.experiments.batches import EvalBatches
from accaware.experiments.checkpoints import load_weights
from accaware.experiments.data import load
from accaware.experiments.images import NORMALIZATIONS
from accaware.experiments.models import build
from accaware.experiments.models.resnet_cifar import Shortcut
from accaware.experiments.training import evaluate
from accaware.layers import QuantIdentity

LAYERS = {"resnet20": (20, 0.27), "resnet32": (32, 0.46), "resnet44": (44, 0.66), "resnet56": (56, 0.85)}


@pytest.mark.parametrize("name", LAYERS)
def test_depth_and_size_are_those_of_the_paper(name: str) -> None:
    """Table 6 of He et al."""
    model = build(name, 10)
    depth = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert (depth, round(millions, 2)) == LAYERS[name]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_residual_stream_is_marked_after_the_stem_and_every_block() -> None:
    names = [name for name, m in build("resnet20", 10).named_modules() if isinstance(m, QuantIdentity)]
    blocks = [f"layer{stage}.{block}.out_quant" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert names == ["out_quant", *blocks]


def test_the_shortcut_is_option_a() -> None:
    x = torch.randn(2, 4, 5, 5)
    got = Shortcut(4, 8, 2)(x)
    assert got.shape == (2, 8, 3, 3)
    assert torch.equal(got[:, 2:6], F.avg_pool2d(x, 1, 2))
    assert not got[:, :2].any()
    assert not got[:, 6:].any()


def test_the_number_of_classes_is_that_of_the_data() -> None:
    assert build("resnet20", 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_factory_is_found_in_the_current_folder(tiny: str) -> None:
    assert isinstance(build(tiny, 10), nn.Sequential)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet99", "unknown model 'resnet99'; built in are resnet20, .*, or give package.module:factory"),
        ("no.such:net", "model 'no.such:net' cannot be built: ModuleNotFoundError"),
        ("tiny_nets:missing", "model 'tiny_nets:missing' cannot be built: AttributeError"),
        ("tiny_nets:number", "model 'tiny_nets:number' returned int, not a torch.nn.Module"),
        (":net", "model ':net' cannot be built: ValueError"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_what_is_no_model_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 10)


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_the_published_weights_have_their_places(name: str, shared: Callable[[str], Path]) -> None:
    load_weights(build(name, 10), shared(f"checkpoints/{name}_cifar10.safetensors"))


@pytest.mark.usefixtures("cache")
def test_the_published_weights_give_their_accuracy(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """On the first 500 test images; 91.73 % on all of them."""
    rows = pq.read_table(shared("data/cifar10/test-00000-of-00001.parquet")).slice(0, 500)
    for split in ("train", "test"):
        pq.write_table(rows, tmp_path / f"{split}-0.parquet")
    images = load("cifar10", tmp_path).evaluation
    model = build("resnet20", 10)
    load_weights(model, shared("checkpoints/resnet20_cifar10.safetensors"))
    accuracy = evaluate(model, EvalBatches(images, 100, NORMALIZATIONS["imagenet"]), torch.device("cpu"))
    assert accuracy == pytest.approx(92.2, abs=0.5)
