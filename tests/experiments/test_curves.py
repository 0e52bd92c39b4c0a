"""Records of runs, and the curves that they make; a run is made up of what the test is about."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml

from accaware.bounds import data_type_bits
from accaware.certify.certificate import Certificate, prove
from accaware.experiments import paper
from accaware.experiments.curves import BY_TYPE, EXACT, Curve, Group, bits_for, distances, groups
from accaware.experiments.results import as_csv, collected, read_runs, write_index
from accaware.formats import Accumulator, IntFormat
from accaware.integer.layer import IntegerLayer
from cli_helpers import fails
from experiments.helpers import made_up


def only(*runs: Any) -> Group:
    (group,) = groups(runs)
    return group


def values(curve: Curve) -> list[tuple[int, float]]:
    return [(point.bits, point.mean) for point in curve.points]


def test_a_point_is_the_mean_over_seeds_of_the_best_pair() -> None:
    small = [made_up(80 + seed, 10, weight_bits=3, seed=seed) for seed in range(3)]
    large = [made_up(value, 10, weight_bits=5, seed=seed) for seed, value in enumerate((90, 70, 80.5))]
    (curve,) = only(*large, *small, made_up(85, 11, weight_bits=3)).curves
    assert values(curve) == [(10, 81), (11, 85)]
    best = curve.points[0]
    assert (best.weight_bits, best.act_bits, best.choices, best.spread) == (3, 4, 2, stdev((80, 81, 82)))
    assert curve.points[1].spread is None


def test_what_is_tuned_along_with_a_setting_tells_no_more_curves() -> None:
    none = [made_up(76, 8, lr=0.02), made_up(80, 9, lr=0.01)]
    free = [made_up(77, 8, lr=0.04, preload="free"), made_up(81, 9, lr=0.02, preload="free")]
    curves = only(*none, *free).curves
    assert [(c.label, values(c)) for c in curves] == [
        ("projected", [(8, 76), (9, 80)]),
        ("projected, preload free", [(8, 77), (9, 81)]),
    ]
    (narrow, *_) = only(*none, *free, made_up(82, 9, lr=0.04, preload="free")).curves
    assert narrow.label == "projected, lr 0.02", "two rates at one point: the rates are curves"


def test_less_perplexity_is_better() -> None:
    runs = [made_up(value, 10, metric="perplexity", weight_bits=bits) for value, bits in ((30, 3), (20, 4))]
    group = only(*runs, made_up(25, 10, metric="perplexity", method="a2q+"))
    assert values(group.curves[0]) == [(10, 20)]
    assert distances(group) == []
    assert runs[0].shown.startswith("perplexity 30.00, proven")


def test_settings_that_differ_within_a_point_make_curves() -> None:
    first = [made_up(80, 10), made_up(70, 11, lr=0.2), made_up(75, 10, preload="free")]
    others = [made_up(60, 10, method="a2q+", init="ep"), made_up(61, 10, method="a2q+", acc_bits=["10", "conv1=20"])]
    group = only(*first, *others)
    assert [curve.label for curve in group.curves] == [
        "projected",
        "projected, preload free",
        "a2q+",
        "a2q+, acc_bits conv1=20",
    ]
    assert values(group.curves[0]) == [(10, 80), (11, 70)]  # lr differs between points only
    assert group.differing()["init"]["a2q+"] == ["ep", "search"], "listed, though acc_bits suffices to tell them apart"
    assert group.differing()["lr"] == {"projected": ["0.01", "0.2"], "a2q+": ["0.01"], "a2q": [], "baseline": []}


def test_runs_that_cannot_be_compared_make_groups() -> None:
    runs = [made_up(80, 10), made_up(81, 10, epochs=3.0), made_up(82, 10, split="val"), made_up(25, 10, metric="psnr")]
    runs += [made_up(80, 10, model="mobilenetv1", width=width) for width in (0.25, 1.0)]
    assert [group.title for group in groups(runs)] == [
        "resnet20 on cifar10, 1 epoch, test set",
        "resnet20 on cifar10, 3 epochs, test set",
        "resnet20 on cifar10, 1 epoch, val split",
        "resnet20 on cifar10, 1 epoch, test set",
        "mobilenetv1 x 0.25 on cifar10, 1 epoch, test set",
        "mobilenetv1 on cifar10, 1 epoch, test set",
    ]


def test_a_repeated_run_counts_once() -> None:
    group = only(made_up(80, 10), made_up(82, 10), made_up(90, 10, seed=1))
    assert (group.repeated, values(group.curves[0])) == (1, [(10, 85)])


def test_the_baseline_lies_at_two_widths() -> None:
    layers = [("a", 576, IntFormat.unsigned(4)), ("b", 64, IntFormat.signed(4))]

    def runs(known: list[Any]) -> list[Any]:
        return [made_up(90 + s, 32, known, method="baseline", bits_needed=14 + s, seed=s) for s in (0, 1)]

    exact, by_type = only(*runs(layers)).curves
    assert (exact.label, values(exact)) == (EXACT, [(15, 90.5)])
    assert (by_type.label, values(by_type)) == (
        BY_TYPE,
        [(data_type_bits(576, IntFormat.narrow(4), layers[0][2]), 90.5)],
    )
    assert [curve.label for curve in only(*runs([])).curves] == [EXACT]  # the types of unknown layers prove nothing


def test_distances_are_those_between_lines() -> None:
    ours = [made_up(80, 9), made_up(86, 10), made_up(90, 12)]
    theirs = [made_up(v, p, method="a2q+") for v, p in ((95, 16), (88, 14), (83, 11), (70, 10))]
    worse = [made_up(v, p, method="a2q+", init="ep") for v, p in ((50, 14), (69, 12))]  # not on the front
    found = [(d.bits, d.value, d.saved, d.at_least) for d in distances(only(*ours, *theirs, *worse))]
    assert found == [(16, 95, None, False), (14, 88, 3, False), (11, 83, 1.5, False), (10, 70, 1, True)]


def test_a_bound_that_says_nothing_is_left_out() -> None:
    """A curve that starts at the other's width, or at a wider one, and lies above it there."""
    theirs = [made_up(80, 10, method="a2q+"), made_up(85, 12, method="a2q+")]
    found = distances(only(made_up(81, 10), made_up(90, 12), *theirs))
    assert [(d.bits, d.saved, d.at_least) for d in found] == [(12, pytest.approx(12 - 10 - 8 / 9), False)]
    assert distances(only(made_up(90, 11), theirs[0])) == []
    assert [d.saved for d in distances(only(made_up(80, 10), theirs[0]))] == [0], "as good, and that is known"


def test_a_curve_that_sinks_is_met_where_it_first_reaches_the_value() -> None:
    assert bits_for([(9, 10.0), (10, 30.0), (11, 20.0), (12, 40.0)], 25) == 9.75
    assert bits_for([(9, 10.0)], 10) == 9
    assert bits_for([(9, 10.0)], 11) is None


# Papers


@pytest.mark.parametrize(
    ("model", "data", "metric", "sources"),
    [
        ("resnet18", "cifar10", "top1", [("ResNet18", 95.0), ("ResNet18", 95.0)]),
        ("resnet20", "cifar10", "top1", [("ResNet18", 95.0), ("ResNet18", 95.0)]),
        ("mobilenet_v1", "cifar10", "top1", [("MobileNetV1", 92.43)]),
        ("mobilenet", "cifar10", "top1", [("MobileNetV1", 92.43)]),
        ("resnet50", "imagenet", "top1", [("ResNet50", 76.13)]),
        ("espcn", "bsds300", "psnr", [("ESPCN", 24.91)]),
        ("unet", "folder", "psnr", [("U-Net", 25.37)]),
        ("my_nets:net", "cifar10", "top1", []),
    ],
)
def test_the_papers_network_is_found(model: str, data: str, metric: str, sources: list[tuple[str, float]]) -> None:
    group = only(made_up(25, 12, model=model, data=data, metric=metric))
    assert [(column.model, column.reference) for column in paper.beside(group)] == sources


def test_what_is_not_the_same_is_said() -> None:
    group = only(made_up(90, 12), made_up(90, 12, weight_bits=5, seed=1))
    pairs = {fact.name: (fact.here, fact.there) for fact in paper.compared(group, paper.COLUMNS[1])}
    assert pairs["model"] == ("resnet20", "ResNet18")
    assert pairs["epochs"] == ("1", "100")
    assert pairs["float network"] == ("91.73", "95.00")
    assert pairs["bits of weights, activations"][0] == "best of 4, 4; 5, 4"
    assert pairs["seeds"] == ("2", "3")


@pytest.mark.parametrize(
    ("model", "width", "data", "metric", "same"),
    [
        ("resnet18-cifar", 1.0, "cifar10", "top1", {"model", "data"}),
        ("mobilenetv1", 1.0, "cifar10", "top1", {"model", "data"}),
        ("mobilenetv1", 0.25, "cifar10", "top1", {"data"}),
        ("resnet20", 1.0, "cifar10", "top1", {"data"}),
        ("resnet50", 1.0, "folder", "top1", {"model"}),
        ("unet", 1.0, "bsds300", "psnr", {"model", "data"}),
    ],
)
def test_the_same_network_goes_by_other_names(model: str, width: float, data: str, metric: str, same: set[str]) -> None:
    group = only(made_up(25, 12, model=model, width=width, data=data, metric=metric))
    for column in paper.beside(group):
        found = {fact.name for fact in paper.compared(group, column) if fact.same}
        assert found & {"model", "data"} == same
        assert "epochs" not in found


# Files


def folder_of(path: Path, value: float, acc_bits: int) -> None:
    run = made_up(value, acc_bits)
    path.mkdir(parents=True)
    config = {**run.config, "data_dir": "/home/me/cifar", "out": str(path)}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "result.json").write_text(json.dumps(run.result))
    layer = IntegerLayer(
        "conv", "Linear", [[3, -2]], IntFormat.unsigned(4), Accumulator(acc_bits), 0, [1.0], 1.0, True, "projected"
    )
    Certificate(1, "x", "0" * 64, (prove(layer),)).save(path / "certificate.json")


def test_runs_come_back_from_folders_and_files(tmp_path: Path) -> None:
    for name, value, bits in (("b", 81.5, 10), ("a", 82.25, 11)):
        folder_of(tmp_path / "sweep" / name, value, bits)
    (tmp_path / "sweep" / "half").mkdir()
    folder_of(tmp_path / "sweep" / "float", 91.73, 12)
    nothing = {"method": "float", "acc_bits": None, "weight_bits": None, "act_bits": None, "bits_needed": None}
    result = {**made_up(91.73, 12).result, **nothing}
    (tmp_path / "sweep" / "float" / "result.json").write_text(json.dumps(result))
    (tmp_path / "sweep" / "float" / "certificate.json").unlink()
    runs = read_runs([tmp_path / "sweep"])
    assert [run.value for run in runs] == [82.25, 81.5]
    assert runs[0].config["data_dir"] == "cifar"
    assert runs[0].layers == [{"name": "conv", "fan_in": 2, "codes": [0, 15], "utilisation": 45 / 1023}]
    assert read_runs([tmp_path / "sweep" / "a"]) == runs[:1]
    (tmp_path / "runs.json").write_text(collected(runs))
    assert read_runs([tmp_path / "runs.json"]) == runs
    rows = list(csv.DictReader(as_csv(runs).splitlines()))
    assert [(row["top1"], row["acc_bits"], row["seed"]) for row in rows] == [("82.25", "11", "0"), ("81.5", "10", "0")]
    import pyarrow.parquet as pq

    write_index(tmp_path / "sweep")
    table = pq.read_table(tmp_path / "sweep" / "index.parquet").to_pylist()
    assert [(row["top1"], row["type_bits"]) for row in table] == [(run.value, run.type_bits) for run in runs]


def test_the_committed_results_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "results"
    runs = read_runs(sorted(folder.glob("*.json")))
    rows = [row["result"] for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]
    assert [run.value for run in runs] == [row[row["metric"]] for row in rows]
    assert fmean(run.value for run in runs) > 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none", None, "No such file"),
        ("empty.json", "[]", "empty.json holds no complete run of a quantized network"),
        ("half.json", '[{"config"', "half.json holds no collected runs"),
        ("other.json", '{"a": 1}', "other.json holds no collected runs"),
        ("nan.json", "NAN", "nan.json holds no collected runs: ValueError: top1 is not finite"),
        ("short.json", '[{"config": {}, "result": {"metric": "top1"}}]', "short.json holds no collected runs"),
    ],
)
def test_damaged_files_are_named(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text == "NAN":
        text = collected([made_up(80, 10)]).replace('"top1": 80', '"top1": NaN')
    if text is not None:
        (tmp_path / name).write_text(text)
    assert message in fails(["report", str(tmp_path / name)], capsys)


def test_damaged_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no complete run" in fails(["report", str(tmp_path)], capsys)
    folder_of(tmp_path / "a", 80, 10)
    (tmp_path / "a" / "certificate.json").write_text("{")
    assert f"run folder {tmp_path / 'a'} is damaged" in fails(["report", str(tmp_path)], capsys)
    assert "the suffix must be" in fails(["report", str(tmp_path), "-o", "x.pdf"], capsys)
