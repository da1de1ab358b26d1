"""JSON files: read whole, or refused with the name of the file, the line and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from toast.files.atomic import read_regular

Kinds = type | tuple[type, ...]
#: What a value of a JSON file may be; True and False are no numbers here, which they are in Python.
NUMBER: Kinds = (int, float)
#: In place of a key: all others.
OTHERS = "*"


def read_json(path: Path, keys: Mapping[str, Kinds] | None = None) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: The file.
        keys: Keys that have to be there, and of what type their values are.

    Raises:
        ValueError: If it is not there, cut off, no UTF-8, or holds something else: names the file, the line
            and what is wrong.
    """
    held = _parsed(read_regular(path, "JSON file"), str(path))
    if not isinstance(held, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the type of the argument
            f"{path} needs a JSON object of settings; it holds {_named(held)}."
        )
    _refuse_keys(held, keys or {}, str(path))
    return held


def read_json_list(path: Path, kind: Kinds) -> list[Any]:
    """Reads a file that holds one JSON list.

    Args:
        path: The file.
        kind: Of what type its items are.

    Raises:
        ValueError: As `read_json`.
    """
    held = _parsed(read_regular(path, "JSON file"), str(path))
    wrong = [item for item in held if not _is_a(item, kind)] if isinstance(held, list) else [held]
    if not isinstance(held, list) or wrong:
        raise ValueError(f"{path} needs a JSON list of {_words(kind)}; it holds {_named(wrong[0])}.")
    return held


def read_json_lines(
    path: Path, keys: Mapping[str, Kinds] | None = None, may_be_cut: bool = False
) -> list[dict[str, Any]]:
    """Reads a file that holds a JSON object in each line.

    Args:
        path: The file.
        keys: As of `read_json`, of each line.
        may_be_cut: Whether a last line without an end, which an interruption has cut off, is left out.

    Raises:
        ValueError: As `read_json`.
    """
    *lines, last = read_regular(path, "file of JSON lines").split(b"\n")
    if last and not may_be_cut:
        lines.append(last)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        held = _parsed(line, where)
        if not isinstance(held, dict):
            raise ValueError(f"{where}: needs a JSON object; it holds {_named(held)}.")  # noqa: TRY004
        _refuse_keys(held, keys or {}, where)
        rows.append(held)
    return rows


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where} is damaged or not JSON: line {line} is not in UTF-8 (byte 0x{data[error.start]:02x})."
        ) from error
    except (ValueError, RecursionError) as error:
        what = error if data.strip() else "it is empty"
        raise ValueError(f"{where} is damaged or not JSON: {what}.") from error


def _refuse_keys(held: dict[str, Any], keys: Mapping[str, Kinds], where: str) -> None:
    missing = [key for key in keys if key not in held and key != OTHERS]
    if missing:
        raise ValueError(f"{where} is damaged: {few(missing)} {'are' if missing[1:] else 'is'} not in it.")
    for key, value in held.items():
        kind = keys.get(key, keys.get(OTHERS, object))
        if not _is_a(value, kind):
            raise ValueError(f"{where} is damaged: {key} needs {_words(kind)}; it is {_named(value)}.")


def _is_a(value: Any, kind: Kinds) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds or object in kinds)


def _words(kind: Kinds) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys(_WORDS.get(each, each.__name__) for each in kinds))


def _named(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)[:60]


_WORDS = {
    dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null",
}  # fmt: skip


def few(names: Collection[str], limit: int = 6) -> str:
    """Returns names for a message, the first of them if there are many."""
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
