"""Pictures to look at, with their targets, as a model takes them: of a run's split, or a user's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from toast.data.vision import BadSample, Transform, VisionSource, open_vision
from toast.data.vision.boxes import read_boxes
from toast.data.vision.decoding import decode
from toast.data.vision.source import Box
from toast.training.data import vision_sources
from toast.training.run_config import RunConfig
from toast.visual.looks import UNKNOWN
from toast.visual.masks import read_mask
from toast.visual.targets import frame, in_sight

#: Files of boxes, and the folder of masks, that lie beside pictures.
BOXES = ("boxes.json", "boxes.csv")
MASKS = "masks"


@dataclass(frozen=True)
class Sample:
    """A picture.

    Args:
        name: What it is called.
        pixels: As the model takes them, `(channels, height, width)`.
        target: The share of each pixel that belongs to what counts, `(height, width)`, 0 to 1; None if that
            is not known.
        label: Its class; None if it is not known.
    """

    name: str
    pixels: Tensor
    target: Tensor | None = None
    label: int | None = None

    @property
    def box(self) -> list[float] | None:
        """What is drawn around the target, to a pixel: x0, y0, x1, y1; None where none is in sight."""
        return None if self.target is None else frame(self.target)


def open_split(config: RunConfig, split: str) -> VisionSource:
    """Opens the pictures of a run's split, and no other split where that can be avoided.

    Raises:
        ValueError: If the run has no such split, or it cannot be opened.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split: needs validation or test; got {split!r}.")
    data = config.data
    named = data.validation if split == "validation" else data.test
    if named is not None:
        return open_vision(data.source, root=data.root, name=data.name, split=named, **data.options)
    cut: VisionSource | None = None
    if split == "validation" and data.validation_share:
        cut = vision_sources(config)[split]
    if cut is None:
        raise ValueError(
            f"split: {config.name} names no {split} split; pass pictures of your own, or another --split."
        )
    return cut


def of_split(
    source: VisionSource, transform: Transform, most: int | None, skipped: Callable[[str], None]
) -> Iterator[Sample]:
    """Yields pictures of a split, spread over it.

    Args:
        source: The split.
        transform: How a picture is prepared.
        most: How many at most; None is all.
        skipped: Told of each picture that cannot be decoded, and why.
    """
    count = len(source)
    some = count if most is None else min(most, count)
    bar = tqdm(range(some), "pictures", unit="picture", leave=False, disable=None)  # on terminals alone
    for index in (place * count // some for place in bar):
        try:
            found = source[index]
        except BadSample as bad:
            skipped(str(bad))
            continue
        target = None if found.box is None else transform.mask(found.box, found.image.size)
        yield Sample(_without_suffix(found.name), transform(found.image), target, found.label)


@dataclass(frozen=True)
class PictureFile:
    """A picture's file.

    Args:
        path: The file.
        root: The folder that the user named, or that the named file lies in.
    """

    path: Path
    root: Path

    @property
    def folders(self) -> list[Path]:
        """The folders that it lies in, up to the root."""
        return [self.path.parent, *(p for p in self.path.parent.parents if p.is_relative_to(self.root))]


def find_pictures(places: Iterable[Path]) -> list[PictureFile]:
    """Finds the files of pictures; folders are walked, but for what is hidden and for masks.

    Args:
        places: Files and folders.

    Raises:
        ValueError: If one is not there, or a folder holds no picture.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from toast.data.walking import walk

    found: list[PictureFile] = []
    for place in places:
        if place.is_file():
            found.append(PictureFile(place, place.parent))
            continue
        if not place.is_dir():
            raise ValueError(f"images: there is no file or folder {str(place)!r}.")
        inside = sorted(walk(place, IMG_EXTENSIONS, skip=[MASKS]).files)
        if not inside:
            raise ValueError(f"images: the folder {place} holds no picture ({', '.join(IMG_EXTENSIONS)}).")
        found += [PictureFile(path, place) for path in inside]
    return found


def of_files(
    found: Sequence[PictureFile], transform: Transform, skipped: Callable[[str], None]
) -> Iterator[Sample]:
    """Yields pictures with what lies beside them of their targets.

    That is a `boxes.json` or `boxes.csv` in a folder that the picture lies in, up to the one that was named,
    under the picture's path from there (`toast.data.vision.boxes.read_boxes`); or a grey picture of the same
    size, `masks/PATH.png`, white or 1 where the target is (`toast.visual.masks.read_mask`). Both
    are of the picture as it is shown, turned as its camera noted.

    Args:
        found: The files.
        transform: How a picture is prepared.
        skipped: Told of each picture that cannot be read, and why.

    Raises:
        ValueError: If a file of boxes or a mask is malformed, or a mask has another size than its picture.
    """
    boxes_in = cache(_boxes_in)
    for each in tqdm(found, "pictures", unit="picture", leave=False, disable=None):
        box = next((b for at in each.folders if (b := boxes_in(at).get(each.path)) is not None), None)
        mask = next((m for at in each.folders if (m := _mask_in(at, each.path)).is_file()), None)
        try:
            picture = decode(each.path, str(each.path))
        except ValueError as error:
            skipped(str(error))
            continue
        target = None
        if box is not None:
            target = transform.mask(box, picture.size)
        elif mask is not None:
            target = _prepared_mask(mask, picture, transform)
        name = each.path.relative_to(each.root)
        yield Sample(_without_suffix(name.as_posix()), transform(picture), target)


def _boxes_in(folder: Path) -> Mapping[Path, Box]:
    """Returns the boxes that the files of a folder hold, by picture."""
    files = [folder / name for name in BOXES if (folder / name).is_file()]
    return {folder / name: box for file in files for name, box in read_boxes(file).items()}


def _mask_in(folder: Path, path: Path) -> Path:
    return (folder / MASKS / path.relative_to(folder)).with_suffix(".png")


def _prepared_mask(file: Path, picture: Any, transform: Transform) -> Tensor:
    from torchvision.transforms import functional

    mask = read_mask(file)
    if mask.size != picture.size:
        turned = " The picture is turned upright as its EXIF data says, so its mask must be, too."
        advice = turned if mask.size == picture.size[::-1] else ""
        raise ValueError(
            f"{file}: a mask needs the size of its picture, {picture.size}; got {mask.size}.{advice}"
        )
    target: Tensor = functional.to_tensor(transform.geometry(mask.convert("RGB")))[0]
    return target


def _without_suffix(name: str) -> str:
    return str(Path(name).with_suffix(""))


@dataclass
class TargetCounts:
    """How many pictures there were, and the first of those that nothing is measured of on a target.

    Args:
        without: Names of pictures whose target is not known.
        away: Names of pictures whose target the preparation has cropped away.
    """

    without: list[str] = field(default_factory=list)
    away: list[str] = field(default_factory=list)


def batches(
    samples: Iterable[Sample], size: int, counted: TargetCounts
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields batches of pictures with their targets and labels.

    Args:
        samples: The pictures.
        size: Pictures of a batch; the last one may have fewer.
        counted: Gets the names of pictures without a target, or with none in sight.

    Yields:
        Pixels `(batch, channels, height, width)`; targets `(batch, height, width)`, not a number where none
        is known; labels `(batch,)`, -100 where none is known.
    """
    samples = iter(samples)
    while batch := list(itertools.islice(samples, size)):
        targets = [
            torch.full(sample.pixels.shape[-2:], torch.nan) if sample.target is None else sample.target
            for sample in batch
        ]
        masks = torch.stack(targets)
        for sample, seen in zip(
            batch, in_sight(masks, (masks.shape[1], masks.shape[2])).tolist(), strict=True
        ):
            if not seen:
                (counted.without if sample.target is None else counted.away).append(sample.name)
        labels = [UNKNOWN if sample.label is None else sample.label for sample in batch]
        yield torch.stack([sample.pixels for sample in batch]), masks, torch.tensor(labels)
