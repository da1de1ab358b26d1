"""Texts with targets: a field of each row is the text, others are what is known of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from toast.data.fields import Fields
from toast.data.language.named_texts import file_rows, hub_rows


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of a split.

    Args:
        texts: The texts.
        fields: All fields of each row.
        remarks: What is unusual about the files, but does not stop a run.
    """

    texts: Sequence[str]
    fields: Fields
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Iterable[int]) -> LabelledTexts:
        """Returns some of the texts, in the given order."""
        chosen = list(indices)
        return LabelledTexts([self.texts[i] for i in chosen], self.fields.subset(chosen), self.remarks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of texts and fields."""
        held = json.dumps(
            [list(self.texts), {n: list(c) for n, c in self.fields.columns.items()}], default=str
        )
        return hashlib.sha256(held.encode()).hexdigest()


class EncodedTexts:
    """Texts as rows of tokens, each with its labels.

    Args:
        source: The texts.
        labels: `(texts, columns)`.
        tokenizer: A tokenizer of transformers.
        block: Most tokens of a row; what is longer loses its end.
    """

    def __init__(self, source: LabelledTexts, labels: Tensor, tokenizer: Any, block: int) -> None:
        self.source = source
        self.labels = labels
        self.tokens: list[list[int]] = tokenizer(list(source.texts), truncation=True, max_length=block)[
            "input_ids"
        ]
        empty = next(
            (place for row, place in zip(self.tokens, source.fields.places, strict=True) if not row), None
        )
        if empty is not None:
            raise ValueError(f"{empty}: the text has no tokens; needs one or more.")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Returns a row; an epoch in the key changes nothing."""
        index = key[1] if isinstance(key, tuple) else key
        return {"input_ids": self.tokens[index], "label": self.labels[index], "index": index}


def open_labelled(
    source: str,
    path: Path | str | None,
    name: str | None = None,
    split: str | None = "train",
    limit: int | None = None,
    text_field: str = "text",
    config: str | None = None,
) -> LabelledTexts:
    """Reads texts with all fields of their rows.

    Args:
        source: `text` for files (.jsonl, .json, .parquet), `hub` for what `datasets` loads.
        path: As of `open_language`.
        name: For `hub`: name of the data set.
        split: Name of the split, in any common spelling.
        limit: Most texts to read, from the first.
        text_field: Name of the field that holds the text.
        config: For `hub`: name of the configuration of a set that has several.

    Raises:
        ValueError: If something is missing or malformed; the message says file, line and reason.
    """
    remarks: tuple[str, ...] = ()
    if source == "hub":
        rows, _ = hub_rows(path, name, config, split or "train", "text", text_field, False, limit)
    elif source == "text":
        for_hub = {"name": name, "config": config}
        rows, _, remarks = file_rows(source, path, split, text_field, for_hub)
    else:
        raise ValueError(f"data.source: heads on text need text or hub; got {source!r}.")
    held = list(itertools.islice(rows, limit))
    if not held:
        raise ValueError(f"{path or name}, split {split!r}: holds no texts.")
    for row in held:
        if not isinstance(row.fields.get(text_field), str) or not row.fields[text_field]:
            raise ValueError(
                f"{row.place}: needs a text in the field {text_field!r}; it has {', '.join(row.fields)}."
            )
    # A field that some rows lack is None there, which the head that asks for it refuses with its row.
    names = dict.fromkeys(field for row in held for field in row.fields if field != text_field)
    columns = {field: [row.fields.get(field) for row in held] for field in names}
    fields = Fields(columns, [row.place for row in held])
    return LabelledTexts([row.fields[text_field] for row in held], fields, remarks)


def collate_texts(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pads rows on the right to the longest.

    Returns:
        `input_ids`, `attention_mask` `(batch, tokens)`, int64; `labels` `(batch, columns)`; `index`.
    """
    tokens = [torch.tensor(row["input_ids"]) for row in rows]
    mask = [torch.ones_like(row) for row in tokens]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": torch.stack([row["label"] for row in rows]),
        "index": torch.tensor([int(row["index"]) for row in rows]),
    }
