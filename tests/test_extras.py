"""What the package imports is installed by what it says: dependencies, and the extras that messages name."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from toast.commands.errors import extras_with, message

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Libraries whose modules have another name.
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "lm_eval": "lm-eval"}
#: What dependencies bring along.
BROUGHT = {"huggingface_hub", "numpy", "pyarrow", "tokenizers", "torchvision", "tqdm"}
#: Asked for by their users, or by messages that name the library itself.
OPTIONAL = {"bitsandbytes", "deepspeed", "pandas", "scipy", "torchao"}


def libraries(extra: str | None = None) -> set[str]:
    """Returns what an extra installs, dependencies included."""
    found: set[str] = set()
    for line in [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else ())]:
        if own := re.match(r"toast-steering\[(.+)\]", line):
            found |= {name for inner in own[1].split(",") for name in libraries(inner)}
        else:
            found.add(re.split(r"[<>=\[]", line)[0])
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.AST) -> Iterator[str]:
    """Yields the full names that the import statements in a piece of code ask for."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            yield from (f"{each.module}.{alias.name}" for alias in each.names)


def is_foreign(name: str) -> bool:
    return name.split(".")[0] not in {*sys.stdlib_module_names, "toast"}


def library(name: str) -> str:
    return NAMES.get(root := name.split(".")[0], root)


def at_import(path: Path) -> set[str]:
    """Returns the libraries that importing a module of the package imports, with all it builds on."""
    found: set[str] = set()
    seen, todo = set(), [path]
    while todo:
        if (at := todo.pop()) in seen:
            continue
        seen.add(at)
        statements = [
            each for each in tree(at).body if isinstance(each, ast.Import | ast.ImportFrom | ast.Try)
        ]
        for name in (name for each in statements for name in imported(each)):
            if is_foreign(name):
                found.add(library(name))
                continue
            places = [ROOT / name.replace(".", "/"), ROOT / name.rpartition(".")[0].replace(".", "/")]
            files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
            todo += [file for file in files if file.is_file()][:1]
    return found - {NAMES.get(name, name) for name in BROUGHT}


def test_every_library_that_is_imported_is_declared() -> None:
    declared = set().union(*map(libraries, PROJECT["optional-dependencies"])) | BROUGHT | OPTIONAL
    found = {
        library(name)
        for path in (ROOT / "toast").rglob("*.py")
        for name in imported(tree(path))
        if is_foreign(name)
    }
    assert found <= declared, found - declared


def test_messages_name_an_extra_that_holds_the_library() -> None:
    checked = 0
    for path in (ROOT / "toast").rglob("*.py"):
        for node in ast.walk(tree(path)):
            said = (
                re.findall(r"toast-steering\[([\w-]+)\]", ast.unparse(node))
                if isinstance(node, ast.Try)
                else []
            )
            for extra in said:
                needed = {library(name) for each in node.body for name in imported(each) if is_foreign(name)}
                assert needed <= libraries(extra) | BROUGHT, (path, needed, extra)
                checked += 1
    assert checked > 4


@pytest.mark.parametrize(
    ("entry", "extra"),
    [
        ("training/run.py", "train"),
        ("training/sweeping.py", "train"),
        ("training/measuring.py", "train"),
        ("planning/printing.py", "train"),
        ("report/showing.py", "visual"),
        ("demo/demonstration.py", "demo"),
        ("benchmark/suite.py", None),
        ("generation/prompting.py", None),
        ("official/importing.py", None),
    ],
)
def test_an_extra_holds_what_its_commands_import(entry: str, extra: str | None) -> None:
    assert at_import(ROOT / "toast" / entry) <= libraries(extra)


def test_a_missing_library_is_said_with_its_extra() -> None:
    assert extras_with("pydantic.fields") == ["train", "visual"] and not extras_with("nowhere")
    error = ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
    assert message(error) == "this needs tqdm: pip install 'toast-steering[train]'"
