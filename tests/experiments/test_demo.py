"""The demo: its table is what the certificates prove, and its run folder is written whole or left alone."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import accaware as aa
from accaware.bounds import bits_needed
from accaware.experiments import demo
from accaware.experiments.demo import Row, Trained
from accaware.experiments.runs import RunFolder

WIDTHS = (16, 9)
CASES = [(method, bits) for bits in WIDTHS for method in demo.METHODS]


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    return demo.load_digits(0)


@pytest.fixture(scope="module")
def network(digits: demo.Digits) -> demo.DigitNet:
    return demo.float_network(digits, epochs=3, seed=0)


@pytest.fixture(scope="module")
def found(digits: demo.Digits, network: demo.DigitNet) -> list[Trained]:
    """Every method at two widths, trained for two epochs."""
    return list(demo.compare(network, digits, WIDTHS, 2, 0, demo.RATES))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "demo"


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, network: demo.DigitNet, found: list[Trained]) -> None:
    """The command trains nothing: what it would train is there already."""
    monkeypatch.setattr(demo, "float_network", lambda *_: network)
    monkeypatch.setattr(demo, "compare", lambda *_: iter(found))
    monkeypatch.setenv("COLUMNS", "80")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must fail."""
    capsys.readouterr()
    assert demo.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("accaware: ")
    assert message.count("\n") == 1
    return message


# data and networks


def test_the_parts_are_all_images_each_once_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn import datasets

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    parts = demo.load_digits(3)
    assert [len(part.labels) for part in parts] == [1000, 257, 540]
    got = [(*image.flatten().tolist(), int(label)) for part in parts for image, label in zip(*part, strict=True)]
    digits = datasets.load_digits()
    assert sorted(got) == sorted((*x / 16, y) for x, y in zip(digits.data, digits.target, strict=True))
    assert not torch.equal(parts.test.labels, demo.load_digits(4).test.labels)


def test_the_seed_decides_the_float_network(digits: demo.Digits) -> None:
    first, second, other = (demo.float_network(digits, 1, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_every_method_starts_from_the_float_network_and_leaves_it_alone(
    digits: demo.Digits, network: demo.DigitNet
) -> None:
    before = copy.deepcopy(network.state_dict())
    first, second = (next(demo.compare(network, digits, [8], 1, 0, {"projected": 0.1})) for _ in range(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert first.row == second.row
    assert first.certificate.sha256 == second.certificate.sha256


# rows


@pytest.mark.parametrize(("index", "case"), [*enumerate(CASES)])
def test_a_row_is_what_its_certificate_proves(found: list[Trained], index: int, case: tuple[str, int]) -> None:
    row, model, certificate = found[index]
    assert (row.method, row.acc_bits) == case
    assert {op.target.bits for op in certificate.inside if op.target} == {row.acc_bits}
    assert len(certificate.inside) == 5
    ends = [(min(op.lo), max(op.hi)) for op in certificate.inside]
    assert row.bits_needed == max(bits_needed(lo, hi) for lo, hi in ends)
    assert row.can_overflow == (row.bits_needed > row.acc_bits) == any(op.witness for op in certificate.inside)
    assert certificate.sha256 == aa.certify(model).sha256


def test_only_the_baseline_overflows_and_only_where_it_is_narrow(found: list[Trained]) -> None:
    assert [(t.row.method, t.row.acc_bits) for t in found if t.row.can_overflow] == [("baseline", 9)]
    assert all(t.row.wrapped == t.row.accuracy for t in found if not t.row.can_overflow)


def test_a_narrow_accumulator_is_survived_by_projection_alone(found: list[Trained]) -> None:
    rows = {t.row.method: t.row for t in found if t.row.acc_bits == 9}
    assert rows["baseline"].accuracy > 90 > 50 > rows["baseline"].wrapped
    assert rows["projected"].wrapped > 80 > 50 > max(rows["a2q"].wrapped, rows["a2q+"].wrapped)


def test_accuracies_are_of_their_own_part(found: list[Trained], digits: demo.Digits) -> None:
    for row, model, _ in found:
        for part, percent in ((digits.test, row.accuracy), (digits.validation, row.validation)):
            with torch.no_grad():
                answers = model(part.images).argmax(1)
            assert percent == round(100 * (answers == part.labels).double().mean().item(), 2)


# choice


def trained(acc_bits: int, validation: float, accuracy: float, can_overflow: bool = False) -> Trained:
    row = Row("projected", acc_bits, accuracy, acc_bits + can_overflow, can_overflow, accuracy, validation)
    return Trained(row, nn.Identity(), aa.Certificate(1, "test", "0" * 64, ()))


@pytest.mark.parametrize("accuracies", [(0, 0, 0, 0, 0), (99, 10, 10, 10, 99), (10, 99, 10, 99, 10)])
def test_the_best_is_the_narrowest_proven_network_that_is_close_on_validation(accuracies: tuple[int, ...]) -> None:
    wide, second, chosen, far, overflowing = (
        trained(16, 90.0, accuracies[0]),
        trained(10, 89.0, accuracies[1]),
        trained(10, 90.0 - demo.CLOSE / 4, accuracies[2]),
        trained(8, 90.0 - demo.CLOSE - 0.1, accuracies[3]),
        trained(6, 99.0, accuracies[4], can_overflow=True),
    )
    assert demo.best_of([wide, second, chosen, far, overflowing]) is chosen


def test_tuning_gives_every_method_the_same_grid_and_reads_validation_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(network: Any, data: Any, widths: Any, epochs: int, seed: int, rates: dict[Any, float]) -> list[Trained]:
        assert tuple(widths) == demo.ACC_BITS
        return [trained(16, 100 * rate + step, accuracy=0) for rate in rates.values() for step in (0, 1)]

    monkeypatch.setattr(demo, "float_network", lambda *_: None)
    monkeypatch.setattr(demo, "compare", compare)
    assert demo.main(["--tune"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    grid = [(method, rate) for method in demo.METHODS for rate in demo.GRID]
    assert [(line[0], float(line[2])) for line in printed] == grid
    assert [float(line[5]) for line in printed] == pytest.approx([100 * rate + 0.5 for _, rate in grid])
    assert tuple(demo.RATES) == demo.METHODS
    assert set(demo.RATES.values()) <= set(demo.GRID)


# what the user sees


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_every_row_in_full(found: list[Trained], columns: int) -> None:
    console = Console(width=columns)
    with console.capture() as capture:
        console.print(demo.table([t.row for t in found], 98.7))
    lines = capture.get().splitlines()
    assert "98.7 %" in lines[0]
    assert max(map(len, lines)) <= columns
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if re.match(r"│ +\d", line)]
    assert shown == [
        [
            str(row.acc_bits),
            row.method,
            f"{row.accuracy:.1f} %",
            f"{row.bits_needed} bits",
            "yes" if row.can_overflow else "no",
            f"{row.wrapped:.1f} %",
        ]
        for row, _, _ in found
    ]
    legend = demo.LEGEND.splitlines()
    assert [line.rstrip() for line in lines[-len(legend) :]] == legend


@pytest.mark.usefixtures("ready")
def test_the_run_folder_holds_the_table_the_proofs_and_the_best_network(
    out: Path, found: list[Trained], digits: demo.Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--out", str(out), "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == demo.FILES
    result, best = json.loads((out / "demo.json").read_text()), demo.best_of(found).row
    assert [Row(**row) for row in result["rows"]] == [t.row for t in found]
    assert result["best"] == {"method": best.method, "acc_bits": best.acc_bits}
    assert f"{out} holds the certificates and {best.method} at P = {best.acc_bits}." in printed
    assert (result["epochs"], result["seed"], result["images"]["test"]) == (1, 0, 540)
    certificates = {path.stem: aa.Certificate.load(path) for path in (out / "certificates").iterdir()}
    assert certificates == {f"{t.row.method}-{t.row.acc_bits}": t.certificate for t in found}
    model = demo.DigitNet()
    aa.prepare_(model, aa.Spec(4, 4, best.acc_bits, best.method), sample=digits.test.images[:1])
    model.load_state_dict(RunFolder(out).model_state())
    assert aa.certify(model.eval()).sha256 == certificates[f"{best.method}-{best.acc_bits}"].sha256
    assert demo.accuracy(model, digits.test) == best.accuracy


@pytest.mark.usefixtures("ready")
def test_a_second_demo_replaces_the_first(out: Path, found: list[Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir(parents=True)
    (out / ".hidden").write_text("kept")
    assert demo.main(["--out", str(out)]) == 0
    before = contents(out)
    monkeypatch.setattr(demo, "compare", lambda *_: (t for t in found if t.row.method == "a2q"))
    assert demo.main(["--out", str(out), "--seed", "5"]) == 0
    after = contents(out)
    assert after.keys() == before.keys()
    assert after[".hidden"] == b"kept"
    assert json.loads(after["demo.json"])["seed"] == 5
    assert after["model.safetensors"] != before["model.safetensors"]


@pytest.mark.usefixtures("ready")
def test_a_full_disk_costs_neither_the_earlier_demo_nor_the_table(
    out: Path, found: list[Trained], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes | str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    assert demo.main(["--out", str(out)]) == 0
    before = contents(out)
    monkeypatch.setattr(demo, "compare", lambda *_: (t for t in found if t.row.method == "a2q"))
    monkeypatch.setattr(demo, "write_whole", full)
    capsys.readouterr()
    assert demo.main(["--out", str(out), "--seed", "1"]) == 2
    said = capsys.readouterr()
    assert "a2q" in said.out
    assert re.fullmatch(r"accaware: .*demo\.json: No space left on device\n", said.err)
    assert contents(out) == before
    assert {path.name for path in out.iterdir()} == demo.FILES


def test_ctrl_c_is_one_line(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "float_network", stop)
    assert demo.main(["--out", str(out)]) == 130
    assert capsys.readouterr().err == "accaware: interrupted\n"
    assert demo.FILES.isdisjoint(path.name for path in out.iterdir())


# mistakes


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may train before a mistake is found."""

    def train(*_: object) -> None:
        pytest.fail("trained before the mistake was found")

    monkeypatch.setattr(demo, "train", train)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "names", [["notes"], ["model.safetensors"], ["demo.json", "other"], [*sorted(demo.FILES), "notes"]], ids=" ".join
)
def test_a_folder_of_something_else_is_left_alone(
    names: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir(parents=True)
    for name in names:
        (out / name).write_text("precious")
    before = contents(out)
    assert f"{out} holds something other than a demo; choose another --out" in fails(["--out", str(out)], capsys)
    assert contents(out) == before


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("below", ["", "demo"])
def test_a_file_in_the_way_is_left_alone(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("precious")
    assert "file" in fails(["--out", str(tmp_path / "file" / below)], capsys)
    assert contents(tmp_path) == {"file": b"precious"}


@pytest.mark.usefixtures("idle")
def test_without_scikit_learn_the_message_says_what_to_install(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = fails(["--out", str(out)], capsys)
    assert message == "accaware: sklearn is not installed; pip install 'accaware[all]' brings everything\n"
    assert not out.exists()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed must lie in [0, 2^32), not -1"),
        (["--seed", str(10**30)], "--seed must lie in [0, 2^32)"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--out"], "argument --out: expected one argument"),
    ],
)
def test_mistakes(words: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(["--out", str(out), *words], capsys)
    assert not out.exists()


def test_the_module_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(aa.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "accaware.experiments.demo", "--out", str(tmp_path / "file")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"accaware: .*file: Not a directory\n", done.stderr)
