"""Which stretches of which documents make a row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Packing = Literal["blocks", "documents", "none"]


class Piece(NamedTuple):
    """Tokens `start` to `stop`, exclusive, of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


def pack_blocks(lengths: Sequence[int], block: int) -> list[list[Piece]]:
    """Joins documents and cuts every `block` tokens, as GPT was pre-trained.

    Attention crosses documents: a model sees the end of one before the beginning of the next. Nothing is lost
    but a last row of a single token, which has none to predict; the last row is shorter otherwise.

    Args:
        lengths: Tokens of each document, EOS included.
        block: Tokens of a row.
    """
    rows: list[list[Piece]] = []
    free = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if free == 0:
                rows.append([])
                free = block
            stop = min(length, start + free)
            rows[-1].append(Piece(document, start, stop))
            free -= stop - start
            start = stop
    if rows and block - free < 2:
        rows.pop()
    return rows


def pack_documents(documents: Sequence[int], lengths: Sequence[int], block: int) -> list[list[Piece]]:
    """Puts whole documents together into rows of at most `block` tokens, longest first, where they fit best.

    Best-fit decreasing bin packing. Rows, and documents within a row, keep the order of the source.

    Args:
        documents: Numbers of the documents.
        lengths: Tokens of every document, of which the first `block` are kept.
        block: Most tokens of a row.
    """
    rows: list[list[Piece]] = []
    room: dict[int, list[int]] = {}  # rows by the tokens that are free in them
    sizes: list[int] = []  # keys of `room` in order
    for document in sorted(documents, key=lambda each: -lengths[each]):
        piece = Piece(document, 0, min(lengths[document], block))
        at = bisect.bisect_left(sizes, piece.length)
        if at < len(sizes):
            free = sizes[at]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[at]
        else:
            free, row = block, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = free - piece.length
        if left not in room:
            bisect.insort(sizes, left)
        room.setdefault(left, []).append(row)
    return sorted(sorted(row) for row in rows)


def check_block(block: int, config: Any) -> None:
    """Checks that a model has positions for a row.

    Args:
        block: Tokens of a row.
        config: Configuration of a model of transformers.

    Raises:
        ValueError: If the row is longer. Models without a limit (ALiBi, such as Bloom) take any.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        positions = getattr(text, name, None)
        if isinstance(positions, int) and block > positions:
            raise ValueError(
                f"block must be at most the {positions} positions of the model ({name}); got {block}."
            )
