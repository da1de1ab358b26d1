"""Files are written whole or not at all, also where the power goes."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Gives a file to write to, which takes the place of `path` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file's name has at most 255 bytes on most systems.
    new = path.with_name(f".{os.getpid()}-{path.name}"[:250])
    try:
        yield new
        replace_all([(new, path)])
    finally:
        new.unlink(missing_ok=True)


def named(folder: str | os.PathLike[str]) -> Path:
    """Returns a path; an empty one, which would be the working folder, is refused.

    Raises:
        ValueError: If it is empty.
    """
    if not os.fspath(folder):
        raise ValueError("folder: needs a path; got an empty text.")
    return Path(folder)


def try_folder(folder: Path, what: str) -> None:
    """Sees whether files can be written into a folder, or into it once it is made; leaves nothing there.

    Args:
        folder: The folder; it need not be there.
        what: What gave it, for the message.

    Raises:
        ValueError: If a file is in its way, or nothing can be written where it is to be.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{what}: {place} is a file or leads nowhere; {folder} needs a folder there.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{what}: nothing can be written in {place}: {error.strerror}.") from error


def try_file(path: Path, what: str) -> None:
    """Sees whether a file can be written; leaves nothing there.

    Raises:
        ValueError: If it is a folder, or as `try_folder`.
    """
    if path.is_dir():
        raise ValueError(f"{what}: {path} is a folder; needs the name of a file.")
    try_folder(path.parent, what)


def refuse_special(path: Path, needed: str = "file") -> os.stat_result:
    """Refuses what is no file: of a pipe or a device, reading may never begin, or never end.

    Args:
        path: The file.
        needed: What is needed in its place, for the message.

    Returns:
        What the system knows of the file.

    Raises:
        ValueError: If it is not there, or is a folder, a pipe, a socket or a device.
    """
    try:
        state = path.stat()
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not stat.S_ISREG(state.st_mode):
        kind = "folder" if stat.S_ISDIR(state.st_mode) else "special file (a pipe, socket or device)"
        raise ValueError(f"{path} is a {kind}; needs a {needed}.")
    return state


def read_regular(path: Path, needed: str = "file", most: int | None = None) -> bytes:
    """Reads a file whole.

    Args:
        path: The file.
        needed: As of `refuse_special`.
        most: Most bytes; None takes any number.

    Raises:
        ValueError: As `refuse_special`, or if it cannot be read or is larger.
    """
    size = refuse_special(path, needed).st_size
    if most is not None and size > most:
        raise ValueError(f"{path} has {size:,} bytes; needs at most {most:,}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def strict_json(held: Any, **options: Any) -> str:
    """Returns JSON that every reader takes: numbers that are not finite, which JSON has not, are null.

    Args:
        held: What `json.dumps` takes.
        **options: Further options of `json.dumps`.
    """
    return json.dumps(finite(held), allow_nan=False, **options)


def finite(held: Any) -> Any:
    """Returns the same with None for each number that is not finite."""
    if isinstance(held, dict):
        return {key: finite(value) for key, value in held.items()}
    if isinstance(held, list | tuple):
        return [finite(value) for value in held]
    return None if isinstance(held, float) and not math.isfinite(held) else held


def replace_all(files: Sequence[tuple[Path, Path]]) -> None:
    """Lets files take the places of others, in order, when all of them are on the disk.

    Without that, a name may be on the disk before what it names is: after a power cut the new file is empty
    and the old one gone.

    Args:
        files: Where each is, and where it goes.
    """
    for new, _ in files:
        flush(new)
    for new, place in files:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.replace(place)
    for folder in {place.parent for _, place in files}:
        flush(folder)


def flush(path: Path) -> None:
    """Waits until a file, or the names within a folder, are on the disk."""
    if path.is_dir():
        if os.name == "nt":  # folders cannot be opened there
            return
        number = os.open(path, os.O_RDONLY)
    else:
        number = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot
            raise
    finally:
        os.close(number)


def flush_all(folder: Path) -> None:
    """Waits until all that is within a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)
