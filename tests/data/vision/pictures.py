"""Tiny pictures and data sets, written where a test wants them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: What timm resolves for a ViT, at a size that tests bear.
CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def picture(seed: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Random pixels, of a width and a height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 36)) -> Path:
    """Writes random pixels; the format is that of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)
    return path


def write_folder(root: Path, counts: Mapping[str, int]) -> Path:
    """Writes a folder of pictures for each class."""
    for offset, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write_picture(root / name / f"{number:02d}.png", 100 * offset + number)
    return root


def write_json(path: Path, value: Any) -> Path:
    """Writes a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def truncate(path: Path, share: float = 0.5) -> None:
    """Cuts off the end of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def touch_later(path: Path) -> None:
    """Moves a file's time of change on by a second, its bytes left alone."""
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
