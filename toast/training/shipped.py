"""The configurations that come with the package: where they are, and what each is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: The folder's name in a checkout, and the first part of the paths that the documentation prints.
CONFIGS = "configs"
_PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """Returns the folder of the shipped configurations.

    A wheel holds it inside the package (`build_hook/backend.py`); a checkout, and so `pip install -e`, has it
    beside the package.
    """
    inside = _PACKAGE / CONFIGS
    return inside if inside.is_dir() else _PACKAGE.parent / CONFIGS


def find_config(path: Path) -> Path:
    """Returns the path itself if it exists, else what is shipped as `configs/…`, if there is such a thing."""
    if path.exists() or path.parts[:1] != (CONFIGS,) or len(path.parts) == 1:
        return path
    shipped = shipped_folder().joinpath(*path.parts[1:])
    return shipped if shipped.exists() else path


def shipped_commands() -> Iterator[str]:
    """Yields the command that each shipped file is written for: its first line, which names the file."""
    for file in sorted(shipped_folder().rglob("*.yaml")):
        yield file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
