"""Boxes that lie beside the pictures: JSON, CSV, and the two text lists of CUB and NABirds."""

from __future__ import annotations

import csv
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from toast.data.vision.decoding import DECODING_ERRORS, shown_size
from toast.data.vision.lists import read_json, read_text
from toast.data.vision.source import Box

_HEADER: Final = ["name", "x0", "y0", "x1", "y1"]
#: Where a file says what its boxes are in.
_UNITS: Final = "units"


def read_boxes(file: Path) -> dict[str, Box]:
    """Reads boxes by the pictures' paths.

    Boxes are in pixels of the picture's file, or in shares of its width and height, 0 to 1. Which it is, is
    plain where all corners of the file are between 0 and 1 and some are neither: in pixels such a box would
    lie within the first one. Where it is not plain, the file has to say so.

    Args:
        file: `.json`, an object of `path: [x0, y0, x1, y1]`, with `units: pixels` or `units: shares` if that
            has to be given; or `.csv` with the header `name,x0,y0,x1,y1`, and a column `units` for the same.
            The ends are exclusive, and places are those of the picture as it is shown, turned as its camera
            noted: so annotation tools and browsers count.

    Returns:
        Boxes in pixels.

    Raises:
        ValueError: If the file or one of its entries is malformed: names the file, the row and why; or if it
            does not say which units it has and has to.
    """
    readers = {".json": _read_json, ".csv": _read_csv}
    if file.suffix.lower() not in readers:
        raise ValueError(f"boxes are read from .json or .csv files; got {file}.")
    boxes, units = readers[file.suffix.lower()](file)
    # with the slashes of this system, if they were written with those of Windows
    boxes = {name if "/" in name else name.replace("\\", "/"): box for name, box in boxes.items()}
    if units is None:
        units = _units_of(file, boxes)
    return boxes if units == "pixels" else {name: _in_pixels(file, name, box) for name, box in boxes.items()}


def _read_json(file: Path) -> tuple[dict[str, Box], str | None]:
    entries = read_json(file)
    units = entries.pop(_UNITS, None) if isinstance(entries.get(_UNITS), str) else None
    boxes = {name: _box(f"{file.name}, entry {name!r}", corners) for name, corners in entries.items()}
    return boxes, _checked_units(file, set() if units is None else {units})


def _read_csv(file: Path) -> tuple[dict[str, Box], str | None]:
    rows = csv.reader(read_text(file).splitlines())
    header = [column.strip() for column in next(rows, [])]
    if header not in (_HEADER, [*_HEADER, _UNITS]):
        raise ValueError(
            f"{file.name}, row 1: the header must be {','.join(_HEADER)}; got {','.join(header)!r}."
        )
    boxes: dict[str, Box] = {}
    units = set()
    for row in filter(None, rows):
        where = f"{file.name}, row {rows.line_num}"
        boxes[row[0]] = _box(where, row[1:5] if len(row) == len(header) else row[1:])
        units |= set(map(str.strip, row[5 : len(header)]))
    return boxes, _checked_units(file, units)


def _checked_units(file: Path, named: set[str]) -> str | None:
    """Returns the units that a file says, None if it says none."""
    if not named:
        return None
    if len(named) > 1 or not named <= {"pixels", "shares"}:
        raise ValueError(
            f"{file.name}: {_UNITS} must be pixels or shares, the same for all; got "
            f"{', '.join(sorted(named))}."
        )
    return named.pop()


def _units_of(file: Path, boxes: Mapping[str, Box]) -> str:
    """Returns the units that boxes can only have.

    Raises:
        ValueError: If they could be either.
    """
    small = {name: box for name, box in boxes.items() if max(map(abs, box)) <= 1}
    broken = {name: box for name, box in small.items() if any(corner != round(corner) for corner in box)}
    if not small or (not broken and len(small) < len(boxes)):
        return "pixels"  # one box may be of the first pixel
    if broken and len(small) == len(boxes):
        return "shares"
    name, box = next(iter((broken or small).items()))
    larger = next((f", but {n!r} with {list(b)}" for n, b in boxes.items() if n not in small), "")
    raise ValueError(
        f"{file.name}, {name!r}: {list(box)}{larger}: are these pixels, or shares of width and height? Say "
        f'so: "{_UNITS}": "shares" (or "pixels") in the JSON object, or a column {_UNITS} in the CSV.'
    )


def _in_pixels(file: Path, name: str, box: Box) -> Box:
    """Returns a box in pixels of its picture; as it is where there is no picture, which then has no box."""
    spelled = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    place = next((place for each in (name, *spelled) if (place := file.parent / each).is_file()), None)
    if place is None:
        return box
    try:
        with Image.open(place) as picture:
            width, height = shown_size(picture)
    except DECODING_ERRORS:
        return box
    x0, y0, x1, y1 = box
    return x0 * width, y0 * height, x1 * width, y1 * height


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
