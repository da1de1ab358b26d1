"""Walking through folders: what is hidden, links, pipes, folders that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from toast.data import walking
from toast.data.walking import files_in, folders_in, walk


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def below(folder: Path, **options: Any) -> tuple[list[str], list[str]]:
    walked = walk(folder, [".jpg"], **options)
    return [str(f.relative_to(folder)) for f in walked.files], [
        str(f.relative_to(folder)) for f in walked.skipped
    ]


def test_what_is_hidden_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "b/x.jpg", "z.JPG", "a.gif", "b/._x.jpg", ".DS_Store", ".ipynb_checkpoints/x.jpg")
    write(tmp_path, "__MACOSX/b/x.jpg", "@eaDir/x.jpg", "Thumbs.db", "desktop.ini", "masks/x.jpg")
    assert below(tmp_path, skip=["masks"]) == (["z.JPG", "b/x.jpg"], ["a.gif"])
    assert folders_in(tmp_path) == ["b", "masks"]
    assert files_in(tmp_path) == ["a.gif", "z.JPG"]
    assert folders_in(tmp_path / "nowhere") == []


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path, "far/x.jpg", "here/y.jpg")
    (tmp_path / "here" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "here" / "self.jpg").symlink_to(tmp_path / "here" / "self.jpg")
    assert below(tmp_path / "here") == (["self.jpg", "y.jpg", "far/x.jpg"], [])


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "y.jpg").symlink_to(tmp_path / "x.jpg")
    assert below(tmp_path) == ([], ["x.jpg", "y.jpg"])


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(walking.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"the folder .* cannot be read: Permission denied"):
        walk(tmp_path, [".jpg"])
