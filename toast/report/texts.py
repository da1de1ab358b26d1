"""Heat maps over held-out rows of a language run."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from torch import nn

from toast.files.templates import render
from toast.training.data import Splits
from toast.visual.text.colours import heat_maps
from toast.visual.text.html import heat_section
from toast.visual.text.looking import TextAttentionMaps, look_at_text

#: Rows that are shown, and tokens of each.
ROWS, TOKENS = 3, 120


def texts(model: nn.Module, tokenizer: Any, splits: Splits) -> Markup:
    """Returns the section with the heat maps: the first open, those of further rows to unfold.

    Args:
        model: A steered causal language model.
        tokenizer: Its tokenizer.
        splits: The run's data.
    """
    name = next(n for n in ("test", "validation", "train") if getattr(splits, n) is not None)
    data = getattr(splits, name)
    count = min(ROWS, len(data))
    read = [_maps(model, tokenizer, data[number * len(data) // count]) for number in range(count)]
    held_out = "held-out" if name != "train" else "training"
    return render(
        "report/templates/texts.html.jinja",
        introduction=f"{count} {held_out} rows of {len(data):,}, up to {TOKENS} tokens of each.",
        rows=[
            {
                "notes": " ".join(maps.notes),
                "sections": [heat_section(maps, heat) for heat in heat_maps(maps)],
            }
            for maps in read
        ],
    )


def _maps(model: nn.Module, tokenizer: Any, row: dict[str, Any]) -> TextAttentionMaps:
    """Looks at a row as text; what its loss does not count is the prompt.

    Of a row with several documents, or several questions, only the first is looked at: what follows its
    answer is no answer of it.
    """
    ids, labels = (list(map(int, row[key]))[:TOKENS] for key in ("input_ids", "labels"))
    ids = ids[: _first_document(row)]
    # What the tokenizer puts before every text, it puts before this one again.
    before = tokenizer("")["input_ids"]
    start = len(before) if before and ids[: len(before)] == before else 0
    # The first token is never counted; what follows it tells whether the row begins with a prompt.
    counted = [i for i in range(start + 1, len(ids)) if labels[i] >= 0]
    asks = counted[0] if counted and counted[0] > start + 1 else len(ids)
    if asks < len(ids):
        ids = ids[: next((i for i in range(asks, len(ids)) if labels[i] < 0), len(ids))]

    def text(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return look_at_text(
        model, tokenizer, text(ids[start:asks]), answer=text(ids[asks:]), max_tokens=2 * TOKENS
    )


def _first_document(row: dict[str, Any]) -> int:
    """Returns how many tokens of a row belong to its first document: positions start again at the next."""
    positions = [int(position) for position in row.get("position_ids", ())]
    return next((i for i in range(1, len(positions)) if positions[i] <= positions[i - 1]), TOKENS)
