"""Files are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
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
        new.replace(path)
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


def read_regular(path: Path, most: int | None = None) -> bytes:
    """Reads a file; what has no end or never begins (a pipe, a device) is refused before it is waited for.

    Args:
        path: The file.
        most: Most bytes; None takes any number.

    Raises:
        ValueError: If it is no regular file, cannot be read, or is larger.
    """
    try:
        # Without waiting: a pipe opens only when somebody writes into it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    with os.fdopen(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{path} is no regular file (a folder, pipe or device); needs a file.")
        if most is not None and state.st_size > most:
            raise ValueError(f"{path} has {state.st_size:,} bytes; needs at most {most:,}.")
        return file.read()


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
