"""The files of a folder as people mean them: what systems and tools hide is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

BESIDE: Final = frozenset(
    {
        "__MACOSX",  # of macOS, in archives: a "._" file for each file
        "@eaDir",  # of Synology's disks: small copies of all pictures
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "__pycache__",
        "Thumbs.db",  # of Windows
        "desktop.ini",
        "Icon\r",  # of macOS
    }
)
"""Names of what systems leave in folders; what begins with "." is hidden as well."""


@dataclass
class Walked:
    """What lies below a folder.

    Args:
        files: The files with one of the suffixes, sorted by folder and name.
        skipped: The other files, but for what is hidden.
    """

    files: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether a name is one of what systems and tools put beside a user's files."""
    return name.startswith(".") or name in BESIDE


def folders_in(folder: Path) -> list[str]:
    """Returns the names of the visible folders within a folder, sorted; none if it is not there.

    Raises:
        ValueError: If it cannot be read.
    """
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry)) if folder.is_dir() else []


def files_in(folder: Path) -> list[str]:
    """Returns the names of the visible files within a folder, sorted; none if it is not there.

    Raises:
        ValueError: If it cannot be read.
    """
    return (
        sorted(entry.name for entry in _entries(folder) if not _is_folder(entry)) if folder.is_dir() else []
    )


def walk(folder: Path, suffixes: Collection[str], skip: Collection[str] = ()) -> Walked:
    """Looks for files below a folder, through links to folders too; one that leads back is not followed.

    Args:
        folder: The folder.
        suffixes: Endings of the files that are wanted, in small letters, with their dots.
        skip: Names of further folders that are left out.

    Raises:
        ValueError: If a folder cannot be read.
    """
    found = Walked()
    _walk(folder, frozenset(suffixes), frozenset(skip), (), found)
    # those of a folder before those of the folders in it
    found.files.sort(key=lambda path: (str(path.parent), path.name))
    found.skipped.sort()
    return found


def _walk(
    folder: Path, suffixes: Collection[str], skip: Collection[str], above: tuple[Path, ...], found: Walked
) -> None:
    real = folder.resolve()
    if real in above:
        return
    for entry in _entries(folder):
        path = folder / entry.name
        if _is_folder(entry):
            if entry.name not in skip:
                _walk(path, suffixes, skip, (*above, real), found)
        elif path.suffix.lower() in suffixes and not _is_strange(entry):
            found.files.append(path)
        else:
            found.skipped.append(path)


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be read: {error.strerror or error}.") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_strange(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is there, but no file and no folder: a pipe would be waited for without an end."""
    try:
        return not (entry.is_file() or stat.S_ISREG(entry.stat().st_mode))
    except OSError:  # a link to nothing, which is reported where files are looked for
        return False
