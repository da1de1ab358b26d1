"""The row of a picture: itself, and the maps over it, as every drawing and every page shows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from toast.visual.grids import Map, Pair
from toast.visual.looks import Look
from toast.visual.methods import METHODS

Kind = Literal["input", "frozen", "selection", "signal", "attention", "difference"]
#: All panels in order, and the few of a page.
KINDS: tuple[Kind, ...] = ("input", "frozen", "selection", "signal", "attention", "difference")
FEW: tuple[Kind, ...] = ("input", "frozen", "selection", "attention")


@dataclass(frozen=True)
class Panel:
    """One picture of a row.

    Args:
        title: What is shown.
        note: What is measured of it; may be empty.
        values: Map over the picture, `(rows, columns)`; None shows the picture as it is.
        cell: Height and width of a cell of the map in pixels of the picture.
        low: Value at the lower end of the colours; minus `high` draws a difference.
        high: Value at the upper end.
        unit: Of the colours.
        wrong: Whether the title says something wrong, such as a false label.
        short: The title in one word.
    """

    title: str
    note: str = ""
    values: Tensor | None = None
    cell: Pair = (1.0, 1.0)
    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    wrong: bool = False
    short: str = ""

    @property
    def caption(self) -> str:
        """The title, and the note if there is one."""
        return f"{self.title}: {self.note}" if self.note else self.title


@dataclass(frozen=True)
class Row:
    """A picture, and what is shown of it.

    Args:
        picture: `(height, width, 3)`, 0 to 1.
        panels: Side by side.
        box: Drawn in every panel: x0, y0, x1, y1 in pixels.
        strengths: By block, a value for a bar chart below the panels; none if empty.
        shown: The block of the chart that the panels show.
    """

    picture: Tensor
    panels: Sequence[Panel]
    box: Sequence[float] | None = None
    strengths: Mapping[int, float] = field(default_factory=dict)
    shown: int | None = None


def row_of(
    look: Look,
    picture: Tensor,
    *,
    caption: str = "input",
    wrong: bool = False,
    after: str | None = None,
    kinds: Collection[Kind] = KINDS,
    box_name: str = "box",
    colour_bars: bool = True,
) -> Row:
    """Composes the row of a picture.

    Both attentions share one scale from 0, and the difference has its own, the same on both sides of 0. The
    selection weights' scale begins at 0 where a colour bar says what it ends at; else it spans the weights,
    and a note says so.

    Args:
        look: What was seen of the picture.
        picture: `(height, width, 3)`, 0 to 1.
        caption: Of the picture itself.
        wrong: Whether the caption says something wrong.
        after: What became of the attention if it moved (`Look.stayed`); None is "refocused" if the model is
            steered, and else "adapted".
        kinds: The panels that are wanted, of those that there are.
        box_name: What the drawn box is called in notes.
        colour_bars: Whether colour bars are drawn.
    """
    panels = [Panel(caption, wrong=wrong, short="input")] if "input" in kinds else []
    if after is None:
        after = "" if look.frozen is None else "adapted" if look.selection is None else "refocused"
    maps = [each for each in (look.attention, look.frozen) if each is not None]
    top = max(float(each.values.max()) for each in maps) or 1.0
    name = METHODS[look.method]
    if look.frozen is not None and "frozen" in kinds:
        unit = _unit(look, look.frozen, look.frozen_on_patches)
        note = _share(look.frozen_on_target, box_name)
        panels.append(_panel(look.frozen, f"frozen {name}", note, top, unit, short="frozen"))
    if look.selection is not None and "selection" in kinds:
        panels.append(_selection(look, look.selection, box_name, colour_bars))
    if look.frozen is not None and look.block in look.signals and "signal" in kinds:
        signal = look.signals[look.block]
        strongest = float(signal.values.max()) or 1.0
        panels.append(_panel(signal, f"top-down signal, block {look.block}", "", strongest, "norm"))
    if "attention" in kinds:
        unit = _unit(look, look.attention, look.on_patches)
        title = f"{name}, not moved" if look.stayed else f"{after} {name}".strip()
        short = "not moved" if look.stayed else after or name
        panels.append(_panel(look.attention, title, _share(look.on_target, box_name), top, unit, short=short))
    difference = look.difference
    if difference is not None and "difference" in kinds:
        most = float(difference.values.abs().max()) or 1.0
        title = "difference to the frozen model"
        panels.append(_panel(difference, title, "", most, "gained or lost share", -most))
    return Row(picture, panels, look.box, look.strengths, look.block)


def _panel(
    shown: Map, title: str, note: str, high: float, unit: str, low: float = 0.0, short: str = ""
) -> Panel:
    return Panel(title, note, shown.values, shown.cell, low, high, unit, short=short or title)


def _selection(look: Look, selection: Map, box_name: str, colour_bars: bool) -> Panel:
    least, most = float(selection.values.min()), float(selection.values.max())
    note = "" if colour_bars else f"{least:.2f} to {most:.2f}"
    if look.selected is not None:
        note = f"{look.selected[0]:.2f} in the {box_name}, {look.selected[1]:.2f} outside"
    low, high = (0.0, most or 1.0) if colour_bars else (least, most)
    return _panel(selection, "selection weights", note, high, "weight, of 0 to 1", low, "selection")


def _share(on_target: float | None, box_name: str) -> str:
    return "" if on_target is None else f"{on_target:.2f} in the {box_name}"


def _unit(look: Look, shown: Map, on_patches: float | None) -> str:
    if not bool(shown.values.any()):
        return "0 everywhere"
    if on_patches is None or look.method not in ("attention", "rollout"):
        return "share of the sum"
    return f"share on patches ({on_patches:.2f} of all)"
