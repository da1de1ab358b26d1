"""Build backend: setuptools, with two things added to its wheels that setuptools has no setting for.

- The import hook that makes TOAST known to PEFT in every program. Its `.pth` file counts only at the root of
  site-packages, and a setuptools command of our own would add it to ordinary wheels but not to those of
  `pip install -e`.
- The shipped configurations, as `toast/configs` (`toast/training/shipped.py`). Mapping the top-level folder
  into the package by `package-dir` would mean listing every package by hand. `pip install -e` finds the
  checkout's own.

So the finished wheel is rewritten with them.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

HERE = Path(__file__).parent
HOOK = {name: HERE / name for name in ("toast-steering.pth", "toast_steering_hook.py")}


def build_wheel(wheel_directory: str, *args: Any, **options: Any) -> str:
    """Builds the wheel of a release or of `pip install .`; returns its name."""
    configs = {f"toast/{path.relative_to(HERE.parent).as_posix()}": path for path in _configs()}
    return _with(HOOK | configs, wheel_directory, build_meta.build_wheel(wheel_directory, *args, **options))


def build_editable(wheel_directory: str, *args: Any, **options: Any) -> str:
    """Builds the wheel of `pip install -e .`; returns its name."""
    return _with(HOOK, wheel_directory, build_meta.build_editable(wheel_directory, *args, **options))


def _configs() -> list[Path]:
    configs = HERE.parent / "configs"
    return sorted([*configs.rglob("*.yaml"), *configs.rglob("config.json")])


def _with(files: dict[str, Path], folder: str, name: str) -> str:
    """Adds files, by their path in the wheel, to a finished wheel; returns its name."""
    wheel, new = Path(folder, name), Path(folder, f"{name}.new")
    with ZipFile(wheel) as before, ZipFile(new, "w", ZIP_DEFLATED) as after:
        record = next(item for item in before.infolist() if item.filename.endswith(".dist-info/RECORD"))
        lines = before.read(record).decode()
        for item in before.infolist():
            if item is not record:
                after.writestr(item, before.read(item))
        for file, source in files.items():
            content = source.read_bytes()
            entry = ZipInfo(file, record.date_time)
            entry.external_attr, entry.compress_type = record.external_attr, ZIP_DEFLATED
            after.writestr(entry, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines += f"{file},sha256={digest},{len(content)}\n"
        after.writestr(record, lines)
    new.replace(wheel)
    return name
