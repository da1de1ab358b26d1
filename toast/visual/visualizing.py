"""`toast.visualize`: where a vision model looks on a user's own pictures, drawn, in one call."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toast.visual import targets
from toast.visual.arrays import save_arrays
from toast.visual.attention_maps import METHODS, AttentionMaps
from toast.visual.figure import Panel, Row, draw, require_matplotlib
from toast.visual.grids import Maps
from toast.visual.maps import look
from toast.visual.modes import evaluating
from toast.visual.pixels import Preparation, Statistics, find_preparation, open_picture

#: What a drawing can be written as.
FORMATS = ("png", "svg", "pdf")
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
    wrong = [name for name in formats if name not in FORMATS]
    if wrong or not formats:
        raise ValueError(f"formats: needs some of {', '.join(FORMATS)}; got {list(formats)}.")
    drawn: list[Path] = []
    taken: set[str] = set()
    with evaluating(model):
        for number, (name, pixels, picture) in enumerate(_pictures(model, images, processor, mean, std)):
            if boxes is not None and number >= len(boxes):
                raise ValueError(f"boxes: needs one for each picture; got {len(boxes)} for more pictures.")
            views = look(model, pixels[None], **options)
            stem = _free(name, taken)
            box = None if boxes is None else boxes[number]
            row = Row(
                picture,
                panels(views, 0, said(views, 0, labels), box),
                None if box is None else box.tolist(),
                strengths(views, 0),
                views.block,
            )
            files = [Path(out) / f"{stem}.{suffix}" for suffix in formats]
            drawn.append(draw([row], files, f"{name}: {views.name}", smooth)[0])
            save_arrays(views, 0, picture, Path(out) / f"{stem}.npz")
    if not drawn:
        raise ValueError("images: needs at least one picture; got none.")
    return drawn


def panels(views: AttentionMaps, index: int, caption: str, box: Tensor | None = None) -> list[Panel]:
    """Returns the panels of one picture: itself, and all that there is to show of it.

    Args:
        views: Of a batch.
        index: The picture's place in it.
        caption: Of the picture.
        box: Whose share of the attention is written above, `(4,)`.
    """
    name = METHODS[views.method]
    shown = [maps.values[index] for maps in (views.attention, views.frozen) if maps is not None]
    top = float(torch.stack(shown).max()) or 1.0

    def unit(maps: Maps, on_patches: Tensor | None) -> str:
        if not bool(maps.values[index].any()):
            return "0 everywhere"
        if on_patches is None or views.method not in ("attention", "rollout"):
            return "share of the sum"
        return f"share on patches ({float(on_patches[index]):.2f} of all)"

    def inside(maps: Maps, weights: bool = False) -> str:
        if box is None:
            return ""
        one = Maps(maps.values[index : index + 1], maps.cell)
        rows, columns = one.values.shape[1:]
        size = (round(rows * maps.cell[0]), round(columns * maps.cell[1]))
        attention, selection = (None, one) if weights else (one, None)
        found = targets.measure(attention, selection, box[None], size)
        said = {name: float(value) for name, value in found.items()}
        if any(map(math.isnan, said.values())):
            return ""
        if weights:
            return f": {said[targets.INSIDE]:.2f} in the box, {said[targets.OUTSIDE]:.2f} outside"
        return f": {said[targets.ATTENTION]:.2f} in the box"

    made = [Panel(caption)]
    if views.frozen is None:
        made.append(
            _panel(
                views.attention,
                index,
                f"{name}{inside(views.attention)}",
                top,
                unit(views.attention, views.on_patches),
            )
        )
        return made
    made.append(
        _panel(
            views.frozen,
            index,
            f"frozen {name}{inside(views.frozen)}",
            top,
            unit(views.frozen, views.frozen_on_patches),
        )
    )
    if views.selection is not None:
        largest = float(views.selection.values[index].max()) or 1.0
        caption = f"selection weights{inside(views.selection, weights=True)}"
        made.append(_panel(views.selection, index, caption, largest, "weight, of 0 to 1"))
    if views.block in views.signals:
        signal = views.signals[views.block]
        strongest = float(signal.values[index].max()) or 1.0
        made.append(_panel(signal, index, f"top-down signal, block {views.block}", strongest, "norm"))
    after = "refocused" if views.selection is not None else "adapted"
    made.append(
        _panel(
            views.attention,
            index,
            f"{after} {name}{inside(views.attention)}",
            top,
            unit(views.attention, views.on_patches),
        )
    )
    difference = views.difference
    assert difference is not None
    most = float(difference.values[index].abs().max()) or 1.0
    made.append(
        _panel(difference, index, f"difference: {after} - frozen", most, "gained or lost share", -most)
    )
    return made


def _panel(maps: Maps, index: int, caption: str, high: float, unit: str, low: float = 0.0) -> Panel:
    return Panel(caption, maps.values[index], maps.cell, low, high, unit)


def strengths(views: AttentionMaps, index: int) -> dict[int, float]:
    """Returns by block the mean norm of the signal over the patches of one picture."""
    return {block: float(norms.values[index].mean()) for block, norms in views.signals.items()}


def said(views: AttentionMaps, index: int, labels: Sequence[str] | None = None) -> str:
    """Returns what the model says of a picture, for a caption.

    Args:
        views: Of a batch.
        index: The picture's place in it.
        labels: Names of the classes; None gives their numbers.
    """
    if views.scores is None:
        return "input"
    scores = views.scores[index].detach().float()
    best = int(scores.argmax())
    name = labels[best] if labels is not None and best < len(labels) else f"class {best}"
    return f"input, predicted: {name} ({float(scores.softmax(-1)[best]):.2f})"


def _pictures(
    model: nn.Module,
    images: Iterable[Any] | Tensor,
    processor: Any,
    mean: Statistics | None,
    std: Statistics | None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields each picture's name, its pixels as the model takes them, and the picture that they show."""
    if isinstance(images, str | Path):
        images = [images]
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(
                f"images: needs pixels (batch, channels, height, width); got {tuple(images.shape)}."
            )
        known = Preparation(lambda pixels: pixels, mean, std)
        for number, pixels in enumerate(images):
            yield f"image-{number}", pixels, known.shown(pixels)
        return
    preparation = find_preparation(model, processor, mean, std)
    for number, image in enumerate(images):
        pixels = preparation.prepare(open_picture(image))
        name = Path(image).stem if isinstance(image, str | Path) else f"image-{number}"
        yield name, pixels, preparation.shown(pixels)


def _free(name: str, taken: set[str]) -> str:
    """Returns a name for a file that no other picture of the call has: short, and safe in every shell."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:LONGEST].strip("-.") or "image"
    free, number = stem, 2
    while free.casefold() in taken:
        free, number = f"{stem}-{number}", number + 1
    taken.add(free.casefold())
    return free
