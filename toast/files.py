"""Files are written whole or not at all, also where the power goes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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
