"""Tables of the documentation that are made from the code: settings, families, public names, errors.

`scripts/build_site.py` puts them where a page has a line `<!-- site: NAME -->`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_FIELD = re.compile(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)


def meanings(owner: type) -> dict[str, str]:
    """Returns what the docstring of a class says of each of its arguments."""
    text = inspect.getdoc(owner) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\nRaises:")[0]
    return {name: " ".join(said.split()) for name, said in _FIELD.findall(arguments)}


def settings() -> str:
    """Returns a table for each section of a run's configuration."""
    from toast.training.resuming import MAY_CHANGE
    from toast.training.run_config import RunConfig

    def tables(model: Any, path: str) -> Iterator[str]:
        said, rows, below = meanings(model), [], []
        for name, field in model.model_fields.items():
            dotted = f"{path}.{name}" if path else name
            inner = _section(field.annotation)
            if inner is not None:
                below.append((inner, dotted))
                continue
            kept = MAY_CHANGE.get(dotted) or MAY_CHANGE.get(path)
            default = "needed" if field.is_required() else f"`{_yaml(field.get_default())}`"
            rows.append((f"`{dotted}`", default, said[name], f"no: {kept}" if kept else "yes"))
        first = (inspect.getdoc(model) or "").partition("\n")[0]
        title = f"## `{path}`" if path else "## The run"
        yield f"{title}\n\n{first}\n\n" + _table(("setting", "default", "meaning", "changes results"), rows)
        for inner, dotted in below:
            yield from tables(inner, dotted)

    return "\n\n".join(tables(RunConfig, ""))


def adapter_settings() -> str:
    """Returns the table of the fields of `ToastConfig`."""
    from toast.config import ToastConfig

    said = meanings(ToastConfig)
    own = [field for field in fields(ToastConfig) if field.name in said]
    rows = []
    for field in own:
        default = "needed" if field.default is MISSING else f"`{field.default!r}`"
        rows.append((f"`{field.name}`", default, said[field.name]))
    return _table(("field", "default", "meaning"), rows)


def _section(annotation: Any) -> Any:
    """Returns the class of a section of settings, if an annotation is one, or one or None."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if hasattr(kind, "model_fields"):
            return kind
    return None


def _yaml(value: Any) -> str:
    """Returns a default as it would stand in a configuration."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def families() -> str:
    """Returns the table of families, and what is refused."""
    from toast.families.listing import LEGEND, verified
    from toast.families.table import FAMILIES, REFUSED

    rows = [
        (row.name, f"`{row.trunk.rpartition('.')[2]}`", f"`{row.value}`", row.layout.replace("_", " "),
         row.taps, ", ".join(verified(row)))
        for row in FAMILIES
    ]  # fmt: skip
    table = _table(("family", "trunk", "values from", "layout", "selector reads", "verified"), rows)
    refused = _table(
        ("refused", "because"), [(f"`{t.rpartition('.')[2]}`", why) for t, why in REFUSED.items()]
    )
    return f"{table}\n\n```text\n{LEGEND}\n```\n\n{refused}"


def api() -> str:
    """Returns the reference of every public name, for Sphinx's autodoc, each in one place."""
    import toast

    parts = []
    for name in ("toast", "toast.embedded", "toast.visual.text"):
        module = importlib.import_module(name)
        lines = [f"## {name}", "", (inspect.getdoc(module) or "").partition("\n")[0], "", "```{eval-rst}"]
        for public in module.__all__:
            found = getattr(module, public)
            kind = "class" if inspect.isclass(found) else "function" if callable(found) else "data"
            if public != "__version__" and (name == "toast" or public not in toast.__all__):
                lines += [f".. auto{kind}:: {name}.{public}", ""]
        parts.append("\n".join([*lines, "```"]))
    return "\n\n".join(parts)


#: Where an error arises, by folder or file of the package, in the order of the page.
AREAS: dict[str, tuple[str, ...]] = {
    "Wrapping a model": ("wrapping", "config", "model", "families", "injection", "probing"),
    "Loading and saving": ("saving", "files", "official", "registration"),
    "Calling a steered model": (),  # all others
    "Configurations and training": ("training", "baselines", "evaluation", "planning"),
    "Data": ("data", "embedded"),
    "Pictures, maps and reports": ("visual", "report"),
    "Commands": ("commands", "demo", "benchmark", "study"),
}  # fmt: skip
_REMEDY = re.compile(r"^(.+?[.;)]) ((?:[A-Z][a-z]+(?:, or)? |To [a-z]+).+)$", re.DOTALL)


def errors() -> str:
    """Returns the messages that say what to do, by where they arise; the others say what is allowed."""
    found: dict[str, dict[str, str]] = {area: {} for area in AREAS}
    places = {place: area for area, names in AREAS.items() for place in names}
    for path in sorted((ROOT / "toast").rglob("*.py")):
        inside = path.relative_to(ROOT / "toast").with_suffix("").parts
        area = places.get(inside[0], "Calling a steered model")
        for said in _raised(ast.parse(path.read_text())):
            if match := _REMEDY.match(said):
                found[area].setdefault(*match.groups())
    parts = []
    for area, messages in found.items():
        rows = sorted((problem.rstrip(" ;.:"), remedy) for problem, remedy in messages.items())
        if rows:
            parts.append(f"## {area}\n\n" + _table(("message", "what to do"), rows))
    return "\n\n".join(parts)


def _raised(tree: ast.AST) -> Iterator[str]:
    """Yields the texts of raised errors, with … in the place of values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said = _text(node.exc.args[0])
            if said is not None:
                yield " ".join(said.split())


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def advice() -> str:
    """Returns the advice of the study."""
    study = (ROOT / "docs" / "study.md").read_text()
    return study.partition("## Advice\n\n")[2].partition("\n\n## ")[0]


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "adapter": adapter_settings,
    "families": families,
    "api": api,
    "errors": errors,
    "advice": advice,
}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
