"""Short runs of what the paper's experiments need: float training, super-resolution, recipes, ImageNet in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from accaware.certify.certificate import Certificate
from accaware.certify.model import certify
from accaware.cli import run
from accaware.experiments.job import load_run
from accaware.experiments.models import build
from accaware.experiments.runs import RunFolder
from accaware.experiments.settings import read_recipe
from experiments.helpers import bsds_folder, imagenet_folder
from test_cli import fails

RECIPES = Path(__file__).parents[2] / "recipes"


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def steps(name: str) -> list[str]:
    return (Path(name) / "log.csv").read_text().splitlines()


@pytest.mark.usefixtures("cache")
def test_a_float_network_is_trained_and_then_quantized(cifar: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shared = ["--data-dir", str(cifar), "--device", "cpu", "--calib", "16", "--batch-size", "16"]
    recipe = str(RECIPES / "quick" / "cifar10-mobilenetv1-float.yaml")
    words = ["--recipe", recipe, "--width", "0.25", "--val-size", "30", "--epochs", "0.5", "--out", "float"]
    assert run(["train", *shared, *words]) == 0
    got = result(Path("float"))
    assert (got["method"], got["holds"], got["acc_bits"], got["bits_needed"]) == ("float", False, None, None)
    assert (got["split"], got["metric"], got["model"]) == ("val", "top1", "mobilenetv1")
    assert not Path("float/certificate.json").exists()
    assert run(["train", "--resume", "--out", "float"]) == 0
    load_run(Path("float"))
    words = ["--model", "mobilenetv1", "--width", "0.25", "--normalize", "cifar10", "--epochs", "0.2", "--out", "quant"]
    words += ["--checkpoint", "float/model.safetensors", "--val-size", "30", "--equalize", "--bias-correct"]
    assert run(["train", *shared, *words, "--method", "a2q+", "--depthwise-method", "a2q+", "--init", "ep"]) == 0
    quant = result(Path("quant"))
    assert quant["float_top1"] == got["top1"]
    assert quant["holds"] is True
    layers = {layer.name: layer.method for layer in Certificate.load("quant/certificate.json").inside}
    assert set(layers.values()) == {"a2q+"}
    config = yaml.safe_load(Path("quant/config.yaml").read_text())
    assert (config["width"], config["equalize"], config["bias_correct"]) == (0.25, True, True)
    assert certify(load_run(Path("quant"))).sha256 == Certificate.load("quant/certificate.json").sha256


@pytest.mark.parametrize("model", ["espcn", "unet"])
def test_super_resolution_is_trained_and_judged_in_decibels(
    model: str, tmp_path: Path, cache: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(RECIPES / "quick" / f"bsds300-{model}.yaml")
    words = ["--recipe", recipe, "--data-dir", str(bsds_folder(tmp_path / "data")), "--batch-size", "2"]
    words += ["--epochs", "1", "--calib", "1", "--image-size", "12", "--acc-bits", "14", "--device", "cpu"]
    assert run(["train", *words, "--out", "a"]) == 0
    got = result(Path("a"))
    assert (got["metric"], got["float_psnr"], got["holds"], got["steps"], got["classes"]) == (
        "psnr",
        None,
        True,
        3,
        None,
    )
    assert 0 < got["psnr"] < 60
    assert "top1" not in got
    assert f"PSNR {got['psnr']:.2f} dB (test), proven to fit 14 bits" in capsys.readouterr().out
    assert steps("a")[0] == "step,epoch,loss,penalty,psnr,lr,seconds"
    assert certify(load_run(Path("a"))).sha256 == Certificate.load("a/certificate.json").sha256


@pytest.mark.usefixtures("cache")
def test_the_recipe_of_imagenet_starts_trains_and_certifies(tmp_path: Path, monkeypatch: Any) -> None:
    """The paper's ResNet50 on three classes of a few small images, from a state dict like torchvision's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = build("resnet50", 3)
    for name, p in network.named_parameters():
        p.requires_grad_(False).mul_(0.2 if name.endswith("bn3.weight") else 1)  # as if trained: tame residuals
    torch.save(network.state_dict(), "resnet50.pth")
    words = ["--recipe", str(RECIPES / "paper" / "imagenet-resnet50.yaml"), "--device", "cpu"]
    words += ["--data-dir", str(imagenet_folder(tmp_path / "data")), "--image-size", "64", "--resize", "72"]
    words += ["--batch-size", "4", "--epochs", "1", "--calib", "4", "--method", "a2q+", "--acc-bits", "16"]
    words += ["--lr", "1e-7"]  # gradients of a network this deep that was never trained explode
    assert run(["train", *words, "--checkpoint", "resnet50.pth", "--out", "a"]) == 0
    got = result(Path("a"))
    assert (got["holds"], got["steps"], got["classes"], got["metric"]) == (True, 3, 3, "top1")
    certificate = Certificate.load("a/certificate.json")
    assert [op.name for op in certificate.operations if op.name in ("conv1", "fc") and op not in certificate.inside]
    assert len(certificate.inside) == 52  # 53 convolutions and one linear layer, less the first and the last


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "name",
    [
        *(f"paper/cifar10-{model}{kind}" for model in ("resnet18", "mobilenetv1") for kind in ("", "-float")),
        *("paper/imagenet-resnet18", "paper/imagenet-resnet34", "paper/bsds300-espcn", "paper/bsds300-unet"),
        *("quick/cifar10-resnet18", "quick/cifar10-resnet20", "quick/cifar10-mobilenetv1"),
        *("quick/bsds300-espcn-float", "quick/bsds300-unet-float"),
    ],
)
def test_a_recipe_starts_trains_and_certifies(name: str, cifar: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Two steps from random weights, as the recipe says but for the sizes; those not listed have tests of their own."""
    monkeypatch.chdir(tmp_path)
    file = RECIPES / f"{name}.yaml"
    recipe = read_recipe(file)
    words = ["--recipe", str(file), "--device", "cpu", "--acc-bits", "16", "--batch-size", "4", "--calib", "4"]
    if recipe["data"] == "cifar10":
        words += ["--data-dir", str(cifar), "--epochs", str(2 * 4 / 96), "--init", recipe.get("init", "none")]
    elif recipe["data"] == "imagenet":
        words += ["--data-dir", str(imagenet_folder(tmp_path / "data")), "--epochs", str(2 * 4 / 12)]
        words += ["--image-size", "48", "--resize", "56", "--lr", "1e-7"]  # a network that was never trained explodes
    else:
        words += ["--data-dir", str(bsds_folder(tmp_path / "data")), "--image-size", "12", "--epochs", "2"]
        words += ["--val-size", "1"] if recipe.get("val_size") else []
    if recipe.get("quantize", True):
        words += ["--method", "a2q+"]
        if recipe["data"] != "bsds300":
            torch.manual_seed(0)
            torch.save(build(recipe["model"], 3, recipe.get("width", 1.0)).state_dict(), "float.pth")
            words += ["--checkpoint", "float.pth"]
    assert run(["train", *words, "--out", "a"]) == 0
    got = result(Path("a"))
    assert (got["steps"], got["holds"], got["model"]) == (2, recipe.get("quantize", True), recipe["model"])
    assert len(steps("a")) > 1


@pytest.mark.usefixtures("cache")
def test_options_win_over_the_recipe(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text("epochs: 0.2\nacc_bits: [12, '3=14']\nlr: 1e-3\nequalize: true\nseed: 3\n")
    words = [word for word in options if word not in ("--epochs", "2")]
    assert run(["train", *words, "--recipe", "r.yaml", "--seed", "4", "--out", "a"]) == 0
    settings = RunFolder(Path("a")).settings()
    assert (settings.epochs, settings.acc_bits, settings.lr) == (0.2, ("12", "3=14"), 0.005)
    assert (settings.seed, settings.equalize) == (4, True)
    message = fails(["ptq", *words[:-8], "--recipe", "r.yaml", "--out", "b"], capsys)
    assert message == "accaware: recipe r.yaml: ptq has no setting 'epochs'\n"
    assert (
        run(["ptq", *words[:-8], "--recipe", "a/config.yaml", "--out", "b"]) == 0
    )  # a run's configuration serves both
    assert RunFolder(Path("b")).settings().acc_bits == ("12", "3=14")
    Path("r.yaml").write_text("epoch: 1\n")
    message = fails(["train", *words, "--recipe", "r.yaml", "--out", "c"], capsys)
    assert message == "accaware: recipe r.yaml: unknown setting 'epoch'\n"
    assert "recipe no.yaml cannot be read" in fails(["train", *words, "--recipe", "no.yaml", "--out", "c"], capsys)


@pytest.mark.parametrize("option", ["--equalize", "--bias-correct"])
def test_each_step_of_the_initialisation_has_its_effect(ptq_options: list[str], option: str) -> None:
    words = ["ptq", *ptq_options, "--algorithm", "projection"]
    assert run([*words, "--out", "plain"]) == 0
    assert run([*words, option, "--out", "other"]) == 0
    one, two = (RunFolder(Path(name)).model_state() for name in ("plain", "other"))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    # 0, 1 and 3 are a convolution, its batch-norm and the next convolution; 8 is the only layer with a bias.
    assert {"1.weight", "3.weight"} <= changed if option == "--equalize" else changed == {"8.bias"}


def test_a_run_repeats_from_its_own_configuration(options: list[str]) -> None:
    assert run(["train", *options, "--epochs", "0.4", "--out", "a"]) == 0
    assert run(["train", "--recipe", "a/config.yaml", "--out", "b"]) == 0
    first, second = result(Path("a")), result(Path("b"))
    assert first["top1"] == second["top1"]
    assert RunFolder(Path("b")).settings().out == "b"
