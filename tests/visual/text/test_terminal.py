"""The terminal view, as a rich console records it."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console

import toast
from tests.visual.text.test_cells import HOSTILE, SENTENCES
from tests.visual.text.test_html import views_of
from tests.visual.text.test_looking import ANSWER, PROMPT, look, plain_decoder
from toast.visual.text.cells import marked
from toast.visual.text.colours import DARK, heat_maps
from toast.visual.text.terminal import as_terminal


def console(colours: Any = "truecolor", width: int = 60, **options: Any) -> Console:
    return Console(
        record=True, file=StringIO(), force_terminal=True, color_system=colours, width=width, **options
    )


def printed(views: Any, screen: Console) -> str:
    screen.print(as_terminal(views))
    return screen.export_text()


@pytest.mark.parametrize("width", [20, 60])
@pytest.mark.parametrize("prompt", [SENTENCES[0], HOSTILE])
def test_the_text_is_there_with_marks_within_the_width(prompt: str, width: int) -> None:
    views = views_of(prompt, ANSWER)
    text = printed(views, console(width=width))
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    joined = text.replace("\n", "")
    assert joined.count(marked(prompt)) == joined.count(marked(ANSWER)) == 3
    assert lines.count("Prompt") == lines.count("Answer") == 3


def test_no_character_of_a_text_commands_the_terminal() -> None:
    screen = console()
    text = printed(views_of(HOSTILE, HOSTILE), screen)
    assert not [character for character in text if character != "\n" and ord(character) < 32]
    assert "\u202e" not in text
    assert "[bold]$" in text  # no markup of rich
    written = screen.file.getvalue()  # type: ignore[attr-defined]
    assert not re.sub(r"\x1b\[[\d;]*m", "", written).replace("\n", "").count("\x1b")


def test_every_cell_has_the_colour_of_its_value_and_readable_ink() -> None:
    views = views_of(SENTENCES[0], ANSWER)
    screen = console(width=400)
    segments = [
        s for s in screen.render(as_terminal(views)) if s.style and s.style.bgcolor and s.text.strip()
    ]
    expected = []
    for heat in heat_maps(views):
        for cell in views.cells:
            share = heat.share(float(heat.values[cell.start : cell.stop].mean()))
            expected.append((marked(cell.text), Color.from_rgb(*DARK.background(share))))
    assert [(s.text, s.style.bgcolor) for s in segments if s.style] == expected
    assert {s.style.color for s in segments if s.style} == {Color.from_rgb(*DARK.ink)}


@pytest.mark.parametrize("options", [{"colours": None}, {"colours": "standard"}, {"no_color": True}])
def test_without_colour_there_are_numbers(options: dict[str, Any]) -> None:
    views = views_of(PROMPT, ANSWER)
    text = printed(views, console(**options))
    rows = re.findall(r"^ *(?:answer )?(\d+)  (\S+) +(-?\d\.\d{4}) *(-?#*) *$", text, re.MULTILINE)
    assert len(rows) == 3 * len(views.cells)
    heat = heat_maps(views)[2]
    for cell, row in zip(views.cells, rows[-len(views.cells) :], strict=True):
        value = heat.of(cell)
        assert (int(row[0]), row[1]) == (cell.start, marked(cell.text))
        assert float(row[2]) == pytest.approx(value, abs=5.1e-5)
        assert row[3].count("#") == round(abs(heat.share(value)) * 20)
        assert row[3].startswith("-") is (value < 0 and "#" in row[3])


def test_256_colours_are_enough() -> None:
    screen = console("256")
    assert "Prompt" in printed(views_of(PROMPT, ANSWER), screen)
    assert "48;5;" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_notes_and_scales_are_printed() -> None:
    views = views_of(SENTENCES[0], ANSWER, max_tokens=9)
    text = " ".join(printed(views, console()).split())
    assert all(note in text for note in views.notes)
    for heat in heat_maps(views):
        assert heat.title in text
        assert f"{heat.top:.3g}" in text
    assert "0 0\n" in printed(look(toast.wrap(plain_decoder())), console()).replace(" " * 22, " ")
