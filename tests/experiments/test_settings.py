"""Settings: patterns, ranges, and the way through a configuration file."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from accaware.experiments.settings import (
    FREE_ON_RESUME,
    PTQ_ONLY,
    TRAIN_ONLY,
    Settings,
    check_same,
    read_recipe,
    refuse_unread,
)

CHANGED = Settings(
    acc_bits=("12", "conv*=14"), keep=("conv1=8", "head=float"), lr=1e-5, data_dir="a b", tile=16, out="x"
)


def test_patterns_become_dictionaries() -> None:
    assert CHANGED.spec.acc_bits == 12
    assert CHANGED.acc_patterns == {"conv*": 14}
    assert CHANGED.keep_patterns == {"conv1": 8, "head": "float"}
    assert Settings(acc_bits=("a=b=9",)).acc_patterns == {"a=b": 9}
    assert Settings(acc_bits=("conv1=9",)).spec.acc_bits == 16


@pytest.mark.parametrize(
    "settings", [Settings(), CHANGED, Settings(quantize=False, equalize=True), Settings(command="ptq", out="y")]
)
def test_yaml_keeps_everything(settings: Settings) -> None:
    assert Settings.from_dict(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings


def test_the_command_line_names_what_is_not_the_default() -> None:
    words = shlex.split(CHANGED.command_line())
    assert words[:2] == ["accaware", "train"]
    pairs = list(zip(words[2::2], words[3::2], strict=True))
    assert pairs == [
        *(("--data-dir", "a b"), ("--acc-bits", "12"), ("--acc-bits", "conv*=14"), ("--tile", "16")),
        *(("--keep", "conv1=8"), ("--keep", "head=float"), ("--lr", "1e-05"), ("--out", "x")),
    ]


def test_the_command_line_says_what_is_on_and_off() -> None:
    words = shlex.split(Settings(quantize=False, equalize=True).command_line())
    assert words == ["accaware", "train", "--no-quantize", "--equalize"]


def test_the_lists_of_names_are_names() -> None:
    assert {f.name for f in fields(Settings)} >= FREE_ON_RESUME | TRAIN_ONLY | PTQ_ONLY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits must lie in \[2, 8\], not 1"),
        ({"act_bits": 9}, r"act_bits must lie in \[1, 8\], not 9"),
        ({"acc_bits": ("33",)}, r"acc_bits must lie in \[2, 32\], not 33"),
        ({"acc_bits": ("conv=1",)}, r"acc_bits must lie in \[2, 32\], not 1"),
        ({"acc_bits": ("x",)}, "acc_bits must be an integer, not 'x'"),
        ({"acc_bits": ("12", "13")}, "acc_bits is given twice without a layer pattern: 12, 13"),
        ({"acc_bits": ("=12",)}, "acc_bits must be PATTERN=VALUE, not '=12'"),
        ({"acc_bits": ("a=12", "a=13")}, "acc_bits says both 12 and 13 for 'a'"),
        ({"keep": ("conv1",)}, "keep must be PATTERN=VALUE, not 'conv1'"),
        ({"keep": ("conv1=7.5",)}, "keep must be PATTERN=8 or PATTERN=float, not 'conv1=7.5'"),
        ({"method": "magic"}, "method must be one of projected, .*, not 'magic'"),
        ({"init": "magic"}, "init must be one of search, ep, none, ptq, not 'magic'"),
        ({"normalize": "no"}, "normalize must be one of imagenet, cifar10, none, not 'no'"),
        (
            {"algorithm": "no"},
            "algorithm must be one of budgeted, axe-gptq, axe-gpfq, gptq, gpfq, projection, not 'no'",
        ),
        ({"epochs": 0.0}, "epochs must be a positive number, not 0.0"),
        ({"lr": float("nan")}, "lr must be a positive number, not nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"seed": -1}, rf"seed must lie in \[0, {2**63 - 1}\], not -1"),
        ({"seed": 2**64}, f"seed must lie in .*, not {2**64}"),
        ({"command": "ptq", "quantize": False}, "ptq quantizes; quantize cannot be false"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"batch_size": 2.5}, r"batch_size must be an integer, not 2\.5"),
        ({"seed": True}, "seed must be an integer, not True"),
        ({"equalize": "yes"}, "equalize must be true or false, not 'yes'"),
        ({"optimizer": "lamb"}, "optimizer must be one of sgd, adam, not 'lamb'"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 0\.999\], not 1\.0"),
        ({"crop_pad": 0.6}, r"crop_pad must lie in \[0, 0\.5\], not 0\.6"),
        ({"width": 0}, "width must be a positive number, not 0"),
        ({"resize": 31}, "resize must be at least 32, not 31"),
        ({"schedule": "x0.1"}, r"schedule must be cosine, constant, .*, not 'x0\.1'"),
        ({"schedule": "x0.1/0"}, r"schedule must be cosine, constant, .*, not 'x0\.1/0'"),
        ({"schedule": "x0.1@"}, r"schedule must be cosine, constant, .*, not 'x0\.1@'"),
        ({"depthwise_method": "magic"}, "depthwise_method must be one of projected, .*, not 'magic'"),
        ({"preload": "free", "depthwise_method": "a2q"}, "preload 'free' needs method 'projected', not 'a2q'"),
        ({"precision": "16-true"}, "precision must be one of 32-true, bf16-mixed, 16-mixed, .*, not '16-true'"),
        ({"warmup": 1.5}, r"warmup must lie in \[0, 1\], not 1.5"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, "image_size would change nothing: it needs data imagenet, folder or bsds300"),
        ({"resize": 40}, "resize would change nothing: it needs data imagenet or folder"),
        ({"data": "bsds300", "model": "espcn", "crop_pad": 0.1}, "crop_pad would change nothing"),
        ({"outer_bits": 20}, "outer_bits would change nothing: it needs a tile, which spills there"),
        ({"optimizer": "adam", "momentum": 0.5}, "momentum would change nothing: it needs optimizer sgd"),
        ({"quantize": False, "acc_bits": ("3",)}, "acc_bits would change nothing: it needs quantize"),
        ({"quantize": False, "keep": ("nothing=8",)}, "keep would change nothing: it needs quantize"),
        ({"quantize": False, "tile": 7}, "tile would change nothing: it needs quantize"),
        ({"command": "ptq", "max_length": 9}, "max_length would change nothing: it needs data sts or text"),
    ],
)
def test_what_nothing_reads_is_refused_where_it_is_said(change: dict[str, object], message: str) -> None:
    settings = Settings.from_dict(change)  # a run that was made so can still be read
    with pytest.raises(ValueError, match=message):
        refuse_unread(change, [settings])


def test_a_default_may_always_be_said() -> None:
    refuse_unread(["image_size", "momentum"], [Settings(optimizer="adam")])
    refuse_unread(["outer_bits"], [Settings(outer_bits=20, tile=64)])


def test_a_recipe_names_what_its_command_has(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("lr: 0.5")
    with pytest.raises(ValueError, match=r"^recipe .*r\.yaml: ptq has no setting 'lr'$"):
        read_recipe(tmp_path / "r.yaml", "ptq")
    (tmp_path / "r.yaml").write_text("algorithm: gptq")
    with pytest.raises(ValueError, match=r"^recipe .*r\.yaml: train has no setting 'algorithm'$"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("command: train\nlr: 0.5\nacc_bits: 12\n")  # the config.yaml of a run
    assert read_recipe(tmp_path / "r.yaml", "ptq") == {"acc_bits": ("12",)}


def test_the_same_run_elsewhere_is_the_same() -> None:
    assert CHANGED.same_run() == replace(CHANGED, out="y", device="cuda", checkpoint="moved").same_run()
    for change in ({"seed": 1}, {"acc_bits": ("12",)}, {"checkpoint_sha256": "0"}):
        assert CHANGED.same_run() != replace(CHANGED, **change).same_run()  # type: ignore[arg-type]


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown setting 'learning_rate'"):
        Settings.from_dict({"learning_rate": 1})


def test_only_where_a_run_computes_may_change() -> None:
    check_same(CHANGED, {"lr": 1e-5, "acc_bits": ("12", "conv*=14"), "device": "cuda", "devices": 4}, Path("x"))
    with pytest.raises(ValueError, match=r"run folder x was made with --batch-size 64, not 128"):
        check_same(CHANGED, {"lr": 1e-5, "batch_size": 128}, Path("x"))


def test_values_take_the_type_of_their_setting() -> None:
    """YAML 1.1 reads 1e-3 as text, and a width without quotes as a number."""
    settings = Settings.from_dict({"lr": "1e-3", "epochs": 3, "acc_bits": 12, "keep": ["a=8"], "tile": None})
    assert settings == Settings(lr=1e-3, epochs=3.0, acc_bits=("12",), keep=("a=8",))


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_the_recipes_are_there() -> None:
    names = {f"{file.parent.name}/{file.stem}" for file in RECIPES}
    paper = ["cifar10-resnet18", "cifar10-mobilenetv1", "bsds300-espcn", "bsds300-unet"]
    paper += [f"imagenet-resnet{depth}" for depth in (18, 34, 50)]
    assert names >= {f"paper/{name}" for name in paper} | {f"quick/{name}" for name in [*paper[:4], "cifar10-resnet20"]}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("bsds300-espcn", "bsds300-espcn"),
        ("bsds300-unet", "bsds300-unet"),
        ("cifar10-mobilenetv1", "cifar10-mobilenetv1-w4a4"),
        ("cifar10-resnet20", "cifar10-resnet20-init-ptq"),
    ],
)
def test_a_quick_recipe_is_that_of_the_results(name: str, rows: str) -> None:
    """Rates are of one method and width; with those rows it has the same."""
    recipe = read_recipe(ROOT / "recipes" / "quick" / f"{name}.yaml")
    found = [row["config"] for row in json.loads((ROOT / "results" / f"{rows}.json").read_text())]
    rate = recipe.pop("lr")
    assert all(row[key] == value for row in found for key, value in recipe.items())
    assert rate in {row["lr"] for row in found if row["method"] == "projected"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_recipe_is_a_valid_run(file: Path) -> None:
    Settings(**read_recipe(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown setting 'learning_rate'"),
        ("lr: fast", "lr must be a number, not 'fast'"),
        ("- lr", "holds no settings"),
        ("lr: [", "cannot be read: "),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "r.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=rf"^recipe .*r\.yaml:? .*{message}") as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)
