"""Draws pictures with maps over them: rows of panels, laid out in inches, so that no size breaks it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toast.files.atomic import beside
from toast.visual.panels import Panel, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Perceptually even, and one with a neutral middle for differences (Moreland 2009).
SEQUENTIAL, DIVERGING = "magma", "coolwarm"
ALPHA = 0.62

# Of the layout, in inches.
_GAP, _MARGIN = 0.14, 0.12
_LINE, _TITLE_LINE = 0.145, 0.19
_BAR, _BAR_LABELS = 0.08, 0.34
_CHART, _CHART_LABELS, _CHART_INSET = 0.7, 0.32, 0.6
_CHARACTER = 0.0083  # width of one, for each point of the font's size


def require_matplotlib(extra: str = "visual") -> None:
    """Says how to install matplotlib if it is not there.

    Args:
        extra: The extra of this package that holds it.

    Raises:
        ImportError: If it is not there.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"drawing needs matplotlib: pip install 'toast-steering[{extra}]'")


def draw(rows: Sequence[Row], paths: Sequence[Path], title: str = "", smooth: bool = False) -> list[Path]:
    """Draws rows of panels.

    Args:
        rows: At least one.
        paths: Files, whose suffixes (.png, .svg, .pdf) say how; written beside and renamed.
        title: Over all.
        smooth: Whether values between the centres of cells are interpolated; else each cell has one colour.

    Returns:
        The files.

    Raises:
        ImportError: If matplotlib is not there, with how to install it.
    """
    require_matplotlib()
    figure = _Drawing(rows, title, smooth).figure
    for path in paths:
        kind = path.suffix.removeprefix(".")
        # The same drawing is the same file: no date, and no random names within it.
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        with beside(path) as new:
            from matplotlib import rc_context

            with rc_context({"svg.hashsalt": "toast"}):
                figure.savefig(new, dpi=160, format=kind, metadata=metadata)
    return list(paths)


class _Drawing:
    """Lays rows out from the top down, and draws them."""

    def __init__(self, rows: Sequence[Row], title: str, smooth: bool) -> None:
        from matplotlib.figure import Figure

        self.smooth = smooth
        self.shapes = [_Shape(row) for row in rows]
        width = max(shape.width for shape in self.shapes)
        self.title = _wrapped(title, width - 2 * _MARGIN, 10, 4)
        height = 2 * _MARGIN + _TITLE_LINE * len(self.title) + sum(shape.height for shape in self.shapes)
        self.figure: Figure = Figure(figsize=(width, height))
        self.width, self.height = width, height
        self.top = height - _MARGIN
        for line in self.title:
            self._text(width / 2, self.top, line, 10)
            self.top -= _TITLE_LINE
        for row, shape in zip(rows, self.shapes, strict=True):
            self._row(row, shape)

    def _text(self, x: float, top: float, text: str, size: float, colour: str = "black") -> None:
        self.figure.text(
            x / self.width, top / self.height, text, fontsize=size, color=colour,
            ha="center", va="top", parse_math=False,
        )  # fmt: skip

    def _axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def _row(self, row: Row, shape: _Shape) -> None:
        inset = (self.width - shape.width) / 2
        for start in range(0, len(row.panels), shape.columns):
            some = row.panels[start : start + shape.columns]
            captions = [shape.caption(panel) for panel in some]
            lines = max(map(len, captions))
            for i, (panel, caption) in enumerate(zip(some, captions, strict=True)):
                left = inset + _MARGIN + i * (shape.slot + _GAP)
                # captions stand on their pictures, whatever the number of their lines
                top = self.top - _LINE * (lines - len(caption))
                for number, line in enumerate(caption):
                    colour = "firebrick" if panel.wrong else "black"
                    self._text(left + shape.slot / 2, top - _LINE * number, line, 8, colour)
                below = self.top - _LINE * lines - 0.04 - shape.panel_height
                inner = left + (shape.slot - shape.panel_width) / 2
                axes = self._axes(inner, below, shape.panel_width, shape.panel_height)
                self._panel(axes, row, panel)
                if panel.values is not None:
                    self._bar(left, below - 0.05 - _BAR, shape.slot, panel)
            self.top -= shape.line_height(some)
        if row.strengths:
            left = inset + _MARGIN + _CHART_INSET
            axes = self._axes(left, self.top - _CHART, shape.width - left + inset - _MARGIN, _CHART)
            _chart(axes, row)
            self.top -= _CHART + _CHART_LABELS

    def _panel(self, axes: Axes, row: Row, panel: Panel) -> None:
        from matplotlib.patches import Rectangle

        height, width = row.picture.shape[:2]
        extent = (0, width, height, 0)
        edge = "red"
        if panel.values is None:
            axes.imshow(row.picture.numpy(), extent=extent, aspect="auto", interpolation="antialiased")
        else:
            edge = "white" if panel.low >= 0 else "black"
            faint = row.picture.mean(-1).numpy() / 2 + (0.5 if panel.low >= 0 else 0.4)
            axes.imshow(
                faint, extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=1, interpolation="antialiased"
            )
            rows, columns = panel.values.shape
            axes.imshow(
                panel.values.numpy(),
                # a grid may reach beyond the picture, or end before its edge
                extent=(0, columns * panel.cell[1], rows * panel.cell[0], 0),
                aspect="auto",
                cmap=SEQUENTIAL if panel.low >= 0 else DIVERGING,
                vmin=panel.low,
                vmax=panel.high,
                alpha=ALPHA,
                interpolation="bilinear" if self.smooth else "nearest",
            )
        if row.box is not None:
            x0, y0, x1, y1 = row.box
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=1.2))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()

    def _bar(self, left: float, bottom: float, width: float, panel: Panel) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        axes = self._axes(left + 0.12, bottom, width - 0.24, _BAR)
        colours = ScalarMappable(
            Normalize(panel.low, panel.high), SEQUENTIAL if panel.low >= 0 else DIVERGING
        )
        ends = [panel.low, (panel.low + panel.high) / 2, panel.high]
        bar = self.figure.colorbar(
            colours, cax=axes, orientation="horizontal", ticks=ends, format=lambda value, _: f"{value:.2g}"
        )
        bar.ax.tick_params(labelsize=7, length=2, pad=1)
        bar.outline.set_linewidth(0.4)
        bar.set_label(panel.unit, fontsize=7, labelpad=1)


class _Shape:
    """Sizes of a row in inches: beside each other, or below each other where the picture is wide."""

    def __init__(self, row: Row) -> None:
        self.row = row
        height, width = row.picture.shape[:2]
        aspect = height / width
        count = len(row.panels)
        self.columns = count if aspect > 0.5 else min(count, 3) if aspect > 0.25 else 1
        self.slot = {count: 1.9, 3: 3.6, 1: 6.5}[self.columns] if self.columns != 1 or aspect <= 0.25 else 2.4
        self.panel_width = self.slot
        self.panel_height = max(self.slot * aspect, 0.35)
        if self.panel_height > 4.5:
            self.panel_height = 4.5
            self.panel_width = max(4.5 / aspect, 0.35)
        across = self.columns * self.slot + (self.columns - 1) * _GAP + 2 * _MARGIN
        self.width = max(across, 4.0)
        if across < self.width:
            self.slot += (self.width - across) / self.columns

    def caption(self, panel: Panel) -> list[str]:
        """Returns the lines of a caption."""
        return _wrapped(panel.caption, self.slot, 8, 3)

    def line_height(self, some: Sequence[Panel]) -> float:
        """Returns the height of panels side by side, with their captions and colour bars."""
        lines = max(len(self.caption(panel)) for panel in some)
        bars = _BAR + _BAR_LABELS if any(panel.values is not None for panel in some) else 0.0
        return _LINE * lines + 0.04 + self.panel_height + 0.05 + bars

    @property
    def height(self) -> float:
        """Height of the row."""
        panels = self.row.panels
        lines = [panels[start : start + self.columns] for start in range(0, len(panels), self.columns)]
        chart = _CHART + _CHART_LABELS if self.row.strengths else 0.0
        return sum(map(self.line_height, lines)) + chart


def _chart(axes: Axes, row: Row) -> None:
    """Draws a bar for each block; the shown one stands out."""
    from matplotlib.ticker import MaxNLocator

    colours = ["#b5367a" if block == row.shown else "#8c8c9c" for block in row.strengths]
    axes.bar(list(row.strengths), list(row.strengths.values()), color=colours, width=0.8)
    step = -(-len(row.strengths) // 24)
    axes.set_xticks(list(row.strengths)[::step])
    axes.set_xlim(min(row.strengths) - 0.6, max(row.strengths) + 0.6)
    axes.set_ylim(0, max(row.strengths.values()) * 1.05 or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=6, length=2)
    axes.set_xlabel("block", fontsize=6.5, labelpad=1)
    axes.set_ylabel("signal's norm,\nmean of patches", fontsize=6.5)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_fontsize(6)
    axes.spines[["top", "right"]].set_visible(False)


def _wrapped(text: str, width: float, size: float, most: int) -> list[str]:
    """Breaks a text into lines that fit a width in inches; what is too long ends in dots."""
    characters = max(int(width / (size * _CHARACTER)), 4)
    return textwrap.wrap(_drawable(text), characters, max_lines=most, placeholder=" …") if text else []


def _drawable(text: str) -> str:
    """Returns a text with a box for each character that the font does not have, or that is none to draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(character if ord(character) in known else "□" for character in " ".join(text.split()))
