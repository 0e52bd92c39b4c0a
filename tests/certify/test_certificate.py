"""Certificates: verdicts, the table, and files that come back whole or are refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accaware.certify.certificate import Certificate, Operation, outside, prove
from accaware.formats import Accumulator, IntFormat
from accaware.integer.layer import IntegerLayer

SHA = "0123456789abcdef" * 4


def layer(name: str, rows: Any, bits: int = 8, **changes: Any) -> IntegerLayer:
    rows = np.array(rows)
    fields: dict[str, Any] = {
        "codes": IntFormat.unsigned(4),
        "accumulator": Accumulator(bits),
        "preload": np.zeros(len(rows), int),
        "scale": np.ones(len(rows)),
        "act_scale": 1.0,
        "inside": True,
        "method": "projected",
    }
    return IntegerLayer(name, "Linear", rows, **(fields | changes))


def certificate() -> Certificate:
    layers = [
        layer("safe", [[8, -8, 0], [0, 0, 0]], repaired=1),
        layer("unsafe", [[1, 1, 1], [8, 1, -1]], note="tight"),
        layer("tiled", [[8, 8, -8]], accumulator=Accumulator(8, "saturate", tile=2, outer_bits=9), preload=[[-113, 7]]),
        layer("spills", [[8, -8, 8]], accumulator=Accumulator(8, tile=1, outer_bits=8), preload=[[0, 0, 0]]),
        layer("raw", [[1, -1]], 4, codes=IntFormat(7, 9)),
        layer("head", [[100]], 32, inside=False, method="baseline"),
    ]
    return Certificate.of(
        layers, [outside("pool", "AvgPool2d", 10, "sum of 64 codes"), outside("add", "add", None, "float")], sha256=SHA
    )


def operation(name: str) -> Operation:
    return next(op for op in certificate().operations if op.name == name)


def test_proven() -> None:
    op = operation("safe")
    assert (op.verdict, op.bits_needed, op.row_bits) == ("proven", 8, (8, 1))
    assert (op.lo, op.hi, op.preload) == ((-120, 0), (120, 0), ())
    assert op.utilisation == 120 / 127
    assert (op.sparsity, op.zero_channels, op.repaired, op.fan_in) == (4 / 6, 1, 1, 3)


def test_refuted_by_the_worst_row() -> None:
    op = operation("unsafe")
    assert (op.verdict, op.bits_needed, op.utilisation) == ("refuted", 9, 135 / 127)
    assert op.witness is not None
    assert (op.witness.register, op.witness.row, op.witness.inputs, op.witness.value) == ("inner", 1, (15, 15, 0), 135)


def test_the_edges_of_a_register() -> None:
    for start, verdict in ((-8, "proven"), (-9, "refuted"), (7, "proven"), (8, "refuted")):
        assert prove(layer("fc", [[8, -8]], preload=[start])).verdict == verdict


def test_tiles_have_their_own_ranges() -> None:
    op = operation("tiled")
    assert (op.verdict, op.lo, op.hi, op.bits_needed) == ("proven", (-113,), (127,), 8)
    assert (op.outer_lo, op.outer_hi) == ((-120,), (240,))
    assert (op.preload, op.target) == ((-113, 7), Accumulator(8, "saturate", tile=2, outer_bits=9))


def test_an_outer_register_can_be_refuted() -> None:
    op = operation("spills")
    assert (op.verdict, op.bits_needed, op.lo, op.hi) == ("refuted", 8, (-120,), (120,))
    assert op.witness is not None
    assert (op.witness.register, op.witness.value, op.witness.inputs) == ("outer", 240, (15, 0, 15))


def test_codes_without_zero_can_stay_unproven() -> None:
    op = operation("raw")
    assert (op.verdict, op.lo, op.hi, op.bits_needed) == ("unproven", (-9,), (9,), 5)
    assert "[7, 9] lack 0" in op.reason
    assert prove(layer("raw", [[1, -1]], 5, codes=IntFormat(7, 9))).verdict == "proven"
    assert prove(layer("raw", [[1, 1]], 5, codes=IntFormat(7, 9))).verdict == "refuted"


def test_outside_reports_the_width_and_judges_nothing() -> None:
    op = operation("head")
    assert (op.verdict, op.bits_needed, op.witness) == ("outside", 12, None)
    assert prove(replace(layer("head", [[100]], 8), inside=False)).verdict == "outside"
    assert (operation("pool").bits_needed, operation("add").bits_needed) == (10, None)


def test_sums_beyond_64_bits_are_judged() -> None:
    wide = layer("wide", [[2**62, 2**62]], 64, codes=IntFormat(0, 2**62))
    assert (prove(wide).verdict, prove(wide).bits_needed) == ("refuted", 127)
    assert Certificate.from_json(Certificate.of([wide], sha256=SHA).to_json()).operations == (prove(wide),)


def test_a_certificate_holds_if_everything_in_the_request_is_proven() -> None:
    safe, head = layer("safe", [[8]]), layer("head", [[100]], inside=False)
    assert Certificate.of([safe, head], sha256=SHA).holds
    assert Certificate.of([safe, head], sha256=SHA).bits_needed == 8
    for layers in ([], [head], [safe, layer("fc", [[9]])], [safe, layer("raw", [[1, -1]], 4, codes=IntFormat(7, 9))]):
        assert not Certificate.of(layers, sha256=SHA).holds
    assert Certificate.of([head], sha256=SHA).bits_needed is None
    assert certificate().bits_needed == 9


def test_the_table_is_plain_text_with_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = certificate().table()
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == "operation kind K codes register needs used zeros zero rows set verdict"
    cells = {line.split()[0]: line for line in lines if "Linear" in line or "AvgPool2d" in line}
    for name, expected in {
        "safe": "safe Linear 3 [0, 15] 8 8 94.5% 66.7% 1 of 2 projected proven",
        "unsafe": "unsafe Linear 3 [0, 15] 8 9 106.3% 0.0% 0 of 2 projected refuted",
        "tiled": "tiled Linear 3 [0, 15] 8, 9 after 2 8, 9 100.0% 0.0% 0 of 1 projected proven",
        "head": "head Linear 1 [0, 15] 32 12 0.0% 0.0% 0 of 1 baseline outside",
        "pool": "pool AvgPool2d 10 outside",
    }.items():
        assert " ".join(cells[name].split()) == expected
    assert "safe: 1 rows repaired by the exact check" in lines
    assert "unsafe: tight; row 1 reaches 135, outside the register" in lines
    assert "spills: row 0 reaches 240, outside the outer register" in lines
    found = "does not hold: 2 of 5 operations of the request are proven; outside it: 1 with weights"
    assert lines[-1] == f"{found}; sha256 {SHA}"
    assert "\x1b" not in text


def test_a_layer_without_any_weight_left_is_remarked_on() -> None:
    table = Certificate.of([layer("none", [[0, 0], [0, 0]]), layer("half", [[0, 1], [0, 0]])], sha256=SHA).table()
    assert "none: all its weights are 0" in table.splitlines()
    assert table.count("all its weights") == 1


def test_the_table_prints_names_as_they_are() -> None:
    name = "[bold]" + "block." * 40 + ":smile:"
    assert name in Certificate.of([layer(name, [[1]])], sha256=SHA).table()


# Files


def test_a_saved_certificate_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text("old")
    certificate().save(path)
    assert Certificate.load(path) == certificate()
    assert os.listdir(tmp_path) == ["certificate.json"]
    data = json.loads(path.read_text())
    assert (data["schema"], data["sha256"], data["operations"][0]["hi"]) == (1, SHA, [120, 0])
    assert data["tool"].startswith("accaware ")


def test_whoever_reads_meanwhile_reads_the_old_file(tmp_path: Path) -> None:
    path, reader = tmp_path / "certificate.json", tmp_path / "reader"
    path.write_text("old")
    os.link(path, reader)
    certificate().save(path)
    assert reader.read_text() == "old"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "certificate.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        certificate().save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["certificate.json"]


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(certificate().to_json())
    edit(data)
    return json.dumps(data)


MALFORMED = {
    "empty": "",
    "text": "proven!\n",
    "truncated": certificate().to_json()[:-100],
    "nested": "[" * 100_000,
    "long number": '{"schema": 1' + "0" * 5000 + "}",
    "list": "[]",
    "null": "null",
    "no schema": "{}",
    "other schema": edited(lambda d: d.update(schema=2)),
    "missing field": edited(lambda d: d.pop("tool")),
    "unknown field": edited(lambda d: d.update(extra="a\nb")),
    "tool": edited(lambda d: d.update(tool=None)),
    "hash": edited(lambda d: d.update(sha256="a\nb")),
    "operations": edited(lambda d: d.update(operations={})),
    "operation": edited(lambda d: d["operations"].append(None)),
    "missing in operation": edited(lambda d: d["operations"][0].pop("lo")),
    "name": edited(lambda d: d["operations"][0].update(name=["a\nb"] * 1000)),
    "verdict": edited(lambda d: d["operations"][0].update(verdict="fine")),
    "verdict type": edited(lambda d: d["operations"][0].update(verdict=[])),
    "float for integer": edited(lambda d: d["operations"][0].update(fan_in=3.0)),
    "bool for integer": edited(lambda d: d["operations"][0].update(bits_needed=True)),
    "bool for a count": edited(lambda d: d["operations"][0].update(repaired=True)),
    "not a number": edited(lambda d: d["operations"][0].update(sparsity=float("nan"))),
    "rows": edited(lambda d: d["operations"][0].update(lo=[0, None])),
    "fewer rows": edited(lambda d: d["operations"][0].update(lo=[-120])),
    "no rows": edited(lambda d: d["operations"][0].update(lo=[], hi=[])),
    "reversed": edited(lambda d: d["operations"][0].update(lo=[-120, 1])),
    "codes": edited(lambda d: d["operations"][0].update(codes={"lo": 1, "hi": 0})),
    "no codes": edited(lambda d: d["operations"][0].update(codes=None)),
    "target": edited(lambda d: d["operations"][0]["target"].update(bits=1)),
    "width": edited(lambda d: d["operations"][0].update(bits_needed=7)),
    "does not fit": edited(lambda d: d["operations"][0]["target"].update(bits=7)),
    "outer does not fit": edited(lambda d: d["operations"][2].update(outer_hi=[256])),
    "proven without numbers": edited(lambda d: d["operations"][6].update(verdict="proven")),
    "proven with a witness": edited(lambda d: d["operations"][1].update(verdict="proven")),
    "refuted without witness": edited(lambda d: d["operations"][1].update(witness=None)),
    "unproven without reason": edited(lambda d: d["operations"][4].update(reason="")),
    "witness that fits": edited(lambda d: d["operations"][1]["witness"].update(value=127)),
    "witness beyond its row": edited(lambda d: d["operations"][1]["witness"].update(value=136)),
    "witness of no row": edited(lambda d: d["operations"][1]["witness"].update(row=2)),
    "witness of other taps": edited(lambda d: d["operations"][1]["witness"].update(inputs=[15, 15])),
    "witness register": edited(lambda d: d["operations"][1]["witness"].update(register="side")),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"certificate\.json: not a certificate: ") as caught:
        Certificate.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500


def test_other_bytes_and_other_paths(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"x\.json: .*utf-8"):
        Certificate.load(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        Certificate.load(tmp_path / "none.json")


def test_a_hash_is_a_hash() -> None:
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits, not 'abc'"):
        Certificate.of([], sha256="abc")


def test_names_cannot_forge_lines_of_the_table() -> None:
    shown = Certificate.of([layer("a\nb\x1b[2J", [[1]])], sha256=SHA).table()
    assert "a\\nb\\x1b[2J" in shown
    assert "\x1b" not in shown


def test_sums_beyond_floats_have_a_utilisation() -> None:
    op = replace(prove(layer("fc", [[1]])), lo=(0,), hi=(10**400,), bits_needed=1330, verdict="outside")
    assert op.utilisation == float("inf")
    assert "inf%" in Certificate(1, "", SHA, (op,)).table()
