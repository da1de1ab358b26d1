"""Two objects in every picture, and the task decides which one counts.

Every picture holds one Fashion-MNIST item and one clip-art object of about its size, neither covering the
other, with a few small distractors. The same pictures are labelled by the item's class or by the kind of
the clip-art, and the box is that of the object that the label names: what a frozen backbone sees is the
same for both tasks, so that what differs is where a method has learnt to look.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from toast.embedded.composing import SIDE, Box, cut_out, ground, paste_item, resized, scatter
from toast.embedded.task import CLASSES, ITEM_SIDES, Pictures, Split, as_pictures, load_materials

Part = Literal["train", "val", "test"]
Labels = Literal["item", "clipart"]
LABELS: Final[tuple[Labels, ...]] = ("item", "clipart")
CLIPART_SIDES: Final = (42, 50)
"""Smallest and largest longer side of the clip-art object in pixels."""
DISTRACTORS: Final = 2
"""Small clip-art pictures beside the two objects."""
_DISTRACTOR_SIDES: Final = (14, 24)
_VALIDATION_ITEMS: Final = 500
#: Of each part: the materials' split of its items and that of its clip-art, and the first number of its seed.
#: Clip-art has few pictures to a kind, so training takes the most: those that stage one sees, too, which is
#: fair to rows without a stage one, as all of them learn from these pictures here.
_MATERIALS: Final[dict[Part, tuple[Split, Split, int]]] = {
    "train": ("train", "pretune", 10),
    "val": ("train", "train", 11),
    "test": ("test", "test", 12),
}


def kinds() -> tuple[str, ...]:
    """Return the names of the kinds of clip-art: the top folders of the collection."""
    return tuple(sorted({name.partition("/")[0] for name in load_materials().folders}))


def load_two_objects(
    part: Part, count: int, labels: Labels, seed: int = 0, distractors: int = DISTRACTORS
) -> Pictures:
    """Compose pictures of two objects.

    No two parts share an item or a clip-art picture. Items' classes and kinds of clip-art are as frequent as
    any other of theirs up to one picture, and independent of each other.

    Args:
        part: "train", "val" or "test".
        count: Number of pictures, at most 2,500, 500 and 1,000.
        labels: What is named: "item", one of `CLASSES`, or "clipart", one of `kinds()`. It changes labels and
            boxes alone, not the pictures.
        seed: Seed of everything that is drawn. The same seed gives the same pictures.
        distractors: Small clip-art pictures beside the two.

    Returns:
        The pictures, with the box of the object that counts.

    Raises:
        ValueError: There is no such part or label set, or more is asked for than there are materials.
    """
    if labels not in LABELS:
        raise ValueError(f"labels: needs one of {', '.join(LABELS)}; got {labels!r}")
    if part not in _MATERIALS:
        raise ValueError(f"part: needs one of {', '.join(_MATERIALS)}; got {part!r}")
    images, truth = _composed(part, count, seed, distractors)
    return as_pictures(images, *truth[labels])


_Truth = dict[Labels, tuple[NDArray[np.int64], NDArray[np.int64]]]


@lru_cache(maxsize=3)
def _composed(part: Part, count: int, seed: int, distractors: int) -> tuple[NDArray[np.uint8], _Truth]:
    """Compose the pictures once for both label sets."""
    materials, (of_items, of_sprites, stream) = load_materials(), _MATERIALS[part]
    sprites = materials.sprites[of_sprites]
    groups = [kinds().index(name.partition("/")[0]) for name in materials.folders]
    kind_of = np.array(groups)[materials.sprite_folders[of_sprites].numpy()]
    members = [np.flatnonzero(kind_of == kind) for kind in range(len(kinds()))]
    by_class = _items_by_class(part, materials.labels[of_items].numpy())
    available = sum(map(len, by_class))
    if not 1 <= count <= available:
        raise ValueError(
            f"{count} {part} pictures are asked for; needs 1 to {available}, the items there are"
        )
    if not 0 <= distractors < len(sprites):
        raise ValueError(f"distractors: needs 0 to {len(sprites) - 1}; got {distractors}")
    draw = np.random.default_rng((seed, stream))
    by_class = [draw.permutation(rows) for rows in by_class]
    classes = draw.permutation(np.arange(count) % len(by_class))
    shown = draw.permutation(np.arange(count) % len(members))
    turn = [iter(rows) for rows in by_class]
    items = materials.items[of_items][np.array([next(turn[label]) for label in classes])]
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    boxes = np.empty((2, count, 4), np.int64)
    for row, (item, shape, kind) in enumerate(zip(items.numpy(), cut_out(items).numpy(), shown, strict=True)):
        main = int(draw.choice(members[kind]))
        side = int(draw.integers(ITEM_SIDES[0], ITEM_SIDES[1] + 1))
        picture = resized(sprites[main], int(draw.integers(CLIPART_SIDES[0], CLIPART_SIDES[1] + 1)), draw)
        canvas = ground(draw)
        of_item, of_clipart = _apart((side, side), picture.size, draw)
        others = [sprite for index, sprite in enumerate(sprites) if index != main]
        scatter(canvas, others, distractors, _DISTRACTOR_SIDES, [of_item, of_clipart], draw, kept=2)
        canvas.paste(picture, of_clipart[:2], picture)
        paste_item(canvas, item, shape, of_item, draw)
        images[row], boxes[0, row], boxes[1, row] = np.asarray(canvas), of_item, of_clipart
    return images, {"item": (classes, boxes[0]), "clipart": (shown, boxes[1])}


def _items_by_class(part: Part, labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the rows of each class that a part may show; training and validation share the split's."""
    rows = [np.flatnonzero(labels == index) for index in range(len(CLASSES))]
    held_out = _VALIDATION_ITEMS // len(CLASSES)
    cut: dict[Part, slice] = {"train": slice(None, -held_out), "val": slice(-held_out, None)}
    return [each[cut.get(part, slice(None))] for each in rows]


def _apart(first: tuple[int, int], second: tuple[int, int], draw: np.random.Generator) -> tuple[Box, Box]:
    """Draw places of two objects that do not touch; together they are shorter than the canvas."""
    limit = [SIDE - first[0] + 1, SIDE - first[1] + 1, SIDE - second[0] + 1, SIDE - second[1] + 1]
    while True:
        x, y, u, v = draw.integers(0, limit).tolist()
        if x + first[0] <= u or u + second[0] <= x or y + first[1] <= v or v + second[1] <= y:
            return (x, y, x + first[0], y + first[1]), (u, v, u + second[0], v + second[1])
