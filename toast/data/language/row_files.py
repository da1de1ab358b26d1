"""Rows of local files, each with its place, so that a message can say where something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toast.data.language.parquet import stream_parquet
from toast.data.splits import SPELLINGS, split_of, words_of
from toast.data.walking import walk
from toast.files.plain_text import decode_text, read_lines

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".parquet")
"""Files of rows with named fields."""
PLAIN: Final = ".txt"
"""A file that is one document."""
TRAIN: Final = "train"


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        place: File and line, or data set and row, counted from 1.
        fields: Its values by name.
    """

    place: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """Files of a split.

    Args:
        files: The files, in the order of their names.
        remarks: What is unusual: files that are left out, names that say another split.
    """

    files: list[Path]
    remarks: tuple[str, ...] = ()


def find_files(path: Path, split: str | None, suffixes: tuple[str, ...]) -> Found:
    """Returns the files of a split.

    Args:
        path: A file, which is the split "train"; or a folder. A file in it is of the split that the first
            folder or else its own name says, in any common spelling (`toast.data.splits`); "train" is, where
            nothing says so, all that says no split. What is hidden is left out.
        split: Name of the split; None is all there is, whatever it is called.
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
        if split not in (TRAIN, None):
            raise ValueError(
                f"{path}: a single file has the split {TRAIN!r} alone; got {split!r}. Give the folder of "
                f"{TRAIN}{path.suffix} and {split}{path.suffix} as path."
            )
        named = split_of(path.stem) if split == TRAIN else None
        remark = f"the name of the training file {path} says that it is of the split {named!r}."
        return Found([path], (remark,) if named not in (TRAIN, "trainval", None) else ())
    files = walk(path, suffixes).files
    found = files if split is None else _of_split(path, files, split)
    left_out = [file for file in files if file not in set(found)] if split == TRAIN else []
    remarks = [f"{path}: {len(left_out)} files are not of the training split: {_few(path, left_out)}."]
    if found:
        return Found(found, tuple(remarks) if left_out else ())
    if split is None:
        raise ValueError(f"{path}: the folder holds no file that ends in {kinds}.")
    beside = f", but {_few(path, files)}" if files else ""
    raise ValueError(
        f"{path}: the split {split!r} needs files that end in {kinds}, called {split}{suffixes[0]} or in "
        f"a folder {split}; the folder has {len(files)} files of these kinds, none of that split{beside}."
    )


def _of_split(path: Path, files: list[Path], split: str) -> list[Path]:
    """Returns the files of a folder that are of a split."""
    kind = split_of(split)
    parts = {file: [*file.relative_to(path).parts[:-1], file.stem] for file in files}
    if kind is None:  # a name of the user's own: that of a folder, or what a file's name begins with
        return [file for file in files if re.split(r"[-.]", parts[file][0])[0] == split]
    # the part of a path that says a split; None where none does
    names = {file: next((part for part in parts[file] if split_of(part)), None) for file in files}
    words = {file: words_of(name) for file, name in names.items() if name and split_of(name) == kind}
    if not words and split == TRAIN:
        return [file for file in files if names[file] is None]
    used = set().union(*words.values())
    if len(used) > 1 and kind in SPELLINGS and kind != "trainval":
        used &= words_of(split)  # val.jsonl and dev.jsonl: the one that is asked for
        if not used:
            raise ValueError(
                f"{path}: the split {split!r} matches several of {_few(path, list(words))}. Name one of them."
            )
    return [file for file in files if words.get(file, set()) & used]


def _few(path: Path, files: list[Path], limit: int = 5) -> str:
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(str(file.relative_to(path)) for file in files[:limit]) + more


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
                yield Row(str(file), {text_field: decode_text(file.read_bytes(), str(file))})
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
    for place, text in read_lines(file):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}.") from None
        except RecursionError:
            raise ValueError(f"{place}: nested too deeply.") from None
        yield _row(place, fields)


def _json_rows(file: Path) -> Iterator[Row]:
    """Reads a JSON file: a list of objects, or objects by name."""
    text = decode_text(file.read_bytes(), str(file))
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply.") from None
    except json.JSONDecodeError as error:
        advice = " Put one object per line into a .jsonl file instead." if error.msg == "Extra data" else ""
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
