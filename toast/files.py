"""Files are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
