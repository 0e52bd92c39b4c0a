"""Points of a sweep: every combination once, with names that people can read; nothing impossible starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from accaware.experiments.grid import parse, points
from accaware.experiments.settings import Settings, read_recipe, refuse_unread, setting
from cli_helpers import fails


def test_every_combination_is_a_point() -> None:
    found = points(parse(["method=a2q,projected", "acc-bits=9..10", "lr=0.1"]), {"epochs": 3.0})
    assert found["method=a2q,acc_bits=10,lr=0.1"] == Settings(method="a2q", acc_bits=("10",), lr=0.1, epochs=3.0)
    assert list(found) == [f"method={m},acc_bits={p},lr=0.1" for m in ("a2q", "projected") for p in (9, 10)]


def test_a_baseline_is_trained_once_for_all_accumulators() -> None:
    grid = parse(["method=baseline,projected", "acc_bits=9..16", "tile=none,64", "seed=0..1"])
    found = points(grid, {"acc_bits": ("12", "head=20")})
    assert len(found) == 2 + 2 * 8 * 2
    assert found["method=baseline,seed=1"] == Settings(method="baseline", acc_bits=("32",), seed=1)
    assert found["method=projected,acc_bits=9,tile=64,seed=0"].acc_bits == ("9", "head=20")


def test_a_baseline_beside_methods_with_a_free_preload_has_none() -> None:
    found = points({"method": ["projected", "baseline"]}, {"preload": "free"})
    assert found["method=baseline"] == points({"method": ["baseline"]}, {})["method=baseline"]
    assert found["method=projected"].preload == "free"
    with pytest.raises(ValueError, match="preload 'free' needs method 'projected', not 'baseline'"):
        points({"seed": ["0"]}, {"method": "baseline", "preload": "free"})


def test_an_option_that_some_points_read_is_no_mistake() -> None:
    refuse_unread(["tile", "outer_bits"], list(points({"tile": ["none", "64"]}, {"outer_bits": 20}).values()))


def test_a_baseline_keeps_what_the_grid_does_not_vary() -> None:
    assert points({"method": ["baseline"]}, {"acc_bits": ("12",)})["method=baseline"].acc_bits == ("12",)
    assert list(points({"acc_bits": ["9", "10"]}, {"method": "baseline"})) == ["baseline"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("seed", "--grid must be KEY=V1,V2 or KEY=LO..HI, not 'seed'"),
        ("seed=", "--grid must be KEY=V1,V2"),
        ("seed=0,,1", "--grid must be KEY=V1,V2"),
        ("seed=0,0", "--grid seed=0,0: a value is given twice"),
        ("seed=3..1", "a range needs LO <= HI"),
        ("seed=0..100000", "at most 100000 values"),
        ("out=a,b", "out makes no points: it does not say"),
        ("colour=red", "unknown setting 'colour'"),
        ("command=ptq", "command makes no points"),
        ("seed=one", "seed must be an integer, not 'one'"),
        ("epochs=x", "epochs must be a number, not 'x'"),
        ("acc_bits=9..40", "point acc_bits=33: acc_bits must lie in [2, 32], not 33"),
        ("method=projected,a2q", "point method=a2q: preload 'free' needs method 'projected', not 'a2q'"),
        ("devices=1,2", "devices makes no points"),
        ("algorithm=budgeted,axe-gptq", "a sweep trains, and train has no setting 'algorithm'"),
        ("max-length=8,9", "a sweep trains, and train has no setting 'max_length'"),
        ("seed=0,00", "--grid seed=0,00: a value is given twice"),
        ("lr=0.01,1e-2", "a value is given twice"),
        ("outer_bits=20,24", "outer_bits would change nothing: it needs a tile"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    grid: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(["sweep", "--grid", grid, "--preload", "free", "--out", "sweep"], capsys)
    assert not Path("sweep").exists()


def test_more_points_than_anybody_wants_are_refused() -> None:
    numbers = [str(n) for n in range(400)]
    with pytest.raises(ValueError, match="more than 100000 points"):
        points({"seed": numbers, "calib": numbers[1:]}, {})


def test_two_points_never_share_a_folder() -> None:
    with pytest.raises(ValueError, match="two points are called model=a_b:c"):
        points({"model": ["a/b:c", "a_b:c"]}, {})


# Recipes


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("acc_bits", 12, ("12",)),
        ("acc_bits", [12, "head=20"], ("12", "head=20")),
        ("keep", "conv1=8", ("conv1=8",)),
        ("lr", 1, 1.0),
        ("lr", "1e-3", 0.001),
        ("tile", "none", None),
        ("tile", None, None),
        ("tile", "64", 64),
        ("data_dir", "a/b", "a/b"),
        ("method", "a2q+", "a2q+"),
    ],
)
def test_a_value_takes_the_type_of_its_setting(name: str, value: object, expected: object) -> None:
    found = setting(name, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("a: [", "while parsing"),
        ("1: 2", "unknown setting 1"),
        ("learning_rate: 1", "unknown setting 'learning_rate'"),
        ("batch_size: 1.5", "batch_size must be an integer, not 1.5"),
        ("batch_size: true", "batch_size must be an integer, not True"),
        ("method: 3", "method must be text, not 3"),
        ("algorithm: axe-gptq", "train has no setting 'algorithm'"),
    ],
)
def test_a_bad_recipe_is_named(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    shown = fails(["sweep", str(file), "--grid", "seed=0", "--out", str(tmp_path / "sweep")], capsys)
    assert shown.startswith(f"accaware: recipe {file}")
    assert message in shown


def test_a_recipe_is_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 1e-2\nacc_bits: 12\nepochs: 3\n")
    assert read_recipe(tmp_path / "recipe.yaml") == {"lr": 0.01, "acc_bits": ("12",), "epochs": 3.0}
