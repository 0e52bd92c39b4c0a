"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from accaware.files import write_whole


def test_content_and_mode(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "text")
    write_whole(tmp_path / "a", b"bytes")
    plain = tmp_path / "b"
    plain.touch()
    assert (tmp_path / "a").read_bytes() == b"bytes"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "a", "before")
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "a", "after")
    assert caught.value.filename == str(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "no" / "a", "text")
    assert caught.value.filename == str(tmp_path / "no" / "a")
