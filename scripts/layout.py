"""Counts what the layout of the package is like: `python scripts/layout.py [PACKAGE]`.

Files, lines, and circles of imports, with and without those under `TYPE_CHECKING`, between files and between
folders; files that share a name; the longest files; the words of the README. Imports inside functions count.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

Graph = dict[str, set[str]]

LONG = 400  # lines


def modules(package: Path) -> dict[str, Path]:
    """Returns the files of a package by the name they are imported by."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, typing: bool) -> Iterator[str]:
    """Yields the absolute names that a file imports; those under `TYPE_CHECKING` only if `typing`."""

    def walk(nodes: Iterable[ast.AST]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk([*(node.body if typing else ()), *node.orelse])
            else:
                yield from walk(ast.iter_child_nodes(node))

    yield from walk(ast.parse(path.read_text()).body)


def graph_of(files: dict[str, Path], typing: bool) -> Graph:
    """Returns which module imports which."""
    graph: Graph = {}
    for name, path in files.items():
        targets = set()
        for target in imports(path, typing):
            while target and target not in files:
                target = target.rpartition(".")[0]
            targets.add(target)
        graph[name] = targets - {"", name}
    return graph


def rooms_of(graph: Graph, files: dict[str, Path], package: Path) -> Graph:
    """Returns the same for rooms: a folder is one, and so is each file beside `__init__.py` at the top."""

    def room(name: str) -> str:
        folder = files[name].parent.relative_to(package)
        return str(folder) if folder.parts else files[name].name

    rooms: Graph = defaultdict(set)
    for name, targets in graph.items():
        rooms[room(name)] |= {room(target) for target in targets}
    # The face of the package imports what it offers; that others import it is its purpose.
    return {name: targets - {name, "__init__.py"} for name, targets in rooms.items() if name != "__init__.py"}


def circles(graph: Graph) -> list[list[str]]:
    """Returns the strongly connected components of more than one node (Tarjan), the largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def report(package: Path) -> Iterator[str]:
    """Yields the lines of the report."""
    files = modules(package)
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    top = list(package.glob("*.py"))
    yield f"files {len(files)}, lines {sum(lines.values()):,}; at the top {len(top)} files"
    long = [f"{files[name].relative_to(package)} ({count})" for name, count in lines.items() if count > LONG]
    yield f"files of more than {LONG} lines: {', '.join(long) or 'none'}"
    stems = Counter(path.stem for path in files.values() if path.stem != "__init__")
    shared = [f"{stem} ({count})" for stem, count in sorted(stems.items()) if count > 1]
    yield f"names of files that are used again: {len(shared)}: {', '.join(shared)}"
    for typing in (False, True):
        graph = graph_of(files, typing)
        rooms = rooms_of(graph, files, package)
        what = "with" if typing else "without"
        yield f"{what} TYPE_CHECKING:"
        arrows = sum(map(len, rooms.values()))
        for title, each in (("files", graph), (f"{len(rooms)} rooms, {arrows} arrows", rooms)):
            found = circles(each)
            yield f"  circles of {title}: {len(found)}" + "".join(
                f"\n    {len(circle)}: {', '.join(circle)}" for circle in found
            )
    readme = package.parent / "README.md"
    if readme.is_file():
        yield f"README.md: {len(readme.read_text().split()):,} words"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", nargs="?", type=Path, default=Path("toast"), help="its folder")
    for line in report(parser.parse_args().package):
        print(line)
