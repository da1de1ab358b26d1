"""The figures of a study: a JSON line for each finished run, and what is known of each picture beside it.

RESULTS/NAME.jsonl                 a line a run, and a line a further evaluation of it
RESULTS/NAME/TASK,ROW,….npz        of each test picture: its index, whether the answer was right, and the
                                   share of attention on its target
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast.files.atomic import beside

Line = dict[str, Any]
Key = tuple[str, str, str, int, str | None]


def key_of(line: Line) -> Key:
    """Returns what a line is of: task, row, value of the curve, seed, evaluation."""
    return line["task"], line["row"], json.dumps(line["point"]), line["seed"], line["evaluation"]


def read_lines(path: Path) -> list[Line]:
    """Reads the lines of a study; of several with one key the last, without one that was cut off.

    Returns:
        The lines; none if there is no file yet.
    """
    if not path.is_file():
        return []
    held: dict[Key, Line] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the process was killed while it wrote
            continue
        held[key_of(line)] = line
    return list(held.values())


def append_line(path: Path, line: Line) -> None:
    """Adds a line in one piece, so that several processes may add to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = "\n" + text  # after a line that was cut off
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def pace(line: Line) -> float:
    """Returns the seconds a step of a run: the median, which other programs on the machine hardly move."""
    return float(line.get("median_step_seconds") or line["step_seconds"])


def have_one_clock(lines: Iterable[Line]) -> bool:
    """Whether seconds of runs can be compared: all had one device, as many threads and neighbours."""
    return len({(line.get("device"), line.get("threads"), line.get("processes", 1)) for line in lines}) == 1


@dataclass(frozen=True)
class OfPictures:
    """What one run gave for each test picture.

    Args:
        index: Number of each picture, `(pictures,)`, int32.
        correct: Whether the answer was right, `(pictures,)`, bool.
        attention: Share of attention on the target, `(pictures,)`, float32; not a number where not measured.
    """

    index: NDArray[np.int32]
    correct: NDArray[np.bool_]
    attention: NDArray[np.float32]


def pictures_path(results: Path, line: Line) -> Path:
    """Returns the file of a line's pictures."""
    parts = [line["task"], line["row"], line["point"], f"seed-{line['seed']}", line["evaluation"]]
    name = ",".join(str(part) for part in parts if part is not None)
    return results / str(line["study"]) / (re.sub(r"[^\w.,=-]+", "-", name) + ".npz")


def write_pictures(path: Path, predictions: Path) -> None:
    """Keeps what tables need of a run's predictions, whole or not at all."""
    rows = [json.loads(text) for text in predictions.read_text().splitlines()]
    shares = [row.get("attention_on_target") for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as new, new.open("wb") as file:
        np.savez_compressed(
            file,
            index=np.array([row["index"] for row in rows], np.int32),
            correct=np.array([row["label"] == row["predicted"] for row in rows]),
            attention=np.array([np.nan if share is None else share for share in shares], np.float16),
        )


def read_pictures(path: Path) -> OfPictures:
    """Reads what a run gave for each test picture.

    Raises:
        ValueError: If the file is not there or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file) as held:
            return OfPictures(held["index"], held["correct"], held["attention"].astype(np.float32))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Delete its line, and run the study again."
        ) from error
