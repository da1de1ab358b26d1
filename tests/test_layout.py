"""No two files or folders of the package import each other, not even for types."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import lowest
from scripts.layout import circles, graph_of, modules, rooms_of

PACKAGE = Path(__file__).parents[1] / "toast"
NEWEST = PACKAGE.parent / ".ci" / "newest"


@pytest.mark.parametrize("typing", [False, True])
def test_nothing_imports_in_circles(typing: bool) -> None:
    files = modules(PACKAGE)
    graph = graph_of(files, typing)
    assert circles(graph) == []
    assert circles(rooms_of(graph, files, PACKAGE)) == []


def test_what_runs_on_other_versions_is_there() -> None:
    """The core of the tests that run on the lowest versions, and on the newest Python."""
    tests = PACKAGE.parent / "tests"
    assert [name for name in lowest.CORE if not (tests / name).exists()] == []
    core = re.search(r"^core=\(tests/test_\{(.*)\}\.py tests/(\w+)\)$", NEWEST.read_text(), re.MULTILINE)
    assert core is not None
    assert (tests / core[2]).is_dir()
    assert [name for name in core[1].split(",") if not (tests / f"test_{name}.py").exists()] == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]
