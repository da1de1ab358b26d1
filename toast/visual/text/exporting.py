"""The files of a text's maps: arrays, page and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from toast.files.atomic import beside
from toast.visual.text.looking import TextAttentionMaps, look_at_text


def save_arrays(views: TextAttentionMaps, path: Path) -> Path:
    """Writes what `look_at_text` found as arrays, under the names of `TextAttentionMaps`.

    Read it with `numpy.load(path)`. `tokens` and `cells` are lists in JSON, for NumPy drops NUL characters at
    the end of a text; a cell is its text, its first token and one past its last.

    Args:
        views: Of `look_at_text`.
        path: A file that ends in .npz; written beside and renamed.

    Returns:
        The file.

    Raises:
        ValueError: If the name ends in anything else.
    """
    import numpy as np

    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz; got {path.name!r}.")
    cells = [(cell.text, cell.start, cell.stop) for cell in views.cells]
    arrays: dict[str, Any] = {
        "tokens": np.array(json.dumps(views.tokens)),
        "cells": np.array(json.dumps(cells)),
        "token_ids": views.token_ids.numpy(),
        "is_prompt": views.is_prompt.numpy(),
        "selection_weights": views.selection_weights.numpy(),
        "attention_change": views.attention_change.numpy(),
        "received_change": views.received_change.numpy(),
        "first_attention": views.first_attention.numpy(),
        "second_attention": views.second_attention.numpy(),
        "block": np.array(views.block),
        "head": np.array(str(views.head)),
        "left_out": np.array(views.left_out),
        "before": np.array(views.before),
    }
    with beside(path) as new, new.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def visualize_text(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[str],
    out: Path,
    *,
    answers: Sequence[str] | None = None,
    title: str = "Where the model looks",
    **options: Any,
) -> list[Path]:
    """Writes the maps of some prompts and their answers: `text-1.html`, `.png`, `.svg`, `.npz`, and so on.

    Args:
        model: A wrapped causal language model with an active adapter.
        tokenizer: Its tokenizer.
        prompts: One or several; each is read by itself.
        out: Folder for the files.
        answers: One for each prompt; None lets the model answer.
        title: Over the pages.
        **options: Of `look_at_text`.

    Returns:
        The files, prompt by prompt.

    Raises:
        ImportError: If matplotlib is not there, with how to install it.
        ValueError: If there is not one answer for each prompt, or as `look_at_text` does.
    """
    from toast.visual.text.html import as_html
    from toast.visual.text.matrices import draw_matrices

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(
            f"answers must be one for each of {len(prompts)} prompts, or None; got {len(answers)}."
        )
    files: list[Path] = []
    for number, prompt in enumerate(prompts, 1):
        answer = None if answers is None else answers[number - 1]
        views = look_at_text(model, tokenizer, prompt, answer=answer, **options)
        page = out / f"text-{number}.html"
        heading = title if len(prompts) == 1 else f"{title}, {number} of {len(prompts)}"
        with beside(page) as new:
            new.write_text(as_html(views, heading), encoding="utf-8", newline="\n")
        files += [
            page,
            draw_matrices(views, page.with_suffix(".png")),
            draw_matrices(views, page.with_suffix(".svg")),
            save_arrays(views, page.with_suffix(".npz")),
        ]
    return files
