"""What a data set of labelled pictures is: labels are known at once, pictures are opened one by one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from toast.data.fields import Fields

Box = tuple[float, float, float, float]
"""A place as x0, y0, x1, y1 in pixels of the picture as it is shown, turned upright; the ends exclusive."""


@dataclass(frozen=True)
class Sample:
    """One labelled picture.

    Args:
        image: The picture, red, green and blue.
        label: Index into the source's `classes`.
        name: What the picture is called in its source, such as its path under the root.
        box: Where the object is that the label names; None where that is not known.
        notes: What was met in it and how that was taken.
    """

    image: Image.Image
    label: int
    name: str
    box: Box | None = None
    notes: tuple[str, ...] = ()


class BadSample(ValueError):
    """A picture that cannot be decoded.

    Args:
        name: What the picture is called in its source.
        reason: Why it cannot be decoded.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class VisionSource(ABC):
    """A split of a labelled picture data set.

    Args:
        name: What the data are called in logs and messages.
        classes: Names of the classes, in the order of the labels.
        labels: Label of every picture, known without opening any.
        remarks: What is unusual about the data, but does not stop a run.

    Attributes:
        fields: What else is known of every picture, by name: targets of heads; None if nothing is.
    """

    fields: Fields | None = None

    def __init__(
        self, name: str, classes: Sequence[str], labels: Iterable[int], remarks: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels: Sequence[int] = tuple(int(label) for label in labels)
        self.remarks = tuple(remarks)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Opens one picture.

        Raises:
            BadSample: If the picture cannot be decoded.
            IndexError: If there is no such picture.
        """

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal digits, of what identifies the data; it changes when the data change."""
        digest = hashlib.sha256()
        for part in self._identity():
            # the length keeps ("ab", "c") apart from ("a", "bc")
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def _identity(self) -> Iterable[bytes | memoryview]:
        """Yields what identifies the data; a source adds its pictures to these."""
        yield repr(self.classes).encode()
        yield np.asarray(self.labels, np.int64).tobytes()

    def absent(self, indices: Iterable[int]) -> list[str]:
        """Returns, for those of the pictures whose file is not there, what they are called and who says so.

        Args:
            indices: The pictures to look for. Nothing is opened.
        """
        return []

    def file(self, index: int) -> Path | None:
        """Returns a picture's file; None where pictures are none of their own."""
        return None

    def sample_name(self, index: int) -> str:
        """Returns what a picture is called; it is opened where its source cannot tell otherwise."""
        try:
            return self[index].name
        except BadSample as bad:
            return bad.name

    def subset(self, indices: Iterable[int]) -> VisionSource:
        """Returns some of the pictures, in the given order.

        Raises:
            ValueError: If an index is not one of the source's.
        """
        return Subset(self, indices)


class Subset(VisionSource):
    """Some pictures of a source.

    Args:
        parent: The source.
        indices: Which of its pictures, in which order.

    Raises:
        ValueError: If an index is not one of the source's.
    """

    def __init__(self, parent: VisionSource, indices: Iterable[int]) -> None:
        self.parent = parent
        self.indices = tuple(int(index) for index in indices)
        wrong = [index for index in self.indices if not 0 <= index < len(parent)]
        if wrong:
            raise ValueError(
                f"subset: {parent.name} has pictures 0 to {len(parent) - 1}; got {len(wrong)} other indices, "
                f"first {wrong[0]}."
            )
        labels = (parent.labels[index] for index in self.indices)
        super().__init__(parent.name, parent.classes, labels, parent.remarks)
        self.fields = None if parent.fields is None else parent.fields.subset(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.parent[self.indices[index]]

    def _identity(self) -> Iterable[bytes | memoryview]:
        yield self.parent.fingerprint.encode()
        yield np.asarray(self.indices, np.int64).tobytes()

    def absent(self, indices: Iterable[int]) -> list[str]:
        """See `VisionSource.absent`."""
        return self.parent.absent(self.indices[index] for index in indices)

    def file(self, index: int) -> Path | None:
        """See `VisionSource.file`."""
        return self.parent.file(self.indices[index])

    def sample_name(self, index: int) -> str:
        """See `VisionSource.sample_name`."""
        return self.parent.sample_name(self.indices[index])
