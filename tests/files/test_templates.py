"""Templates escape what they are given, and lie in the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

import toast
from toast.files.templates import render

PACKAGE = Path(toast.__file__).parent
TEMPLATES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.jinja"))


def test_text_is_escaped_and_markup_is_not() -> None:
    page = render(
        "report/templates/page.html.jinja",
        title="<b>&amp;", kind='"', head=Markup("<i>head</i>"), sections=["</body>"], foot="'",
        light={"ink": (1, 2, 3)}, dark={"ink": (4, 5, 6)},
    )  # fmt: skip
    assert "<h1>&lt;b&gt;&amp;amp;</h1>" in page
    assert "<i>head</i>" in page
    assert page.count("</body>") == 1
    assert "--ink: 1 2 3;" in page


def test_what_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'charts' is undefined"):
        render("report/templates/curves.html.jinja")


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_loads_or_runs_anything(name: str) -> None:
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|https?:|\bsafe\b|autoescape", text)
    for folder in re.findall(r'(?:import|include) "([^"]+)"', text):
        assert (PACKAGE / folder).is_file()
