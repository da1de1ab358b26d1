"""Pictures of the study's external tasks as image folders, from files that a user has fetched.

python scripts/study_data.py emoji    --assets $TOAST_ASSETS --out $TOAST_ASSETS/study
python scripts/study_data.py clipart  --assets $TOAST_ASSETS --out $TOAST_ASSETS/study
python scripts/study_data.py fashion  --assets $TOAST_ASSETS --out $TOAST_ASSETS/study
python scripts/study_data.py solar    --assets $TOAST_ASSETS --out $TOAST_ASSETS/study

writes OUT/NAME/{train,val,test}/CLASS/*.png and, where the place of the object is known, OUT/NAME/boxes.json,
for `data.source: folder`. The same files give the same pictures. Nothing is fetched and nothing is shipped:

emoji    ASSETS/emoji/{emoji.json,google/,twitter/}: the npm packages emoji-datasource-google and -twitter
         (data MIT; Google's drawings, Noto Emoji, Apache 2.0; Twitter's, Twemoji, CC BY 4.0). Unicode's
         subcategory of an emoji, in Google's style; `shift` is the test split in Twitter's, each emoji at the
         same place.
clipart  ASSETS/openclipart/: the Open Clip Art Library, public domain. Categories of drawings that are in no
         folder of the embedded stage one, and no drawing that is in it under another name. The embedded
         backbone was distilled, without labels, on views of the whole library.
fashion  ASSETS/fashion_mnist/: Fashion-MNIST's four IDX files (Zalando Research, MIT). Its own test split.
solar    ASSETS/elpv-dataset/: a checkout of github.com/zae-bayern/elpv-dataset (Buerhop-Lutz et al. 2018,
         Deitsch et al. 2019; pictures CC BY-NC-SA 4.0, not for commercial use). Whether a solar cell is
         defective; cells whose probability was given as 1/3 or 2/3 go to the nearer side. Cells of one module
         may be in several splits, for the modules are not published.

Emoji and clip-art are pasted at a random place and size on a plain ground, several times each; no drawing is
in two splits.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from toast.commands.errors import run_script

Image.MAX_IMAGE_PIXELS = None  # the largest drawings are left out by their header
SIDE = 112
#: Smallest and largest longer side of a drawing on its canvas, in pixels.
SIDES = (44, 76)
#: Shares of the drawings of a class.
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
#: Pictures of each split, over all classes.
COUNTS = {"train": 3000, "val": 600, "test": 1000}
#: Drawings that a category needs to be a class.
LEAST = 12
#: Drawings of a category that are used at most.
MOST = 60
#: Mean difference of small copies, of 255, below which two drawings are one.
NEAR = 6.0
#: Emoji that are one drawing with many colours of skin, sexes and flags, so that splits would share drawings.
LEFT_OUT = ("People & Body", "Flags", "Component")
#: Class -> folders of Open Clip Art, each with the folders in it.
CLIPART = {
    "arrows": ["shapes/arrows"],
    "bodypart": ["people/bodypart"],
    "bread": ["food/breads_and_carbs"],
    "callouts": ["shapes/callouts"],
    "cards": ["recreation/games/cards"],
    "clothing": ["people/clothing"],
    "containers": ["containers"],
    "decorations": ["decorations"],
    "electronics": ["electronics"],
    "flags": ["signs_and_symbols/flags"],
    "flowchart": ["shapes/flowchart"],
    "geography": ["geography"],
    "jigsaw": ["shapes/jigsaw"],
    "map symbols": ["signs_and_symbols/map_symbols"],
    "office": ["office"],
    "party": ["recreation/party"],
    "religion": ["recreation/religion"],
    "road signs": ["transportation/roadsigns"],
    "smilies": ["people/smilies"],
    "stickmen": ["people/stickmen"],
    "transport symbols": ["transportation/aiga-symbols"],
    "weather": ["signs_and_symbols/weather"],
}
FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
SOLAR = {"0.0": "functional", "0.3333333333333333": "functional", "0.6666666666666666": "defective",
         "1.0": "defective"}  # fmt: skip
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """One picture of a task.

    Args:
        at: Path under the task's folder, `SPLIT/CLASS/NAME.png`.
        image: The picture, or its file.
        box: The object's place as x0, y0, x1, y1, the ends exclusive; None where that is not known.
    """

    at: str
    image: Image.Image | Path
    box: Box | None = None


class Splits:
    """Splits what a class has by shares, at random but always alike.

    Args:
        name: Of the task.
        shares: Split -> share, adding up to 1.
    """

    def __init__(self, name: str, shares: Mapping[str, float] = SHARES) -> None:
        self.name, self.shares = name, shares

    def __call__(self, label: str, held: Sequence[Any]) -> dict[str, list[Any]]:
        """Returns what of a class is in each split, in the order that was drawn."""
        order = generator(self.name, label).permutation(len(held))
        split, start, share = {}, 0, 0.0
        for name, part in self.shares.items():
            share += part
            end = round(share * len(held))
            split[name] = [held[i] for i in order[start:end]]
            start = end
        return split


def generator(*key: object) -> np.random.Generator:
    """Returns a generator that starts from a hash of a key."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), np.uint32))


def pasted(drawing: Image.Image, draw: np.random.Generator) -> tuple[Image.Image, Box]:
    """Pastes a drawing with transparency on a plain ground, at a random place and size; returns its box."""
    ground = draw.uniform(0, 255, 3)
    field = ground + draw.normal(0, draw.uniform(0, 12), (SIDE, SIDE, 3))
    canvas = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    scale = draw.uniform(*SIDES) / max(drawing.size)
    width, height = (max(4, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    x, y = (int(draw.integers(0, SIDE - side + 1)) for side in (width, height))
    canvas.paste(drawing, (x, y), drawing)
    return canvas, (x, y, x + width, y + height)


def visible(path: Path) -> Image.Image | None:
    """Opens a drawing, cropped to what is visible; None if it is damaged, empty, huge, tiny or a sliver."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > 4_000_000:
                return None
            drawing = opened.convert("RGBA")
    except (OSError, ValueError):
        return None
    box = drawing.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if box is None:
        return None
    drawing = drawing.crop(box)
    good = 24 <= max(drawing.size) <= 3 * min(drawing.size)
    drawing.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return drawing if good else None


class Known:
    """Drawings that were met, so that the same one is known again at another size or under another name."""

    def __init__(self, drawings: Iterable[Image.Image] = ()) -> None:
        self.held = [_likeness(drawing) for drawing in drawings]

    def meets(self, drawing: Image.Image) -> bool:
        """Returns whether a drawing, or one that is nearly it, was met before; it is met now."""
        new = _likeness(drawing)
        if self.held and np.abs(np.stack(self.held) - new).mean((1, 2, 3)).min() < NEAR:
            return True
        self.held.append(new)
        return False


def _likeness(drawing: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns a small copy on grey, with what is visible, 0 to 255."""
    grey = Image.new("RGBA", drawing.size, (128, 128, 128, 255))
    grey.alpha_composite(drawing)
    copies = (grey.convert("RGB"), drawing.getchannel("A").convert("RGB"))
    small = [np.asarray(each.resize((8, 8), Image.Resampling.BOX), np.float32) for each in copies]
    return np.concatenate(small, -1)


def compose(
    name: str,
    drawings: Mapping[str, Mapping[str, Sequence[Mapping[str, Image.Image]]]],
    counts: Mapping[str, int],
) -> Iterator[Picture]:
    """Yields as many pictures of each class as of any other, each drawing as often as any other of its class.

    Args:
        name: Of the task.
        drawings: Class -> split -> drawings, each by the split that it is written to: `test` and, in another
            style, `shift` have the same grounds and places.
        counts: Pictures of each split.
    """
    for label, splits in drawings.items():
        for split, held in splits.items():
            for number in range(counts[split] // len(drawings)):
                for to, drawing in held[number % len(held)].items():
                    image, box = pasted(drawing, generator(name, label, split, number))
                    yield Picture(f"{to}/{label}/{number:04d}.png", image, box)


def emoji(assets: Path, counts: Mapping[str, int]) -> Iterator[Picture]:
    """Yields emoji by their subcategory."""
    root, by_label = assets / "emoji", defaultdict(list)
    for entry in json.loads(needed(root / "emoji.json").read_text()):
        both = all((root / style / entry["image"]).is_file() for style in ("google", "twitter"))
        if both and entry["category"] not in LEFT_OUT:
            by_label[entry["subcategory"].replace(" & ", " and ")].append(entry["image"])
    split_up, drawings = Splits("emoji"), {}
    for label, images in sorted(by_label.items()):
        if len(images) < LEAST:
            continue
        drawings[label] = {
            split: [_in_styles(root, image, split) for image in held]
            for split, held in split_up(label, sorted(images)).items()
        }
    return compose("emoji", drawings, counts)


def _in_styles(root: Path, image: str, split: str) -> dict[str, Image.Image]:
    styles = {split: "google"} | ({"shift": "twitter"} if split == "test" else {})
    return {to: Image.open(root / style / image).convert("RGBA") for to, style in styles.items()}


def clipart(assets: Path, counts: Mapping[str, int]) -> Iterator[Picture]:
    """Yields clip-art of categories that the embedded stage one has never seen."""
    from toast.embedded.task import load_materials

    materials, root = load_materials(), needed(assets / "openclipart")
    overlap = [f for folders in CLIPART.values() for f in folders if _is_in(f, materials.folders)]
    if overlap:
        raise SystemExit(f"stage one has seen {', '.join(overlap)}; take them out of CLIPART.")
    known = Known(sprite for sprites in materials.sprites.values() for sprite in sprites)
    split_up, drawings = Splits("clipart"), {}
    for label, folders in CLIPART.items():
        paths = sorted(path for folder in folders for path in (root / folder).rglob("*.png"))
        held: list[Image.Image] = []
        for index in generator("clipart", label).permutation(len(paths)):
            drawing = visible(paths[index])
            if drawing is not None and not known.meets(drawing):
                held.append(drawing)
            if len(held) == MOST:
                break
        if len(held) >= LEAST:
            drawings[label] = {s: [{s: d} for d in part] for s, part in split_up(label, held).items()}
    return compose("clipart", drawings, counts)


def _is_in(folder: str, folders: Sequence[str]) -> bool:
    return any(f"{folder}/".startswith(f"{seen}/") or f"{seen}/".startswith(f"{folder}/") for seen in folders)


def fashion(assets: Path, counts: Mapping[str, int]) -> Iterator[Picture]:
    """Yields items of Fashion-MNIST, its training split cut into `train` and `val`."""
    for file, splits in (("train", ("train", "val")), ("t10k", ("test",))):
        images, labels = (
            _read_idx(needed(assets / "fashion_mnist" / f"{file}-{kind}-ubyte.gz"))
            for kind in ("images-idx3", "labels-idx1")
        )
        for label, name in enumerate(FASHION):
            rows = generator("fashion", file, name).permutation(np.flatnonzero(labels == label)).tolist()
            for split in splits:
                for _ in range(counts[split] // len(FASHION)):
                    row = rows.pop()
                    seen = np.argwhere(images[row] > 16)
                    (y0, x0), (y1, x1) = seen.min(0).tolist(), (seen.max(0) + 1).tolist()
                    at = f"{split}/{name}/{row:05d}.png"
                    yield Picture(at, Image.fromarray(images[row]), (x0, y0, x1, y1))


def _read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no IDX file of unsigned bytes.")
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def solar(assets: Path, counts: Mapping[str, int]) -> Iterator[Picture]:
    """Yields all solar cells, by the probability of a defect; kinds of cells are shared out alike."""
    root = needed(assets / "elpv-dataset")
    listed = next(root.rglob("labels.csv"), root / "labels.csv")
    by_kind = defaultdict(list)
    for row in csv.reader(needed(listed).read_text().splitlines(), delimiter=" ", skipinitialspace=True):
        path, chance, kind = row
        if chance not in SOLAR:
            raise SystemExit(f"{listed}: the probability must be one of {', '.join(SOLAR)}; got {chance!r}.")
        by_kind[SOLAR[chance], chance, kind].append(path)
    split_up = Splits("solar", {"train": 0.55, "val": 0.2, "test": 0.25})
    for (label, *kind), paths in sorted(by_kind.items()):
        for split, held in split_up(f"{label} {kind}", sorted(paths)).items():
            for path in held:
                yield Picture(f"{split}/{label}/{Path(path).name}", needed(listed.parent / path))


def needed(path: Path) -> Path:
    """Returns a path that has to be there."""
    if not path.exists():
        raise SystemExit(
            f"{path} does not exist; the head of {Path(__file__).name} says where it comes from."
        )
    return path


TASKS: dict[str, Callable[[Path, Mapping[str, int]], Iterator[Picture]]] = {
    "emoji": emoji, "clipart": clipart, "fashion": fashion, "solar": solar
}  # fmt: skip


def write(pictures: Iterator[Picture], place: Path) -> dict[str, int]:
    """Writes a task's folder whole or not at all; returns the pictures of each split."""
    beside = place.with_name(f".{place.name}-part")
    shutil.rmtree(beside, ignore_errors=True)
    boxes: dict[str, Box] = {}
    written: dict[str, int] = defaultdict(int)
    for picture in pictures:
        path = beside / picture.at
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture.image, Path):
            shutil.copyfile(picture.image, path)
        else:
            picture.image.save(path)
        written[picture.at.partition("/")[0]] += 1
        if picture.box is not None:
            boxes[picture.at] = picture.box
    if boxes:
        (beside / "boxes.json").write_text(json.dumps(boxes))
    beside.rename(place)
    return dict(written)


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    assets: Annotated[Path, typer.Option(help="Folder of what was fetched.", envvar="TOAST_ASSETS")],
    out: Annotated[Path, typer.Option(help="Folder that the task's folder is written into.")],
    share: Annotated[float, typer.Option(help="Write so much of a task; solar is always whole.")] = 1.0,
) -> None:
    """Write the pictures of one of the study's external tasks as an image folder."""
    if name not in TASKS:
        raise SystemExit(f"{name!r} is no task; needs one of {', '.join(TASKS)}.")
    place = out / name
    if place.exists():
        raise SystemExit(f"{place} is there already; remove it, or choose another --out.")
    counts = {split: math.ceil(share * count) for split, count in COUNTS.items()}
    written = write(TASKS[name](assets, counts), place)
    classes = len(list((place / "train").iterdir()))
    said = ", ".join(f"{split} {count:,}" for split, count in written.items())
    print(f"{place}: {classes} classes; {said}")


if __name__ == "__main__":
    run_script(main)
