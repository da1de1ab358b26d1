"""Rows hold every token once, documents whole, and their loss is that of the documents alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import toast
from tests.data.language.wording import tokenizer, write_lines
from tests.models import VOCABULARY, awaken, decoder
from toast.data.language import collate, open_language
from toast.data.language.packing import pack_blocks, pack_documents


@pytest.mark.parametrize("block", [2, 5, 16])
def test_blocks_are_the_joined_documents_cut(block: int) -> None:
    lengths = [random.Random(seed).randint(0, 20) for seed in range(40)]
    joined = [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    rows = [
        [(piece.document, at) for piece in row for at in range(piece.start, piece.stop)]
        for row in pack_blocks(lengths, block)
    ]
    expected = [joined[start : start + block] for start in range(0, len(joined), block)]
    assert rows == [row for row in expected if len(row) > 1]


def test_no_blocks() -> None:
    assert pack_blocks([], 4) == []
    assert pack_blocks([1], 4) == []


def test_documents_are_packed_whole_tightly_and_in_order() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 40) for _ in range(500)]
    rows = pack_documents(range(0, 500, 2), lengths, 32)
    assert sorted(piece.document for row in rows for piece in row) == list(range(0, 500, 2))
    assert all(p.start == 0 and p.stop == min(32, lengths[p.document]) for row in rows for p in row)
    filled = [sum(piece.length for piece in row) for row in rows]
    assert max(filled) <= 32
    assert len(rows) == -(-sum(filled) // 32)  # no packing has fewer
    assert all(a.document < b.document for row in rows for a, b in itertools.pairwise(row))
    assert [row[0].document for row in rows] == sorted(row[0].document for row in rows)


def test_best_fit() -> None:
    rows = pack_documents(range(5), [3, 5, 4, 2, 2], 8)
    assert [[piece.document for piece in row] for row in rows] == [[0, 1], [2, 3, 4]]


def test_blocks_of_text(tmp_path: Path) -> None:
    words = tokenizer(bos=True)
    texts = ["Peel the carrots.", "Paris", "Chop one onion."]
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    joined = [token for text in texts for token in [*words(text)["input_ids"], words.eos_token_id]]
    data = open_language("text", words, path=file, block=8, packing="blocks")
    assert [token for i in range(len(data)) for token in data[i]["input_ids"]] == joined
    for i in range(len(data)):
        assert data[i]["labels"] == [-100, *data[i]["input_ids"][1:]]
        assert "position_ids" not in data[i]
    assert data.summary["documents"] == 3


def packed(tmp_path: Path, packing: str) -> list[dict[str, list[int]]]:
    """Texts of many lengths, with tokens folded into the vocabulary of the tiny models."""
    texts = [{"text": "a" * (3 * i % 7 + 1) + "b" * i} for i in range(1, 7)]
    file = write_lines(tmp_path / "texts.jsonl", texts)
    data = open_language("text", tokenizer(), path=file, block=24, packing=packing)
    rows = [data[i] for i in range(len(data))]
    for row in rows:
        row["input_ids"] = [token % (VOCABULARY - 1) + 1 for token in row["input_ids"]]
        row["labels"] = [-100 if t == -100 else t % (VOCABULARY - 1) + 1 for t in row["labels"]]
    return rows


CASES = [
    *itertools.product(("llama", "gpt2", "qwen2"), ("sdpa", "eager"), ("plain", "steered")),
    ("llama", "sdpa", "upper half"),
    ("llama", "sdpa", "lite"),
    ("mistral", "sdpa", "steered"),
]


@pytest.mark.parametrize(("kind", "attention", "manner"), CASES)
def test_the_loss_of_packed_documents_is_that_of_documents_alone(
    tmp_path: Path, kind: str, attention: str, manner: str
) -> None:
    model = decoder(kind)
    model.set_attn_implementation(attention)
    options = {"steered": {}, "upper half": {"steer_from": 1}, "lite": {"lora_rank": 2}}
    if manner != "plain":
        model = awaken(toast.wrap(model, **options[manner]))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(rows: list[dict[str, list[int]]]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        batch = collate(rows, 0)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total, torch.autograd.grad(total, trained, allow_unused=True)

    together, alone = packed(tmp_path, "documents"), packed(tmp_path, "none")
    assert len(together) < len(alone)
    packed_loss, packed_gradients = loss(together)
    losses, gradients = zip(*(loss([row]) for row in alone), strict=True)
    # The eager attention of transformers takes its softmax in single precision.
    exact = attention != "eager"
    torch.testing.assert_close(packed_loss, sum(losses), rtol=1e-12 if exact else 1e-7, atol=0)
    close = {"rtol": 1e-8, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 1e-5}
    assert any(gradient is not None for gradient in packed_gradients)
    for gradient, *parts in zip(packed_gradients, *gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, sum(parts), **close)


def test_the_loss_of_transformers_is_the_mean_of_the_same_terms(tmp_path: Path) -> None:
    model = decoder("llama")
    batches = [collate(packed(tmp_path, packing), 0) for packing in ("documents", "none")]
    one, other = (model(**batch, use_cache=False).loss for batch in batches)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
