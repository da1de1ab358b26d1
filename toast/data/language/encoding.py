"""From text to tokens, and which of them are predicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jinja2 import TemplateError

from toast.data.language.conversations import (
    CONVERSATION_FIELDS,
    Form,
    Message,
    conversation_of,
    instruction_of,
    text_of,
)
from toast.data.language.row_files import Row
from toast.data.language.turns import ChatTemplate, Segment, alpaca_messages, alpaca_segments
from toast.files.plain_text import read_text

T = TypeVar("T")


class Encoded(NamedTuple):
    """A document as tokens, and which of them the loss counts."""

    tokens: list[int]
    counts: list[bool]


class Encoder:
    """Turns rows of one form into tokens.

    Args:
        tokenizer: A tokenizer of transformers.
        form: Form of the rows.
        template: For "alpaca": None or "alpaca" for the official prompt, "chat" for the tokenizer's chat
            template. For conversations None or "chat". For all three also the path of a Jinja file.
        text_field: The field of a text.

    Raises:
        ValueError: If the tokenizer has no EOS or no chat template where one is needed, or the template is
            none of these.
    """

    def __init__(self, tokenizer: Any, form: Form, template: str | None, text_field: str) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no EOS, which ends every document; "
                "set tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self.form = form
        self.text_field = text_field
        self.chat = _chat_template(tokenizer, form, template)

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Turns rows into tokens: a text with EOS behind it, a conversation as its template writes it.

        Raises:
            ValueError: If a row is malformed; the message says where.
        """
        if self.form == "text":
            return encode_texts(self.tokenizer, [text_of(row, self.text_field) for row in rows])
        if self.chat is None:
            prompted = [alpaca_segments(*instruction_of(row)) for row in rows]
            return encode_segments(self.tokenizer, prompted, alone=True)
        if self.chat.marks_answers:
            return [Encoded(*self._of_turns(row, self.chat.marked)) for row in rows]
        written = [self._of_turns(row, self.chat.segments) for row in rows]
        return encode_segments(self.tokenizer, written, alone=False)

    def _of_turns(self, row: Row, write: Callable[[list[Message]], T]) -> T:
        """Applies the chat template to the turns of a row; where it fails, the message says of which."""
        if self.form == "alpaca":
            messages = alpaca_messages(*instruction_of(row))
        else:
            messages = conversation_of(row, CONVERSATION_FIELDS[self.form])
        try:
            return write(messages)
        except (ValueError, TemplateError) as error:
            raise ValueError(f"{row.place}: {error}") from error


def _chat_template(tokenizer: Any, form: Form, template: str | None) -> ChatTemplate | None:
    if form == "text":
        if template is not None:
            raise ValueError(
                f"template is for instructions and conversations; text takes none, got {template!r}."
            )
        return None
    if form == "alpaca" and template in (None, "alpaca"):
        return None
    if template in (None, "chat"):
        return ChatTemplate(tokenizer)
    path = Path(str(template))
    if not path.is_file():
        names = "'alpaca', 'chat'" if form == "alpaca" else "'chat'"
        raise ValueError(f"template must be {names} or the path of a Jinja file; got {template!r}.")
    return ChatTemplate(tokenizer, read_text(path))


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Turns texts into tokens: the tokenizer's own first ones, the text's, and EOS; all count."""
    encoded = []
    for tokens in tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]:
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            tokens = tokens[:-1]
        encoded.append(_ended(tokenizer, tokens, [True] * len(tokens)))
    return encoded


def encode_segments(tokenizer: Any, documents: Sequence[Sequence[Segment]], alone: bool) -> list[Encoded]:
    """Turns documents of several segments into tokens, each of which belongs to one segment.

    A document is encoded as a whole. Where a token would reach over the border of two segments, its segments
    are encoded one by one, as they are when a model is asked: first the prompt, and the answer behind it.

    Args:
        tokenizer: A tokenizer of transformers.
        documents: Segments of each document.
        alone: Whether the tokenizer's own first tokens go before each document and EOS behind it; a chat
            template writes them itself.
    """
    if not tokenizer.is_fast:  # it does not tell where its tokens lie
        return [_one_by_one(tokenizer, segments, alone) for segments in documents]
    batch = tokenizer(
        ["".join(segment.text for segment in segments) for segments in documents],
        add_special_tokens=alone,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    encoded = []
    for segments, tokens, offsets in zip(documents, batch["input_ids"], batch["offset_mapping"], strict=True):
        if alone and tokens and tokens[-1] == tokenizer.eos_token_id and offsets[-1] == (0, 0):
            tokens, offsets = tokens[:-1], offsets[:-1]
        borders = np.cumsum([len(segment.text) for segment in segments])
        ends = np.array([end for _, end in offsets], dtype=np.int64)
        if not np.isin(borders[:-1], [0, *ends]).all():
            encoded.append(_one_by_one(tokenizer, segments, alone))
            continue
        # A token reaches from the end of the one before it, for some tokenizers leave spaces out of offsets.
        within = np.searchsorted(borders, ends)
        counts = np.array([segment.counts for segment in segments])[within].tolist()
        encoded.append(_ended(tokenizer, tokens, counts) if alone else Encoded(tokens, counts))
    return encoded


def _one_by_one(tokenizer: Any, segments: Sequence[Segment], alone: bool) -> Encoded:
    tokens: list[int] = []
    counts: list[bool] = []
    for number, segment in enumerate(segments):
        first = alone and number == 0
        part: list[int] = tokenizer(segment.text, add_special_tokens=first, verbose=False)["input_ids"]
        if first and part and part[-1] == tokenizer.eos_token_id:
            part = part[:-1]
        tokens += part
        counts += [segment.counts] * len(part)
    return _ended(tokenizer, tokens, counts) if alone else Encoded(tokens, counts)


def _ended(tokenizer: Any, tokens: list[int], counts: list[bool]) -> Encoded:
    return Encoded([*tokens, tokenizer.eos_token_id], [*counts, True])


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a SHA-256 of what a tokenizer does: its vocabulary and rules, special tokens, chat template."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by the last call, whoever made it.
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    else:
        rules = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    known = [type(tokenizer).__name__, rules, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
