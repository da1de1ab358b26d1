"""The demonstration's task: find the one item of clothing among clip-art, with the item's place known.

Every picture is a canvas of 112 x 112 pixels with four clip-art distractors and one Fashion-MNIST item,
whose class is the label and whose box is kept, so that where a model looks can be held against where the
answer is. The package ships raw materials alone; pictures are composed from a seed.
"""

from __future__ import annotations

import io
import itertools
import json
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from toast.embedded.backbone import MEAN, STD
from toast.embedded.composing import SIDE, cut_out, ground, paste_item, place, resized, scatter

ITEM_SIDES: Final = (40, 44)
"""Smallest and largest side of the item's square box in pixels."""
DISTRACTORS: Final = 4
"""Clip-art pictures beside the item."""
CLASSES: Final = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Names of the task's labels, in order."""

Split = Literal["train", "test", "pretune"]
_SPLITS: Final[tuple[Split, ...]] = ("train", "test", "pretune")


@dataclass(frozen=True)
class Pictures:
    """Composed pictures with what is in them and where.

    Attributes:
        images: uint8 (n, 3, 112, 112), red, green and blue, 0 to 255.
        labels: int64 (n,), the class of the object that counts.
        boxes: int64 (n, 4), its place as x0, y0, x1, y1 in pixels, the ends exclusive.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)


@dataclass(frozen=True)
class Materials:
    """What the pictures are composed from.

    Attributes:
        items: For "train" and "test", uint8 (n, 28, 28) Fashion-MNIST items, bright on black.
        labels: For "train" and "test", int64 (n,) classes of the items.
        sprites: For every split, the clip-art as RGBA pictures; no two splits share one.
        sprite_folders: For every split, int64 (n,) indices into `folders`.
        folders: Names of the clip-art folders.
    """

    items: dict[Split, Tensor]
    labels: dict[Split, Tensor]
    sprites: dict[Split, list[Image.Image]]
    sprite_folders: dict[Split, Tensor]
    folders: tuple[str, ...]


@cache
def load_materials() -> Materials:
    """Read the raw materials that ship in the package.

    Returns:
        The materials; the same object every time.

    Raises:
        ValueError: The file is missing, damaged or of another kind.
    """
    file = resources.files("toast.embedded") / "assets" / "task.safetensors"
    try:
        stored = load(file.read_bytes())
        with resources.as_file(file) as path, safe_open(path, "pt") as opened:
            folders = tuple(json.loads((opened.metadata() or {})["folders"]))
        splits = stored["sprites.split"]
        offsets = stored["sprites.offsets"].tolist()
        packed = stored["sprites.png"].numpy().tobytes()
        pictures = [
            Image.open(io.BytesIO(packed[start:end])).convert("RGBA")
            for start, end in itertools.pairwise(offsets)
        ]
        items: dict[Split, Tensor] = {}
        labels: dict[Split, Tensor] = {}
        for split in ("train", "test"):
            labels[split] = stored[f"items.{split}.labels"].long()
            flat = zlib.decompress(stored[f"items.{split}.zlib"].numpy().tobytes())
            items[split] = torch.frombuffer(bytearray(flat), dtype=torch.uint8).view(-1, 28, 28)
    except (OSError, SafetensorError, KeyError, zlib.error, json.JSONDecodeError) as error:
        raise ValueError(f"the demonstration's materials in {file} cannot be read: {error!r}") from error
    return Materials(
        items=items,
        labels=labels,
        sprites={
            split: [picture for picture, of in zip(pictures, splits.tolist(), strict=True) if of == index]
            for index, split in enumerate(_SPLITS)
        },
        sprite_folders={
            split: stored["sprites.folder"][splits == index].long() for index, split in enumerate(_SPLITS)
        },
        folders=folders,
    )


def load_task(
    train: int = 2000, test: int = 1000, seed: int = 0, distractors: int = DISTRACTORS
) -> tuple[Pictures, Pictures]:
    """Compose the task's pictures.

    The two sets share neither an item nor a distractor, and every class is as frequent as any other up to
    one picture.

    Args:
        train: Number of pictures to train on, at most 3,000.
        test: Number of pictures to test on, at most 1,000.
        seed: Seed of everything that is drawn. The same seed gives the same pictures.
        distractors: Clip-art pictures beside the item, 0 or more.

    Returns:
        The pictures to train on and those to test on.

    Raises:
        ValueError: More pictures are asked for than there are items, or more distractors than clip-art.
    """
    return _items("train", train, seed, distractors), _items("test", test, seed, distractors)


def load_generic(n: int = 2000, seed: int = 0) -> Pictures:
    """Compose generic pictures of clip-art alone, for a stage before the task is known.

    Every canvas has one main picture among smaller ones; the label is the main one's folder, an index
    into `load_materials().folders`, and the box is the main one's. None of the clip-art appears in the
    task's pictures.

    Args:
        n: Number of pictures.
        seed: Seed of everything that is drawn.

    Returns:
        The pictures.
    """
    materials = load_materials()
    draw = np.random.default_rng((seed, 2))
    sprites, folders = materials.sprites["pretune"], materials.sprite_folders["pretune"]
    # every folder is as frequent as any other, whatever the number of its pictures
    members = [torch.nonzero(folders == index).flatten().tolist() for index in range(len(materials.folders))]
    images = np.empty((n, SIDE, SIDE, 3), np.uint8)
    labels = np.empty(n, np.int64)
    boxes = np.empty((n, 4), np.int64)
    for row in range(n):
        label = row % len(members)
        main = sprites[int(draw.choice(members[label]))]
        canvas = ground(draw)
        picture = resized(main, int(draw.integers(46, 59)), draw)
        box = place(picture.size, [], draw)
        scatter(canvas, sprites, DISTRACTORS, (16, 28), [box], draw)
        canvas.paste(picture, box[:2], picture)
        images[row], labels[row], boxes[row] = np.asarray(canvas), label, box
    return _shuffled(images, labels, boxes, draw)


def normalise(images: Tensor) -> Tensor:
    """Turn pictures into what the backbone expects.

    Args:
        images: uint8 (n, 3, height, width), 0 to 255.

    Returns:
        float32 of the same shape, with the backbone's mean and standard deviation taken out.
    """
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def _items(split: Split, count: int, seed: int, distractors: int) -> Pictures:
    """Compose `count` pictures of one split of the task."""
    materials = load_materials()
    labels, sprites = materials.labels[split], materials.sprites[split]
    if count > len(labels):
        raise ValueError(f"{count} {split} pictures are asked for; there are {len(labels)} items")
    if not 0 <= distractors <= len(sprites):
        raise ValueError(f"distractors: needs 0 to {len(sprites)}; got {distractors}")
    draw = np.random.default_rng((seed, _SPLITS.index(split)))
    order = draw.permutation(len(labels))
    by_class = [order[labels.numpy()[order] == index] for index in range(len(CLASSES))]
    chosen = torch.tensor(
        [int(by_class[i % len(CLASSES)][i // len(CLASSES)]) for i in range(count)], dtype=torch.long
    )
    items = materials.items[split][chosen]
    shapes = cut_out(items).numpy()
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    boxes = np.empty((count, 4), np.int64)
    for row, (item, shape) in enumerate(zip(items.numpy(), shapes, strict=True)):
        side = int(draw.integers(ITEM_SIDES[0], ITEM_SIDES[1] + 1))
        canvas = ground(draw)
        box = place((side, side), [], draw)
        scatter(canvas, sprites, distractors, (26, 38), [box], draw)
        paste_item(canvas, item, shape, box, draw)
        images[row], boxes[row] = np.asarray(canvas), box
    return _shuffled(images, labels[chosen].numpy(), boxes, draw)


def _shuffled(
    images: NDArray[np.uint8], labels: NDArray[np.int64], boxes: NDArray[np.int64], draw: np.random.Generator
) -> Pictures:
    """Shuffle the rows and turn them into tensors."""
    order = draw.permutation(len(labels))
    return as_pictures(images[order], labels[order], boxes[order])


def as_pictures(images: NDArray[np.uint8], labels: NDArray[np.int64], boxes: NDArray[np.int64]) -> Pictures:
    """Turn rows into tensors, the pictures' channels first."""
    return Pictures(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels),
        torch.from_numpy(boxes),
    )
