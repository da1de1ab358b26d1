"""Rows become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from toast.data.language.rows import IGNORED


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pads rows on the right to the longest.

    Rows of packed documents come without an attention mask: transformers finds packed documents by their
    positions only if there is none. Padding is then one more document behind the others, with positions of
    its own, and no other attends to it.

    transformers' collators do not serve: the padding one needs a whole tokenizer and takes its side of
    padding, the flattening one joins the batch to a single row, over which attention without a
    variable-length kernel is quadratic.

    Args:
        rows: Rows with `input_ids`, `labels`, and `position_ids` in all or none; `index`, the number of a
            row, may be there.
        pad_token_id: Token that fills up.

    Returns:
        `input_ids`, `labels` and, for packed documents, `position_ids`, else `attention_mask`, each int64
        `(batch, tokens)`; `index` `(batch,)` if rows have it.
    """
    tokens = _padded([row["input_ids"] for row in rows], pad_token_id)
    batch = {"input_ids": tokens, "labels": _padded([row["labels"] for row in rows], IGNORED)}
    lengths = [len(row["input_ids"]) for row in rows]
    if "position_ids" in rows[0]:
        longest = tokens.shape[1]
        behind = ([*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows)
        batch["position_ids"] = torch.tensor(list(behind))
    else:
        batch["attention_mask"] = _padded([[1] * length for length in lengths], 0)
    if "index" in rows[0]:
        batch["index"] = torch.tensor([int(row["index"]) for row in rows])
    return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
