"""Build backend: setuptools, with the files in its wheels that make TOAST known to PEFT in every program.

A `.pth` file counts only at the root of site-packages. setuptools has no setting for that, and a command of
one's own adds to a wheel but not to what `pip install -e` gets. So the finished wheel, of either
kind, is written anew.
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

FILES = ("toast-steering.pth", "toast_steering_hook.py")


def build_wheel(wheel_directory: str, *args: Any, **options: Any) -> str:
    """Builds the wheel of a release or of `pip install .`; returns its name."""
    return _with_hook(wheel_directory, build_meta.build_wheel(wheel_directory, *args, **options))


def build_editable(wheel_directory: str, *args: Any, **options: Any) -> str:
    """Builds the wheel of `pip install -e .`; returns its name."""
    return _with_hook(wheel_directory, build_meta.build_editable(wheel_directory, *args, **options))


def _with_hook(folder: str, name: str) -> str:
    wheel, new = Path(folder, name), Path(folder, f"{name}.new")
    with ZipFile(wheel) as before, ZipFile(new, "w", ZIP_DEFLATED) as after:
        record = next(item for item in before.infolist() if item.filename.endswith(".dist-info/RECORD"))
        lines = before.read(record).decode()
        for item in before.infolist():
            if item is not record:
                after.writestr(item, before.read(item))
        for file in FILES:
            content = Path(__file__).with_name(file).read_bytes()
            entry = ZipInfo(file, record.date_time)
            entry.external_attr, entry.compress_type = record.external_attr, ZIP_DEFLATED
            after.writestr(entry, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines += f"{file},sha256={digest},{len(content)}\n"
        after.writestr(record, lines)
    new.replace(wheel)
    return name
