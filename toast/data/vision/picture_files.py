"""Pictures that lie as files on a disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toast.data.vision.decoding import VERSION, read_picture
from toast.data.vision.source import Box, Sample, VisionSource


@dataclass(frozen=True)
class Picture:
    """A picture's file and what is known of it.

    Args:
        path: The file.
        label: Index into the source's classes.
        name: What the picture is called in its source.
        where: Who says that it is there, such as "train800.txt, row 17"; empty where nobody does.
        box: Where the object is that the label names, or None.
    """

    path: Path
    label: int
    name: str
    where: str = ""
    box: Box | None = None


class FileSource(VisionSource):
    """A source whose pictures are files.

    Its fingerprint holds names, labels, boxes, sizes and times of change, so it is quick and notices every
    edit, but a copy of the data that does not keep the times counts as other data.

    Args:
        name: What the data are called.
        classes: Names of the classes.
        pictures: The files.
        remarks: What is unusual about the data.
    """

    def __init__(
        self, name: str, classes: Sequence[str], pictures: Sequence[Picture], remarks: Sequence[str] = ()
    ) -> None:
        super().__init__(name, classes, (picture.label for picture in pictures), remarks)
        self.pictures = tuple(pictures)

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[index]
        found = read_picture(picture.path, picture.name)
        return Sample(found.image, picture.label, picture.name, picture.box, found.notes)

    def _identity(self) -> Iterable[bytes | memoryview]:
        yield from super()._identity()
        yield f"decoding {VERSION}".encode()
        for picture, state in zip(self.pictures, self._states, strict=True):
            yield repr((picture.name, picture.box, state)).encode()

    def absent(self, indices: Iterable[int]) -> list[str]:
        """See `VisionSource.absent`."""
        missing = (self.pictures[index] for index in indices if self._states[index] is None)
        return [f"{p.path} ({p.where})" if p.where else str(p.path) for p in missing]

    def file(self, index: int) -> Path | None:
        """See `VisionSource.file`."""
        return self.pictures[index].path

    def sample_name(self, index: int) -> str:
        """See `VisionSource.sample_name`."""
        return self.pictures[index].name

    @cached_property
    def _states(self) -> list[tuple[int, int] | None]:
        return [file_state(picture.path) for picture in self.pictures]


def file_state(path: Path) -> tuple[int, int] | None:
    """Returns a file's size in bytes and time of change in nanoseconds; None if it cannot be had."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # not there, a link to itself, a name that no system has
        return None
    return found.st_size, found.st_mtime_ns


def readable(path: Path | str) -> str:
    """Returns a path as text that can be written anywhere: what is not UTF-8 in it shows as its bytes."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "backslashreplace")
