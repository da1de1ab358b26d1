"""`LanguageData`: rows of tokens by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Final, TypedDict

import numpy as np

from toast.data.language.packing import Packing, Piece, pack_blocks, pack_documents

IGNORED: Final = -100
"""Label of a token that is not predicted, as transformers and PyTorch have it."""


class Summary(TypedDict):
    """Sizes of the data.

    Attributes:
        documents: Documents in the rows.
        tokens: Tokens of all rows.
        loss_tokens: Tokens that the loss counts.
        longest: Tokens of the longest document, uncut.
        cut: Documents that were longer than a row, and lost their end.
        left_out: Documents of the source in which nothing is left to predict.
    """

    documents: int
    tokens: int
    loss_tokens: int
    longest: int
    cut: int
    left_out: int


class LanguageData:
    """Rows of tokens with labels, made when they are asked for.

    The label of each document's first token is -100 (in blocks: of each row's), for nothing comes before it.
    So a row's number of other labels is the number of terms of its loss.

    Args:
        documents: A `datasets.Dataset` in the format "arrow": of each document, uncut, its `tokens`, which of
            them `counts`, its `length`, and how many are `counted` but for the first.
        packing: How documents make rows; see `toast.data.language.named_texts`.
        block: Most tokens of a row.
        digest: What else the fingerprint covers: tokenizer and settings.
        rows: Rows, if they are not to be packed.
        remarks: What is unusual about the files, but does not stop a run.

    Raises:
        ValueError: If the loss would count no token.
    """

    def __init__(
        self,
        documents: Any,
        packing: Packing,
        block: int,
        digest: str,
        rows: Sequence[list[Piece]] | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        self.packing = packing
        self.remarks = tuple(remarks)
        self.block = block
        self._documents = documents
        self._digest = digest
        self._whole = rows is None
        self._rows = list(self._packed() if rows is None else rows)
        if not self._rows:
            raise ValueError(
                f"no token counts towards the loss: {len(documents)} documents, the longest of "
                f"{int(self._lengths.max(initial=0))} tokens, in rows of {block}. Answers may lie beyond the "
                "block, or there are none."
            )

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Returns a row: `input_ids`, `labels`, and `position_ids` where documents are packed."""
        tokens: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for piece in self._rows[index]:
            ids, counts = self._read(piece)
            tokens += ids
            labels += [token if each else IGNORED for token, each in zip(ids, counts, strict=True)]
            positions += range(piece.length)
            if self.packing != "blocks":
                labels[-piece.length] = IGNORED
        labels[0] = IGNORED
        row = {"input_ids": tokens, "labels": labels}
        return row | {"position_ids": positions} if self.packing == "documents" else row

    def subset(self, indices: Iterable[int]) -> LanguageData:
        """Returns chosen rows in the order of `indices`, with a fingerprint of their own."""
        chosen = [int(index) for index in indices]
        digest = hashlib.sha256(json.dumps([self.fingerprint, chosen]).encode()).hexdigest()
        rows = [self._rows[index] for index in chosen]
        return LanguageData(self._documents, self.packing, self.block, digest, rows, self.remarks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the documents' tokens, the tokenizer and the settings; of a subset, also of its rows."""
        digest = hashlib.sha256(json.dumps([self._digest, self.packing, self.block]).encode())
        if self._whole:
            for batch in self._documents.iter(batch_size=1000):
                for name in ("tokens", "counts"):
                    column = batch[name].combine_chunks()
                    digest.update(np.asarray(column.value_lengths()).tobytes())
                    digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()

    @cached_property
    def summary(self) -> Summary:
        """Sizes of the rows."""
        inside = {piece.document for row in self._rows for piece in row}
        uncut = self._lengths[sorted(inside)]
        tokens = sum(self.lengths)
        if self.packing == "blocks":  # all but each row's first token
            cut, loss_tokens = 0, tokens - len(self)
        else:
            cut = int((uncut > self.block).sum())
            loss_tokens = sum(self._counted(piece) for row in self._rows for piece in row)
        return Summary(
            documents=len(inside),
            tokens=tokens,
            loss_tokens=loss_tokens,
            longest=int(uncut.max()),
            cut=cut,
            left_out=len(self._documents) - len(inside) if self._whole else 0,
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [sum(piece.length for piece in row) for row in self._rows]

    @cached_property
    def _lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of every document."""
        return np.asarray(self._documents.data.column("length").to_numpy())

    @cached_property
    def _totals(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of every document, but its first, that the loss counts."""
        return np.asarray(self._documents.data.column("counted").to_numpy())

    def _packed(self) -> list[list[Piece]]:
        lengths = self._lengths.tolist()
        if self.packing == "blocks":
            return pack_blocks(lengths, self.block)
        whole = [Piece(number, 0, min(length, self.block)) for number, length in enumerate(lengths)]
        kept = [piece for piece in whole if self._counted(piece)]
        if self.packing == "none":
            return [[piece] for piece in kept]
        return pack_documents([piece.document for piece in kept], lengths, self.block)

    def _counted(self, piece: Piece) -> int:
        """Returns how many tokens of a document from its beginning the loss counts, but for the first."""
        total, length = int(self._totals[piece.document]), int(self._lengths[piece.document])
        if piece.length == length:
            return total
        if total == length - 1:
            return piece.length - 1
        return sum(self._read(piece)[1][1:])

    def _read(self, piece: Piece) -> tuple[list[int], list[bool]]:
        """Returns tokens of a piece, and which count, without reading the rest of its document."""
        table = self._documents[piece.document]
        tokens, counts = (
            table[name][0].values.slice(piece.start, piece.length).to_pylist()
            for name in ("tokens", "counts")
        )
        return tokens, counts
