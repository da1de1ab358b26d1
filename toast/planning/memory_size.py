"""Sizes of memory as text: `80GB`, `24 GiB`, bytes."""

from __future__ import annotations

import re

_UNITS = {"": 1.0, "B": 1.0} | {
    f"{prefix}{kind}": float((1000 if kind == "B" else 1024) ** power)
    for power, prefix in enumerate("KMGT", start=1)
    for kind in ("B", "IB")
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> float:
    """Returns the bytes that a text names.

    Raises:
        ValueError: If it is no size above 0.
    """
    found = _SIZE.fullmatch(text)
    size = float(found[1]) * _UNITS.get(found[2].upper(), 0.0) if found else 0.0
    if not size:
        raise ValueError(f"memory: needs a size above 0, such as 80GB, 40GiB or 500MB; got {text!r}.")
    return size


def unit_of(most: float) -> tuple[str, float]:
    """Returns the unit in which sizes up to one are written, and its bytes."""
    return ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
