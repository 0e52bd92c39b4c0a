"""A few thousand damaged files and certificates through every entry point; `tests/onnx_fuzz.py` runs more."""

from __future__ import annotations

from collections import Counter

import pytest

from accaware.certify.files import certify_file
from accaware.certify.targets import TARGETS
from accaware.cli import run
from onnx_fuzz import GOOD, attempt, case, damaged, damaged_json, small

FILES = 750


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_judged_soundly(seed, tmp_path) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(FILES):
        outcomes.update(attempt(case(seed, number), tmp_path))
    usual = {"refused", "certified", "holds", "certificate refused", "certificate agrees", "run", "not run"}
    usual |= {"run, overflows", "repaired", "not repaired"}
    assert min(outcomes[what] for what in usual) > 15, outcomes


def test_good_files_are_read(tmp_path) -> None:
    path = tmp_path / "net.onnx"
    for data in GOOD:
        path.write_bytes(data)
        assert certify_file(path, TARGETS["int32"]).operations


COMMANDS = [["certify", "--json", "out"], ["emulate", "--json", "out"], ["repair", "-o", "out"], ["check", "cert.json"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_the_command_line_says_why_in_one_line(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.onnx"
    path.write_bytes(small().SerializeToString())
    good = certify_file(path, TARGETS["int16"]).to_json()
    codes: Counter[int] = Counter()
    for number in range(100):
        rng = case(9, number)
        if command[0] == "check":
            (tmp_path / "cert.json").write_text(damaged_json(good, rng))
        else:
            path.write_bytes(damaged(rng))
        codes[code := run([*command, "net.onnx"])] += 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (code == 2)
        assert all(line.startswith("accaware: ") for line in lines)
        out = tmp_path / "out"
        assert out.exists() == (code == 0 or (code == 1 and command[0] == "certify")) or command[0] == "check"
        out.unlink(missing_ok=True)
    assert codes[2] > 15
    assert sum(codes.values()) - codes[2] > 5
    assert set(codes) <= {0, 1, 2}
