"""How a map is computed, and whose attention it is: choices of functions and commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Query = Literal["class", "mean"]
Method = Literal["attention", "rollout", "relevance", "grad-cam", "energy"]
#: What a drawing can be written as.
FORMATS = ("png", "svg", "pdf")

#: Ways to say where a model looks, and what they are called in a title.
METHODS: dict[str, str] = {
    "attention": "attention",
    "rollout": "attention rollout",
    "relevance": "relevance",
    "grad-cam": "Grad-CAM",
    "energy": "activation energy",
}


def check_formats(formats: Sequence[str]) -> None:
    """Checks that drawings can be written in some formats.

    Raises:
        ValueError: If there is no format, or one is not known.
    """
    if not formats or set(formats) - set(FORMATS):
        raise ValueError(f"formats: needs some of {', '.join(FORMATS)}; got {list(formats)}.")
