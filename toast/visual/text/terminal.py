"""Heat maps of a text in the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from toast.visual.text.cells import Cell, marked
from toast.visual.text.colours import DARK, Colour, HeatMap, heat_maps
from toast.visual.text.looking import TextAttentionMaps

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.style import Style
    from rich.text import Text

# With sixteen colours or none a terminal cannot show a scale.
_SHOWS_SCALES = ("256", "truecolor")
_BAR = 20


def as_terminal(maps: TextAttentionMaps) -> RenderableType:
    """Returns what a rich console prints: the coloured text, or a table where there is no colour.

    Ink and paper are set for every token, so that it can be read on light and dark terminals alike. Control
    characters are replaced by marks; nothing in the text reaches the terminal as a command.

    Args:
        maps: Of `look_at_text`.
    """
    return _TerminalMaps(maps)


class _TerminalMaps:
    """Is printed as the console allows."""

    def __init__(self, maps: TextAttentionMaps) -> None:
        self.maps = maps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for note in self.maps.notes:
            yield Text(note)
        coloured = console.color_system in _SHOWS_SCALES and not console.no_color
        for heat in heat_maps(self.maps):
            yield Text()
            yield Text(heat.title, style="bold")
            if coloured:
                yield _legend(heat)
                yield from _lines(self.maps, heat, options.max_width)
            else:
                yield _table(self.maps, heat)


def _style(colour: Colour, special: bool = False) -> Style:
    from rich.color import Color
    from rich.style import Style

    return Style(
        color=Color.from_rgb(*DARK.ink), bgcolor=Color.from_rgb(*colour), italic=special, underline=special
    )


def _legend(heat: HeatMap) -> Text:
    from rich.text import Text

    line = Text(f"-{heat.top:.3g} " if heat.signed else "0 ")
    for step in range(_BAR):
        share = step / (_BAR - 1)
        line.append(" ", _style(DARK.background(2 * share - 1 if heat.signed else share)))
    line.append(f" {heat.top:.3g}")
    if heat.largest > heat.top:
        line.append(f" and beyond, to {heat.largest:.3g}")
    return line


def _lines(maps: TextAttentionMaps, heat: HeatMap, width: int) -> list[Text]:
    """Returns the text in lines that break between cells, and after each line feed."""
    from rich.text import Text

    lines: list[Text] = []
    part, used = "", 0
    for cell in maps.cells:
        heading = "Prompt" if maps.is_prompt[cell.start] else "Answer"
        if heading != part:
            lines = [*_without_empty_end(lines), Text(heading, style="dim"), Text(overflow="fold")]
            part, used = heading, 0
        style = _style(DARK.background(heat.share(heat.of(cell))), cell.special)
        for piece in re.findall(r"[^\n]*\n|[^\n]+", cell.text):
            shown = Text(marked(piece), style)
            if used and used + shown.cell_len > width:
                lines.append(Text(overflow="fold"))
                used = 0
            lines[-1].append_text(shown)
            # Cell by cell, as rich measures what has a style: joined emoji may be narrower together.
            used += shown.cell_len
            if piece.endswith("\n"):
                lines.append(Text(overflow="fold"))
                used = 0
    return _without_empty_end(lines)


def _without_empty_end(lines: list[Text]) -> list[Text]:
    return lines[:-1] if lines and not lines[-1].plain else lines


def _table(maps: TextAttentionMaps, heat: HeatMap) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "text", "value", f"to {heat.top:.3g}", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[2].justify = "right"
    for cell in maps.cells:
        value = heat.of(cell)
        bar = "#" * round(abs(heat.share(value)) * _BAR)
        sign = "-" if value < 0 and bar else ""
        part = "" if maps.is_prompt[cell.start] else "answer "
        table.add_row(
            Text(f"{part}{maps.left_out + cell.start}"),
            Text(_named(cell)),
            Text(f"{value:.4f}"),
            Text(sign + bar),
        )
    return table


def _named(cell: Cell) -> str:
    return f"[{cell.text}]" if cell.special else marked(cell.text)
