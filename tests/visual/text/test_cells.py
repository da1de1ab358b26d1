"""Tokens become whole characters, and what cannot be seen gets a mark."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from toast.visual.text.cells import Cell, join_tokens, mark, marked

SENTENCES = [
    "To make a good tomato soup, chop the onions and the tomatoes.",
    "Bake the bread for forty minutes; let it cool before you cut it.",
    "The soup is good with bread, and the bread is good with soup.",
]
HOSTILE = (
    "<script>alert(\"x\" + 'y')</script> &amp; &#60; </div>\n\n\t  "
    "\U0001f345\U0001f469\u200d\U0001f467 naïve 日本語 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c\u2066 "
    "\x1b[31mred\x1b[0m \x07\x00\r\x7f\x85 \u00a0\u2028\ufeff [bold]$\\frac$ \ufffd -->]]>"
)
START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def trained() -> str:
    """A byte-level BPE of 300 tokens, as JSON."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special: list[str | AddedToken] = [PAD, START, END]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return bpe.to_str()


def tiny_tokenizer(**options: Any) -> Any:
    """A byte-level BPE tokenizer with three special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained()), pad_token=PAD, eos_token=END, **options
    )


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def join(tokenizer: Any, ids: Sequence[int]) -> list[Cell]:
    special = frozenset(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(START)}
    cells = join_tokens(ids, lambda some: decode(tokenizer, some), special)
    assert [cell.start for cell in cells] == [0, *(cell.stop for cell in cells[:-1])][: len(cells)]
    assert not ids or cells[-1].stop == len(ids)
    return cells


@pytest.mark.parametrize("text", [*SENTENCES, HOSTILE, "", "a", "日本語", "\U0001f345\U0001f345"])
def test_cells_are_the_tokens_whose_offsets_overlap(text: str) -> None:
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(text, return_offsets_mapping=True)
    cells = join(tokenizer, encoded["input_ids"])
    assert "".join(cell.text for cell in cells) == text
    expected: list[list[int]] = []
    for start, stop in encoded["offset_mapping"]:
        if expected and start < expected[-1][1]:
            expected[-1][1] = max(stop, expected[-1][1])
        else:
            expected.append([start, stop])
    assert [cell.text for cell in cells] == [text[start:stop] for start, stop in expected]


def test_any_tokens_make_the_decoded_text() -> None:
    """Generated ones may be no text at all."""
    tokenizer, draw = tiny_tokenizer(), random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(300) for _ in range(draw.randrange(1, 12))]
        cells = join(tokenizer, ids)
        assert "".join(cell.text for cell in cells) == decode(tokenizer, ids)


def test_broken_characters_do_not_swallow_what_follows() -> None:
    tokenizer = tiny_tokenizer()
    broken = tokenizer("日")["input_ids"][:2] + tokenizer(" soup")["input_ids"]
    cells = join(tokenizer, broken)
    assert cells[0] == Cell("\ufffd", 0, 2)
    assert "".join(cell.text for cell in cells[1:]) == " soup"


def test_special_tokens_are_marked_and_stand_alone() -> None:
    tokenizer = tiny_tokenizer()
    cells = join(tokenizer, tokenizer(f"{START}the bread日{END}")["input_ids"])
    assert [cell.text for cell in cells if cell.special] == [START, END]
    assert cells[-2].text == "日"


def test_tokens_of_a_decoder_that_strips_the_first_space() -> None:
    """As Llama 2's: words begin with "▁", unknown characters are bytes."""
    words = ["▁the", "▁soup", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    llama = Tokenizer(
        models.BPE({word: i for i, word in enumerate(["<unk>", *words])}, [], byte_fallback=True)
    )
    llama.normalizer = normalizers.Prepend("▁")
    llama.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama)
    parts = [f"<0x{byte:02X}>" for byte in "€".encode()]
    ids = tokenizer.convert_tokens_to_ids(["▁", "▁the", "▁soup", "s", *parts, "▁the"])
    texts = [(cell.text, cell.start, cell.stop) for cell in join(tokenizer, ids)]
    assert texts == [(" the", 0, 2), (" soup", 2, 3), ("s", 3, 4), ("€", 4, 7), (" the", 7, 8)]


def test_marks_of_what_cannot_be_seen() -> None:
    assert marked("a b\n\tc") == "a·b↵⇥c"
    assert marked("\x1b[0m\r\u202e\u00a0\ufeff") == "U+001B[0mU+000DU+202EU+00A0U+FEFF"
    seen = "aé日\u05e9\U0001f469\u200d\U0001f467$<&\ufffd"
    assert all(mark(character) is None for character in seen)
    shown = marked("".join(map(chr, range(0x500))) + HOSTILE)
    assert not [character for character in shown if ord(character) < 32 or 127 <= ord(character) < 160]
