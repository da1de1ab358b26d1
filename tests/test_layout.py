"""No two files or folders of the package import each other, not even for types."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.layout import circles, graph_of, modules, rooms_of

PACKAGE = Path(__file__).parents[1] / "toast"


@pytest.mark.parametrize("typing", [False, True])
def test_nothing_imports_in_circles(typing: bool) -> None:
    files = modules(PACKAGE)
    graph = graph_of(files, typing)
    assert circles(graph) == []
    assert circles(rooms_of(graph, files, PACKAGE)) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]
