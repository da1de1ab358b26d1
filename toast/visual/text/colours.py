"""Heat maps of a text, their scales and their colours, which words stay readable on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toast.visual.text.cells import Cell
from toast.visual.text.looking import TextAttentionMaps

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a page, red, green and blue from 0 to 255.

    A value is shown by its share of `hot`, or of `cold` below zero, laid over `paper`. The ink has a contrast
    of more than 4.5 on all of them (WCAG 2.2, criterion 1.4.3).

    Args:
        paper: Background, and the colour of zero.
        ink: Text.
        hot: The largest value.
        cold: The smallest, where values have a sign.
    """

    paper: Colour
    ink: Colour
    hot: Colour
    cold: Colour

    def background(self, share: float) -> Colour:
        """Returns the colour of a share of the scale, -1 to 1."""
        full = self.hot if share > 0 else self.cold
        mixed = [round(p + (f - p) * abs(share)) for p, f in zip(self.paper, full, strict=True)]
        return mixed[0], mixed[1], mixed[2]


LIGHT = Theme(paper=(255, 255, 255), ink=(26, 26, 26), hot=(255, 146, 51), cold=(92, 172, 255))
DARK = Theme(paper=(20, 23, 28), ink=(240, 240, 240), hot=(176, 74, 0), cold=(32, 98, 190))


@dataclass(frozen=True)
class HeatMap:
    """One number a token, and how it is shown.

    Args:
        name: What it is, for the head of a column.
        title: What it is, in a few words.
        caption: What it is, in a sentence.
        values: `(tokens,)`.
        top: What has the full colour; larger values have it too.
        signed: Whether the scale goes from `-top` to `top`, not from 0.
    """

    name: str
    title: str
    caption: str
    values: Tensor
    top: float
    signed: bool = False

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return float(self.values.abs().max())

    def of(self, cell: Cell) -> float:
        """Returns the value of a cell: the mean of its tokens."""
        return float(self.values[cell.start : cell.stop].mean())

    def share(self, value: float) -> float:
        """Returns the share of the scale that a value is at, 0 to 1, or -1 to 1 if it has a sign."""
        return max(-1.0, min(1.0, value / self.top)) if self.top > 0 else 0.0


def heat_maps(maps: TextAttentionMaps) -> list[HeatMap]:
    """Returns what is shown over the text."""
    return [
        HeatMap(
            "selection",
            "Selection weights",
            "How much of each token is fed back: its similarity to the task embedding, from 0 to 1.",
            maps.selection_weights,
            _top(maps.selection_weights),
        ),
        HeatMap(
            "attends, change",
            "Change in what a token attends to",
            "Total variation distance between its attention before and after: "
            "the share that went to other tokens, from 0 to 1.",
            maps.attention_change,
            _top(maps.attention_change),
        ),
        HeatMap(
            "gets, change",
            "Change in the attention that a token gets",
            "Mean over the tokens that can see it, after minus before.",
            maps.received_change,
            _top(maps.received_change),
            signed=True,
        ),
    ]


def _top(values: Tensor) -> float:
    """Returns what has the full colour.

    That is the largest value; or if it stands far out, as the first token's may, what 19 of 20 are below.
    """
    sizes = values.abs().double()
    largest, usual = float(sizes.max()), float(torch.quantile(sizes, 0.95))
    return usual if largest > 2 * usual > 0 else largest
