"""Every example in the docstrings and in the README runs and prints what stands there."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import toast
from toast.families import table

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(toast.__path__, "toast.") if m.name != "toast.__main__"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FAMILIES", [*table.FAMILIES])  # an example adds a row
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0


def test_readme_examples() -> None:
    torch.manual_seed(0)
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=FLAGS)
    assert results.attempted >= 4
    assert results.failed == 0


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_pages_name_only_what_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:toast|scripts|tests|configs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
