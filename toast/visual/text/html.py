"""Heat maps of a text as one HTML file: no network, no script, light and dark, for any width of screen."""

from __future__ import annotations

from dataclasses import dataclass

from toast.files.templates import render
from toast.visual.text.cells import Cell, mark
from toast.visual.text.colours import DARK, LIGHT, HeatMap, heat_maps
from toast.visual.text.looking import TextAttentionMaps

# What an HTML parser keeps as it is, and a browser lays out as text.
_KEPT = {" ", "\n", "\t"}


@dataclass(frozen=True)
class Piece:
    """A part of a text as the page shows it.

    Args:
        text: What stands there; empty where a mark stands instead.
        mark: Drawn by the page, and left out when the text is copied; empty for plain text.
        code: The character that the mark stands instead of, in hexadecimal digits.
    """

    text: str
    mark: str = ""
    code: str = ""


@dataclass(frozen=True)
class HeatCell:
    """A cell of a text in its colour.

    Args:
        pieces: Its text.
        value: Its value.
        share: The size of that as a share of the scale, 0 to 1.
        kinds: Classes of CSS.
    """

    pieces: list[Piece]
    value: float
    share: float
    kinds: str


@dataclass(frozen=True)
class HeatSection:
    """One heat map.

    Args:
        heat: What it shows.
        parts: Cells of the prompt and of the answer.
    """

    heat: HeatMap
    parts: list[tuple[str, list[HeatCell]]]


@dataclass(frozen=True)
class TokenRow:
    """The numbers of a token.

    Args:
        place: Of the token, counted with those that are left out.
        pieces: Its text; None where it shares that of the token before.
        span: Tokens that share the text.
        token: Its number in the vocabulary.
        values: Of the heat maps.
        is_answer: Whether it belongs to the answer.
    """

    place: int
    pieces: list[Piece] | None
    span: int
    token: int
    values: list[float]
    is_answer: bool


def as_html(maps: TextAttentionMaps, title: str) -> str:
    """Returns a page with the coloured text, the scales, and the numbers of every token in a table.

    What cannot be seen stands for itself where it may, with a mark that the page draws and copying leaves
    out; a control character or one that moves others is replaced by `<i class="mark" data-code="1B">`. The
    page says to the browser that it may load and run nothing.

    Args:
        maps: Of `look_at_text`.
        title: Over the page.
    """
    heats = heat_maps(maps)
    page = render(
        "visual/text/templates/page.html.jinja",
        title="".join(c if c == " " else mark(c) or c for c in title),
        light=vars(LIGHT),
        dark=vars(DARK),
        notes=maps.notes,
        sections=[heat_section(maps, heat) for heat in heats],
        head=["", "text", "token", *(heat.name for heat in heats)],
        rows=_rows(maps, heats),
    )
    return str(page)


def heat_section(maps: TextAttentionMaps, heat: HeatMap) -> HeatSection:
    """Returns one heat map for the macro `heat_map` of `visual/text/templates/macros.html.jinja`."""
    return HeatSection(
        heat,
        [
            (
                name,
                [_cell(cell, heat) for cell in maps.cells if bool(maps.is_prompt[cell.start]) is is_prompt],
            )
            for name, is_prompt in (("Prompt", True), ("Answer", False))
        ],
    )


def _cell(cell: Cell, heat: HeatMap) -> HeatCell:
    value = heat.of(cell)
    share = heat.share(value)
    kinds = "t" + " cold" * (share < 0) + " special" * cell.special
    return HeatCell(_pieces(cell.text), value, abs(share), kinds)


def _pieces(text: str) -> list[Piece]:
    """Returns a text character by character where it has marks."""
    pieces = []
    for character in text:
        shown = mark(character)
        if shown is None:
            pieces.append(Piece(character))
        elif character in _KEPT:
            pieces.append(Piece(character, shown))
        else:
            pieces.append(Piece("", shown, f"{ord(character):X}"))
    return pieces


def _rows(maps: TextAttentionMaps, heats: list[HeatMap]) -> list[TokenRow]:
    """Returns the numbers of every token; a cell of several tokens spans their rows."""
    return [
        TokenRow(
            place=maps.left_out + i,
            pieces=_pieces(cell.text) if i == cell.start else None,
            span=cell.stop - cell.start,
            token=int(maps.token_ids[i]),
            values=[float(heat.values[i]) for heat in heats],
            is_answer=not maps.is_prompt[i],
        )
        for cell in maps.cells
        for i in range(cell.start, cell.stop)
    ]
