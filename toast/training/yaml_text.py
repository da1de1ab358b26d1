"""YAML as configurations are written in it: no surprises of YAML 1.1, and limits to what a file can cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from toast.files.atomic import read_regular
from toast.files.plain_text import decode_text

#: Characters of a file, levels of nesting, and values with aliases written out: far above any configuration.
MOST_CHARACTERS, MOST_LEVELS, MOST_VALUES = 2**20, 50, 100_000

#: What plain text is read as. YAML 1.1 reads `1e-3` as text, `010` as 8, `12:30` as 750, and days as dates.
_NUMBERS = {
    "float": (
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "int": (r"[-+]?(?:0|[1-9][\d_]*)|0x[\da-fA-F]+", "-+0123456789"),
}


class _Loader(yaml.SafeLoader):
    """A loader with these limits, that refuses a name that is given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _fault(f"is nested more than {MOST_LEVELS} levels deep", self.peek_event())
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1

    def compose_document(self) -> Node | None:
        node = super().compose_document()
        if node is not None:
            _written_out(node, {})
        return node

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.value in seen:
                first = seen[key.value] + 1
                raise _fault(f"gives {key.value!r} twice; the first is in line {first}", key)
            seen[key.value if isinstance(key, ScalarNode) else ""] = key.start_mark.line
        return node


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    ours = {f"tag:yaml.org,2002:{name}" for name in (*_NUMBERS, "timestamp")}
    kept = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in ours]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, (pattern, firsts) in _NUMBERS.items():
        for first in firsts:
            kept.setdefault(first, []).append((f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$")))
    return kept


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what this loader or one of YAML 1.1 would read as something else than text."""


_Loader.yaml_implicit_resolvers = _resolvers()
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *pairs]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Returns what YAML says.

    Raises:
        ValueError: If it is no YAML, names something twice, contains itself, or is beyond the limits.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"has {len(text):,} characters; a configuration has at most {MOST_CHARACTERS:,}")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def read_yaml_file(path: Path) -> Any:
    """Returns what a YAML file says.

    Raises:
        ValueError: As `parse_yaml`, or if it is no regular file, or in another encoding than it says; it
            names file and line.
    """
    data = read_regular(path, "YAML file", 4 * MOST_CHARACTERS)
    text = decode_text(data, str(path))
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def dump_yaml(held: Any) -> str:
    """Returns YAML that `parse_yaml`, and any other reader, takes for the same."""
    text: str = yaml.dump(held, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _written_out(
    node: Node, seen: dict[int, tuple[int, int]], within: tuple[int, ...] = ()
) -> tuple[int, int]:
    """Counts values and levels of a node with its aliases written out; each node is visited once."""
    if id(node) in within:
        raise _fault("contains itself: an alias (*) refers to a value that it is part of", node)
    if id(node) not in seen:
        parts: list[Node] = []
        if not isinstance(node, ScalarNode):
            pairs = isinstance(node, MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else list(node.value)
        found = [_written_out(part, seen, (*within, id(node))) for part in parts]
        values, levels = 1 + sum(v for v, _ in found), 1 + max((n for _, n in found), default=0)
        if values > MOST_VALUES or levels > MOST_LEVELS:
            raise _fault(
                f"is more than {MOST_VALUES:,} values or {MOST_LEVELS} levels with its aliases written out",
                node,
            )
        seen[id(node)] = values, levels
    return seen[id(node)]


def _fault(what: str, at: Any) -> ValueError:
    return ValueError(f"{what} (line {at.start_mark.line + 1})")
