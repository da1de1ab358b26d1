"""Tokens as readable pieces of text: whole characters, and what cannot be seen gets a mark."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A character has at most four bytes, and a token holds at least one of them.
_BYTES_TO_COME = 3

_WHITE = {" ": "·", "\n": "↵", "\t": "⇥"}
# Characters that reorder the text around them.
_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
# Soft hyphen, zero-width space, word joiner, byte order mark. Joiners of emoji and scripts stay as they are.
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"


@dataclass(frozen=True)
class Cell:
    """One or more tokens that hold whole characters between them.

    Args:
        text: What they say.
        start: The first of them.
        stop: One past the last.
        special: Whether it is one of the tokenizer's special tokens, such as the end of the text.
    """

    text: str
    start: int
    stop: int
    special: bool = False


def join_tokens(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], special: frozenset[int] = frozenset()
) -> list[Cell]:
    """Joins tokens that hold parts of one character; the texts of all cells make the decoded text.

    A cell may end where no further token changes what was decoded before it. That holds for every
    tokenizer, and for generated tokens, which have no offsets in a text.

    Args:
        ids: Tokens, `(tokens,)`.
        decode: From tokens to text, special tokens included.
        special: Tokens that mean something to the model and are no text.
    """
    cells: list[Cell] = []
    context = start = 0  # some decoders treat the first token in a way of its own: decode from a cell before
    for stop in range(1, len(ids) + 1):
        decoded = decode(ids[context:stop])
        later = range(stop + 1, min(stop + _BYTES_TO_COME, len(ids)) + 1)
        if not all(decode(ids[context:end]).startswith(decoded) for end in later):
            continue
        text = decoded[len(decode(ids[context:start])) :]
        if not text and cells:  # the rest of a broken character, for which a sign stands already
            last = cells.pop()
            cells.append(Cell(last.text, last.start, stop, last.special))
        elif text or stop == len(ids):
            cells.append(Cell(text, start, stop, any(token in special for token in ids[start:stop])))
        else:
            continue
        context, start = cells[-1].start, stop
    return cells


def mark(character: str) -> str | None:
    """Returns what stands for a character that cannot be seen or would move others; None for all others.

    A space is "·", a line feed "↵", a tab "⇥", and whatever else its code point, such as "U+001B".
    """
    shown = _WHITE.get(character)
    if shown is not None:
        return shown
    hidden = (
        unicodedata.category(character) in ("Cc", "Zs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in _REORDERING
        or character in _INVISIBLE
    )
    return f"U+{ord(character):04X}" if hidden else None


def marked(text: str) -> str:
    """Returns a text with marks in the place of what cannot be seen; nothing in it controls a terminal."""
    return "".join(mark(character) or character for character in text)
