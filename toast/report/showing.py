"""Draws what a run or an adapter looks at: pictures with their labels and targets, and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toast.files.atomic import beside
from toast.report.opening import Opened
from toast.report.samples import Sample
from toast.visual.arrays import save_arrays
from toast.visual.attention_maps import AttentionMaps
from toast.visual.figure import Panel, Row, draw, require_matplotlib
from toast.visual.maps import look
from toast.visual.pixels import Preparation
from toast.visual.text.exporting import save_arrays as save_text_arrays
from toast.visual.text.html import as_html
from toast.visual.text.looking import TextAttentionMaps, look_at_text
from toast.visual.text.matrices import draw_matrices
from toast.visual.visualizing import FORMATS, _free, panels, said, strengths

_OF_A_CLASS = ("relevance", "grad-cam")


def show_samples(
    opened: Opened,
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
    wrong = [name for name in formats if name not in FORMATS]
    if wrong or not formats:
        raise ValueError(f"formats: needs some of {', '.join(FORMATS)}; got {list(formats)}.")
    if options.get("method") in _OF_A_CLASS and not opened.classifies:
        raise ValueError(
            f"method={options['method']!r} explains a class, but {opened.name} holds no head that says one; "
            "use 'attention', 'rollout' or 'energy'."
        )
    taken: set[str] = set()
    for sample in samples:
        views = look(opened.model, sample.pixels[None], **options)
        row = _row(opened, views, sample)
        stem = _free(sample.name, taken)
        files = [out / f"{stem}.{suffix}" for suffix in formats]
        draw([row], files, f"{sample.name}: {views.name}", smooth)
        yield [*files, save_arrays(views, 0, row.picture, out / f"{stem}.npz")]


def show_together(
    opened: Opened, samples: Iterable[Sample], path: Path, title: str, *, smooth: bool = False, **options: Any
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
        views = look(opened.model, sample.pixels[None], **options)
        shows = views.name
        rows.append(replace(_row(opened, views, sample), strengths={}))
    return draw(rows, [path], f"{title} ({shows})", smooth)[0]


def _row(opened: Opened, views: AttentionMaps, sample: Sample) -> Row:
    """Returns a picture with all that there is to show of it."""
    data, box = opened.backbone.data, sample.box
    preparation = Preparation(lambda picture: picture, data["mean"], data["std"])
    first, *others = panels(views, 0, "input", None if box is None else torch.tensor([*box]))
    return Row(
        preparation.shown(sample.pixels),
        [_captioned(first, opened, views, sample), *others],
        box,
        strengths(views, 0),
        views.block,
    )


def _captioned(panel: Panel, opened: Opened, views: AttentionMaps, sample: Sample) -> Panel:
    """Returns the panel of the picture itself with what the model says, and what is true if that is known."""
    if not opened.classifies:
        return panel
    caption = said(views, 0, opened.classes or None)
    if sample.label is None or not opened.classes or views.scores is None:
        return replace(panel, caption=caption)
    wrong = int(views.scores[0].argmax()) != sample.label
    return replace(
        panel, caption=f"{caption}; is: {opened.classes[sample.label]}" if wrong else caption, wrong=wrong
    )


def show_texts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], out: Path, **options: Any
) -> Iterator[tuple[TextAttentionMaps, list[Path]]]:
    """Writes the maps of prompts and answers as `toast.visualize_text` does.

    Args:
        model: A wrapped causal language model with an active adapter.
        tokenizer: Its tokenizer.
        prompts: Each is read by itself.
        out: Folder for `text-1.html`, `.png`, `.svg`, `.npz`, and so on.
        **options: Of `toast.visual.text.looking.look_at_text`.

    Yields:
        What was seen, for the terminal, and the files.

    Raises:
        ImportError: If what draws is not installed.
        ValueError: As `look_at_text` does.
    """
    for number, prompt in enumerate(prompts, 1):
        views = look_at_text(model, tokenizer, prompt, **options)
        page = out / f"text-{number}.html"
        title = "Where the model looks" + (f", {number} of {len(prompts)}" if len(prompts) > 1 else "")
        with beside(page) as new:
            new.write_text(as_html(views, title), encoding="utf-8", newline="\n")
        drawn = [draw_matrices(views, page.with_suffix(suffix)) for suffix in (".png", ".svg")]
        yield views, [page, *drawn, save_text_arrays(views, page.with_suffix(".npz"))]
