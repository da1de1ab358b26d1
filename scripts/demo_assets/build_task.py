#!/usr/bin/env python3
"""Build the raw materials of the demonstration's task.

    python scripts/demo_assets/build_task.py  # write toast/embedded/assets/task.safetensors
    python scripts/demo_assets/build_task.py --sheet sheet.png  # draw composed pictures with labels and boxes

Expected layout of `--assets` (default: $TOAST_ASSETS, else ~/.cache/toast-assets):

    fashion_mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz
    openclipart/<folder>/**/*.png
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from views import open_visible

from toast.embedded.task import CLASSES, Pictures, load_generic, load_materials, load_task

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "toast" / "embedded" / "assets" / "task.safetensors"
SPRITE_SIDE = 48
# folders of objects; clothing is left out, so that the answer is never among the distractors
FOLDERS = (
    "animals/birds",
    "animals/bugs",
    "animals/fish",
    "animals/mammals",
    "buildings/homes",
    "computer/hardware",
    "education/books",
    "food/beverages",
    "food/desserts",
    "food/fruit",
    "food/meats_and_eggs",
    "plants/flowers",
    "recreation/holiday",
    "recreation/music",
    "recreation/sports",
    "recreation/toys",
    "tools",
    "tools/weapons",
    "transportation/boating",
    "transportation/vehicles",
)
WORN = ("shoe", "boot", "shirt", "dress", "coat", "sandal", "bag", "hat", "stocking", "sock")
PER_FOLDER = {"train": 8, "test": 7, "pretune": 15}


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def draw_items(assets: Path, name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` items of one split of Fashion-MNIST, as many of every class."""
    images = read_idx(assets / "fashion_mnist" / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(assets / "fashion_mnist" / f"{name}-labels-idx1-ubyte.gz")
    draw = np.random.default_rng(seed)
    rows = [
        draw.permutation(np.flatnonzero(labels == c))[: count // len(CLASSES)] for c in range(len(CLASSES))
    ]
    order = draw.permutation(np.concatenate(rows))
    return images[order], labels[order]


def read_sprite(path: Path) -> Image.Image | None:
    """Read one clip-art, cropped to what is visible; None where it would not do as an object."""
    if any(word in path.stem.lower() for word in WORN):
        return None
    picture = open_visible(path)
    if picture is None:
        return None
    solid = (np.asarray(picture)[..., 3] > 128).mean()
    # slivers vanish at this size, and a full rectangle is a scene with a ground of its own
    if max(picture.size) < 40 or max(picture.size) > 2.5 * min(picture.size) or not 0.12 < solid < 0.97:
        return None
    picture.thumbnail((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)
    return picture


def draw_sprites(assets: Path, seed: int) -> tuple[list[bytes], list[int], list[int]]:
    """Draw the sprites of all folders; return their PNG bytes, folder indices and split indices."""
    draw = np.random.default_rng(seed)
    packed: list[bytes] = []
    folders: list[int] = []
    splits: list[int] = []
    seen: set[bytes] = set()
    for index, name in enumerate(FOLDERS):
        paths = sorted((assets / "openclipart" / name).glob("*.png"))
        good = []
        for row in draw.permutation(len(paths)):
            picture = read_sprite(paths[row])
            if picture is None:
                continue
            # the same drawing is stored under several names: a small gray copy tells
            thumb = np.asarray(picture.convert("LA").resize((8, 8), Image.Resampling.BOX)) // 32
            digest = hashlib.sha256(thumb.tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", optimize=True)
            good.append(buffer.getvalue())
            if len(good) == sum(PER_FOLDER.values()):
                break
        # a short folder gives to every split in proportion
        total, start = sum(PER_FOLDER.values()), 0
        for split, share in enumerate(PER_FOLDER.values()):
            end = start + len(good) * share // total
            packed += good[start:end]
            folders += [index] * (end - start)
            splits += [split] * (end - start)
            start = end
        print(f"{name}: {len(good)} sprites of {len(paths)} pictures")
    return packed, folders, splits


def build(args: argparse.Namespace) -> None:
    """Write the materials."""
    tensors: dict[str, Tensor] = {}
    for split, name, count in (("train", "train", args.train), ("test", "t10k", args.test)):
        images, labels = draw_items(args.assets, name, count, args.seed)
        squeezed = zlib.compress(images.tobytes(), 9)
        tensors[f"items.{split}.zlib"] = torch.frombuffer(bytearray(squeezed), dtype=torch.uint8)
        tensors[f"items.{split}.labels"] = torch.from_numpy(labels.copy())
    packed, folders, splits = draw_sprites(args.assets, args.seed)
    tensors["sprites.png"] = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
    tensors["sprites.offsets"] = torch.tensor([0, *np.cumsum([len(p) for p in packed]).tolist()])
    tensors["sprites.folder"] = torch.tensor(folders, dtype=torch.uint8)
    tensors["sprites.split"] = torch.tensor(splits, dtype=torch.uint8)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    beside = args.target.with_name(args.target.name + ".part")
    save_file(tensors, beside, metadata={"folders": json.dumps(FOLDERS)})
    beside.chmod(0o644)
    beside.replace(args.target)
    print(f"wrote {args.target}: {args.target.stat().st_size / 1e6:.2f} MB, {len(packed)} sprites")


def sheet(path: Path, seed: int) -> None:
    """Draw a contact sheet: two rows each of train, test and generic pictures."""
    columns, cell = 10, 2 * 112

    def rows(pictures: Pictures, names: tuple[str, ...]) -> Image.Image:
        out = Image.new("RGB", (columns * cell, 2 * cell))
        for index in range(2 * columns):
            picture = Image.fromarray(pictures.images[index].permute(1, 2, 0).numpy()).resize((cell, cell))
            pen = ImageDraw.Draw(picture)
            pen.rectangle([2 * v for v in pictures.boxes[index].tolist()], outline="red")
            pen.text(
                (4, 4), names[int(pictures.labels[index])], fill="white", stroke_width=2, stroke_fill="black"
            )
            out.paste(picture, (index % columns * cell, index // columns * cell))
        return out

    train, test = load_task(100, 100, seed)
    parts = [
        rows(train, CLASSES),
        rows(test, CLASSES),
        rows(load_generic(100, seed), load_materials().folders),
    ]
    whole = Image.new("RGB", (columns * cell, 6 * cell))
    for index, part in enumerate(parts):
        whole.paste(part, (0, 2 * index * cell))
    whole.save(path)
    print(f"wrote {path}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("TOAST_ASSETS", Path.home() / ".cache" / "toast-assets"))
    parser.add_argument("--assets", type=Path, default=default)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--train", type=int, default=3000, help="items of the train split")
    parser.add_argument("--test", type=int, default=1000, help="items of the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet of the target's pictures and stop")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet, args.seed)
    else:
        build(args)


if __name__ == "__main__":
    main()
