"""The templates of the package's pages, in Jinja2: what is put into one is escaped, unless it is markup."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> Markup:
    """Fills a template.

    Args:
        template: Its path within the package, such as `report/templates/page.html.jinja`.
        **values: By name, what the template asks for; one that is missing is an error.

    Returns:
        Markup, which another template takes as it is.
    """
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("toast", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
