"""The page holds the text and nothing of it acts."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import toast
from tests.visual.text.test_cells import HOSTILE, SENTENCES
from tests.visual.text.test_looking import ANSWER, PROMPT, look, plain_decoder, steer
from toast.visual.text.cells import Cell
from toast.visual.text.colours import DARK, LIGHT, Theme, heat_maps
from toast.visual.text.html import as_html
from toast.visual.text.looking import TextAttentionMaps

TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "section", "div", "span", "i",
    "details", "summary", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page back, as strictly as its own writer."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.cells: list[dict[str, Any]] = []
        self.marks: list[str] = []
        self.rows: list[list[str]] = []
        self.visible: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        assert tag in TAGS
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
        if tag != "meta":
            self.open.append((tag, attributes))
        if attributes.get("class") == "text":
            self.texts.append("")
        if tag == "span" and attributes["class"].startswith("t"):
            self.cells.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if "data-mark" in attributes:
            self.marks.append(attributes["data-mark"])
        if "data-code" in attributes:
            self.handle_data(chr(int(attributes["data-code"], 16)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        if any(attributes.get("class") == "text" for _, attributes in self.open):
            self.texts[-1] += data
        elif "td" in inside:
            self.rows[-1][-1] += data
        elif "style" not in inside:
            self.visible.append(data.strip())

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


@cache
def views_of(prompt: str, answer: str, **options: Any) -> TextAttentionMaps:
    return look(steer(plain_decoder()), prompt, answer=answer, **options)


@pytest.mark.parametrize("prompt", [PROMPT, HOSTILE, f"<|start|>{SENTENCES[1]}\n"])
@pytest.mark.parametrize("answer", [ANSWER, HOSTILE, "<|end|>", ""])
def test_the_text_of_the_page_is_the_decoded_text(prompt: str, answer: str) -> None:
    page = Page(as_html(views_of(prompt, answer), "Title"))
    parts = [prompt, answer] if answer else [prompt]
    assert page.texts == parts * 3  # one heat map after the other


def test_nothing_in_a_hostile_text_or_title_acts() -> None:
    written = as_html(views_of(HOSTILE, HOSTILE), HOSTILE)
    page = Page(written)
    assert "script" not in {tag for tag, _ in page.open}
    assert written.count("<script") == 0
    assert "default-src 'none'" in written
    assert "url(" not in written
    assert not re.search(
        r"https?:|javascript:|@import|&#",
        written.replace("&amp;#", "").replace("&#34;", "").replace("&#39;", ""),
    )
    body = written[written.index("<section") :]
    moving = {*map(chr, range(32)), *map(chr, range(127, 160)), "\u202e", "\u2066", "\ufeff"} - {"\n", "\t"}
    assert not moving & set(body)
    assert {"·", "↵", "⇥", "U+001B", "U+0000", "U+000D", "U+202E", "U+00A0"} <= set(page.marks)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</div></span>", "&lt;&#60;", "<!--", "\"'"])
def test_a_token_that_is_markup_is_text(text: str) -> None:
    """A large vocabulary has such tokens."""
    views = views_of(PROMPT, ANSWER)
    count = len(views.tokens)
    views = replace(views, cells=[Cell(text, 0, 1), Cell(text, 1, count)])
    page = Page(as_html(views, ""))
    assert page.texts == [text * 2] * 3
    assert [row[1] for row in page.rows if len(row) == 6] == [text] * 2


def test_a_title_with_control_characters_is_harmless() -> None:
    written = as_html(views_of(PROMPT, ANSWER), "a\x00\x1b\u202e\n<b>")
    assert not {"\x00", "\x1b", "\u202e"} & set(written)
    assert "<b>" not in written


def test_the_table_has_the_numbers_of_every_token() -> None:
    views = views_of("soup 日本", ANSWER)
    rows = [row for row in Page(as_html(views, "")).rows if row]
    assert len(rows) == len(views.tokens)
    numbers = torch.tensor([[float(number) for number in row[-3:]] for row in rows], dtype=torch.float64)
    expected = [views.selection_weights.double(), views.attention_change, views.received_change]
    torch.testing.assert_close(numbers, torch.stack(expected, dim=1), rtol=0, atol=5.1e-7)
    assert [int(row[0]) for row in rows] == [*range(len(rows))]
    assert [int(row[-4]) for row in rows] == views.token_ids.tolist()
    assert "".join(row[1] for row in rows if len(row) == 6) == views.text
    assert {len(row) for row in rows} == {5, 6}  # parts of a character share its cell


def test_colours_go_by_the_share_of_the_scale() -> None:
    views = views_of(SENTENCES[0], ANSWER)
    cells = Page(as_html(views, "")).cells
    for number, heat in enumerate(heat_maps(views)):
        count = len(views.cells)
        shown = cells[number * count : (number + 1) * count]
        for cell, attributes in zip(views.cells, shown, strict=True):
            value = float(heat.values[cell.start : cell.stop].mean())
            share = min(abs(value) / heat.top, 1)
            assert float(attributes["style"].removeprefix("--v:")) == pytest.approx(share, abs=5.1e-4)
            assert ("cold" in attributes["class"]) is (value < 0)
            assert float(attributes["title"]) == pytest.approx(value, rel=1e-3)
    assert any("cold" in attributes["class"] for attributes in cells)


def test_one_value_that_stands_out_does_not_hide_the_others() -> None:
    views = views_of(SENTENCES[0], ANSWER)
    change = torch.linspace(0, 0.1, len(views.tokens), dtype=torch.float64)
    even = heat_maps(replace(views, attention_change=change))[1]
    assert even.top == even.largest == pytest.approx(0.1)
    change[0] = 0.9
    heat = heat_maps(replace(views, attention_change=change))[1]
    assert 0.08 < heat.top < 0.15
    assert heat.share(0.9) == 1
    assert "up to 0.9, the colour stays" in as_html(replace(views, attention_change=change), "")


def test_a_new_adapter_makes_a_page_without_colour() -> None:
    views = look(toast.wrap(plain_decoder()))
    shares = [attributes["style"] for attributes in Page(as_html(views, "")).cells]
    assert set(shares[len(views.cells) :]) == {"--v:0.000"}


def test_the_page_says_what_was_left_out() -> None:
    views = views_of(SENTENCES[0], ANSWER, max_tokens=9)
    page = Page(as_html(views, ""))
    assert any(f"{views.left_out} tokens before these" in line for line in page.visible)
    assert next(int(row[0]) for row in page.rows if row) == views.left_out > 0


def luminance(colour: tuple[int, int, int]) -> float:
    """WCAG 2.2: relative luminance."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_ink_is_readable_on_every_colour(theme: Theme) -> None:
    ink = luminance(theme.ink)
    for step in range(-20, 21):
        paper = luminance(theme.background(step / 20))
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast > 4.5
    assert theme.background(0) == theme.paper
    assert theme.background(1) == theme.hot
    assert theme.background(-1) == theme.cold
