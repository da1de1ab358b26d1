"""Tables, bars and single figures as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

_WORDS = Markup(' class="words"')


def tiles(figures: Iterable[tuple[str, str, str]]) -> Markup:
    """Returns single figures side by side: name, value, and a note below."""
    made = [
        Markup('<div class="tile"><span>{}</span><b>{}</b><small>{}</small></div>').format(*figure)
        for figure in figures
    ]
    return Markup('<div class="tiles">{}</div>').format(Markup("").join(made)) if made else Markup("")


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], marked: int | None = None, words: int = 1
) -> Markup:
    """Returns a table that scrolls by itself where it is wider than the page.

    Args:
        head: Names of the columns.
        rows: Cells, the first of each row its name.
        marked: A row that stands out, counted from 0.
        words: How many of the first columns hold words; the others hold numbers.
    """
    lines = []
    for i, (first, *cells) in enumerate(rows):
        lines.append(
            Markup('<tr{}><th scope="row">{}</th>{}</tr>').format(
                Markup(' class="marked"') if i == marked else "",
                first,
                Markup("").join(
                    Markup("<td{}>{}</td>").format(_WORDS if j < words else "", cell)
                    for j, cell in enumerate(cells, 1)
                ),
            )
        )
    names = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(_WORDS if j < words else "", name)
        for j, name in enumerate(head)
    )
    return Markup(
        '<div class="wide"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(names, Markup("").join(lines))


def bar(share: float, text: str) -> Markup:
    """Returns a figure with a bar behind it, of a share of the cell's width, 0 to 1."""
    return Markup('<span class="bar-cell" style="--s:{}">{}</span>').format(f"{max(0.0, share):.3f}", text)


def facts(rows: Iterable[tuple[str, Any]]) -> Markup:
    """Returns names with what is to say of each; those without are left out."""
    made = [
        Markup("<dt>{}</dt><dd>{}</dd>").format(name, held) for name, held in rows if held not in ("", None)
    ]
    return Markup("<dl>{}</dl>").format(Markup("").join(made))


def listed(items: Iterable[Any]) -> Markup:
    """Returns a list."""
    return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(item) for item in items))


def folded(title: str, inner: Markup) -> Markup:
    """Returns what is shown when its title is chosen."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, inner)


def seconds(value: float) -> str:
    """Returns a time as it is said."""
    if value < 100:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes_ = divmod(minutes, 60)
    return f"{hours} h {minutes_} min" if hours else f"{minutes} min {rest} s"
