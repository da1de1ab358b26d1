"""Attention matrices of both passes as a picture."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toast.files.atomic import beside
from toast.visual.text.cells import marked
from toast.visual.text.looking import TextAttentionMaps

# Of more tokens than this only some are written at the axes.
_LABELS = 72
_LONGEST = 14


def draw_matrices(maps: TextAttentionMaps, path: Path) -> Path:
    """Draws the attention of the first pass, of the second, and their difference.

    Rows are the tokens that look, columns those that are looked at. Both passes share one scale; the
    difference has its own, the same on both sides of 0. Colours go by the square root, for the first token
    often gets most of the attention. A line divides prompt and answer.

    Args:
        maps: Of `look_at_text`.
        path: A file that ends in .png or .svg; written beside and renamed.

    Returns:
        The file.

    Raises:
        ImportError: If matplotlib is not there, with how to install it.
        ValueError: If the name ends in anything else.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("drawing needs matplotlib: pip install 'toast-steering[visual]'")
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"path must end in .png or .svg; got {path.name!r}.")
    figure = _figure(maps)
    metadata = {"Date": None} if kind == "svg" else {}
    with beside(path) as new:
        figure.savefig(new, dpi=150, format=kind, metadata=metadata)
    return path


def _figure(maps: TextAttentionMaps) -> Any:
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure

    first, second = maps.first_attention.double(), maps.second_attention.double()
    count = len(first)
    # Room for three squares, labels and bars, in inches. A layout that measures every label takes seconds.
    side = min(max(0.13 * count, 2.6), 8.0)
    width, height = 3 * side + 3.65, side + 1.7
    figure = Figure(figsize=(width, height))
    figure.suptitle("\n".join(maps.notes), fontsize=8, y=1 - 0.08 / height, va="top")
    top = float(torch.stack([first, second]).max()) or 1.0
    most = float((second - first).abs().max()) or 1.0
    attention: dict[str, Any] = {"cmap": "magma", "norm": FuncNorm(_ROOT, 0, top)}
    change: dict[str, Any] = {"cmap": "RdBu_r", "norm": FuncNorm(_ROOT, -most, most)}
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    for values, name, scale, left, label in (
        (first, maps.before, attention, 0.95, ""),
        (second, "second pass", attention, side + 1.1, "attention"),
        (second - first, "difference", change, 2 * side + 2.0, "second minus first"),
    ):
        axis = figure.add_axes((left / width, 0.95 / height, side / width, side / height), facecolor="0.85")
        image = axis.imshow(values.masked_fill(later, torch.nan).numpy(), interpolation="nearest", **scale)
        axis.set_title(name, fontsize=9)
        _label(axis, maps, rows=values is first)
        if label:
            place = (
                (left + side + 0.1) / width,
                (0.95 + 0.1 * side) / height,
                0.12 / width,
                0.8 * side / height,
            )
            bar = figure.colorbar(image, cax=figure.add_axes(place))
            bar.set_label(label, fontsize=8)
            bar.ax.tick_params(labelsize=7)
    return figure


def _root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> Any:
    return np.sign(values) * np.square(values)


#: Square root and its inverse, with the sign kept.
_ROOT = (_root, _square)


def _label(axis: Any, maps: TextAttentionMaps, rows: bool) -> None:
    """Writes tokens at the columns, and at the rows if asked to; draws a line before the answer."""
    count = len(maps.tokens)
    places = list(range(0, count, math.ceil(count / _LABELS)))
    labels = [_label_of(maps.tokens[i]) for i in places]
    # A dollar sign in a token begins no formula.
    axis.set_xticks(places, labels, rotation=90, fontsize=6, parse_math=False)
    if rows:
        axis.set_yticks(places, labels, fontsize=6, parse_math=False)
    else:
        axis.set_yticks([])
    prompt = int(maps.is_prompt.sum())
    if 0 < prompt < count:
        for line in (axis.axhline, axis.axvline):
            line(prompt - 0.5, color="tab:cyan", linewidth=0.8)


def _label_of(token: str) -> str:
    """Returns a token for an axis: short, with the code point where the font has no sign."""
    known = _signs()
    text = "".join(c if ord(c) in known else f"U+{ord(c):X}" for c in marked(token))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


@cache
def _signs() -> frozenset[int]:
    """Code points that matplotlib's own font has."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))).get_charmap())
