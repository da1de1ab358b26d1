"""Finds pictures of a held-out split that are trained on as well."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

from toast.data.vision.picture_files import file_state
from toast.data.vision.source import VisionSource

LOOKED_AT: Final = 1000
"""Held-out pictures that are compared, spread over the split."""
_READ: Final = 20_000
"""Most training files of which the end is read."""
_END: Final = 4096


def repeated(train: VisionSource, held_out: VisionSource) -> str | None:
    """Says which pictures of a held-out split are in the training split too: of one size and one end.

    Args:
        train: The training split.
        held_out: Another split.

    Returns:
        A remark; None if no such picture was found, or the pictures are no files.
    """
    count = len(held_out)
    some = sorted({place * count // LOOKED_AT for place in range(LOOKED_AT)})
    paths = [path for path in map(held_out.file, some) if path is not None]
    wanted = {state[0] for path in paths if (state := file_state(path)) is not None}
    known: dict[tuple[int, int], Path] = {}
    for path in map(train.file, range(len(train))):
        state = None if path is None else file_state(path)
        if path is None or state is None or state[0] not in wanted:
            continue
        if len(known) == _READ:
            break
        key = _key(path)
        if key is not None:
            known[key] = path
    keys = {path: _key(path) for path in paths}
    twice = [(path, known[key]) for path, key in keys.items() if key is not None and key in known]
    if not twice:
        return None
    return (
        f"{len(twice):,} of the {len(paths):,} pictures that were compared are also in the training split, "
        f"so figures of this split are too good: first {twice[0][0]}, which is {twice[0][1]}."
    )


def _key(path: Path) -> tuple[int, int] | None:
    """Returns a file's size and the checksum of its end; None if it is empty or cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _END))
            return (size, zlib.crc32(file.read())) if size else None
    except OSError:
        return None
