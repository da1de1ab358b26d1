"""The files of a text's maps: arrays, page and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from toast.files.atomic import beside
from toast.visual.text.looking import TextAttentionMaps, look_at_text


def save_arrays(maps: TextAttentionMaps, path: Path) -> Path:
    """Writes what `look_at_text` found as arrays, under the names of `TextAttentionMaps`.

    Read it with `numpy.load(path)`. `tokens` and `cells` are lists in JSON, for NumPy drops NUL characters at
    the end of a text; a cell is its text, its first token and one past its last.

    Args:
        maps: Of `look_at_text`.
        path: A file that ends in .npz; written beside and renamed.

    Returns:
        The file.

    Raises:
        ValueError: If the name ends in anything else.
    """
    import numpy as np

    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz; got {path.name!r}.")
    cells = [(cell.text, cell.start, cell.stop) for cell in maps.cells]
    arrays: dict[str, Any] = {
        "tokens": np.array(json.dumps(maps.tokens)),
        "cells": np.array(json.dumps(cells)),
        "token_ids": maps.token_ids.numpy(),
        "is_prompt": maps.is_prompt.numpy(),
        "selection_weights": maps.selection_weights.numpy(),
        "attention_change": maps.attention_change.numpy(),
        "received_change": maps.received_change.numpy(),
        "first_attention": maps.first_attention.numpy(),
        "second_attention": maps.second_attention.numpy(),
        "block": np.array(maps.block),
        "head": np.array(str(maps.head)),
        "left_out": np.array(maps.left_out),
        "before": np.array(maps.before),
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
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(
            f"answers must be one for each of {len(prompts)} prompts, or None; got {len(answers)}."
        )
    written = export_texts(model, tokenizer, prompts, out, answers=answers, title=title, **options)
    return [file for _, files in written for file in files]


def export_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    out: Path,
    *,
    answers: Sequence[str] | None = None,
    title: str = "Where the model looks",
    **options: Any,
) -> Iterator[tuple[TextAttentionMaps, list[Path]]]:
    """Writes the same prompt by prompt; arguments as of `visualize_text`.

    Yields:
        The maps of a prompt and its answer, and their files.

    Raises:
        ImportError: If what draws is not installed.
        ValueError: As `look_at_text` does.
    """
    from toast.visual.text.html import as_html
    from toast.visual.text.matrices import draw_matrices

    for number, prompt in enumerate(prompts, 1):
        answer = None if answers is None else answers[number - 1]
        maps = look_at_text(model, tokenizer, prompt, answer=answer, **options)
        page = out / f"text-{number}.html"
        heading = title if len(prompts) == 1 else f"{title}, {number} of {len(prompts)}"
        with beside(page) as new:
            new.write_text(as_html(maps, heading), encoding="utf-8", newline="\n")
        drawings = [draw_matrices(maps, page.with_suffix(suffix)) for suffix in (".png", ".svg")]
        yield maps, [page, *drawings, save_arrays(maps, page.with_suffix(".npz"))]
