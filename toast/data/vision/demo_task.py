"""The embedded task as a source: pictures composed from a seed, with the place of the answer known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from toast.data.fields import Fields
from toast.data.vision.source import Sample, VisionSource
from toast.data.vision.splitting import split_validation

if TYPE_CHECKING:
    from toast.embedded.task import Pictures

SPLITS: Final = ("train", "val", "test", "generic")


class DemoSource(VisionSource):
    """Composed pictures.

    Args:
        name: What they are called.
        classes: Names of the classes.
        pictures: The pictures, their labels and boxes.
        things: Names of what else is in each picture, by kind.

    Attributes:
        fields: `x` and `y`, the middle of the box, and `size`, its longer side, in pixels; `item` and
            `clipart`, what is there, as far as it is known; `things`, all of these.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        pictures: Pictures,
        things: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(name, classes, pictures.labels.tolist())
        self.pictures = pictures
        x0, y0, x1, y1 = pictures.boxes.unbind(1)
        numbers = {"x": (x0 + x1) / 2, "y": (y0 + y1) / 2, "size": (x1 - x0).maximum(y1 - y0)}
        shown = dict(things or {"item": [classes[label] for label in self.labels]})
        columns: dict[str, Sequence[Any]] = {n: values.tolist() for n, values in numbers.items()} | shown
        columns["things"] = [";".join(each) for each in zip(*shown.values(), strict=True)]
        self.fields = Fields(columns, [f"{name}/{index}" for index in range(len(self.labels))])

    def __getitem__(self, index: int) -> Sample:
        pixels = self.pictures.images[index].permute(1, 2, 0).contiguous().numpy()
        x0, y0, x1, y1 = self.pictures.boxes[index].tolist()
        name = self.sample_name(index)
        return Sample(Image.fromarray(pixels), self.labels[index], name, (x0, y0, x1, y1))

    def sample_name(self, index: int) -> str:
        """See `VisionSource.sample_name`."""
        return f"{self.name}/{index}"

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
    distractors: int | None = None,
    labels: str | None = None,
) -> VisionSource:
    """Opens the embedded task, or that of two objects.

    Args:
        root: Nothing: the task lies in the package.
        name: Nothing: there is one task.
        split: "train", "val", "test", or "generic" for clip-art labelled by its folder.
        train: Training pictures to compose, at most 3,000. Those of "val" are cut from them. Of two objects
            at most 2,500, which "val" takes nothing from.
        val: How many of them are held out as "val"; None is a tenth. Of two objects at most 500, of items and
            clip-art that no training picture has.
        test: Test pictures, at most 1,000.
        generic: Pictures of clip-art alone.
        seed: Seed of everything that is drawn.
        distractors: Clip-art pictures beside what counts; None is 4, and 2 beside two objects.
        labels: "item" or "clipart": two objects in every picture, of which this one counts; None has the item
            alone.

    Raises:
        ValueError: If there is no such split, or a number does not suit.
    """
    from toast.embedded.task import CLASSES, DISTRACTORS, load_generic, load_materials

    if split not in SPLITS:
        raise ValueError(f"split: the demo has {', '.join(SPLITS)}; got {split!r}.")
    if min(train, test, generic) < 1:
        raise ValueError(f"train, test and generic must be at least 1; got {train}, {test}, {generic}.")
    if split == "generic":
        folders, pictures = load_materials().folders, load_generic(generic, seed)
        named = {"clipart": [folders[label] for label in pictures.labels.tolist()]}
        return DemoSource("demo/generic", folders, pictures, named)
    held_out = max(1, train // 10) if val is None else val
    if labels is not None:
        return _two_objects(split, {"train": train, "val": held_out, "test": test}, labels, seed, distractors)
    beside = DISTRACTORS if distractors is None else distractors
    if split == "test":
        return DemoSource("demo/test", CLASSES, _test_pictures(test, seed, beside))
    whole = DemoSource("demo/train", CLASSES, _training_pictures(train, seed, beside))
    if held_out == 0 and split == "train":
        return whole
    rest, validation = split_validation(whole, held_out, seed)
    return rest if split == "train" else validation


def _two_objects(
    split: str, counts: dict[str, int], labels: str, seed: int, distractors: int | None
) -> VisionSource:
    from toast.embedded import two_objects
    from toast.embedded.task import CLASSES

    beside = two_objects.DISTRACTORS if distractors is None else distractors
    pictures = two_objects.load_two_objects(split, counts[split], labels, seed, beside)  # type: ignore[arg-type]
    names = {"item": CLASSES, "clipart": two_objects.kinds()}
    things = {}
    for kind, known in names.items():
        shown = two_objects.load_two_objects(split, counts[split], kind, seed, beside)  # type: ignore[arg-type]
        things[kind] = [known[label] for label in shown.labels.tolist()]
    return DemoSource(f"demo/{labels}/{split}", names[labels], pictures, things)


# Thousands of pictures take seconds, and a sweep opens the same ones for every run.
@lru_cache(maxsize=1)
def _training_pictures(count: int, seed: int, distractors: int) -> Pictures:
    from toast.embedded.task import load_task

    return load_task(count, 1, seed, distractors)[0]


@lru_cache(maxsize=1)
def _test_pictures(count: int, seed: int, distractors: int) -> Pictures:
    from toast.embedded.task import load_task

    return load_task(1, count, seed, distractors)[1]
