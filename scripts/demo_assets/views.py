"""Compose and augment the clip-art views that the demonstration's backbone is distilled on."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from toast.embedded.backbone import MEAN, STD

SIDE = 112
PICTURE_SIDE = 128
MAX_PIXELS = 4_000_000
MAX_PER_FOLDER = 160
Image.MAX_IMAGE_PIXELS = None  # the largest pictures are skipped by their header


def open_visible(path: Path, smallest: int = 0) -> Image.Image | None:
    """Open one clip-art as RGBA, cropped to what is visible; None if damaged, empty, too large or too small.

    Args:
        path: A picture with transparency.
        smallest: Least width and height of the file in pixels.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS or min(opened.size) < smallest:
                return None
            picture = opened.convert("RGBA")
    except (OSError, ValueError):
        return None
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    return None if box is None else picture.crop(box)


def read_picture(path: Path) -> np.ndarray | None:
    """Read one clip-art as RGBA, cropped to what is visible, its longer side at most PICTURE_SIDE."""
    picture = open_visible(path, smallest=16)
    if picture is None:
        return None
    if max(picture.size) > 5 * min(picture.size):
        return None
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def read_clipart(assets: Path, workers: int) -> tuple[list[np.ndarray], list[str]]:
    """Read the clip-art, without copies, at most MAX_PER_FOLDER of a folder; also the folder names."""
    root = assets / "openclipart"
    folders: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        folders.setdefault(str(path.parent.relative_to(root)), []).append(path)
    if not folders:
        raise SystemExit(f"no pictures under {root}")
    draw = np.random.default_rng(0)
    chosen = []
    for name, paths in sorted(folders.items()):
        keep = draw.permutation(len(paths))[:MAX_PER_FOLDER]
        chosen += [(name, paths[i]) for i in sorted(keep)]
    pictures, names, seen = [], [], set()
    with ProcessPoolExecutor(workers) as pool:
        loaded = pool.map(read_picture, [path for _, path in chosen], chunksize=32)
        for (name, _), picture in zip(chosen, loaded, strict=True):
            if picture is None:
                continue
            digest = hashlib.sha256(picture.tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                pictures.append(picture)
                names.append(name)
    return pictures, names


def jitter(picture: Image.Image, draw: np.random.Generator, gray: float) -> Image.Image:
    """Change the colours of an RGBA picture at random; with probability `gray` make it a tinted gray."""
    values = np.asarray(picture).astype(np.float32)
    colour, alpha = values[..., :3], values[..., 3:]
    if draw.random() < gray:
        colour = colour.mean(-1, keepdims=True) * (
            draw.uniform(0.35, 1.0, 3) if draw.random() < 0.6 else np.ones(3)
        )
    elif draw.random() < 0.3:
        colour = colour[..., draw.permutation(3)]
    if draw.random() < 0.08:
        colour = 255 - colour
    if draw.random() < 0.5:
        colour = (colour - 128) * draw.uniform(0.6, 1.3) + 128 + draw.uniform(-40, 40)
    out = np.concatenate([colour.clip(0, 255), alpha], -1)
    return Image.fromarray(out.astype(np.uint8), "RGBA")


def ground(pictures: list[np.ndarray], draw: np.random.Generator) -> Image.Image:
    """Draw a ground of SIDE x SIDE pixels: plain, noisy, graded, or a dimmed collage of clip-art."""
    kind = draw.random()
    base = draw.uniform(0, 255, 3)
    if draw.random() < 0.3:
        base = np.full(3, draw.choice([0.0, 128.0, 255.0, draw.uniform(0, 255)]))
    field = np.broadcast_to(base, (SIDE, SIDE, 3)).astype(np.float32)
    if kind < 0.35:
        return Image.fromarray(field.astype(np.uint8))
    if kind < 0.6:
        cells = int(draw.integers(3, 40))
        coarse = draw.normal(0, draw.uniform(5, 40), (cells, cells, 3 if draw.random() < 0.5 else 1))
        coarse = np.broadcast_to(coarse, (cells, cells, 3))
        shifted = np.stack(
            [
                np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize((SIDE, SIDE), 3))
                for c in range(3)
            ],
            -1,
        )
        return Image.fromarray((field + shifted).clip(0, 255).astype(np.uint8))
    if kind < 0.78:
        other = draw.uniform(0, 255, 3)
        angle = draw.uniform(0, 2 * math.pi)
        rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
        share = (0.5 + 0.7 * (rows * math.sin(angle) + columns * math.cos(angle))).clip(0, 1)[..., None]
        return Image.fromarray((field * (1 - share) + other * share).astype(np.uint8))
    canvas = Image.fromarray(field.astype(np.uint8))
    for _ in range(int(draw.integers(2, 7))):
        paste(canvas, pictures, draw, draw.uniform(40, 150), gray=0.3)
    return Image.blend(canvas, Image.fromarray(field.astype(np.uint8)), draw.uniform(0.2, 0.7))


def paste(
    canvas: Image.Image,
    pictures: list[np.ndarray],
    draw: np.random.Generator,
    side: float,
    gray: float,
    centre: tuple[float, float] | None = None,
) -> None:
    """Paste one random clip-art, `side` pixels long, on the canvas; it may hang over an edge."""
    picture = Image.fromarray(pictures[int(draw.integers(len(pictures)))])
    scale = side / max(picture.size)
    stretch = math.exp(draw.uniform(-0.2, 0.2))
    size = (max(4, round(picture.width * scale * stretch)), max(4, round(picture.height * scale / stretch)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    if draw.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < 0.3:
        picture = picture.rotate(draw.uniform(-30, 30), Image.Resampling.BILINEAR, expand=True)
    picture = jitter(picture, draw, gray)
    x, y = centre or (draw.uniform(0, SIDE), draw.uniform(0, SIDE))
    canvas.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)), picture)


def view(pictures: list[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    """Compose one view, uint8 (3, SIDE, SIDE)."""
    canvas = ground(pictures, draw)
    if draw.random() < 0.4:
        centre = (SIDE / 2 + draw.normal(0, 14), SIDE / 2 + draw.normal(0, 14))
        paste(canvas, pictures, draw, SIDE * draw.uniform(0.4, 1.25), gray=0.25, centre=centre)
    else:
        places = [(x, y) for x in (22, 56, 90) for y in (22, 56, 90)]
        for place in draw.permutation(len(places))[: int(draw.integers(2, 7))]:
            x, y = places[int(place)]
            centre = (x + draw.normal(0, 8), y + draw.normal(0, 8))
            paste(canvas, pictures, draw, draw.uniform(22, 58), gray=0.25, centre=centre)
    if draw.random() < 0.1:
        canvas = canvas.convert("L").convert("RGB")
    if draw.random() < 0.1:
        canvas = canvas.filter(ImageFilter.GaussianBlur(draw.uniform(0.4, 1.2)))
    out = np.asarray(canvas).transpose(2, 0, 1)
    if draw.random() < 0.2:
        out = (out + draw.normal(0, draw.uniform(2, 12), out.shape)).clip(0, 255)
    return out.astype(np.uint8)


_shared: list[np.ndarray] = []


def _share(pictures: list[np.ndarray]) -> None:
    _shared[:] = pictures


def _views(job: tuple[int, int, int]) -> np.ndarray:
    seed, chunk, count = job
    draw = np.random.default_rng((seed, chunk))
    return np.stack([view(_shared, draw) for _ in range(count)])


def compose(pictures: list[np.ndarray], count: int, seed: int, workers: int) -> Tensor:
    """Compose `count` views, uint8 (count, 3, SIDE, SIDE), the same for any number of workers."""
    chunk = 200
    jobs = [(seed, start, min(chunk, count - start)) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers, initializer=_share, initargs=(pictures,)) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(_views, jobs))))


def normalised(images: Tensor) -> Tensor:
    """Turn uint8 pictures (n, 3, h, w) into normalised float32."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std
