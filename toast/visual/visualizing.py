"""`toast.visualize`: where a vision model looks on a user's own pictures, drawn, in one call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toast.visual.arrays import save_arrays
from toast.visual.attention_maps import AttentionMaps
from toast.visual.figure import draw, require_matplotlib
from toast.visual.looks import Look, looks_of
from toast.visual.maps import look
from toast.visual.methods import check_formats
from toast.visual.modes import evaluating
from toast.visual.panels import Row, row_of
from toast.visual.pixels import Preparation, Statistics, find_preparation, open_picture

#: Longest name of a file, without its suffix.
LONGEST = 80


def visualize(
    model: nn.Module,
    images: Iterable[Any] | Tensor,
    *,
    out: Path | str,
    processor: Any = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    boxes: Tensor | None = None,
    labels: Sequence[str] | None = None,
    formats: Sequence[str] = ("png", "svg"),
    smooth: bool = False,
    **options: Any,
) -> list[Path]:
    """Draws where a vision model looks: one drawing for each picture, and the arrays behind it.

    From left to right: the picture as the model saw it, the frozen model's attention, the selection weights,
    the norm of the signal at the shown block, the refocused attention, and the difference of the two
    attentions, which share one scale; below, the norm of every block's signal. Of a plain model the picture
    and its attention. The model is in evaluation mode while it is looked at.

    Args:
        model: A timm or transformers vision model: plain, wrapped, or with another adapter.
        images: Paths or pictures of Pillow; or pixels as the model takes them, `(batch, channels, height,
            width)`.
        out: Folder for `NAME.png`, `NAME.svg` and `NAME.npz`; files of an earlier call are replaced.
        processor: How pictures are prepared, see `find_preparation`; None is what timm keeps with a model.
        mean: Per-channel mean that a function or the pixels were normalised with, to show their colours.
        std: Per-channel standard deviation of the same.
        boxes: Drawn in, and what falls into them is written above: x0, y0, x1, y1 in pixels of what
            the model sees, `(pictures, 4)`.
        labels: Names of the classes, for the caption of the picture.
        formats: Of the drawings: `png`, `svg`, `pdf`.
        smooth: Whether values between the centres of patches are interpolated; else a patch has one colour.
        **options: Of `toast.visual.maps.look`: `block`, `head`, `query`, `method`, `target`, and inputs of
            the model.

    Returns:
        The drawings in the first of the formats, one for each picture.

    Raises:
        ImportError: If what draws is not installed.
        ValueError: If there are no pictures, one cannot be read, or what is asked is not there.
    """
    require_matplotlib()
    check_formats(formats)
    drawings = draw_pictures(
        model,
        _pictures(model, images, processor, mean, std, boxes),
        Path(out),
        caption=lambda look: (prediction(look, labels), False),
        formats=formats,
        smooth=smooth,
        **options,
    )
    with evaluating(model):
        drawn = [files[0] for files in drawings]
    if not drawn:
        raise ValueError("images: needs at least one picture; got none.")
    return drawn


@dataclass(frozen=True)
class Picture:
    """A picture to be drawn.

    Args:
        name: What it is called.
        pixels: As the model takes them, `(channels, height, width)`.
        shown: What they show, `(height, width, 3)`, 0 to 1.
        box: Drawn in, `(4,)`; None if there is none.
        label: Its class; None if it is not known.
    """

    name: str
    pixels: Tensor
    shown: Tensor
    box: Tensor | None = None
    label: int | None = None


#: From what was seen of a picture to its caption, and whether that says something wrong.
Caption = Callable[[Look], tuple[str, bool]]


def draw_pictures(
    model: nn.Module,
    pictures: Iterable[Picture],
    out: Path,
    *,
    caption: Caption,
    formats: Sequence[str],
    smooth: bool = False,
    **options: Any,
) -> Iterator[list[Path]]:
    """Draws pictures, and writes the arrays behind each.

    Args:
        model: In evaluation mode.
        pictures: The pictures.
        out: Folder for `NAME.png` and the like, and `NAME.npz`.
        caption: Of the picture itself.
        formats: Some of `toast.visual.methods.FORMATS`.
        smooth: Whether values between the centres of patches are interpolated.
        **options: Of `toast.visual.maps.look`.

    Yields:
        The files of a picture, drawings first.
    """
    taken: set[str] = set()
    for picture in pictures:
        maps, row = row_of_picture(model, picture, caption, **options)
        stem = _free(picture.name, taken)
        files = [out / f"{stem}.{suffix}" for suffix in formats]
        draw([row], files, f"{picture.name}: {maps.name}", smooth)
        yield [*files, save_arrays(maps, 0, picture.shown, out / f"{stem}.npz")]


def row_of_picture(
    model: nn.Module, picture: Picture, caption: Caption, **options: Any
) -> tuple[AttentionMaps, Row]:
    """Looks at a picture; returns what was seen, and its row."""
    maps = look(model, picture.pixels[None], **options)
    box = None if picture.box is None else picture.box[None]
    label = None if picture.label is None else torch.tensor([picture.label])
    (seen,) = looks_of(maps, box, label)
    text, wrong = caption(seen)
    return maps, row_of(seen, picture.shown, caption=text, wrong=wrong)


def prediction(look: Look, labels: Sequence[str] | None = None) -> str:
    """Returns what the model says of a picture, for a caption.

    Args:
        look: What was seen of it.
        labels: Names of the classes; None gives their numbers.
    """
    best = look.predicted
    if best is None:
        return "input"
    name = labels[best] if labels is not None and best < len(labels) else f"class {best}"
    return f"input, predicted: {name} ({look.confidence:.2f})"


def _pictures(
    model: nn.Module,
    images: Iterable[Any] | Tensor,
    processor: Any,
    mean: Statistics | None,
    std: Statistics | None,
    boxes: Tensor | None,
) -> Iterator[Picture]:
    """Yields the pictures, each with its box."""

    def box(number: int) -> Tensor | None:
        if boxes is not None and number >= len(boxes):
            raise ValueError(f"boxes: needs one for each picture; got {len(boxes)} for more pictures.")
        return None if boxes is None else boxes[number]

    if isinstance(images, str | Path):
        images = [images]
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(
                f"images: needs pixels (batch, channels, height, width); got {tuple(images.shape)}."
            )
        known = Preparation.of_pixels(mean, std)
        for number, pixels in enumerate(images):
            yield Picture(f"image-{number}", pixels, known.shown(pixels), box(number))
        return
    preparation = find_preparation(model, processor, mean, std)
    for number, image in enumerate(images):
        pixels = preparation.prepare(open_picture(image))
        name = Path(image).stem if isinstance(image, str | Path) else f"image-{number}"
        yield Picture(name, pixels, preparation.shown(pixels), box(number))


def _free(name: str, taken: set[str]) -> str:
    """Returns a name for a file that no other picture of the call has: short, and safe in every shell."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:LONGEST].strip("-.") or "image"
    free, number = stem, 2
    while free.casefold() in taken:
        free, number = f"{stem}-{number}", number + 1
    taken.add(free.casefold())
    return free
