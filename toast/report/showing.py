"""Draws what a run or an adapter looks at: pictures with their labels and targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toast.report.opening import OpenedModel
from toast.report.samples import Sample
from toast.visual.figure import draw, require_matplotlib
from toast.visual.looks import Look
from toast.visual.methods import check_formats
from toast.visual.panels import Row
from toast.visual.pixels import Preparation
from toast.visual.visualizing import Picture, draw_pictures, prediction, row_of_picture

_OF_A_CLASS = ("relevance", "grad-cam")


def show_samples(
    opened: OpenedModel,
    samples: Iterable[Sample],
    out: Path,
    *,
    formats: Sequence[str] = ("png",),
    smooth: bool = False,
    **options: Any,
) -> Iterator[list[Path]]:
    """Draws pictures as `toast.visualize` does, with their label and the box around their target.

    Args:
        opened: A vision model.
        samples: The pictures.
        out: Folder for `NAME.png` and the like, and `NAME.npz`.
        formats: Of the drawings: `png`, `svg`, `pdf`.
        smooth: Whether values between the centres of patches are interpolated.
        **options: Of `toast.visual.maps.look`.

    Yields:
        The files of a picture.

    Raises:
        ImportError: If what draws is not installed.
        ValueError: If a format or an option is not there, or explaining a class needs a trained head.
    """
    require_matplotlib()
    check_formats(formats)
    if options.get("method") in _OF_A_CLASS and not opened.classifies:
        raise ValueError(
            f"method={options['method']!r} explains a class, but {opened.name} holds no head that says one; "
            "use 'attention', 'rollout' or 'energy'."
        )
    yield from draw_pictures(
        opened.model,
        (_picture(opened, sample) for sample in samples),
        out,
        caption=partial(_caption, opened),
        formats=formats,
        smooth=smooth,
        **options,
    )


def show_together(
    opened: OpenedModel,
    samples: Iterable[Sample],
    path: Path,
    title: str,
    *,
    smooth: bool = False,
    **options: Any,
) -> Path:
    """Draws pictures below each other in one drawing, without the strengths of the signals by block.

    Args:
        opened: A vision model.
        samples: At least one picture.
        path: The drawing, `.png`, `.svg` or `.pdf`.
        title: Over all; what the maps show follows it.
        smooth: As of `show_samples`.
        **options: Of `toast.visual.maps.look`.

    Returns:
        The file.

    Raises:
        ImportError: If what draws is not installed.
    """
    rows: list[Row] = []
    shows = ""
    for sample in samples:
        maps, row = row_of_picture(
            opened.model, _picture(opened, sample), partial(_caption, opened), **options
        )
        shows = maps.name
        rows.append(replace(row, strengths={}))
    return draw(rows, [path], f"{title} ({shows})", smooth)[0]


def _picture(opened: OpenedModel, sample: Sample) -> Picture:
    """Returns a sample to be drawn; what is measured is what falls into the box around its target."""
    data = opened.backbone.data
    preparation = Preparation.of_pixels(data["mean"], data["std"])
    box = None if sample.box is None else torch.tensor(sample.box)
    return Picture(sample.name, sample.pixels, preparation.shown(sample.pixels), box, sample.label)


def _caption(opened: OpenedModel, look: Look) -> tuple[str, bool]:
    """Returns what the model says, and what is true if that is known and something else."""
    if not opened.classifies:
        return "input", False
    caption = prediction(look, opened.classes or None)
    if look.label is None or not opened.classes or look.predicted is None or look.is_right:
        return caption, False
    return f"{caption}; is: {opened.classes[look.label]}", True
