"""The Python of the README and of the docs runs as it stands."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "certificate.json").stat().st_size > 0


def test_the_examples_of_the_api_page_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(README.parent / "docs" / "api.md"), module_relative=False)
    assert results.attempted > 20
    assert results.failed == 0
