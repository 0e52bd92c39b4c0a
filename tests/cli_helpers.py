"""The command line in tests."""

from __future__ import annotations

import pytest

from accaware.cli import run


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must fail."""
    capsys.readouterr()
    assert run(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("accaware: ")
    assert message.count("\n") == 1
    return message
