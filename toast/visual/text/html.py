"""Heat maps of a text as one HTML file: no network, no script, light and dark, for any width of screen."""

from __future__ import annotations

from html import escape

from toast.visual.text.cells import Cell, mark
from toast.visual.text.colours import DARK, LIGHT, Colour, HeatMap, Theme, heat_maps
from toast.visual.text.looking import TextAttentionMaps

# What an HTML parser keeps as it is, and a browser lays out as text.
_KEPT = {" ", "\n", "\t"}


def as_html(views: TextAttentionMaps, title: str) -> str:
    """Returns a page with the coloured text, the scales, and the numbers of every token in a table.

    What cannot be seen stands for itself where it may, with a mark that the page draws and copying leaves
    out; a control character or one that moves others is replaced by `<i class="mark" data-code="1B">`. The
    page says to the browser that it may load and run nothing.

    Args:
        views: Of `look_at_text`.
        title: Over the page.
    """
    maps = heat_maps(views)
    return _PAGE.format(
        title=escape("".join(c if c == " " else mark(c) or c for c in title)),
        style=STYLE.format(light=variables(LIGHT), dark=variables(DARK)),
        notes="".join(f"<p>{escape(note)}</p>\n" for note in views.notes),
        maps="\n".join(heat_map_section(views, heat) for heat in maps),
        table=_table(views, maps),
    )


def heat_map_section(views: TextAttentionMaps, heat: HeatMap) -> str:
    """Returns one heat map with its scale."""
    parts = []
    for name, belongs in (("Prompt", True), ("Answer", False)):
        cells = [cell for cell in views.cells if bool(views.is_prompt[cell.start]) is belongs]
        if cells:
            spans = "".join(_span(cell, heat) for cell in cells)
            parts.append(f'<h3>{name}</h3>\n<div class="text" dir="auto">{spans}</div>\n')
    low = f"−{heat.top:.3g}" if heat.signed else "0"
    beyond = (
        f" Beyond the scale, up to {heat.largest:.3g}, the colour stays." if heat.largest > heat.top else ""
    )
    return (
        f"<section>\n<h2>{heat.title}</h2>\n<p>{heat.caption}{beyond}</p>\n"
        f'<p class="scale">{low} <span class="bar{" signed" * heat.signed}"></span> {heat.top:.3g}</p>\n'
        f"{''.join(parts)}</section>"
    )


def _span(cell: Cell, heat: HeatMap) -> str:
    value = heat.of(cell)
    share = heat.share(value)
    kinds = "t" + " cold" * (share < 0) + " special" * cell.special
    return (
        f'<span class="{kinds}" style="--v:{abs(share):.3f}" title="{value:.4g}">{_visible(cell.text)}</span>'
    )


def _visible(text: str) -> str:
    """Returns escaped text, with elements around or instead of what cannot be seen."""
    parts = []
    for character in text:
        shown = mark(character)
        if shown is None:
            parts.append(escape(character))
        elif character in _KEPT:
            kind = "space" if character == " " else "mark"
            parts.append(f'<i class="{kind}" data-mark="{shown}">{character}</i>')
        else:
            parts.append(f'<i class="mark" data-mark="{shown}" data-code="{ord(character):X}"></i>')
    return "".join(parts)


def _table(views: TextAttentionMaps, maps: list[HeatMap]) -> str:
    """Returns the numbers of every token; a cell of several tokens spans their rows."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "text", "token", *(m.name for m in maps)))
    rows = []
    for cell in views.cells:
        for i in range(cell.start, cell.stop):
            span = f' rowspan="{cell.stop - cell.start}"' if cell.stop - cell.start > 1 else ""
            text = f'<td class="said" dir="auto"{span}>{_visible(cell.text)}</td>' if i == cell.start else ""
            numbers = "".join(f"<td>{float(heat.values[i]):.6f}</td>" for heat in maps)
            answer = "" if views.is_prompt[i] else ' class="answer"'
            place = f"<td>{views.left_out + i}</td>"
            rows.append(f"<tr{answer}>{place}{text}<td>{int(views.token_ids[i])}</td>{numbers}</tr>")
    body = "\n".join(rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def variables(theme: Theme) -> str:
    """Returns a theme's colours as variables of CSS."""
    colours: dict[str, Colour] = vars(theme)
    return " ".join(f"--{name}: {red} {green} {blue};" for name, (red, green, blue) in colours.items())


STYLE = """
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ margin: 0 auto; padding: 1rem; max-width: 50rem;
  background: rgb(var(--paper)); color: rgb(var(--ink)); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; line-height: 1.25; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .25rem; }}
h3 {{ font-size: .8rem; font-weight: 600; margin: .75rem 0 .1rem; opacity: .75; }}
p {{ margin: .25rem 0; font-size: .9rem; }}
.text {{ white-space: break-spaces; line-height: 1.9; }}
.t {{ background: rgb(var(--hot) / var(--v)); padding: .15em 0; border-radius: .15em;
  box-decoration-break: clone; -webkit-box-decoration-break: clone;
  box-shadow: inset 1px 0 rgb(var(--ink) / .12); }}
.t.cold {{ background: rgb(var(--cold) / var(--v)); }}
.special {{ outline: 1px dashed rgb(var(--ink) / .6); outline-offset: -2px;
  font: .85em ui-monospace, monospace; }}
.space, .mark {{ font-style: normal; position: relative; }}
.space::before {{ content: attr(data-mark); position: absolute; left: 0; right: 0; text-align: center;
  opacity: .6; }}
.mark::before {{ content: attr(data-mark); font-size: .8em; opacity: .7; }}
.scale {{ display: flex; gap: .5rem; align-items: center; font-variant-numeric: tabular-nums; }}
.bar {{ flex: 0 1 14rem; height: .9rem; border: 1px solid rgb(var(--ink) / .3);
  background: linear-gradient(to right, rgb(var(--paper)), rgb(var(--hot))); }}
.bar.signed {{ background: linear-gradient(to right, rgb(var(--cold)), rgb(var(--paper)), rgb(var(--hot))); }}
details {{ margin-top: 2rem; }}
summary {{ cursor: pointer; font-weight: 600; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .72rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }}
th, td {{ padding: .2rem; text-align: right; border-bottom: 1px solid rgb(var(--ink) / .15); }}
th {{ vertical-align: bottom; }}
th:nth-child(2), .said {{ text-align: start; white-space: break-spaces; }}
.answer td {{ background: rgb(var(--ink) / .06); }}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{notes}{maps}
<details>
<summary>Numbers by token</summary>
<p>Six decimals; tokens of the answer are shaded. Tokens that hold parts of one character share a text.</p>
<div class="wide">
{table}
</div>
</details>
</body>
</html>
"""
