"""Sphinx's settings for the site, which `scripts/build_site.py` builds."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

from toast.version import __version__

project = "toast"
author = "The toast-steering authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
suppress_warnings = ["myst.header"]  # CHANGELOG.md and notebooks step over levels
exclude_patterns = ["conf.py"]

smartquotes = False  # messages and options stand as they are typed
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"toast {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings are written with single backticks
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escapes, in a docstring, what reStructuredText reads in another way than Markdown."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        text = "".join(p if p.startswith("`") else p.replace("|", "\\|") for p in parts)
        lines[number] = re.sub(r"(?<=\w)`(?=\w)", r"`\\ ", text)  # `yield`s


def visit_math(self: Any, node: nodes.Element) -> None:
    """Writes an equation as MathML, which browsers show without scripts."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Registers both."""
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
