"""The page around the sections: one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from toast.files.templates import render
from toast.visual.text.colours import DARK, LIGHT


def page(title: str, kind: str, head: Markup, sections: Iterable[Markup], foot: str) -> str:
    """Returns the page; what is no markup is escaped.

    Args:
        title: Of it.
        kind: What it is a report of, above the title.
        head: Below the title.
        sections: In order.
        foot: Below all.
    """
    return str(
        render(
            "report/templates/page.html.jinja",
            title=title, kind=kind, head=head, sections=list(sections), foot=foot,
            light=vars(LIGHT), dark=vars(DARK),
        )
    )  # fmt: skip
