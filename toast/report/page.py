"""The page around the sections: one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from toast.report.style import style

_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><p class="kind">{kind}</p><h1>{title}</h1>{head}</header>
{sections}
<footer>{foot}</footer>
</body>
</html>
""")


def page(title: str, kind: str, head: Markup, sections: Iterable[Markup], foot: str) -> str:
    """Returns the page; what is no markup is escaped.

    Args:
        title: Of it.
        kind: What it is a report of, above the title.
        head: Below the title.
        sections: In order.
        foot: Below all.
    """
    inner = Markup("\n").join(sections)
    return str(
        _PAGE.format(title=title, kind=kind, style=Markup(style()), head=head, sections=inner, foot=foot)
    )
