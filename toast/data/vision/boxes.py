"""Boxes that lie beside the pictures: JSON, CSV, and the two text lists of CUB and NABirds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from toast.data.vision.lists import read_json, read_text
from toast.data.vision.source import Box

_HEADER: Final = ["name", "x0", "y0", "x1", "y1"]


def read_boxes(file: Path) -> dict[str, Box]:
    """Reads boxes by the pictures' paths.

    Args:
        file: `.json`, an object of `path: [x0, y0, x1, y1]`; or `.csv` with the header
            `name,x0,y0,x1,y1`. Pixels of the picture as it is shown, turned as its camera noted, the ends
            exclusive: so annotation tools and browsers count.

    Raises:
        ValueError: If the file or one of its entries is malformed: names the file, the row and why.
    """
    if file.suffix.lower() == ".json":
        return {
            name: _box(f"{file.name}, entry {name!r}", corners) for name, corners in read_json(file).items()
        }
    if file.suffix.lower() != ".csv":
        raise ValueError(f"boxes are read from .json or .csv files; got {file}.")
    rows = csv.reader(read_text(file).splitlines())
    header = [column.strip() for column in next(rows, [])]
    if header != _HEADER:
        raise ValueError(
            f"{file.name}, row 1: the header must be {','.join(_HEADER)}; got {','.join(header)!r}."
        )
    boxes = {}
    for row in filter(None, rows):
        where = f"{file.name}, row {rows.line_num}"
        boxes[row[0]] = _box(where, row[1:])
    return boxes


def read_bird_boxes(folder: Path) -> dict[str, Box]:
    """Reads the boxes as CUB-200-2011 and NABirds publish them, by the paths under their folder of pictures.

    Args:
        folder: Holds `images.txt`, rows `id path`, and `bounding_boxes.txt`, rows `id x y width height`.

    Returns:
        The boxes; none if one of the files is not there.

    Raises:
        ValueError: If a row is malformed: names the file, the row and why.
    """
    names, places = folder / "images.txt", folder / "bounding_boxes.txt"
    if not (names.is_file() and places.is_file()):
        return {}
    paths = {fields[0]: fields[1] for _, fields in _fields(names, 2)}
    boxes = {}
    for where, (key, *numbers) in _fields(places, 5):
        if key not in paths:
            raise ValueError(f"{where}: {names.name} has no picture {key!r}.")
        x, y, width, height = _numbers(where, numbers)
        boxes[paths[key]] = _box(where, (x, y, x + width, y + height))
    return boxes


def _fields(file: Path, count: int) -> Iterable[tuple[str, list[str]]]:
    """Yields the fields of each row, and where it stands."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        where = f"{file.name}, row {number}"
        fields = line.split(maxsplit=count - 1)
        if fields and len(fields) != count:
            raise ValueError(f"{where}: {line!r}: {count} fields are needed.")
        if fields:
            yield where, fields


def _numbers(where: str, values: Any) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {values!r}: a box is four numbers.") from error


def _box(where: str, corners: Sequence[Any]) -> Box:
    numbers = _numbers(where, corners)
    if len(numbers) != 4 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{where}: {corners!r}: a box is four finite numbers x0, y0, x1, y1.")
    x0, y0, x1, y1 = numbers
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{where}: {corners!r}: a box needs x0 < x1 and y0 < y1.")
    return x0, y0, x1, y1
