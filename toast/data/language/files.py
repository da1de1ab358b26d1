"""Rows of local files, each with its place, so that a message can say where something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toast.data.language.hub import stream_parquet

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".parquet")
"""Files of rows with named fields."""
PLAIN: Final = ".txt"
"""A file that is one document."""
TRAIN: Final = "train"
OTHER_SPLITS: Final = ("validation", "valid", "val", "dev", "eval", "test")
"""What files that are not for training are called."""


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        place: File and line, or data set and row, counted from 1.
        fields: Its values by name.
    """

    place: str
    fields: Mapping[str, Any]


def find_files(path: Path, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files of a split, in the order of their names.

    Args:
        path: A file, which is the split "train"; or a folder. What lies in its folder `SPLIT`, or is called
            `SPLIT.SUFFIX` or `SPLIT-ANYTHING.SUFFIX`, is of that split; "train" is, where nothing is called
            so, all that is not called like another split, or all there is if it is of one other split.
        split: Name of the split.
        suffixes: Endings of the files that serve.

    Raises:
        ValueError: If there is nothing, or nothing of that kind or split.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder; path names the data.")
    kinds = ", ".join(suffixes)
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{path}: this source needs files that end in {kinds}; got another.")
        if split != TRAIN:
            raise ValueError(
                f"{path}: a single file has the split {TRAIN!r} alone; got {split!r}. Give the folder of "
                f"{TRAIN}{path.suffix} and {split}{path.suffix} as path."
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    names = {file: _split_name(file.relative_to(path)) for file in files}
    found = [file for file in files if names[file] == split]
    if not found and split == TRAIN:
        found = [file for file in files if names[file] not in OTHER_SPLITS]
        if (
            len(set(names.values())) == 1
        ):  # the folder of another split alone, which a run may read as a whole
            found = files
    if not found:
        raise ValueError(
            f"{path}: the split {split!r} needs files that end in {kinds}, called {split}{suffixes[0]} or in "
            f"a folder {split}; the folder has {len(files)} files of these kinds, none of that split."
        )
    return found


def _split_name(file: Path) -> str:
    """Returns the first folder of a path, or what a file's name begins with."""
    return file.parts[0] if len(file.parts) > 1 else re.split(r"[-.]", file.name)[0]


def read_files(files: list[Path], text_field: str) -> Iterator[Row]:
    """Reads the rows of files, one after the other.

    Args:
        files: Files of `SUFFIXES`, or plain text, of which each is one row.
        text_field: Name of the field that the text of a plain file becomes.

    Yields:
        The rows. Empty lines of `.jsonl` are none.

    Raises:
        ValueError: If a file does not parse or is not UTF-8; the message says where.
    """
    for file in files:
        match file.suffix.lower():
            case ".txt":
                yield Row(str(file), {text_field: _decoded(file.read_bytes(), str(file))})
            case ".json":
                yield from _json_rows(file)
            case ".parquet":
                yield from (
                    Row(f"{file}, row {number}", fields)
                    for number, fields in enumerate(stream_parquet(file), 1)
                )
            case _:
                yield from _line_rows(file)


def _line_rows(file: Path) -> Iterator[Row]:
    """Reads a file of one JSON object a line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            text = _decoded(line, place)
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}.") from None
            yield _row(place, fields)


def _json_rows(file: Path) -> Iterator[Row]:
    """Reads a JSON file: a list of objects, or objects by name."""
    text = _decoded(file.read_bytes(), str(file))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        advice = " One object a line belongs into a .jsonl file." if error.msg == "Extra data" else ""
        raise ValueError(
            f"{file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}.{advice}"
        ) from None
    if isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
        yield from (_row(f"{file}, row {name!r}", fields) for name, fields in content.items())
    elif isinstance(content, list):
        yield from (_row(f"{file}, row {number}", fields) for number, fields in enumerate(content, 1))
    else:
        raise ValueError(f"{file}: needs a list of objects, or objects by name; got {_kind(content)}.")


def _row(place: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(  # noqa: TRY004, what is wrong is a file
            f"{place}: needs an object with named fields; got {_kind(fields)}."
        )
    return Row(place, fields)


def _kind(value: Any) -> str:
    return "an object with other values than objects" if isinstance(value, dict) else type(value).__name__


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8: {error.reason} at byte {error.start}. Convert the file first."
        ) from None
