"""Pictures whose targets stand in a list, `labels.csv`: a row a picture, a column a target."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any, Final

from toast.data.fields import Fields
from toast.data.splits import find_split
from toast.data.vision.class_folders import box_key, boxes_beside
from toast.data.vision.lists import read_text
from toast.data.vision.picture_files import FileSource, Picture, readable
from toast.data.vision.source import VisionSource
from toast.data.walking import folders_in

LIST: Final = "labels.csv"
FILE: Final = "file"
"""The column of the pictures' paths, from the folder that the list lies in."""
SPLIT: Final = "split"
"""The column that says a picture's split, where one list is of all."""


def open_csv(root: Path, name: str | None, split: str) -> VisionSource:
    """Opens `root/SPLIT/labels.csv`, or of `root/labels.csv` the rows whose column `split` says so.

    Without that column, all rows of `root/labels.csv` are the split "train". The column `file` holds paths
    from the list's folder; all other columns are targets, which heads read. Boxes are read from `boxes.json`
    or `boxes.csv` beside the list or in `root`.

    Args:
        root: The folder.
        name: What to call the data; None is the folder's name.
        split: Name of the split.

    Raises:
        ValueError: If list, split or a column is not there, or a row is malformed: names file and row.
    """
    found = find_split(split, [folder for folder in folders_in(root) if (root / folder / LIST).is_file()])
    if len(found) > 1:
        raise ValueError(f"split {split!r}: {root} has several: {', '.join(found)}. Name one of them.")
    top = root / found[0] if found else root
    if not (top / LIST).is_file():
        raise ValueError(
            f"split {split!r}: needs {root / split / LIST}, or {root / LIST} with a column {SPLIT!r}; "
            "neither is there."
        )
    rows = _read(top / LIST)
    if not found:
        rows = _of_split(top / LIST, rows, split)
    boxes = boxes_beside(root, top)
    pictures = [
        Picture(
            top / row[FILE], 0, readable((top / row[FILE]).relative_to(root)), where,
            boxes.get(box_key(top / row[FILE])),
        )
        for where, row in rows
    ]  # fmt: skip
    return ListedSource(f"{name or root.resolve().name}/{split}", pictures, [row for _, row in rows])


class ListedSource(FileSource):
    """Pictures with targets, and without classes of their own.

    Args:
        name: What the data are called.
        pictures: The files.
        rows: What the list says of each, by column.
    """

    def __init__(self, name: str, pictures: list[Picture], rows: list[dict[str, str]]) -> None:
        super().__init__(name, [], pictures)
        columns = {column: [row[column] for row in rows] for column in rows[0] if column not in (FILE, SPLIT)}
        self.fields = Fields(columns, [f"{picture.where} ({picture.name})" for picture in pictures])

    def _identity(self) -> Any:
        yield from super()._identity()
        assert self.fields is not None
        yield repr(self.fields.columns).encode()


def _read(file: Path) -> list[tuple[str, dict[str, str]]]:
    """Returns the rows of a list, each with its place."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""))
    head = [column.strip() for column in next(reader, [])]
    twice = [column for column, count in Counter(head).items() if count > 1 or not column]
    if FILE not in head or twice:
        wrong = (
            f"{twice[0]!r} stands there twice or is empty" if twice else f"got {', '.join(head) or 'nothing'}"
        )
        raise ValueError(f"{file}, row 1: needs names of columns, {FILE!r} among them, each once; {wrong}.")
    rows: list[tuple[str, dict[str, str]]] = []
    seen: dict[str, str] = {}
    for cells in reader:
        where = f"{file.name}, row {reader.line_num}"
        if not any(cells):
            continue
        if len(cells) != len(head):
            raise ValueError(
                f"{where}: needs {len(head)} cells, as the first row; got {len(cells)}; the file is {file}."
            )
        row = dict(zip(head, (cell.strip() for cell in cells), strict=True))
        if not row[FILE]:
            raise ValueError(f"{where}: the column {FILE!r} is empty; needs a path; the file is {file}.")
        if row[FILE] in seen:
            raise ValueError(
                f"{where}: {row[FILE]} is in {seen[row[FILE]]}, too; needs each picture once; the file is "
                f"{file}."
            )
        seen[row[FILE]] = where
        rows.append((where, row))
    if not rows:
        raise ValueError(f"{file} lists no picture.")
    return rows


def _of_split(
    file: Path, rows: list[tuple[str, dict[str, str]]], split: str
) -> list[tuple[str, dict[str, str]]]:
    if SPLIT not in rows[0][1]:
        if split != "train":
            raise ValueError(
                f"split {split!r}: {file} has no column {SPLIT!r}, so all its rows are for training. Add "
                "one, or set data.validation_share."
            )
        return rows
    known = dict.fromkeys(row[SPLIT] for _, row in rows)
    found = find_split(split, known)
    if len(found) != 1:
        raise ValueError(f"split {split!r}: the column {SPLIT!r} of {file} has {', '.join(known)}.")
    return [(where, row) for where, row in rows if row[SPLIT] == found[0]]
