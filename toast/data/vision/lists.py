"""Lists that say which pictures there are and what they show: text lines and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toast.files import plain_text


@dataclass(frozen=True)
class Entry:
    """One picture of a list.

    Args:
        path: The picture's path, as the list spells it.
        label: Its class, as the list spells it.
        where: The list's name and row, for messages.
    """

    path: str
    label: int | str
    where: str


def read_text(file: Path) -> str:
    """Reads a text file.

    Raises:
        ValueError: If it is not there, cannot be read or is in another encoding than it says.
    """
    try:
        return plain_text.read_text(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist; it must list the pictures and their labels.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: If the file is not there, not JSON, or not an object, or if a key stands in it twice.
    """
    text = read_text(file)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if half := plain_text.half_pair(key):
                raise ValueError(
                    f"{file.name}, entry {key!r}: half of a surrogate pair is no character ({half}); "
                    f"the file is {file}."
                )
            if key in found:
                raise ValueError(f"{file.name}, entry {key!r}: it is in the file twice.")
            found[key] = value
        return found

    try:
        loaded = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file.name}, row {error.lineno}, column {error.colno}: not valid JSON: {error.msg}; "
            f"the file is {file}."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(  # noqa: TRY004 - the file is at fault, not a caller's type
            f"{file.name} must map the path of each picture to a value; it holds a {type(loaded).__name__}; "
            f"the file is {file}."
        )
    return loaded


def read_rows(file: Path, classes: int) -> list[Entry]:
    """Reads a list of lines `path label`; the path may contain spaces.

    Args:
        file: The list.
        classes: Number of classes; labels are 0 to one less.

    Raises:
        ValueError: If the list is not there or empty, or a row is malformed: names the file, the first such
            row and why.
    """
    entries: list[Entry] = []
    wrong: list[str] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file.name}, row {number}"
        path, label = line.rsplit(maxsplit=1) if len(line.split()) > 1 else ("", line)
        if not path.strip():
            wrong.append(f"{where}: {line!r}: a path and a label are needed, with a space between them")
        elif not label.isascii() or not label.isdecimal():
            wrong.append(f"{where}: {line!r}: the label is not a whole number")
        elif int(label) >= classes:
            wrong.append(
                f"{where}: {line!r}: the label is not one of the {classes} classes 0 to {classes - 1}"
            )
        else:
            entries.append(Entry(path.strip(), int(label), where))
    return _whole(file, entries, wrong)


def read_mapping(file: Path) -> list[Entry]:
    """Reads a JSON object of paths and class ids, which are whole numbers or names.

    Raises:
        ValueError: If the list is not there or empty, or an entry is malformed: names the file, the first
            such entry and why.
    """
    entries: list[Entry] = []
    wrong: list[str] = []
    for path, label in read_json(file).items():
        where = f"{file.name}, entry {path!r}"
        if isinstance(label, bool) or not isinstance(label, int | str):
            wrong.append(f"{where}: {label!r}: the class id is neither a whole number nor a name")
        elif entries and type(label) is not type(entries[0].label):
            wrong.append(f"{where}: {label!r}: some class ids are numbers and some are names")
        else:
            entries.append(Entry(path, label, where))
    return _whole(file, entries, wrong)


def _whole(file: Path, entries: list[Entry], wrong: list[str]) -> list[Entry]:
    """Returns the entries if all is well."""
    if wrong:
        more = f" ({len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}; the file is {file}.")
    if not entries:
        raise ValueError(f"{file} lists no picture.")
    return entries
