"""The embedded task as a source: pictures composed from a seed, with the place of the answer known."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from PIL import Image

from toast.data.vision.source import Sample, VisionSource
from toast.data.vision.splitting import split_validation

if TYPE_CHECKING:
    from toast.demo.task import Pictures

SPLITS: Final = ("train", "val", "test", "generic")


class DemoSource(VisionSource):
    """Composed pictures.

    Args:
        name: What they are called.
        classes: Names of the classes.
        pictures: The pictures, their labels and boxes.
    """

    def __init__(self, name: str, classes: tuple[str, ...], pictures: Pictures) -> None:
        super().__init__(name, classes, pictures.labels.tolist())
        self.pictures = pictures

    def __getitem__(self, index: int) -> Sample:
        pixels = self.pictures.images[index].permute(1, 2, 0).contiguous().numpy()
        x0, y0, x1, y1 = self.pictures.boxes[index].tolist()
        name = f"{self.name}/{index}"
        return Sample(Image.fromarray(pixels), self.labels[index], name, (x0, y0, x1, y1))

    def _identity(self) -> Iterable[bytes | memoryview]:
        yield from super()._identity()
        for tensor in (self.pictures.images, self.pictures.boxes):
            yield tensor.contiguous().numpy().data.cast("B")


def open_demo(
    root: None,
    name: None,
    split: str,
    *,
    train: int = 2000,
    val: int | None = None,
    test: int = 1000,
    generic: int = 2000,
    seed: int = 0,
) -> VisionSource:
    """Opens the embedded task.

    Args:
        root: Nothing: the task lies in the package.
        name: Nothing: there is one task.
        split: "train", "val", "test", or "generic" for clip-art labelled by its folder.
        train: Training pictures to compose, at most 3,000. Those of "val" are cut from them.
        val: How many of them are held out as "val"; None is a tenth.
        test: Test pictures, at most 1,000.
        generic: Pictures of clip-art alone.
        seed: Seed of everything that is drawn.

    Raises:
        ValueError: If there is no such split, or a number does not suit.
    """
    from toast.demo.task import CLASSES, load_generic, load_materials

    if split not in SPLITS:
        raise ValueError(f"split: the demo has {', '.join(SPLITS)}; got {split!r}.")
    if min(train, test, generic) < 1:
        raise ValueError(f"train, test and generic must be at least 1; got {train}, {test}, {generic}.")
    if split == "generic":
        return DemoSource("demo/generic", load_materials().folders, load_generic(generic, seed))
    if split == "test":
        return DemoSource("demo/test", CLASSES, _pictures(1, test, seed)[1])
    whole = DemoSource("demo/train", CLASSES, _pictures(train, 1, seed)[0])
    held_out = max(1, train // 10) if val is None else val
    if held_out == 0 and split == "train":
        return whole
    rest, validation = split_validation(whole, held_out, seed)
    return rest if split == "train" else validation


@lru_cache(maxsize=2)
def _pictures(train: int, test: int, seed: int) -> tuple[Pictures, Pictures]:
    """Composes them once for splits that are cut from them, and for runs one after the other."""
    from toast.demo.task import load_task

    return load_task(train, test, seed)
