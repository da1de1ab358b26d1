"""Files that are written beside are on the disk before they take their places."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from toast.files.atomic import beside, flush_all


def test_what_is_written_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        done.append("folder" if os.path.samestat(os.fstat(number), tmp_path.stat()) else "file")
        sync(number)

    def replaced(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with beside(tmp_path / "x.json") as new:
        new.write_text("1")
    assert done == ["file", "rename", "folder"]
    assert (tmp_path / "x.json").read_text() == "1"
    done.clear()
    flush_all(tmp_path)
    assert done == ["file", "folder"]
