"""What the demonstration's pictures are put together from: grounds, sprites, items, and their places."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIDE: Final = 112
"""Width and height of a picture in pixels."""
Box = tuple[int, int, int, int]
"""A place as x0, y0, x1, y1 in pixels, the ends exclusive."""


def cut_out(items: Tensor) -> Tensor:
    """Find what belongs to an item: everything that the dark ground around it does not reach.

    Args:
        items: uint8 (n, 28, 28), bright on black.

    Returns:
        uint8 (n, 28, 28), 255 where the item is and 0 on the ground. Dark spots inside an item are kept.
    """
    dark = (items < 20).float()[:, None]
    reached = dark.clone()
    reached[..., 1:-1, 1:-1] = 0
    while True:
        across = functional.max_pool2d(reached, (1, 3), 1, (0, 1))
        grown = torch.maximum(across, functional.max_pool2d(reached, (3, 1), 1, (1, 0))) * dark
        if torch.equal(grown, reached):
            return ((1 - reached[:, 0]) * 255).to(torch.uint8)
        reached = grown


def paste_item(
    canvas: Image.Image,
    item: NDArray[np.uint8],
    shape: NDArray[np.uint8],
    box: Box,
    draw: np.random.Generator,
) -> None:
    """Paste an item in a tint of its own.

    Args:
        canvas: What it is pasted on.
        item: `(28, 28)`, bright on black.
        shape: `(28, 28)`, 255 where the item is, as `cut_out` finds it.
        box: Its place, a square.
        draw: What the tint is drawn from.
    """
    side = box[2] - box[0]
    tint = draw.uniform(0.35, 1.0, 3)
    # dark cloth stays apart from a dark ground: the item's own range of brightness is lifted
    cloth = (40 + item[..., None] * (215 / 255)) * tint
    picture = Image.fromarray(cloth.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(shape).resize((side, side), Image.Resampling.BILINEAR)
    canvas.paste(picture, box[:2], alpha)


def ground(draw: np.random.Generator) -> Image.Image:
    """Draw a plain or lightly textured ground."""
    base = draw.uniform(30, 235, 3)
    if draw.random() < 0.4:
        return Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in base))
    cells = int(draw.integers(4, 57))
    coarse = (base + draw.normal(0, 12, (cells, cells, 1))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def resized(sprite: Image.Image, longer: int, draw: np.random.Generator) -> Image.Image:
    """Scale a sprite to a longer side of `longer` pixels; mirror every other one."""
    scale = longer / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    out = sprite.resize(size, Image.Resampling.BICUBIC)
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else out


def place(
    size: tuple[int, int], taken: list[Box], draw: np.random.Generator, tries: int = 24, kept: int = 1
) -> Box:
    """Find a place on the canvas that covers as little as possible of the boxes taken.

    The first `kept` of `taken` are objects that count: covering them weighs more than covering others.
    """
    width, height = size
    best: tuple[int, Box] | None = None
    corners = draw.integers(0, (SIDE - width + 1, SIDE - height + 1), (tries, 2)).tolist()
    for x, y in corners:
        box = (x, y, x + width, y + height)
        covered = 0
        for index, other in enumerate(taken):
            across = min(box[2], other[2]) - max(box[0], other[0])
            down = min(box[3], other[3]) - max(box[1], other[1])
            covered += max(0, across) * max(0, down) * (20 if index < kept else 1)
        if best is None or covered < best[0]:
            best = (covered, box)
        if covered == 0:
            break
    assert best is not None
    return best[1]


def scatter(
    canvas: Image.Image,
    sprites: list[Image.Image],
    count: int,
    sides: tuple[int, int],
    taken: list[Box],
    draw: np.random.Generator,
    kept: int = 1,
) -> None:
    """Paste `count` different sprites where they cover little of the boxes taken; `kept` as of `place`."""
    boxes = list(taken)
    for index in draw.choice(len(sprites), count, replace=False):
        picture = resized(sprites[int(index)], int(draw.integers(sides[0], sides[1] + 1)), draw)
        box = place(picture.size, boxes, draw, kept=kept)
        canvas.paste(picture, box[:2], picture)
        boxes.append(box)
